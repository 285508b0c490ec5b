"""Environment helpers: repeated actions, dm_control tasks through Shimmy, and what is wrong with what environments give.

The wrappers take plain numbers and lists only, so that a hyperparameter file of rl_zoo3 can name them::

    env_wrapper:
      - sb3_dreamer_gpld.envs.ActionRepeat:
          repeat: 2
"""

import difflib
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize

from sb3_dreamer_gpld.config import check_int
from sb3_dreamer_gpld.observations import ONLY_KEY, by_key, called, spaces_by_key

_DM_CONTROL = "dm_control/"


def steps_per_second(env: gym.Env[Any, Any]) -> float | None:
    """How many steps of ``env`` make a second of simulated time.

    For dm_control tasks it comes from the task's control timestep: Shimmy puts the milliseconds between two steps into
    ``metadata["render_fps"]`` instead of the steps of a second.

    :param env: the environment, wrapped or not
    :return: steps per second; what ``metadata["render_fps"]`` says for other environments, None if it is missing
    """
    layer, repeat = env, 1
    while isinstance(layer, gym.Wrapper):
        repeat *= layer.repeat if isinstance(layer, ActionRepeat) else 1
        layer = layer.env
    if hasattr(layer, "control_timestep"):
        return 1 / (layer.control_timestep() * repeat)
    return env.metadata.get("render_fps")


