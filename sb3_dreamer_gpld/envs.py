"""Environment helpers: wrappers, and the tasks of dm_control and Meta-World.

The wrappers take plain numbers and lists only, so that a hyperparameter file of rl_zoo3 can name them::

    env_wrapper:
      - sb3_dreamer_gpld.envs.ActionRepeat:
          repeat: 2
"""

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from sb3_dreamer_gpld.checks import check_int

_WELD_NUMBERS = 11  # of MuJoCo's weld constraints, as Meta-World 3 writes them


def steps_per_second(env: gym.Env[Any, Any]) -> float | None:
    """How many steps of ``env`` make a second of simulated time.

    For dm_control tasks it comes from the task's control timestep: Shimmy puts the milliseconds between two steps into
    ``metadata["render_fps"]`` instead of the steps of a second.

    :param env: the environment, wrapped or not
    :return: steps per second; what ``metadata["render_fps"]`` says for other environments, None if it is missing
    """
    timestep = getattr(env.unwrapped, "control_timestep", None)
    if callable(timestep):  # elsewhere it may be a number
        return 1 / (timestep() * repeats(env))
    return (env.metadata or {}).get("render_fps")


def repeats(env: gym.Env[Any, Any]) -> int:
    """How often the :class:`ActionRepeat` among the wrappers of ``env``, if there are any, have an action applied."""
    layer, repeat = env, 1
    while isinstance(layer, gym.Wrapper):
        repeat *= layer.repeat if isinstance(layer, ActionRepeat) else 1
        layer = layer.env
    return repeat


def frames_of(info: Mapping[str, Any]) -> int:
    """How many frames a step has made.

    :param info: of the step
    :return: what an ``ActionRepeat`` has counted, else 1
    """
    frames = info.get("frames")
    return frames if isinstance(frames, int) else 1


