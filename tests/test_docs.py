"""The documentation: its code runs, its commands and hyperparameters exist, and its tables are those of the code.

Python blocks of a page run one after the other in one namespace, as written, but for what would take long: see ``small``. A
block after ``<!-- test: needs rendering -->`` is left out where there is no OpenGL.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import runpy
import shlex
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import pytest
import torch as th
import yaml
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor

from benchmarks.learning.run import LastValues
from sb3_dreamer_gpld import DreamerGPLD, preset
from sb3_dreamer_gpld.config import SIZES, ModelConfig
from sb3_dreamer_gpld.envs import ActionRepeat, register_dm_control
from sb3_dreamer_gpld.learner import mean
from sb3_dreamer_gpld.policies import DreamerPolicy
from sb3_dreamer_gpld.saving import MODULES
from sb3_dreamer_gpld.trained import TrainedAgent, find_agent

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "console", "yaml", "text", "bibtex"}
OTHER_PROGRAMS = {"cd", "export", "git", "hf", "tensorboard"}
# Programs that start others, and the last word before these
PREFIXES = {"torchrun": "2", "srun": "--"}
STEPS, EPISODE = 40, 20


class Block(NamedTuple):
    """A fenced block.

    :param page: the page's file name
    :param line: of the page, where the block's text starts
    :param language: what is written behind the fence
    :param text: what is inside
    :param rendering: whether it needs OpenGL
    """

    page: str
    line: int
    language: str
    text: str
    rendering: bool


def read_blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page; those of MyST's directives, as ``{toctree}``, are left out."""
    lines = page.read_text().splitlines()
    fence, start = "", 0
    for number, line in enumerate(lines):
        found = re.match(r"\s*(`{3,})(.*)$", line)
        if not fence and found:
            fence, language, start = found[1], found[2].strip(), number + 1
        elif fence and line.strip() == fence:
            text = textwrap.dedent("\n".join(lines[start:number])) + "\n"
            comment = lines[start - 2] if start > 1 else ""
            if not language.startswith("{"):
                yield Block(page.name, start, language, text, "test: needs rendering" in comment)
            fence = ""
    assert not fence, f"{page.name}: the block of line {start} has no end"


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def of(*languages: str) -> list[Any]:
    """The blocks of some languages, as parameters of a test."""
    return [pytest.param(block, id=f"{block.page}:{block.line}") for block in BLOCKS if block.language in languages]


def test_every_block_names_its_language() -> None:
    assert len(BLOCKS) > 20
    nameless = [f"{block.page}:{block.line} {block.language!r}" for block in BLOCKS if block.language not in LANGUAGES]
    assert not nameless, f"allowed: {sorted(LANGUAGES)}"


