"""The wrappers, dm_control tasks through make_dmc, and Meta-World's through make_metaworld."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecTransposeImage

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.envs import (
    ActionRepeat,
    EpisodeSuccess,
    PixelObservation,
    make_dmc,
    make_metaworld,
    registered,
    steps_per_second,
)


class Counter(gym.Env[np.ndarray, int]):
    """Counts its steps: the reward is the number of the step, and the episode ends after ``length`` of them."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = spaces.Box(0, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 5, truncate: bool = True, render_mode: str | None = None) -> None:
        self.length, self.truncate, self.render_mode = length, truncate, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        end = self.count == self.length
        reward = np.float32(self.count)
        return np.full(1, self.count, np.float32), reward, end and not self.truncate, end and self.truncate, {"n": self.count}


def test_action_repeat_sums_rewards_and_keeps_the_last_step() -> None:
    env = ActionRepeat(Counter(length=100), repeat=3)
    env.reset()
    obs, reward, terminated, truncated, info = env.step(0)
    assert obs == [3] and info == {"n": 3, "frames": 3}
    assert reward == 1 + 2 + 3 and isinstance(reward, float)
    assert not terminated and not truncated
    assert env.step(0)[1] == 4 + 5 + 6


@pytest.mark.parametrize("truncate", [True, False])
def test_action_repeat_stops_at_the_end_of_the_episode(truncate: bool) -> None:
    env = ActionRepeat(Counter(length=5, truncate=truncate), repeat=3)
    env.reset()
    env.step(0)
    obs, reward, terminated, truncated, info = env.step(0)
    assert (terminated, truncated) == (not truncate, truncate)
    assert obs == [5] and reward == 4 + 5 and info["frames"] == 2
    env.reset()
    assert env.step(0)[4]["frames"] == 3


def test_action_repeat_counts_the_frames_of_another_one_below() -> None:
    env = ActionRepeat(ActionRepeat(Counter(length=7), repeat=2), repeat=3)
    env.reset()
    obs, reward, _, _, info = env.step(0)
    assert obs == [6] and reward == 21 and info["frames"] == 6
    assert env.step(0)[2:4] == (False, True) and env.unwrapped.count == 7


def test_action_repeat_of_one_changes_nothing() -> None:
    plain, repeated = Counter(), ActionRepeat(Counter(), repeat=1)
    plain.reset()
    repeated.reset()
    for _ in range(5):
        obs, *rest, info = plain.step(0)
        repeated_obs, *repeated_rest, repeated_info = repeated.step(0)
        assert repeated_obs == obs and repeated_rest == rest
        assert repeated_info == {**info, "frames": 1}


@pytest.mark.parametrize("repeat", [2.0, "2", None, True])
def test_action_repeat_wants_an_integer(repeat: Any) -> None:
    with pytest.raises(ValueError, match="repeat must be a whole number of at least 1, not"):
        ActionRepeat(Counter(), repeat=repeat)


@pytest.mark.parametrize("repeat", [0, -1])
def test_action_repeat_wants_at_least_one(repeat: int) -> None:
    with pytest.raises(ValueError, match=f"repeat must be a whole number of at least 1, not {repeat}"):
        ActionRepeat(Counter(), repeat=repeat)


def test_action_repeat_passes_the_checkers_and_slows_videos_down() -> None:
    env = ActionRepeat(Counter(), repeat=np.int64(2))
    check_env(env)
    assert env.metadata["render_fps"] == 15 and env.unwrapped.metadata["render_fps"] == 30


def test_action_repeat_is_rebuilt_from_the_spec() -> None:
    env = gym.make(ActionRepeat(gym.make("CartPole-v1"), repeat=4).spec)
    env.reset(seed=0)
    assert env.step(0)[4]["frames"] == 4


def test_action_repeat_from_a_hyperparameter_file() -> None:
    get_wrapper_class = pytest.importorskip("rl_zoo3.utils").get_wrapper_class
    wrap = get_wrapper_class({"env_wrapper": [{"sb3_dreamer_gpld.envs.ActionRepeat": {"repeat": 2}}]})
    vec_env = make_vec_env("CartPole-v1", n_envs=2, wrapper_class=wrap)
    vec_env.reset()
    infos = vec_env.step(np.array([0, 1]))[3]
    assert [info["frames"] for info in infos] == [2, 2]