class ActionRepeat(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Apply each action several times and return the sum of the rewards.

    Stops early when the episode ends. Observation and info are those of the last repetition; ``info["frames"]`` is the
    number of steps the wrapped environment made for this one (``repeat``, or fewer at the end of an episode). Videos run
    at the speed of the simulation: ``metadata["render_fps"]`` counts one picture per action, see ``steps_per_second``.

    :param env: the environment to wrap
    :param repeat: how many times each action is applied, at least 1
    """

    def __init__(self, env: gym.Env[Any, Any], repeat: int = 2) -> None:
        self.repeat = check_int("repeat", repeat, 1)
        RecordConstructorArgs.__init__(self, repeat=self.repeat)
        gym.Wrapper.__init__(self, env)
        rate = steps_per_second(env)
        if rate:
            # One rendered picture per action: a video at this rate runs at the speed of the wrapped environment.
            self.metadata = {**env.metadata, "render_fps": rate / self.repeat}

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Apply ``action`` up to ``repeat`` times.

        :param action: the action
        :return: last observation, sum of the rewards, terminated, truncated, last info with ``frames``
        """
        total, frames, terminated, truncated = 0.0, 0, False, False
        while frames < self.repeat and not (terminated or truncated):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            frames += 1
        return obs, total, terminated, truncated, {**info, "frames": frames}


class PixelObservation(gym.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Replace the observation of a dm_control environment by a camera picture.

    The observation is ``{"image": picture}``, uint8 of shape (height, width, 3). It is rendered beside ``env.render()``,
    so the size and camera of recorded videos stay independent of what the agent sees. Together with ``ActionRepeat``,
    wrap with this one last: then only the last of the repeated states is rendered.

    :param env: a dm_control environment made by Shimmy
    :param size: height and width of the picture
    :param camera_id: Number or name of the task's camera (-1 is the free camera)
    """

    def __init__(self, env: gym.Env[Any, Any], size: Sequence[int] = (64, 64), camera_id: int | str = 0) -> None:
        if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
            raise TypeError(f"size must be two integers (height, width), got {size!r}")
        self.size = (check_int("height", size[0], 1), check_int("width", size[1], 1))
        self.camera_id = camera_id
        RecordConstructorArgs.__init__(self, size=list(self.size), camera_id=camera_id)
        gym.ObservationWrapper.__init__(self, env)
        unwrapped: Any = env.unwrapped
        if not hasattr(unwrapped, "physics"):
            raise TypeError(f"PixelObservation needs a dm_control environment, got {unwrapped}")
        self._physics_owner = unwrapped
        self.observation_space = spaces.Dict({"image": spaces.Box(0, 255, (*self.size, 3), np.uint8)})
        self._check_rendering()

    def observation(self, observation: Any) -> dict[str, np.ndarray]:
        """Render the current state.

        :param observation: the wrapped environment's observation, dropped
        :return: the picture under the key ``image``
        """
        height, width = self.size
        # Composer tasks make a new physics object at each reset, so it is looked up every time.
        return {"image": self._physics_owner.physics.render(height=height, width=width, camera_id=self.camera_id)}

    def _check_rendering(self) -> None:
        """Render once, so that a wrong size or camera, or a missing OpenGL, is found before the first step."""
        model = self._physics_owner.physics.model
        names = [model.id2name(number, "camera") for number in range(model.ncam)]
        if self.camera_id not in names and self.camera_id not in range(-1, model.ncam):
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
            raise ValueError(f"unknown camera_id {self.camera_id!r}: this task has -1 (free camera), {known}")
        try:
            self.observation(None)
        except ValueError:  # a size beyond MuJoCo's framebuffer: dm_control's own words are clear
            raise
        except Exception as error:
            raise RuntimeError(
                "MuJoCo cannot render pictures. On a machine without a display set the environment variable "
                "MUJOCO_GL=egl before Python starts, and install the system's EGL library (libegl1 on Debian and Ubuntu)."
            ) from error


def make_dmc(
    task: str,
    pixels: bool = False,
    action_repeat: int = 1,
    size: tuple[int, int] = (64, 64),
    camera_id: int | str = 0,
    render_mode: str | None = None,
    seed: int | None = None,
) -> gym.Env[Any, Any]:
    """Make a dm_control task as a Gymnasium environment, through Shimmy.

    Suite tasks end by truncation after 1000 steps of the simulator's control loop, with or without ``action_repeat``.

    :param task: ``"walker-walk"``, or the same as a Gymnasium id, ``"dm_control/walker-walk-v0"``
    :param pixels: whether the observation is a picture instead of the task's own numbers, see ``PixelObservation``
    :param action_repeat: how many times each action is applied, see ``ActionRepeat``
    :param size: height and width of the picture with ``pixels``
    :param camera_id: camera of the picture, and of ``env.render()``
    :param render_mode: what ``env.render()`` returns (``"rgb_array"`` for videos)
    :param seed: seed of the episodes; ``env.reset(seed=...)`` starts anew from its own seed
    :return: the environment
    """
    env_id = _find_task(task)
    make_kwargs: dict[str, Any] = {"render_mode": render_mode}
    if render_mode in ("rgb_array", "depth_array"):
        make_kwargs["render_kwargs"] = {"camera_id": camera_id}
    env: gym.Env[Any, Any] = gym.make(env_id, **make_kwargs)
    unwrapped: Any = env.unwrapped
    if seed is not None:
        unwrapped.np_random = np.random.RandomState(seed)
    env.metadata = {**env.metadata, "render_fps": steps_per_second(env)}
    # Repeating comes first: only the last of the repeated states is worth a picture.
    if action_repeat != 1:
        env = ActionRepeat(env, action_repeat)
    if pixels:
        env = PixelObservation(env, size, camera_id)
    return env


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

    :raises RuntimeError: in place of a broken connection to an environment whose process ended; names it
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:
        lost = "" if algorithm.env is None else lost_processes(algorithm.env)
        if not lost:
            raise
        raise RuntimeError(f"At step {algorithm.num_timesteps} {lost}") from error
    except Exception as error:
        blamed = "" if algorithm.env is None else blamed_environment(error, algorithm.env)
        if blamed and hasattr(error, "add_note"):
            error.add_note(f"It was raised at step {algorithm.num_timesteps} by {blamed}")
        raise


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


def registered(env: Any) -> Any:
    """Register the dm_control tasks if the id of one is given that Gymnasium does not know yet.

    They are registered by importing Shimmy, which imports dm_control and MuJoCo, too: seconds that only those who need them
    should wait for, and the point at which MuJoCo reads ``MUJOCO_GL``.

    :param env: what an algorithm is given as its environment
    :return: the same
    :raises ImportError: Shimmy or dm_control is missing
    :raises ValueError: there is no such task
    """
    if isinstance(env, str) and env.startswith(_DM_CONTROL) and env not in gym.registry:
        return _find_task(env)
    return env


def register_dm_control() -> None:
    """Register the dm_control tasks with Gymnasium, as ``dm_control/walker-walk-v0`` and so on.

    :raises ImportError: Shimmy or dm_control is missing
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="glfw")  # it warns where there is no display
            import dm_control  # noqa: F401
            import shimmy  # noqa: F401  (registers the tasks)
    except ImportError as error:
        raise ImportError('dm_control tasks need Shimmy and dm_control: pip install "sb3-dreamer-gpld[dmc]"') from error


def _find_task(task: str) -> str:
    """Look up a dm_control task, registering all of them on the first call.

    :param task: short name or Gymnasium id of the task
    :return: its Gymnasium id
    """
    if not isinstance(task, str):
        raise TypeError(f"task must be a name such as 'walker-walk', got {task!r}")
    register_dm_control()
    names = [env_id.removeprefix(_DM_CONTROL).removesuffix("-v0") for env_id in gym.registry if env_id.startswith(_DM_CONTROL)]
    names.remove("compatibility-env")  # Shimmy's wrapper for the caller's own dm_control environment, not a task
    name = task.removeprefix(_DM_CONTROL).removesuffix("-v0")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "tasks are named like walker-walk"
        raise ValueError(f"unknown dm_control task {task!r}: {hint}")
    return f"{_DM_CONTROL}{name}-v0"
