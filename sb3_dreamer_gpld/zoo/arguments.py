"""Arguments of the commands: what is read of rl_zoo3's options, what is taken out, and the hyperparameter file they name."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import yaml

from sb3_dreamer_gpld.checks import unknown_name
from sb3_dreamer_gpld.presets import CONFIGS
from sb3_dreamer_gpld.zoo.check import read_yaml

NAME = "dreamer_gpld"  # of the algorithm, for --algo
DEFAULT_ENV = "CartPole-v1"  # Inside rl_zoo3: what its scripts take without --env


def fail(message: str) -> NoReturn:
    """End with ``message`` on the standard error and exit status 1."""
    raise SystemExit(f"dreamer-gpld: {message}")


def parse(args: list[str], *names: str) -> argparse.Namespace:
    """Read some of rl_zoo3's options; the others are left to rl_zoo3. What is not given is None.

    :param args: the command's arguments
    :param names: further options to read, by their name in the result
    :return: the options, with ``env_given``: whether the environment was named
    """
    from rl_zoo3.utils import StoreDict

    # Inside rl_zoo3: the options of its scripts
    known: dict[str, tuple[list[str], dict[str, Any]]] = {
        "folder": (["-f", "--folder"], {}),
        "conf_file": (["-conf", "--conf-file"], {}),
        "hyperparams": (["-params", "--hyperparams"], dict(nargs="+", action=StoreDict)),
        "trained_agent": (["-i", "--trained-agent"], {}),
        "n_timesteps": (["-n", "--n-timesteps"], dict(type=int, default=-1)),
        "eval_freq": (["--eval-freq"], dict(type=int)),
        "env_kwargs": (["--env-kwargs"], dict(nargs="+", action=StoreDict)),
        "exp_id": (["--exp-id"], dict(type=int, default=0)),
        "load_best": (["--load-best"], dict(action="store_true")),
        "load_checkpoint": (["--load-checkpoint"], dict(type=int)),
        "load_last_checkpoint": (["--load-last-checkpoint"], dict(action="store_true")),
        "no_render": (["--no-render"], dict(action="store_true")),
        "organization": (["-orga", "--organization"], {}),
    }
    parser = argparse.ArgumentParser(prog="dreamer-gpld", add_help=False)
    parser.add_argument("--algo")
    parser.add_argument("--env")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    for name in names:
        flags, settings = known[name]
        parser.add_argument(*flags, dest=name, **settings)
    try:
        options = parser.parse_known_args(args)[0]
    except Exception as error:  # whatever the values do: rl_zoo3 evaluates them
        fail(f"{error}. -params and --env-kwargs take name:value, the value in Python: train_ratio:64 model_size:\"'1m'\"")
    options.env_given, options.env = options.env is not None, options.env or DEFAULT_ENV
    return options


def say_environment(options: argparse.Namespace) -> None:
    """Print which environment is taken if none was named.

    :param options: of :func:`parse`
    """
    if not options.env_given:
        print(f"--env was not given, so the environment is {options.env}")


def take(args: list[str], flag: str, **settings: Any) -> tuple[Any, list[str]]:
    """Take an option that rl_zoo3's script does not have out of the arguments.

    :return: its value, and the other arguments in their order
    """
    parser = argparse.ArgumentParser(prog="dreamer-gpld", add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value", **settings)
    found, rest = parser.parse_known_args(args)
    return found.value, rest


def asks_for_help(args: list[str]) -> bool:
    return "-h" in args or "--help" in args


@contextlib.contextmanager
def given_arguments(command: str, args: list[str]) -> Iterator[None]:
    """Let the scripts of rl_zoo3 find ``args`` where they look for them."""
    before = sys.argv
    sys.argv = [f"dreamer-gpld {command}", *args]
    try:
        yield
    finally:
        sys.argv = before


def find_config(given: str | None) -> str:
    """File of hyperparameters: as given, or one that comes with the package, by its name.

    :raises SystemExit: there is no such file
    """
    if given is None:
        return str(CONFIGS / f"{NAME}.yml")
    shipped = CONFIGS / Path(given).with_suffix(".yml").name
    if Path(given).is_file():
        return given
    if Path(given).parent in (Path(), Path("zoo_configs")) and Path(given).suffix in ("", ".yml") and shipped.is_file():
        return str(shipped)
    if not given.endswith((".yml", ".yaml", ".py")) and _is_module(given):
        return given  # which rl_zoo3 takes as well
    fail(unknown_name("the file", given, sorted(path.name for path in CONFIGS.glob("*.yml")), brief=True))


def _is_module(name: str) -> bool:
    """Whether there is a Python module of that name."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # its package is missing, or it is no name of a module
        return False


def choose_entry(file: str, env_id: str) -> tuple[str, dict[str, Any]]:
    """The entry of a YAML file that rl_zoo3 will use for an environment.

    :raises SystemExit: the file cannot be read, or has none
    """
    from rl_zoo3.exp_manager import ExperimentManager

    entries, problems = read_yaml(file)
    if problems:
        fail("\n".join(problems))
    # Inside rl_zoo3: which entry it takes
    is_atari = ExperimentManager.is_atari(env_id)
    name = next((name for name in (env_id, "atari" if is_atari else "default") if name in entries), None)
    if name is None:
        hint = ". For Atari games it can also be 'atari'" if is_atari else ""
        fail(unknown_name(f"{file}: the entry", env_id, entries, brief=True) + hint)
    if not isinstance(entries[name], dict):
        fail(f"{file}, {name}: an entry is a list of 'key: value' lines, not {entries[name]!r}")
    return name, dict(entries[name])


def find_environment(conf_file: str, env_id: str) -> tuple[Callable[[gym.Env], gym.Env] | None, dict[str, Any]]:
    """What a hyperparameter file says of the environment.

    :return: its wrappers and its arguments
    :raises SystemExit: the file is wrong, or has wrappers around the vectorised environment too
    """
    from rl_zoo3.utils import get_wrapper_class

    file = find_config(conf_file)
    if not file.endswith((".yml", ".yaml")):
        fail(f"-conf {conf_file}: diagnose reads YAML files only")
    name, entry = choose_entry(file, env_id)
    for key in ("frame_stack", "normalize", "vec_env_wrapper"):
        if entry.get(key):
            fail(f"{conf_file}, {name}: diagnose knows env_wrapper and env_kwargs only, not {key}")
    return get_wrapper_class(entry), entry.get("env_kwargs") or {}


def recorded_env_kwargs(folder: Path) -> dict[str, Any]:
    """Arguments of the environment that a run was trained in, of its hyperparameter file or of ``--env-kwargs``.

    :param folder: where rl_zoo3 recorded the hyperparameters and arguments of the run
    """
    for name in ("config.yml", "args.yml"):
        file = folder / name
        # Files of a run whose model is loaded as well
        recorded = yaml.load(file.read_text(), Loader=yaml.UnsafeLoader) if file.is_file() else None
        if recorded and recorded.get("env_kwargs"):
            return dict(recorded["env_kwargs"])
    return {}
