"""Looks for mistakes in hyperparameter files of rl_zoo3: a wrong key, value or type, found without training."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dreamer_gpld.checks import check_int, check_range, unknown_name
from sb3_dreamer_gpld.config import SIZES
from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.envs import suite_of
from sb3_dreamer_gpld.policies import CnnPolicy, DreamerPolicy, MultiInputPolicy

_PIXELS = "sb3_dreamer_gpld.envs.PixelObservation"

# Inside rl_zoo3: constructor arguments that it gives itself, and what sets them
_SET_ELSEWHERE = {
    "env": "--env on the command line",
    "seed": "--seed on the command line",
    "device": "--device on the command line",
    "verbose": "--verbose on the command line",
    "tensorboard_log": "--tensorboard-log on the command line",
    "action_noise": "noise_type and noise_std",
}
_NO_ENV: dict[str, Any] = {"policy": "MlpPolicy", "env": None}


def read_yaml(file: str) -> tuple[dict[str, Any], list[str]]:
    """
    :param file: a file of hyperparameters
    :return: its entries by environment, and what is wrong with the file as a whole
    """
    import yaml

    try:
        entries = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        return {}, [f"{file}: {error.strerror}"]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return {}, [f"{file} is not YAML: {error}"]
    if not isinstance(entries, dict) or not entries:
        return {}, [f"{file}: the file must have an entry for each environment, 'Pendulum-v1:' and its keys below"]
    return entries, []


def check_file(file: str) -> list[str]:
    """Check every entry of a file.

    :param file: a file of hyperparameters
    :return: what is wrong, each with the file, the entry and the key
    """
    entries, problems = read_yaml(file)
    found: dict[str, list[str]] = {}  # entries are often copies of each other
    for name, entry in entries.items():
        wrong = list(_check_environment(name))
        if not isinstance(entry, dict):
            wrong.append(f"an entry is a list of 'key: value' lines, not {entry!r}")
        else:
            if repr(entry) not in found:
                found[repr(entry)] = check_entry(entry)
            wrong += found[repr(entry)]
        problems += [f"{file}, {name}: {problem}" for problem in wrong]
    return problems


def _check_environment(name: object) -> Iterable[str]:
    """Only a suite's tasks are all known: other environments may come from packages that are not imported here."""
    suite = suite_of(name)
    tasks = suite.tasks() if suite is not None else []
    if tasks and name not in tasks:
        yield unknown_name("the environment", name, tasks, brief=True)


def check_entry(entry: dict[str, Any]) -> list[str]:
    """Check what an entry of a hyperparameter file says, by building the agent without memory for its parameters.

    :param entry: keys and values, as rl_zoo3 reads them
    :return: what is wrong, each with the key
    """
    problems: list[str] = []
    arguments: dict[str, Any] = {}
    for key, value in entry.items():
        try:
            _check_key(key, value)
            if key not in _ZOO_KEYS:
                arguments[key] = _evaluated(key, value)
        except Exception as problem:  # whatever the value did: it came from the file
            problems.append(f"{key}: {problem}{_number_hint(value)}")
    problems += [f"{key}: this key is missing" for key in ("n_timesteps", "policy") if key not in entry]
    if ("noise_type" in entry) != ("noise_std" in entry):
        problems.append("noise_type: noise_type and noise_std need each other")
    if entry.get("normalize") and entry.get("frame_stack"):
        problems.append(
            "normalize: rl_zoo3 stacks frames around VecNormalize, which must be the outermost wrapper here; allowed: one of "
            "the two, or policy_kwargs normalize_vectors in place of normalize"
        )
    if entry.get("n_envs", 1) != 1 and "episode" in str(entry.get("train_freq")):
        problems.append(f"train_freq: episodes cannot be counted in n_envs={entry['n_envs']} environments; allowed: steps")
    pixels = _PIXELS in str(entry.get("env_wrapper"))
    error = _build_error(arguments, pixels)
    if error is not None:
        problems += _faults(arguments, pixels) or [f"{', '.join(arguments)} together: {error}"]
    return problems


def _check_key(key: str, value: Any) -> None:
    """:raises ValueError, TypeError: the key does not exist, or the value is wrong in itself"""
    parameters = inspect.signature(DreamerGPLD).parameters
    if key in _SET_ELSEWHERE:
        raise ValueError(f"this is set by {_SET_ELSEWHERE[key]}, not here")
    if key not in _ZOO_KEYS and (key not in parameters or key.startswith("_")):
        allowed = [name for name in parameters if name not in _SET_ELSEWHERE and not name.startswith("_")]
        raise TypeError(unknown_name("the key", key, [*allowed, *_ZOO_KEYS], brief=True))
    if key in _CHECKS:
        _CHECKS[key](value)
    elif isinstance(parameters[key].default, bool) and not isinstance(value, bool):
        raise TypeError(f"{key} must be true or false, not {value!r}")