class ActionRepeat(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Apply each action several times and return the sum of the rewards.

    Stops early when the episode ends. Observation and info are those of the last repetition; ``info["frames"]`` is the
    number of steps the wrapped environment made for this one (``repeat``, or fewer at the end of an episode; with another
    ``ActionRepeat`` inside, the sum of its frames). Videos run at the speed of the simulation: ``metadata["render_fps"]``
    counts one picture per action, see ``steps_per_second``.

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
            self.metadata = {**(env.metadata or {}), "render_fps": rate / self.repeat}

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Apply ``action`` up to ``repeat`` times.

        :param action: the action
        :return: last observation, sum of the rewards, terminated, truncated, last info with ``frames``
        """
        total, steps, frames, terminated, truncated = 0.0, 0, 0, False, False
        while steps < self.repeat and not (terminated or truncated):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            steps += 1
            frames += frames_of(info)
        return obs, total, terminated, truncated, {**info, "frames": frames}


class EpisodeSuccess(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Report in ``info["is_success"]`` whether the episode has been a success so far, at this step or an earlier one.

    SB3 reads it at the end of an episode, for ``rollout/success_rate`` and ``eval/success_rate``. That one step is enough is
    how Meta-World counts: its own evaluation (``metaworld.evaluation`` of release 3.1.1) ends an episode at the first success.
    Together with ``ActionRepeat``, wrap with this one first: then all of the repeated steps count.

    :param env: the environment to wrap
    :param key: where its info has the success of a step, a bool or a number that is not 0
    """

    def __init__(self, env: gym.Env[Any, Any], key: str = "success") -> None:
        if not isinstance(key, str):
            raise TypeError(f"key must be a text, such as 'success', not {key!r}")
        self.key, self._reached = key, False
        RecordConstructorArgs.__init__(self, key=key)
        gym.Wrapper.__init__(self, env)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, which is no success yet.

        :param seed: of the environment
        :param options: of the environment
        :return: first observation and info, as the wrapped environment gives them
        """
        self._reached = False
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Make a step.

        :param action: the action
        :return: observation, reward, terminated, truncated, info with ``is_success``
        :raises ValueError: the info lacks the success
        """
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.key not in info:
            has = ", ".join(map(str, info)) or "nothing"
            raise ValueError(f"EpisodeSuccess needs info[{self.key!r}]; this environment's info has {has}")
        self._reached = self._reached or bool(info[self.key])
        return obs, reward, terminated, truncated, {**info, "is_success": self._reached}


class _SeededByReset(gym.Wrapper[Any, Any, Any, Any]):
    """A Meta-World environment whose goals follow from the seed of ``reset``, which Meta-World itself ignores."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            _seed_metaworld(self.env, seed)
        return self.env.reset(seed=seed, options=options)


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

    Suite tasks end by truncation after 1000 steps of the simulator's control loop, with or without ``action_repeat``; those of
    lqr have no limit.

    :param task: ``"walker-walk"``, or the same as a Gymnasium id, ``"dm_control/walker-walk-v0"``
    :param pixels: whether the observation is a picture instead of the task's own numbers, see ``PixelObservation``
    :param action_repeat: how many times each action is applied, see ``ActionRepeat``
    :param size: height and width of the picture with ``pixels``
    :param camera_id: camera of the picture, and of ``env.render()``
    :param render_mode: what ``env.render()`` returns (``"rgb_array"`` for videos)
    :param seed: seed of the episodes; ``env.reset(seed=...)`` starts anew from its own seed
    :return: the environment
    """
    env_id = _find_task(task, DM_CONTROL)
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


def make_metaworld(
    task: str,
    action_repeat: int = 1,
    goal_seed: int = 0,
    render_mode: str | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> gym.Env[Any, Any]:
    """Make a task of Meta-World as its benchmark MT1 has it: one task, with 50 goals of which each episode has one.

    Observations are float64 of shape (39,): position of the hand and opening of the gripper (4 numbers), positions and
    rotations of the objects (14), the same 18 of the step before, and the position of the goal (3). The reward of a step is
    between 0 and 10. Episodes end by truncation after 500 steps of the simulator's control loop (of 0.0125 s), with or without
    ``action_repeat``, also when the task is solved. ``info["is_success"]`` says whether it was solved at any step.

    :param task: ``"reach"``, ``"reach-v3"``, or the same as a Gymnasium id, ``"metaworld/reach-v3"``
    :param action_repeat: how many times each action is applied, see ``ActionRepeat``
    :param goal_seed: of the 50 goals; training and evaluation have the same ones if it is the same
    :param render_mode: what ``env.render()`` returns (``"rgb_array"`` for videos)
    :param seed: of the order of the goals; ``env.reset(seed=...)`` starts anew from its own seed
    :param kwargs: further arguments of ``metaworld.make_mt_envs``, such as ``camera_name="topview"``, ``width`` and ``height``
        (pixels)
    :return: the environment
    :raises ImportError: metaworld is missing, or does not work with the MuJoCo that is installed
    :raises ValueError: there is no such task
    """
    name = _find_task(task, METAWORLD).removeprefix(METAWORLD.prefix)
    goal_seed = check_int("goal_seed", goal_seed, 0)
    import metaworld

    # What Meta-World's own id Meta-World/MT1 makes; that id would become the environment's name in logs.
    env: Any = metaworld.make_mt_envs(name, seed=goal_seed, render_mode=render_mode, **kwargs)
    # Its space is that of a hidden goal, with bounds of 0, until a goal has been set.
    env.reset()
    env.unwrapped.observation_space = env.unwrapped.sawyer_observation_space
    _seed_metaworld(env, seed)
    env = EpisodeSuccess(_SeededByReset(env))
    return env if action_repeat == 1 else ActionRepeat(env, action_repeat)


def _seed_metaworld(env: gym.Env[Any, Any], seed: int | None) -> None:
    """Seed the order of a Meta-World environment's goals; None: from the system's entropy."""
    unwrapped: Any = env.unwrapped
    unwrapped.seed(int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed))


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


def register_metaworld() -> None:
    """Register the Meta-World tasks with Gymnasium, as ``metaworld/reach-v3`` and so on.

    :raises ImportError: metaworld is missing, or does not work with the MuJoCo that is installed
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="glfw")
            import metaworld
            import mujoco
    except ImportError as error:
        raise ImportError('Meta-World tasks need metaworld: pip install "sb3-dreamer-gpld[metaworld]"') from error
    if mujoco.mjNEQDATA != _WELD_NUMBERS:
        raise ImportError(
            f"Meta-World does not work with MuJoCo {mujoco.__version__}, which is installed here: metaworld 3.1.1 needs 3.3.0,"
            " and dm_control a newer one. In a virtual environment without dm_control: "
            'pip install "sb3-dreamer-gpld[metaworld]"'
        )
    for name in metaworld.ALL_V3_ENVIRONMENTS:
        if METAWORLD.prefix + name not in gym.registry:
            gym.register(METAWORLD.prefix + name, entry_point="sb3_dreamer_gpld.envs:make_metaworld", kwargs={"task": name})


class Suite(NamedTuple):
    """Tasks of one package.

    :param prefix: of their Gymnasium ids
    :param version: the end of their ids
    :param example: a task, without prefix and version
    :param register: makes Gymnasium know them; raises ImportError if a package is missing
    """

    prefix: str
    version: str
    example: str
    register: Callable[[], None]

    def tasks(self) -> list[str]:
        """:return: ids of the tasks that are registered"""
        # Shimmy's wrapper for the caller's own dm_control environment is not a task
        ids = [env_id for env_id in gym.registry if env_id.startswith(self.prefix)]
        return [env_id for env_id in ids if env_id != "dm_control/compatibility-env-v0"]


DM_CONTROL = Suite("dm_control/", "-v0", "walker-walk", register_dm_control)
METAWORLD = Suite("metaworld/", "-v3", "button-press", register_metaworld)


def suite_of(env: Any) -> Suite | None:
    """:return: the suite that the id of an environment belongs to, None for other environments"""
    return next((suite for suite in (DM_CONTROL, METAWORLD) if isinstance(env, str) and env.startswith(suite.prefix)), None)


def registered(env: Any) -> Any:
    """Register the tasks of dm_control or Meta-World if the id of one is given that Gymnasium does not know yet.

    They are registered by importing their packages, which import MuJoCo, too: seconds that only those who need them
    should wait for, and the point at which MuJoCo reads ``MUJOCO_GL``.

    :param env: what an algorithm is given as its environment
    :return: the same
    :raises ImportError: a package of the suite is missing
    :raises ValueError: there is no such task
    """
    suite = suite_of(env)
    return env if suite is None or env in gym.registry else _find_task(env, suite)


def _find_task(task: str, suite: Suite) -> str:
    """Look up a task of a suite, registering all of them on the first call.

    :param task: short name or Gymnasium id of the task
    :param suite: where to look
    :return: its Gymnasium id
    """
    if not isinstance(task, str):
        raise TypeError(f"task must be a name such as {suite.example!r}, got {task!r}")
    suite.register()
    names = [env_id.removeprefix(suite.prefix).removesuffix(suite.version) for env_id in suite.tasks()]
    name = task.removeprefix(suite.prefix).removesuffix(suite.version)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"tasks are named like {suite.example}"
        raise ValueError(f"unknown {suite.prefix[:-1]} task {task!r}: {hint}")
    return f"{suite.prefix}{name}{suite.version}"