@pytest.fixture
def dm_control() -> None:
    """Skip where the dmc extra is not installed."""
    pytest.importorskip("dm_control")
    pytest.importorskip("shimmy")


@pytest.mark.usefixtures("dm_control")
@pytest.mark.parametrize("task", ["walker-walk", "dm_control/walker-walk-v0", "ball_in_cup-catch"])
def test_dmc_task_by_either_name(task: str) -> None:
    env = make_dmc(task)
    short = task.removeprefix("dm_control/").removesuffix("-v0")
    assert env.spec is not None and env.spec.id == f"dm_control/{short}-v0"
    assert env.observation_space == gym.make(env.spec.id).observation_space
    obs, _ = env.reset(seed=0)
    assert obs.keys() == env.observation_space.keys()


@pytest.mark.usefixtures("dm_control")
@pytest.mark.parametrize("action_repeat, steps", [(1, 1000), (2, 500), (3, 334)])
def test_dmc_episode_ends_by_truncation(action_repeat: int, steps: int) -> None:
    env = make_dmc("cartpole-balance", action_repeat=action_repeat)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape)
    frames = 0
    for step in range(1, steps + 1):
        _, _, terminated, truncated, info = env.step(action)
        frames += info.get("frames", 1)
        assert not terminated and truncated == (step == steps)
    assert frames == 1000


@pytest.mark.usefixtures("dm_control")
def test_dmc_seed_fixes_the_episodes() -> None:
    def starts(env: gym.Env) -> np.ndarray:
        return np.concatenate([env.reset()[0]["orientations"] for _ in range(2)])

    assert np.array_equal(starts(make_dmc("walker-walk", seed=3)), starts(make_dmc("walker-walk", seed=3)))
    assert not np.array_equal(starts(make_dmc("walker-walk", seed=3)), starts(make_dmc("walker-walk", seed=4)))
    by_reset = make_dmc("walker-walk").reset(seed=3)[0]["orientations"]
    assert np.array_equal(make_dmc("walker-walk", seed=3).reset()[0]["orientations"], by_reset)


@pytest.mark.usefixtures("dm_control")
def test_dmc_videos_run_at_the_speed_of_the_simulation() -> None:
    assert make_dmc("walker-walk").metadata["render_fps"] == 40
    assert make_dmc("walker-walk", action_repeat=2).metadata["render_fps"] == 20


@pytest.mark.usefixtures("dm_control")
@pytest.mark.parametrize("task, seconds", [("walker-walk", 0.025), ("cartpole-swingup", 0.01), ("quadruped-walk", 0.02)])
def test_wrapped_dmc_videos_run_at_the_speed_of_the_simulation(task: str, seconds: float) -> None:
    """Also without make_dmc, as in hyperparameter files, where Shimmy's own rate (25 for walker) is wrong."""
    env = gym.make(f"dm_control/{task}-v0")
    assert steps_per_second(env) == pytest.approx(1 / seconds)
    assert ActionRepeat(env, 1).metadata["render_fps"] == pytest.approx(1 / seconds)
    twice = ActionRepeat(env, 2)
    assert twice.metadata["render_fps"] == pytest.approx(1 / seconds / 2)
    assert ActionRepeat(twice, 3).metadata["render_fps"] == pytest.approx(1 / seconds / 6)


def test_speed_of_other_environments_is_what_they_say() -> None:
    assert steps_per_second(Counter()) == 30
    assert steps_per_second(ActionRepeat(Counter(), 3)) == 10
    silent = Counter()
    silent.metadata = {}
    assert steps_per_second(silent) is None and "render_fps" not in ActionRepeat(silent, 2).metadata
    silent.metadata, silent.control_timestep = None, 0.05  # type: ignore[assignment, attr-defined]  # as robosuite has it
    assert steps_per_second(silent) is None and ActionRepeat(silent, 2).metadata is None


