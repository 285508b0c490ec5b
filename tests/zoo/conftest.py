"""What the tests of the command line share; without rl_zoo3 none of them is collected."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from entries import PLAIN, SMALL

from sb3_dreamer_gpld.replay.rows import Rows

collect_ignore_glob = [] if importlib.util.find_spec("rl_zoo3") else ["test_*.py"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a screen for pygame."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a small agent on Pendulum-v1."""
    from sb3_dreamer_gpld.zoo import main as zoo

    path = tmp_path_factory.mktemp("zoo")
    (path / "small.yml").write_text(yaml.safe_dump({"default": {**PLAIN, **SMALL}}))
    args = "--env Pendulum-v1 --device cpu --seed 1 --eval-freq 75 --eval-episodes 1 --save-freq 100 --verbose 0"
    files = ["-conf", str(path / "small.yml"), "-f", str(path / "logs")]
    assert zoo.main(["train", *args.split(), *files]) == 0
    return path


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the replay buffer takes memory."""

    def refuse(self: Rows) -> None:
        raise AssertionError("the replay buffer was allocated")

    monkeypatch.setattr(Rows, "_allocate", refuse)


@pytest.fixture(autouse=True)
def same_arguments() -> Iterator[None]:
    """The commands leave ``sys.argv`` as it was."""
    before = list(sys.argv)
    yield
    assert sys.argv == before