# ------------------------------------------------------------------------------------------------------------- Python


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[DreamerGPLD]:
    """Cut what a block costs, and nothing else: sizes of nets and batches, steps of ``learn``, length of episodes.

    :return: the models that were trained, filled while the block runs
    """
    trained: list[DreamerGPLD] = []
    setup, learn, make = DreamerGPLD._setup_model, DreamerGPLD.learn, gym.make

    def small_setup(self: DreamerGPLD) -> None:
        most = dict(batch_size=2, batch_length=4, train_ratio=4, learning_starts=16, imagination_horizon=3, buffer_size=1000)
        most["imagination_starts"] = 2
        for name, value in most.items():
            if getattr(self, name) is not None:
                setattr(self, name, min(getattr(self, name), value))
        setup(self)

    def small_learn(self: DreamerGPLD, total_timesteps: int, *args: Any, **kwargs: Any) -> DreamerGPLD:
        trained.append(self)
        return learn(self, min(total_timesteps, STEPS), *args, **kwargs)

    def small_make(id: Any, *args: Any, **kwargs: Any) -> gym.Env:
        return make(id, *args, **{"max_episode_steps": EPISODE, **kwargs})

    sizes, load = dict(SIZES), TrainedAgent.load

    def whole_load(self: TrainedAgent, *args: Any) -> DreamerPolicy:
        with pytest.MonkeyPatch.context() as whole:  # its file has the true sizes
            for size, values in sizes.items():
                whole.setitem(SIZES, size, values)
            return load(self, *args)

    monkeypatch.setattr(TrainedAgent, "load", whole_load)
    for size in SIZES:
        monkeypatch.setitem(SIZES, size, {**SIZES["debug"], "stoch": 32})
    monkeypatch.setattr(DreamerGPLD, "_setup_model", small_setup)
    monkeypatch.setattr(DreamerGPLD, "learn", small_learn)
    monkeypatch.setattr(gym, "make", small_make)
    return trained


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
@pytest.mark.filterwarnings("ignore:Your action space has dtype float64", "error:The replay buffer is empty")
def test_python_runs(page: str, small: list[DreamerGPLD], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in BLOCKS if block.page == page and block.language == "python"]
    if re.search("dm_control|make_dmc|shimmy", "".join(block.text for block in blocks)):
        pytest.importorskip("shimmy")
        pytest.importorskip("dm_control")
    if any("sb3_dreamer_gpld.zoo" in block.text for block in blocks):
        pytest.importorskip("rl_zoo3")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        if block.rendering and os.environ["MUJOCO_GL"] == "disabled":
            warnings.warn(f"{page}, line {block.line}: not run, since nothing can be rendered here", stacklevel=1)
            continue
        exec(compile("\n" * block.line + block.text, page, "exec"), namespace)
    assert all(model._n_updates > 0 for model in small), "a training of this page makes no update"


def test_a_loss_of_your_own_is_logged(small: list[DreamerGPLD], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The term that docs/extending.md adds is in what training minimises: overriding another method would change nothing."""
    block = next(block for block in BLOCKS if "class PriorEntropyLearner" in block.text)
    namespace: dict[str, Any] = {"DreamerGPLD": DreamerGPLD, "preset": preset}
    monkeypatch.chdir(tmp_path)
    exec(block.text, namespace)
    log = LastValues()
    namespace["model"].set_logger(Logger(None, [log]))
    namespace["model"].learn(STEPS, reset_num_timesteps=False, log_interval=1)
    assert log.values["loss/prior_entropy"] > 0
    model = namespace["model"]
    batch = model.policy.to_batch(model.replay_buffer.sample(2))
    with th.no_grad():
        loss = model.learner.loss(batch, model.learner.draw(*batch.rewards.shape), model._n_updates)
    parts = [float(term.weight * mean(term.value)) for term in loss.terms.values()]
    assert float(loss.total) == pytest.approx(sum(parts), rel=1e-4) and "prior_entropy" in loss.terms


# ----------------------------------------------------------------------------------------------------------- commands


class Parsed(Exception):
    """Ends a program when it has read its arguments, which are ``args[0]``."""


def read_commands(text: str) -> Iterator[list[str]]:
    """Commands of shell lines, without loops, comments, prompts and settings of variables."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$\w+", "1", line.removeprefix("$ ")), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words and words[0] not in ("for", "done"):
            yield words


