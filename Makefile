PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dmc,zoo,extra,onnx,ray,docs,dev

# The test processes share the cores, so each keeps to one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# Of what hosting services read, against the schemas that it brings along.
CHECK := $(BIN)/check-jsonschema --quiet --default-filetype yaml --builtin-schema

# Meta-World needs an older MuJoCo than dm_control does, so it has an environment of its own.
METAWORLD := .venv-metaworld

.PHONY: install demo test test-long test-metaworld lint format evidence benchmark docs clean

install: $(VENV)/.installed

# A virtual environment that is there already is kept, unless its pip does not run.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV), which takes a few minutes the first time"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: install
	$(BIN)/python examples/demo.py

test: lint docs
	$(PYTEST)

test-long: install
	$(PYTEST) -m long

test-metaworld: $(METAWORLD)/.installed
	OMP_NUM_THREADS=1 $(METAWORLD)/bin/python -m pytest -q -m "long or not long" tests/test_metaworld.py

$(METAWORLD)/.installed: pyproject.toml constraints.txt Makefile
	@$(METAWORLD)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(METAWORLD)
	@grep -v '^mujoco==' constraints.txt > $(METAWORLD)/constraints.txt
	@$(METAWORLD)/bin/python -m pip install -qq --disable-pip-version-check -c $(METAWORLD)/constraints.txt \
		-e '.[metaworld,zoo,extra,dev]'
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CHECK) vendor.github-workflows .github/workflows/*.yml
	$(CHECK) vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(CHECK) vendor.readthedocs .readthedocs.yml
	$(CHECK) vendor.citation-file-format CITATION.cff

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site comes into build/docs; a warning is an error.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "the site is in build/docs/index.html"

# Tables and figure of docs/evidence.md, from the results that are there.
evidence: install
	$(BIN)/python -m benchmarks.evidence page

benchmark: install
	$(BIN)/python -m benchmarks.update_time --size 1m

# Leaves the virtual environment and the results of runs.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