@pytest.mark.usefixtures("dm_control")
@pytest.mark.parametrize(
    "task, message",
    [
        ("walker_walk", "did you mean walker-walk"),
        ("dm_control/waker-walk-v0", "did you mean walker-walk"),
        ("CartPole-v1", "unknown dm_control task 'CartPole-v1'"),
        ("zzz", "tasks are named like walker-walk"),
        ("compatibility-env", "unknown dm_control task"),
    ],
)
def test_dmc_unknown_task(task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dmc(task)


def test_the_algorithm_registers_dm_control_by_itself_and_only_then() -> None:
    """In a process of its own: here Shimmy may have been imported already."""
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    program = """if True:
        import sys
        from sb3_dreamer_gpld import DreamerGPLD
        assert not {"shimmy", "dm_control", "mujoco"} & set(sys.modules), "the package imports them"
        DreamerGPLD("MlpPolicy", "CartPole-v1", model_size="debug")
        assert not {"shimmy", "dm_control", "mujoco"} & set(sys.modules), "another environment imports them"
        model = DreamerGPLD("MultiInputPolicy", "dm_control/cartpole-balance-v0", model_size="debug")
        print(sorted(model.observation_space))
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['position', 'velocity']"
    assert "DISPLAY" not in result.stderr


def test_unknown_dm_control_id() -> None:
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    with pytest.raises(ValueError, match="did you mean walker-walk"):
        DreamerGPLD("MultiInputPolicy", "dm_control/waker-walk-v0", model_size="debug")


def test_dm_control_without_shimmy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in gym.registry if name.startswith("dm_control/")]:
        monkeypatch.delitem(gym.registry, name)
    monkeypatch.setitem(sys.modules, "shimmy", None)
    with pytest.raises(ImportError, match=r'pip install "sb3-dreamer-gpld\[dmc\]"'):
        DreamerGPLD("MultiInputPolicy", "dm_control/walker-walk-v0", model_size="debug")


def test_dmc_task_must_be_a_name() -> None:
    with pytest.raises(TypeError, match="task must be a name"):
        make_dmc(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["dm_control", "shimmy"])
def test_dmc_names_the_extra_that_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "sb3-dreamer-gpld\[dmc\]"'):
        make_dmc("walker-walk")


@pytest.mark.usefixtures("rendering")
@pytest.mark.filterwarnings("ignore:Your action space has dtype float64")
def test_dmc_pixels() -> None:
    env = make_dmc("walker-walk", pixels=True, action_repeat=2, size=(48, 64), seed=1)
    check_env(env)
    assert env.observation_space == spaces.Dict({"image": spaces.Box(0, 255, (48, 64, 3), np.uint8)})
    first, _ = env.reset(seed=1)
    again, _ = env.reset(seed=1)
    np.testing.assert_array_equal(first["image"], again["image"])
    moved, _, _, _, info = env.step(env.action_space.high)
    assert info["frames"] == 2
    assert not np.array_equal(first["image"], moved["image"])
    assert first["image"].std() > 0
    other, _ = make_dmc("walker-walk", pixels=True, size=(48, 64), camera_id=1).reset(seed=1)
    assert not np.array_equal(first["image"], other["image"])


@pytest.mark.usefixtures("rendering")
def test_dmc_videos_have_the_camera_that_is_asked_for() -> None:
    frames: list[Any] = []
    for camera_id in (0, 1):
        env = make_dmc("walker-walk", render_mode="rgb_array", camera_id=camera_id)
        env.reset(seed=1)
        frames.append(env.render())
    assert not np.array_equal(*frames)


@pytest.mark.usefixtures("rendering")
def test_dmc_pixels_and_videos_have_their_own_sizes() -> None:
    env = make_dmc("cartpole-swingup", pixels=True, size=(32, 32), render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    frame: Any = env.render()
    assert obs["image"].shape == (32, 32, 3) and frame.shape == (240, 320, 3)


@pytest.mark.usefixtures("rendering")
def test_dmc_pixels_reach_the_algorithm_channels_first() -> None:
    vec_env = make_vec_env(make_dmc, n_envs=2, env_kwargs={"task": "walker-walk", "pixels": True})
    images = VecTransposeImage(vec_env).reset()
    assert isinstance(images, dict) and images["image"].shape == (2, 3, 64, 64)


@pytest.mark.usefixtures("rendering")
def test_dmc_pixels_from_a_hyperparameter_file() -> None:
    get_wrapper_class = pytest.importorskip("rl_zoo3.utils").get_wrapper_class
    wrappers = [
        {"sb3_dreamer_gpld.envs.ActionRepeat": {"repeat": 2}},
        {"sb3_dreamer_gpld.envs.PixelObservation": {"size": [32, 32], "camera_id": 0}},
    ]
    vec_env = make_vec_env("dm_control/walker-walk-v0", wrapper_class=get_wrapper_class({"env_wrapper": wrappers}))
    assert vec_env.reset()["image"].shape == (1, 32, 32, 3)


@pytest.mark.usefixtures("rendering")
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"camera_id": 2}, r"unknown camera_id 2: this task has -1 \(free camera\), 0 \(side\), 1 \(back\)"),
        ({"camera_id": "front"}, "unknown camera_id 'front'"),
        ({"size": (10_000, 64)}, "Image height 10000 > framebuffer height"),
    ],
)
def test_dmc_pixels_that_cannot_be_drawn(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dmc("walker-walk", pixels=True, **wrong)


@pytest.mark.usefixtures("dm_control")
@pytest.mark.parametrize(
    "size, error, message",
    [
        (64, TypeError, "size must be two integers"),
        ((64, 64, 3), TypeError, "size must be two integers"),
        ("64", TypeError, "size must be two integers"),
        ((64, 32.5), ValueError, "width must be a whole number of at least 1, not 32.5"),
        ((0, 64), ValueError, "height must be a whole number of at least 1"),
    ],
)
def test_dmc_pixels_of_wrong_size(size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_dmc("walker-walk", pixels=True, size=size)


def test_pixels_are_for_dm_control_only() -> None:
    with pytest.raises(TypeError, match="needs a dm_control environment"):
        PixelObservation(Counter())


@pytest.mark.usefixtures("dm_control")
def test_dmc_pixels_without_opengl_say_what_to_do() -> None:
    code = "from sb3_dreamer_gpld.envs import make_dmc; make_dmc('walker-walk').reset(); make_dmc('walker-walk', pixels=True)"
    env = {**os.environ, "MUJOCO_GL": "disabled"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "RuntimeError: MuJoCo cannot render pictures" in run.stderr and "MUJOCO_GL=egl" in run.stderr


# ------------------------------------------------------------------------------------------------------------- success


class Solved(Counter):
    """Successful at some steps of the first episode and of every second one after it."""

    def __init__(self, steps: tuple[int, ...] = (2,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.steps, self.episode = steps, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.episode += 1
        return super().reset(seed=seed, options=options)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, {**info, "success": float(self.count in self.steps and self.episode % 2)}


def successes(env: gym.Env, steps: int) -> list[bool]:
    """``is_success`` of each step of an episode."""
    env.reset()
    return [env.step(0)[4]["is_success"] for _ in range(steps)]


def test_an_episode_is_a_success_from_its_first_successful_step_on() -> None:
    env = EpisodeSuccess(Solved())
    assert successes(env, 5) == [False, True, True, True, True]
    assert successes(env, 5) == [False] * 5
    assert all(type(success) is bool for success in successes(env, 5))


def test_a_success_between_repeated_steps_counts() -> None:
    assert successes(ActionRepeat(EpisodeSuccess(Solved(steps=(1,))), 2), 2) == [True, True]


def test_success_may_have_another_name_in_the_info() -> None:
    assert successes(EpisodeSuccess(Counter(), key="n"), 1) == [True]
    with pytest.raises(TypeError, match="key must be a text, such as 'success', not 1"):
        EpisodeSuccess(Counter(), key=1)  # type: ignore[arg-type]


def test_success_of_an_environment_without_it() -> None:
    env = EpisodeSuccess(Counter())
    env.reset()
    with pytest.raises(ValueError, match=r"EpisodeSuccess needs info\['success'\]; this environment's info has n$"):
        env.step(0)


def test_success_is_rebuilt_from_the_spec() -> None:
    env = gym.make(EpisodeSuccess(gym.make("CartPole-v1"), key="other").spec)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"info\['other'\]; .* has nothing"):
        env.step(0)


def test_sb3_logs_the_share_of_successful_episodes(tmp_path: Path) -> None:
    """Half of them; in the last step of none there is a success."""
    evaluation = EvalCallback(Monitor(EpisodeSuccess(Solved())), n_eval_episodes=4, eval_freq=40, verbose=0)
    model = DreamerGPLD("MlpPolicy", EpisodeSuccess(Solved()), model_size="debug", learning_starts=1000, device="cpu")
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(40, callback=evaluation, log_interval=4)
    rows = list(csv.DictReader((tmp_path / "progress.csv").open()))
    for name in ("rollout/success_rate", "eval/success_rate"):
        assert {row[name] for row in rows if row[name]} == {"0.5"}, name


# ---------------------------------------------------------------------------------------------------------- Meta-World


@pytest.mark.usefixtures("metaworld")
def test_metaworld_tasks_have_ids() -> None:
    for env in (make_metaworld("reach"), make_metaworld("reach-v3"), gym.make(registered("metaworld/reach-v3"))):
        assert env.unwrapped.name == "reach-v3"  # type: ignore[attr-defined]
    assert env.spec is not None and env.spec.id == "metaworld/reach-v3"
    assert successes(env, 5) == [False, False, True, True, True]
    assert env.observation_space == spaces.Box(-1.0, 1.0, (1,), np.float64)  # with the goal


@pytest.mark.usefixtures("metaworld")
def test_goals_follow_from_the_seed() -> None:
    def goals(env: gym.Env, **seed: int) -> list[float]:
        return [float(env.reset(**seed)[0][0]), float(env.reset()[0][0])]

    first, second = make_metaworld("reach", seed=3), make_metaworld("reach", seed=4)
    expected = goals(first)
    assert goals(second) != expected == goals(make_metaworld("reach", seed=3)) == goals(second, seed=3)
    assert goals(make_metaworld("reach")) != goals(make_metaworld("reach")), "without a seed they are those of chance"
    assert expected[0] != expected[1]


@pytest.mark.usefixtures("metaworld")
def test_arguments_of_metaworld_environments() -> None:
    env: Any = gym.make(registered("metaworld/reach-v3"), render_mode="rgb_array", action_repeat=2, goal_seed=7, width=64)
    assert env.unwrapped.kwargs == {"goal_seed": 7, "width": 64} and env.render_mode == "rgb_array"
    assert env.metadata["render_fps"] == 40
    assert successes(env, 3) == [False, True, True]  # the third frame is the first of the second step
    assert make_metaworld("reach").unwrapped.kwargs == {"goal_seed": 0}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="goal_seed must be a whole number of at least 0, not None"):
        make_metaworld("reach", goal_seed=None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("metaworld")
@pytest.mark.parametrize(
    "task, message",
    [
        ("raech", "unknown metaworld task 'raech': did you mean reach"),
        ("metaworld/drawer-clos-v3", "did you mean drawer-close"),
        ("zzz", "tasks are named like button-press"),
    ],
)
def test_unknown_metaworld_task(task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_metaworld(task)


@pytest.mark.usefixtures("metaworld")
def test_metaworld_task_must_be_a_name() -> None:
    with pytest.raises(TypeError, match="task must be a name such as 'button-press', got 3"):
        make_metaworld(3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_metaworld")
def test_metaworld_without_its_extra() -> None:
    for make in (lambda: make_metaworld("reach"), lambda: DreamerGPLD("MlpPolicy", "metaworld/reach-v3")):
        with pytest.raises(ImportError, match=r'Meta-World tasks need metaworld: pip install "sb3-dreamer-gpld\[metaworld\]"'):
            make()


@pytest.mark.usefixtures("metaworld")
def test_metaworld_with_a_mujoco_that_it_does_not_work_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", SimpleNamespace(__version__="3.17.0", mjNEQDATA=12))
    with pytest.raises(
        ImportError, match=r"does not work with MuJoCo 3\.17\.0.* needs 3\.3\.0.* without dm_control: pip install"
    ):
        make_metaworld("reach")


@pytest.mark.usefixtures("metaworld")
def test_the_algorithm_takes_the_id_of_a_metaworld_task() -> None:
    model = DreamerGPLD("MlpPolicy", "metaworld/reach-v3", model_size="debug", learning_starts=1000, device="cpu").learn(10)
    assert list(model.ep_success_buffer or ()) == [True, True]