_JUDGED_TOGETHER = ("posterior_penalty", "prior_penalty", "penalty_min", "penalty_schedule")


def _faults(arguments: dict[str, Any], pixels: bool) -> list[str]:
    """Try the arguments one by one, to say which of them are wrong."""
    basis: dict[str, Any] = {key: arguments[key] for key in ("policy", "model_size") if key in arguments}
    together = {key: arguments[key] for key in _JUDGED_TOGETHER if key in arguments}
    faults = []
    for key, value in arguments.items():
        parts = {key: value}
        if key == "policy_kwargs":  # deter and blocks must fit each other, so alone they may seem wrong
            parts = {f"{key}, {name}": {name: part} for name, part in value.items() if name not in ("deter", "blocks")}
        for name, part in parts.items():
            error = _build_error({**basis, key: part}, pixels)
            if error is not None and key in together:
                error = _build_error({**basis, **together}, pixels)
            if error is not None:
                text = next(iter(part.values())) if key == "policy_kwargs" else part
                faults.append(f"{name}: {error}{_number_hint(text)}")
    return faults


def _number_hint(value: Any) -> str:
    """YAML 1.1 takes a number for a text if its exponent comes without a point or a sign."""
    if not isinstance(value, str) or not re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", value):
        return ""
    mantissa, exponent = f"{float(value):e}".split("e")
    return f". YAML reads {value} as text: write {float(mantissa)}e{exponent}"


def _evaluated(key: str, value: Any) -> Any:
    """The value of a constructor argument as rl_zoo3 passes it on: it evaluates some texts as Python."""
    if key in ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs") and isinstance(value, str):
        return _evaluate(value)
    if key == "learning_rate":
        return _learning_rate(value)
    if key == "train_freq" and isinstance(value, list):
        return tuple(value)
    if key == "policy" and "." in str(value):
        return _find_class(value)
    return value


def _evaluate(text: str) -> Any:
    from rl_zoo3 import exp_manager

    try:
        return eval(text, dict(vars(exp_manager)))  # Inside rl_zoo3: evaluated there, where th and nn are known
    except Exception as error:  # whatever the text does: it came from the file
        raise ValueError(f"{text!r} is not a Python expression that can be evaluated: {error}") from error


def _build_error(arguments: dict[str, Any], pixels: bool) -> Exception | None:
    """Build an agent on PyTorch's "meta" device, where tensors have shapes but no memory.

    :param arguments: constructor arguments
    :param pixels: whether the environment shows pictures
    :return: what went wrong
    """
    try:
        # Without an environment, as in load()
        model = DreamerGPLD(**{**_NO_ENV, **arguments}, device="meta", _init_setup_model=False)
        model.observation_space, model.action_space, model.n_envs = _space(arguments, pixels), spaces.Box(-1, 1, (2,)), 1
        with th.device("meta"):
            model._setup_model()
    except Exception as error:  # whatever the values did: they came from the file
        return error
    return None


def _space(arguments: dict[str, Any], pixels: bool) -> spaces.Space:
    """An observation space that suits the policy."""
    given = arguments.get("policy", DreamerPolicy)
    policy = DreamerGPLD.policy_aliases.get(given, given)
    space: spaces.Space = spaces.Box(-1, 1, (3,))
    if pixels or issubclass(policy, CnnPolicy):
        unscaled = dict(arguments.get("policy_kwargs") or {}).get("normalize_images") is False
        space = spaces.Box(0, 1, (3, 64, 64)) if unscaled else spaces.Box(0, 255, (3, 64, 64), np.uint8)
    return spaces.Dict(observation=space) if pixels or issubclass(policy, MultiInputPolicy) else space


# ------------------------------------------------------------------------------------------- checks of single values


def _find_class(path: Any, functions: bool = False) -> Any:
    """The class that is named with its module.

    :param functions: that return an object are allowed, too, as rl_zoo3 allows them
    :raises ValueError: there is no such class
    """
    module_name, _, name = str(path).rpartition(".")
    if not module_name:
        raise ValueError(f"{path!r} must be a class with its module, such as 'sb3_dreamer_gpld.envs.ActionRepeat'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{path!r}: {error}") from error
    found = getattr(module, name, None)
    if not (callable(found) if functions else isinstance(found, type)):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(unknown_name(f"in {module_name}, the class", name, classes, brief=True))
    return found


