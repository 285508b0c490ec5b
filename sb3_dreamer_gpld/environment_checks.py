"""What is wrong with what environments give, and which one of them it was."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_dreamer_gpld.config import ObservationSpec
from sb3_dreamer_gpld.observations import ONLY_KEY, by_key, called, normalized_keys, spaces_by_key


def lost_processes(env: VecEnv) -> str:
    """Tell which processes of a SubprocVecEnv have ended; SB3 itself only raises an EOFError or a BrokenPipeError.

    :param env: a vectorised environment, wrapped or not
    :return: "the process of environment 1 ended ...", or "" if none has, or there are no processes
    """
    unwrapped = env.unwrapped
    if not isinstance(unwrapped, SubprocVecEnv):
        return ""
    # The pipe breaks a moment before the process is gone.
    connection.wait([process.sentinel for process in unwrapped.processes], timeout=5.0)
    ended = []
    for number, process in enumerate(unwrapped.processes):
        if process.exitcode is not None:
            how = (
                f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else f"ended with code {process.exitcode}"
            )
            ended.append(f"the process of environment {number} {how}")
    return f"{' and '.join(ended)}; an error of its own is printed above" if ended else ""


def end_processes(env: VecEnv) -> None:
    """End what is left of a SubprocVecEnv of which a process has ended, whose ``close`` would wait for an answer for good.

    :param env: of which :func:`lost_processes` has found one; closing it does nothing afterwards
    """
    unwrapped = env.unwrapped
    assert isinstance(unwrapped, SubprocVecEnv)
    for process in unwrapped.processes:
        process.terminate()  # a closed connection alone would make each of the others print an error
    for process in unwrapped.processes:
        process.join(1.0)
        process.kill()  # if it hangs
        process.join()
    for remote in unwrapped.remotes:
        remote.close()
    unwrapped.waiting, unwrapped.closed = False, True


def blamed_environment(error: BaseException, env: VecEnv) -> str:
    """Tell which environment an error came from; SB3 keeps that to the local variables of its loops.

    :param error: an error that was raised inside ``env``
    :param env: a vectorised environment, wrapped or not
    :return: "environment 1", with the shape of its observation if that is what is wrong, or "" if nothing tells
    """
    unwrapped = env.unwrapped
    for frame, _ in traceback.walk_tb(error.__traceback__):
        names = frame.f_locals
        if names.get("self") is unwrapped and "env_idx" in names:
            return f"environment {names['env_idx']}"
        if isinstance(unwrapped, SubprocVecEnv) and {"obs_list", "space"} <= names.keys():
            for number, observation in enumerate(names["obs_list"]):
                wrong = _wrong_shape(observation, names["space"])
                if wrong:
                    return f"environment {number}, {wrong}"
    return ""


def _wrong_shape(observation: Any, space: spaces.Space[Any]) -> str:
    """What shape is wrong in an observation, or ""."""
    values = observation if isinstance(space, spaces.Dict) else {ONLY_KEY: observation}
    for key, part in spaces_by_key(space).items():
        if key in values and np.shape(values[key]) != part.shape:
            return f"{called('observation', key)}: expected shape {part.shape}, received {np.shape(values[key])}"
    return ""


@contextmanager
def naming_environments(algorithm: BaseAlgorithm) -> Iterator[None]:
    """Errors of an algorithm's environments say which one it was: as a note, from Python 3.11 on.

    :raises RuntimeError: in place of a broken connection to an environment whose process ended; names it. The other processes
        are ended, too
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:
        lost = "" if algorithm.env is None else lost_processes(algorithm.env)
        if not lost or algorithm.env is None:
            raise
        end_processes(algorithm.env)
        raise RuntimeError(f"At step {algorithm.num_timesteps} {lost}") from error
    except Exception as error:
        blamed = "" if algorithm.env is None else blamed_environment(error, algorithm.env)
        if blamed and hasattr(error, "add_note"):
            error.add_note(f"It was raised at step {algorithm.num_timesteps} by {blamed}")
        raise


def whereabouts(env: VecEnv) -> bytes | None:
    """Where environments are, to tell whether somebody else has moved them, as an evaluation does.

    :param env: a vectorised environment, wrapped or not
    :return: a digest of the last observations of a DummyVecEnv, and of the steps that Monitors have counted, if all have one;
        None: neither is there
    """
    unwrapped, parts = env.unwrapped, []
    if isinstance(unwrapped, DummyVecEnv):
        parts += [values.tobytes() for values in unwrapped.buf_obs.values()]
    elif not isinstance(unwrapped, SubprocVecEnv) or unwrapped.closed:
        return None
    if all(unwrapped.env_is_wrapped(Monitor)):
        parts.append(repr(unwrapped.env_method("get_total_steps")).encode())
    return b"".join(parts) if parts else None