def stop_at_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs end with :class:`Parsed` once they have read their arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise Parsed(parse(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


def check_zoo_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command line read its arguments, and look up the files and environments that they name."""
    pytest.importorskip("rl_zoo3")
    from sb3_dreamer_gpld.zoo import environments
    from sb3_dreamer_gpld.zoo import main as zoo
    from sb3_dreamer_gpld.zoo.arguments import CONFIGS
    from sb3_dreamer_gpld.zoo.sweep import ARMS

    stop_at_arguments(monkeypatch)
    monkeypatch.setattr(zoo, "_prepare_training", lambda args, evaluates: args)
    monkeypatch.setattr(zoo, "_prepare_agent", lambda args, rendering: ([*args, "--algo", zoo.NAME, "-f", "logs"], Path()))
    monkeypatch.setattr(environments, "has_display", lambda: True)
    with pytest.raises(Parsed) as parsed:
        zoo.main(words)
    for config in behind(words, "-conf"):
        assert (CONFIGS / config).is_file(), config
    for given in behind(words, "-params", "--hyperparams"):
        assert given.split(":")[0] in {*inspect.signature(DreamerGPLD).parameters, "n_envs", "n_timesteps", "normalize"}, given
    for agent in behind(words, "--trained"):
        find_agent(agent)
    for arm in behind(words, "--arms"):
        assert arm in ARMS, arm
    if getattr(parsed.value.args[0], "gym_packages", None):
        return
    with contextlib.suppress(ImportError):  # without Shimmy nothing can be said about dm_control's tasks
        register_dm_control()
    known = any(name.startswith("dm_control/") for name in gym.registry)
    metaworld = yaml.safe_load((CONFIGS / "dreamer_gpld_metaworld.yml").read_text())
    for env in behind(words, "--env", "--tasks"):
        assert env in gym.registry or env in metaworld or (env.startswith("dm_control/") and not known), env


def behind(words: list[str], *options: str) -> list[str]:
    """The words of a command that stand behind some options."""
    found, taken = [], False
    for word in words:
        taken = word in options if word.startswith("-") else taken
        found += [word] if taken and not word.startswith("-") else []
    return found


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """:raises AssertionError: the command does not exist, or does not take these arguments"""
    program, *args = words
    if program in PREFIXES:
        program, *args = [word for word in args[args.index(PREFIXES[program]) + 1 :] if word != "-m"]
        if program == "train.py":  # of the block before it
            return
    if program in ("dreamer-gpld", "sb3_dreamer_gpld.zoo"):
        check_zoo_command(args, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {arg for arg in args if "=" not in arg} <= set(targets)
    elif program == "pip":
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        extras = re.search(r"\[(.*)\]", " ".join(args))
        assert args[0] == "install" and extras and set(extras[1].split(",")) <= set(known)
    elif program == "python":
        module = args[0] == "-m"
        name = args[1].replace(".", "/") if module else args[0]
        path = ROOT / (f"{name}/__main__.py" if (ROOT / name).is_dir() else f"{name}.py" if module else name)
        if path.is_file():
            main = runpy.run_path(str(path), run_name="documented")["main"]
            stop_at_arguments(monkeypatch)
            monkeypatch.setattr(sys, "argv", [str(path), *args[1 + module :]])
            with pytest.raises(Parsed):
                main()
        else:
            assert module and importlib.util.find_spec(args[1]), args
    else:
        assert program in OTHER_PROGRAMS, f"{program} is not known here"


@pytest.mark.parametrize("block", of("bash", "console"))
def test_commands_exist(block: Block) -> None:
    text = block.text
    if block.language == "console":
        text = "\n".join(line for line in text.splitlines() if line.startswith("$ "))
    commands = list(read_commands(text))
    assert commands
    for words in commands:
        with pytest.MonkeyPatch.context() as monkeypatch:
            check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "make tset",
        'pip install ".[dcm]"',
        "python -m benchmarks.update_time --sizes 1m",
        "python examples/dmo.py",
        "dreamer-gpld trian",
        "dreamer-gpld train --evalfreq 3",
        "dreamer-gpld train --env dm_control/waker-walk-v0",
        "dreamer-gpld train --env metaworld/raech-v3",
        "dreamer-gpld train -conf dreamer_v4.yml",
        "dremer-gpld train",
        "dreamer-gpld train -params train_ration:128",
        "dreamer-gpld enjoy --trained walker-wlak",
        "dreamer-gpld sweep --tasks dm_control/waker-walk-v0 --arms gpld",
        "dreamer-gpld sweep --tasks dm_control/walker-walk-v0 --arms gpdl",
        "python -m benchmarks.evidence rnu",
    ],
)
def test_wrong_commands_are_found(line: str) -> None:
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises((AssertionError, SystemExit, ValueError)):
        for words in read_commands(line):
            check_command(words, monkeypatch)


def test_way_of_a_batch_names_functions_that_exist() -> None:
    """Each with the file that it stands in, in docs/extending.md."""
    way = (ROOT / "docs" / "extending.md").read_text().split("## A batch's way through an update")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. `(\w+)\.(\w+)` \(`([\w/.]+)`\)", way, re.MULTILINE)
    assert len(steps) == len(re.findall(r"^\d+\. ", way, re.MULTILINE)) >= 10
    modules = {owner: file.removesuffix(".py").replace("/", ".") for owner, _, file in steps}
    named = {(owner, name) for owner, name, _ in steps} | set(re.findall(r"`(\w+)\.(\w+)`", way)) - {("DreamerGPLD", "train")}
    for owner, name in sorted(pair for pair in named if pair[1] != "py"):
        module = importlib.import_module(f"sb3_dreamer_gpld.{modules[owner]}")
        assert callable(getattr(getattr(module, owner), name)), f"{owner}.{name}"


# --------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("block", of("yaml"))
def test_hyperparameters_are_valid(block: Block) -> None:
    pytest.importorskip("rl_zoo3")
    from sb3_dreamer_gpld.zoo.arguments import CONFIGS
    from sb3_dreamer_gpld.zoo.check import check_entry

    copied = (CONFIGS / "dreamer_gpld_cpu.yml").read_text() if "*default" in block.text else ""
    entries = yaml.safe_load(copied + block.text)
    if not all(isinstance(entry, dict) and "policy" in entry for entry in entries.values()):
        entries = {"part": {"n_timesteps": 1, "policy": "MultiInputPolicy", **entries}}
    for name, entry in entries.items():
        assert check_entry(entry) == [], name


def test_what_check_prints_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rl_zoo3")
    from sb3_dreamer_gpld.zoo import main as zoo

    block = next(block for block in BLOCKS if block.language == "console" and "dreamer-gpld check" in block.text)
    command, *shown = block.text.splitlines()
    monkeypatch.chdir(tmp_path)
    Path("mine.yml").write_text(
        "Pendulum-v1: {n_timesteps: 100, policy: MlpPolicy, batchsize: 16, posterior_penalty: 5e-2}", encoding="utf-8"
    )
    assert zoo.main(shlex.split(command)[2:]) == 1
    assert capsys.readouterr().out.splitlines() == shown


# ------------------------------------------------------------------------------------------------------------- tables


def read_table(page: str, title: str) -> list[list[str]]:
    """Cells of all tables under a heading, without their heads.

    :param page: file name
    :param title: the heading, with its number signs
    """
    text = f"\n{(ROOT / 'docs' / page).read_text()}".split(f"\n{title}\n")[1]
    text = re.split(rf"\n#{{1,{title.count('#')}}} ", text)[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")]
    heads = [number - 1 for number, row in enumerate(rows) if set(row[0]) <= set("- ")]
    return [row for number, row in enumerate(rows) if number not in heads and number - 1 not in heads]


def code(cell: str) -> str:
    """What stands in a cell as code, "" if nothing does."""
    return cell.strip("`")


def test_every_argument_of_the_constructor_is_described() -> None:
    signature = dict(inspect.signature(DreamerGPLD).parameters)
    rows = read_table("parameters.md", "## DreamerGPLD")
    assert [code(row[0]) for row in rows] == list(signature)
    for name, default, meaning, source in rows:
        given = signature[code(name)].default
        assert (default == "") == (given is inspect.Parameter.empty), name
        assert default == "" or (type(eval(code(default))), eval(code(default))) == (type(given), given), name
        assert meaning and source, name


def test_what_the_presets_change_is_described() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(DreamerGPLD).parameters.items()}
    values = [defaults, {**defaults, **preset("cpu")}, {**defaults, **preset("paper")}]
    rows = {code(row[0]): [eval(code(cell)) for cell in row[1:]] for row in read_table("parameters.md", "## Presets")}
    assert rows == {
        name: [named[name] for named in values] for name in defaults if any(named[name] != defaults[name] for named in values)
    }


def test_every_size_and_constant_is_described() -> None:
    rows = read_table("parameters.md", "## policy_kwargs")
    assert {code(row[0]): eval(code(row[1])) for row in rows} == {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    names = ("deter", "hidden", "classes", "units", "depth")
    sizes = {
        code(row[0]): dict(zip(names, map(int, row[1:]), strict=True)) for row in read_table("parameters.md", "## model_size")
    }
    assert sizes == {name: size for name, size in SIZES.items() if name != "debug"}


def test_every_module_that_can_be_loaded_alone_is_named() -> None:
    text = (ROOT / "docs" / "saving.md").read_text().split("The names are")[1].split(".")[0]
    assert re.findall(r"`(\w+)`", text) == list(MODULES)


def test_everything_in_the_log_is_described(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def make(**kwargs: Any) -> DreamerGPLD:
        return DreamerGPLD(
            "MlpPolicy",
            ActionRepeat(gym.make("CartPole-v1"), 2),
            model_size="debug",
            batch_size=2,
            batch_length=4,
            train_ratio=4,
            learning_starts=16,
            imagination_horizon=3,
            prior_penalty=0.1,
            policy_penalty=0.1,
            actor_learning_rate=1e-5,
            tensorboard_log=str(tmp_path),
            device="cpu",
            seed=0,
            **kwargs,
        )

    model = make()
    evaluation = EvalCallback(Monitor(gym.make("CartPole-v1")), n_eval_episodes=1, eval_freq=50)
    model.learn(60, callback=evaluation, log_interval=1)
    events = accumulator.EventAccumulator(str(tmp_path / "DreamerGPLD_1"))
    events.Reload()
    described = {name for row in read_table("logging.md", "# Watching a run") for name in re.findall(r"\w+/\w+", row[0])}
    make(policy_kwargs=dict(reconstruction="redundancy")).learn(60, log_interval=1)
    without_decoder = accumulator.EventAccumulator(str(tmp_path / "DreamerGPLD_2"))
    without_decoder.Reload()
    names, others = set(events.Tags()["scalars"]), set(without_decoder.Tags()["scalars"])
    assert "loss/redundancy" in others and "loss/reconstruction" not in others
    assert names | others | {"train/n_updates"} == described  # which TensorBoard does not get

    frames = events.Scalars("time/frames")[-1]
    assert frames.step < frames.value <= 2 * frames.step
    assert 0 < events.Scalars("time/update_share")[-1].value < 1
    assert events.Scalars("gpld/posterior_lambda")[-1].value == pytest.approx(0.5, rel=0.1)


def test_frames_are_logged_only_where_actions_are_repeated(tmp_path: Path) -> None:
    options = dict(model_size="debug", device="cpu", seed=0)
    model = DreamerGPLD("MlpPolicy", "CartPole-v1", **options)
    repeated = DreamerGPLD("MlpPolicy", ActionRepeat(gym.make("CartPole-v1"), 2), **options)
    logs = [LastValues(), LastValues()]
    for trained, log in zip((model, repeated), logs, strict=True):
        trained.set_logger(Logger(None, [log]))
        trained.learn(30, log_interval=1)
    assert model.num_frames == model.num_timesteps == 30
    assert ["time/frames" in log.values for log in logs] == [False, True] and all("time/fps" in log.values for log in logs)
    first = repeated.num_frames
    assert 30 < first <= 60
    repeated.learn(30, reset_num_timesteps=False)
    assert 60 < repeated.num_frames <= 120 and repeated.num_frames > first
    repeated.save(tmp_path / "model")
    assert DreamerGPLD.load(tmp_path / "model").num_frames == repeated.num_frames
    assert repeated.learn(30).num_frames <= 60


# -------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