def _check_names(names: Iterable[str], function: Callable[..., Any], given_already: int) -> None:
    """Check the names of the arguments of a function.

    :raises TypeError: it has no such argument
    """
    parameters = list(inspect.signature(function).parameters.values())[given_already:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    for name in names:
        if name not in [parameter.name for parameter in parameters]:
            raise TypeError(
                unknown_name(f"the argument of {function.__name__}", name, [p.name for p in parameters], brief=True)
            )


def _check_classes(given_already: int) -> Callable[[Any], object]:
    """Check of wrappers and callbacks: a class, one with arguments, or a list of these."""

    def check(value: Any) -> None:
        arguments: Any
        for item in value if isinstance(value, list) else [value]:
            if item is None and not isinstance(value, list):
                continue
            name, arguments = item, {}
            if isinstance(item, dict):
                if len(item) != 1:
                    raise ValueError(f"{item!r} must be one class with its arguments below it, indented further")
                name, arguments = next(iter(item.items()))
            if not isinstance(arguments, dict):
                raise TypeError(f"the arguments of {name} must be 'name: value' lines, not {arguments!r}")
            _check_names(arguments, _find_class(name, functions=True), given_already)

    return check


def _check_dict_for(function: Callable[..., Any], given_already: int = 1) -> Callable[[Any], object]:
    """Check of arguments for a function, as a dict or a text that gives one."""

    def check(value: Any) -> None:
        arguments = _evaluate(value) if isinstance(value, str) else value
        if not isinstance(arguments, dict):
            raise TypeError(f"it must be 'name: value' lines or 'dict(name=value)', not {value!r}")
        _check_names(arguments, function, given_already)

    return check


def _check_steps(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
        raise ValueError(f"n_timesteps must be a number of at least 1, not {value!r}")


def _check_count(name: str) -> Callable[[Any], object]:
    return lambda value: check_int(name, value, 1)


def _check_normalize(value: Any) -> None:
    if not isinstance(value, bool):
        _check_dict_for(VecNormalize)(value)


def _check_env_kwargs(value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"env_kwargs must be 'name: value' lines, not {value!r}")


def _check_noise_type(value: Any) -> None:
    if not isinstance(value, str) or not any(name in value for name in ("normal", "ornstein-uhlenbeck")):
        raise ValueError(f"noise_type must be 'normal' or 'ornstein-uhlenbeck', not {value!r}")


def _check_policy(value: Any) -> None:
    if "." in str(value):
        if not issubclass(_find_class(value), DreamerPolicy):
            raise TypeError(f"{value} is not a policy of DreamerGPLD: it must derive from DreamerPolicy")
    elif value not in DreamerGPLD.policy_aliases:
        raise ValueError(unknown_name("the policy", value, DreamerGPLD.policy_aliases, brief=True))


def _learning_rate(value: Any) -> float:
    """Its first value. Other texts are refused: rl_zoo3 makes a linear decay of all that have an underscore."""
    number = value
    if isinstance(value, str) and value.startswith("lin_"):
        with contextlib.suppress(ValueError):
            number = float(value.removeprefix("lin_"))
    try:
        check_range("learning_rate", number, 0.0, float("inf"), low_open=True)
    except ValueError:
        raise ValueError(f"it must be a number above 0, or 'lin_' and one for a linear decay to 0, not {value!r}") from None
    return number


def _check_train_freq(value: Any) -> None:
    steps, unit = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, "step")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1 or unit not in ("step", "episode"):
        raise ValueError(f"train_freq must be a number of steps, or a list such as [1, episode], not {value!r}")


def _check_model_size(value: Any) -> None:
    if value is not None and value not in SIZES:
        raise ValueError(unknown_name("the model size", value, SIZES, brief=True))


def _check_policy_kwargs(value: Any) -> None:
    if not isinstance(_evaluated("policy_kwargs", value), dict):
        raise TypeError(f"policy_kwargs must be 'name: value' lines or 'dict(name=value)', not {value!r}")


# Inside rl_zoo3: keys that it takes out before it makes the agent
_ZOO_KEYS: dict[str, Callable[[Any], object]] = {
    "n_timesteps": _check_steps,
    "n_envs": _check_count("n_envs"),
    "frame_stack": _check_count("frame_stack"),
    "normalize": _check_normalize,
    "env_wrapper": _check_classes(1),
    "vec_env_wrapper": _check_classes(1),
    "callback": _check_classes(0),
    "env_kwargs": _check_env_kwargs,
    "monitor_kwargs": _check_dict_for(Monitor),
    "noise_type": _check_noise_type,
    "noise_std": lambda value: check_range("noise_std", value, 0.0, float("inf")),
}

_CHECKS: dict[str, Callable[[Any], object]] = {
    **_ZOO_KEYS,
    "policy": _check_policy,
    "policy_kwargs": _check_policy_kwargs,
    "model_size": _check_model_size,
    "train_freq": _check_train_freq,
    "stats_window_size": _check_count("stats_window_size"),
}