def check_finite(
    step: int,
    observation: np.ndarray | dict[str, np.ndarray],
    reward: np.ndarray | None = None,
    infos: list[dict[str, Any]] | None = None,
) -> None:
    """Refuse what no net can learn from.

    :param step: of the agent
    :param observation: of E environments, (E, *shape), or by key
    :param reward: (E,)
    :param infos: of each environment; they may have an episode's last observation
    :raises ValueError: NaN, infinity, or what becomes infinite in float32; names the key, the environment's index and the step
    """

    def check(name: str, values: np.ndarray, first_env: int = 0) -> None:
        values = np.asarray(values)
        if not np.issubdtype(values.dtype, np.floating):
            return
        with np.errstate(over="ignore"):
            finite = np.isfinite(values.astype(np.float32)).reshape(len(values), -1).all(1)  # as it is stored
        if not finite.all():
            env = first_env + int(np.flatnonzero(~finite)[0])
            raise ValueError(
                f"{name} of environment {env} is not finite at step {step}: {values[env - first_env]}. "
                "Allowed: finite numbers of float32. Nothing of this step was stored"
            )

    for key, values in by_key(observation).items():
        check(called("observation", key), values)
    if reward is not None:
        check("the reward", reward)
    for env, info in enumerate(infos or ()):
        terminal = info.get("terminal_observation")
        if terminal is not None:
            for key, value in by_key(terminal).items():
                check(called("terminal observation", key), np.asarray(value)[None], env)


def check_normalized_images(normalize: VecNormalize | None, spec: ObservationSpec, space: spaces.Space[Any]) -> None:
    """Images are scaled by the bounds of their space, which VecNormalize changes for those of uint8 in [0, 255] only.

    :param normalize: among the wrappers, if there is one
    :param spec: which observations are images
    :param space: of the observations that the algorithm sees
    :raises ValueError: it normalises an image whose space has the bounds of before
    """
    keys = normalized_keys(normalize)
    for image in spec.images:
        bounds = spaces_by_key(space)[image.name]
        assert isinstance(bounds, spaces.Box)
        if normalize is not None and image.name in keys and np.any(bounds.high != normalize.clip_obs):
            raise ValueError(
                f"VecNormalize normalises {called('observation', image.name)}, an image whose space goes on saying that its "
                f"numbers are from {bounds.low.min():g} to {bounds.high.max():g}; allowed: norm_obs_keys without it"
            )


def _differing(keys: Sequence[str], normalize: VecNormalize | None) -> str:
    """How the observations that ``normalize`` normalises differ from those that were, by keys; "" if they do not."""
    now = normalized_keys(normalize)
    raw = [called("observation", key) for key in keys if key not in now]
    new = [called("observation", key) for key in now if key not in keys]
    parts = [f"its environments do not normalise {', '.join(raw)}, as they did"] if raw else []
    parts += [f"its environments normalise {', '.join(new)}, as they did not"] if new else []
    return ", and ".join(parts)


def warn_of_other_units(keys: Sequence[str], normalize: VecNormalize | None) -> None:
    """Warn of environments whose observations are in other units than those that were learned from.

    :param keys: of observations that VecNormalize normalised when the agent learned
    :param normalize: among the wrappers of its environments now, if there is one
    """
    problem = _differing(keys, normalize)
    if not problem and normalize is not None and keys:
        statistics = normalize.obs_rms if isinstance(normalize.obs_rms, dict) else {ONLY_KEY: normalize.obs_rms}
        if min(each.count for each in statistics.values()) < 1:
            problem = "its environments' VecNormalize has seen no observation yet"
    if problem:
        warnings.warn(
            f"The agent learned from observations in other units: {problem}. VecNormalize.load('vecnormalize.pkl', env) gives "
            "the environments the statistics that VecNormalize.save has saved in training",
            stacklevel=4,
        )


def check_same_units(keys: Sequence[str], rewards: bool, normalize: VecNormalize | None) -> None:
    """Look whether a run goes on with the units that it had.

    :param keys: of observations that VecNormalize normalised when the agent learned
    :param rewards: whether it normalised rewards
    :param normalize: among the wrappers of its environments now, if there is one
    :raises ValueError: it normalises others
    """
    problem = _differing(keys, normalize)
    if not problem and rewards != (normalize is not None and normalize.norm_reward):
        problem = f"norm_reward was {rewards}, and is {not rewards}"
    if problem:
        raise ValueError(f"The run would go on with numbers in other units: {problem}. Allowed: VecNormalize as it was")


def check_normalization(normalize: VecNormalize | None, space: spaces.Space[Any]) -> None:
    """What is stored must be what VecNormalize sees, so that it can be normalised when it is replayed.

    :param normalize: among the wrappers, if there is one
    :param space: of the observations that the algorithm sees
    :raises ValueError: a wrapper outside VecNormalize changes the shape
    """
    if normalize is None:
        return

    def shapes(space: spaces.Space[Any]) -> Any:
        return {k: s.shape for k, s in space.items()} if isinstance(space, spaces.Dict) else space.shape

    inner, outer = shapes(normalize.observation_space), shapes(space)
    if inner != outer:
        raise ValueError(
            f"VecNormalize sees observations of shape {inner}, the algorithm {outer}. VecNormalize must be the outermost "
            "of the wrappers that change the shape: VecNormalize(VecTransposeImage(VecFrameStack(env)))"
        )
