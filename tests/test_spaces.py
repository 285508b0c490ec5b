"""Every space and every vectorised environment: train a little, save, load, act the same.

One-dimensional vectors, 0-d and 2-d entries, Discrete ones and the plain action spaces are in ``test_dreamer_gpld.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from test_dreamer_gpld import BOX, RandomSpaces, policy_for, tiny

from sb3_dreamer_gpld import DreamerGPLD

FEW: dict[str, Any] = dict(
    learning_starts=12, batch_size=2, batch_length=5, imagination_horizon=2, train_ratio=4, buffer_size=200
)


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def floats(*shape: int) -> spaces.Box:
    return spaces.Box(0.0, 1.0, shape, np.float32)


def check(env: gym.Env | VecEnv, folder: Path, policy: str | None = None, steps: int = 40, **kwargs: Any) -> DreamerGPLD:
    """Train, save, load without an environment: the same deterministic actions over three steps, with memory."""
    model = tiny(env, policy or policy_for(env.observation_space), **{**FEW, **kwargs})
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(steps)
    assert model._n_updates >= 3
    changed = [not th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True)]
    assert all(th.isfinite(p).all() for p in model.policy.parameters()) and sum(changed) > len(changed) // 2
    model.save(folder / "model")
    loaded = DreamerGPLD.load(folder / "model", device="cpu")
    assert loaded.observation_space == model.observation_space and loaded.action_space == model.action_space
    vec_env = model.get_env()
    assert vec_env is not None
    observation, states = vec_env.reset(), [None, None]
    for _ in range(3):
        actions = []
        for k, agent in enumerate((model, loaded)):
            action, states[k] = agent.predict(observation, states[k], deterministic=True)  # type: ignore[call-overload]
            actions.append(action)
        np.testing.assert_array_equal(*actions)
        assert all(vec_env.action_space.contains(action) for action in actions[0])
        observation = vec_env.step(actions[0])[0]
    return model


# ---------------------------------------------------------------------------------------------- observations

LONG = pytest.mark.long
IMAGES = [
    image(16, 16, 1),
    image(16, 16, 3),
    image(3, 16, 16),
    image(17, 31, 3),  # odd sides
    image(1, 31, 17),
    image(41, 40, 50),  # more channels than pixels in a row
    image(50, 64, 80),
    image(64, 64, 3),
    image(2, 16, 128),
    pytest.param(image(128, 128, 3), marks=LONG),
    pytest.param(image(50, 128, 96), marks=LONG),
]


@pytest.mark.parametrize("space", IMAGES, ids=lambda space: "x".join(map(str, space.shape)))
def test_images(space: spaces.Box, tmp_path: Path) -> None:
    model = check(RandomSpaces(space, BOX), tmp_path, "CnnPolicy", steps=22)
    (key,) = model.policy.observation_spec.images
    first = space.shape[0] == min(space.shape) or space.shape[0] == 50
    assert (key.channels, key.height, key.width) == (space.shape if first else (space.shape[2], *space.shape[:2]))
    assert model.observation_space.shape == (key.channels, key.height, key.width)  # by VecTransposeImage if it was last


@pytest.mark.parametrize("space", [floats(3, 20, 16), floats(20, 16, 3), floats(50, 33, 16)], ids=lambda s: str(s.shape))
def test_normalised_float_images(space: spaces.Box, tmp_path: Path) -> None:
    model = check(RandomSpaces(space, BOX), tmp_path, "CnnPolicy", steps=22, policy_kwargs=dict(normalize_images=False))
    (key,) = model.policy.observation_spec.images
    assert key.scale == 1.0 and key.channels == min(space.shape)


def test_masks_have_their_own_scale(tmp_path: Path) -> None:
    """Integers that end below 255 fill [0, 1] as well; Stable-Baselines3 leaves their layout as it is."""
    model = check(
        RandomSpaces(spaces.Box(0, 1, (18, 17, 16), np.uint8), BOX), tmp_path, policy_kwargs=dict(normalize_images=False)
    )
    (key,) = model.policy.observation_spec.images
    assert key.scale == 1.0 and (key.channels, key.height, key.width) == (16, 18, 17)
    (targets,) = model.policy.world_model.targets({"": th.ones(1, 18, 17, 16, dtype=th.uint8)}, [1])[1]
    assert th.equal(targets, th.ones(1, 18, 17, 16))


@pytest.mark.parametrize(
    "low, high, dtype, scale",
    [(-1, 1, np.float32, 2), (0, 255, np.float32, 255), (0, 0.5, np.float64, 1), (-9, 3, np.int16, 12)],
)
def test_images_of_other_numbers_are_scaled_by_their_bounds(low: float, high: float, dtype: type, scale: float) -> None:
    space = spaces.Box(low, high, (16, 16, 3), dtype)
    model = tiny(RandomSpaces(space, BOX), policy_kwargs=dict(normalize_images=False)).learn(50)
    assert model.policy.observation_spec.images[0].scale == scale and model._n_updates
    both = th.as_tensor(np.stack([space.low, space.high]))
    (targets,) = model.policy.world_model.targets({"": both}, [2])[1]
    assert targets[0].unique().tolist() == [0.0] and targets[1].unique().tolist() == [high if scale == 1 else 1.0]


def test_images_without_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="is an image of numbers from -inf to inf; allowed: finite bounds"):
        tiny(RandomSpaces(spaces.Box(-np.inf, np.inf, (16, 16, 3)), BOX), policy_kwargs=dict(normalize_images=False))


def test_float_images_in_a_dict_with_vectors(tmp_path: Path) -> None:
    space = spaces.Dict({"camera": floats(3, 16, 20), "x": BOX, "height": spaces.Box(-np.inf, np.inf, (), np.float64)})
    model = check(RandomSpaces(space, BOX), tmp_path, steps=22, policy_kwargs=dict(normalize_images=False))
    assert [key.name for key in model.policy.observation_spec.images] == ["camera"]


def test_everything_in_one_dict(tmp_path: Path) -> None:
    space = spaces.Dict(
        {
            "z 0-d": spaces.Box(-np.inf, np.inf, (), np.float64),
            "y 2-d": spaces.Box(-1.0, 1.0, (8, 2), np.float64),
            "x": BOX,
            "small integers": spaces.Box(0, 9, (3,), np.int64),
            "near": image(16, 16, 3),
            "far": image(18, 16, 2),
            "same size as near": image(16, 16, 1),
            "class": spaces.Discrete(4, start=-2),
            "classes": spaces.MultiDiscrete([[2, 3], [4, 5]]),
            "bits": spaces.MultiBinary((2, 2)),
        }
    )
    model = check(RandomSpaces(space, spaces.MultiDiscrete([3, 2])), tmp_path, steps=22)
    spec = model.policy.observation_spec
    assert {key.name for key in (*spec.vectors, *spec.images)} == set(space.spaces)
    assert spec.vector_size == 1 + 16 + 3 + 3 + 4 + 14 + 8


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_entries_without_numbers_are_left_out(shape: tuple[int, ...], tmp_path: Path) -> None:
    """dm_control has such entries; a space of nothing else has nothing to learn from."""
    empty = spaces.Box(-1.0, 1.0, shape)
    model = check(RandomSpaces(spaces.Dict({"none": empty, "x": BOX}), BOX), tmp_path, steps=22)
    assert [key.name for key in model.policy.observation_spec.vectors] == ["x"]
    with pytest.raises(ValueError, match="has no numbers in it"):
        tiny(RandomSpaces(spaces.Dict({"none": empty}), BOX))


# --------------------------------------------------------------------------------------------------- actions

ACTIONS = {
    "0-d box": spaces.Box(-2.0, 3.0, (), np.float64),
    "2-d box": spaces.Box(-2.0, 3.0, (2, 3)),
    "huge box": spaces.Box(-1e10, 1e10, (2,), np.float64),
    "one choice": spaces.Discrete(1),
    "many choices": spaces.Discrete(500),
    "unequal choices": spaces.MultiDiscrete([2, 9, 1]),
    "many bits": spaces.MultiBinary(20),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_actions(name: str, tmp_path: Path) -> None:
    check(RandomSpaces(BOX, ACTIONS[name]), tmp_path, steps=22)


@pytest.mark.parametrize(
    "space, error", [(spaces.MultiDiscrete([[2, 3], [4, 5]]), ValueError), (spaces.MultiBinary((2, 3)), AssertionError)]
)
def test_two_dimensional_choices_are_refused(space: spaces.Space, error: type[Exception]) -> None:
    """SB3 cannot store them either."""
    with pytest.raises(error, match=f"{type(space).__name__}.*You can flatten it"):
        tiny(RandomSpaces(BOX, space))


# --------------------------------------------------------------------------------------- vectorised environments

DICT = spaces.Dict({"x": BOX, "camera": image(16, 20, 3)})


def many(n: int, space: spaces.Space = BOX, cls: type[VecEnv] = DummyVecEnv) -> VecEnv:
    return make_vec_env(lambda: RandomSpaces(space, BOX), n, seed=1, vec_env_cls=cls)  # type: ignore[arg-type]


VEC_ENVS: dict[str, Callable[[], VecEnv]] = {
    "16 dummies": lambda: many(16),
    "3 of dicts": lambda: many(3, DICT),
    "normalised": lambda: VecNormalize(many(2)),
    "normalised dict": lambda: VecNormalize(VecTransposeImage(many(2, DICT)), norm_obs_keys=["x"]),
    "stacked, then normalised": lambda: VecNormalize(VecFrameStack(many(2), 3)),
    "stacked images": lambda: VecFrameStack(many(2, image(16, 20, 3)), 4),
    "stacked dict": lambda: VecFrameStack(many(2, DICT), 2, channels_order={"x": "last", "camera": "last"}),
    "stacked, then transposed": lambda: VecTransposeImage(VecFrameStack(many(2, image(16, 20, 1)), 4)),
    "transposed dict": lambda: VecTransposeImage(many(1, DICT)),
    "monitored": lambda: VecMonitor(DummyVecEnv([lambda: RandomSpaces(BOX, BOX)] * 2)),
    "one key": lambda: VecExtractDictObs(many(1, DICT), "x"),
    "2 processes": lambda: many(2, DICT, SubprocVecEnv),
}


@pytest.mark.parametrize("name", VEC_ENVS)
def test_vectorised_environments(name: str, tmp_path: Path) -> None:
    env = VEC_ENVS[name]()
    try:
        policy = (
            "CnnPolicy" if isinstance(env.observation_space, spaces.Box) and len(env.observation_space.shape) == 3 else None
        )
        model = check(env, tmp_path, policy, steps=26 * env.num_envs if env.num_envs < 3 else 96)
        assert model.n_envs == env.num_envs
        if name.startswith(("monitored", "16", "3", "2")):
            assert model.ep_info_buffer is not None and all(info["l"] == 10 for info in model.ep_info_buffer)
            assert len(model.ep_info_buffer) >= 2 or name.startswith("16")
    finally:
        env.close()


@pytest.mark.parametrize(
    "env",
    [lambda: VecFrameStack(VecNormalize(many(2)), 3), lambda: VecNormalize(many(2, DICT), norm_obs_keys=["x"])],
    ids=["frame stack", "transposed by SB3"],
)
def test_normalisation_inside_of_another_shape(env: Callable[[], VecEnv]) -> None:
    """SB3 stores what VecNormalize saw, which is not what the nets take here."""
    model = tiny(env(), policy_for(env().observation_space), **FEW)
    with pytest.raises(ValueError, match="VecNormalize must be the outermost"):
        model.learn(20)
    assert model.num_timesteps == 0


@pytest.mark.long
def test_sixteen_processes(tmp_path: Path) -> None:
    env = many(16, BOX, SubprocVecEnv)
    try:
        assert check(env, tmp_path, steps=320).n_envs == 16
    finally:
        env.close()


@pytest.mark.parametrize("before, after", [(1, 3), (3, 1), (2, 16)])
def test_the_number_of_environments_may_change_on_loading(before: int, after: int, tmp_path: Path) -> None:
    model = tiny(many(before), "MlpPolicy", **FEW).learn(24)
    model.save(tmp_path / "model")
    loaded = DreamerGPLD.load(tmp_path / "model", many(after), device="cpu")
    updates = loaded._n_updates
    loaded.learn(10 * after + 20, reset_num_timesteps=False)
    assert loaded.n_envs == after and loaded._n_updates > updates == model._n_updates
    assert loaded.replay_buffer is not None and loaded.replay_buffer.observations.shape[1] == after  # type: ignore[union-attr]


class Counting(RandomSpaces):
    """Its observations are the number of the step, counted from ``start``."""

    def __init__(self, *args: Any, start: int = 100, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start = start

    def observation(self) -> Any:
        return np.full(self.observation_space.shape, self.start + self.steps, self.observation_space.dtype)

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        _, info = super().reset(**kwargs)
        return self.observation(), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        _, *others = super().step(action)
        return self.observation(), *others  # type: ignore[return-value]


@pytest.mark.parametrize("shape, dtype", [((2,), np.int64), ((2,), np.uint8), ((), np.int32), ((), np.float64)])
def test_last_observations_are_those_of_the_environment(shape: tuple[int, ...], dtype: type) -> None:
    """Also of integers, which VecNormalize makes floats of, and of single numbers."""
    env = DummyVecEnv([lambda: Counting(spaces.Box(0, 255, shape, dtype), BOX, terminates=True)] * 2)
    model = tiny(VecNormalize(env), **FEW).learn(60)
    assert model.replay_buffer is not None
    samples = model.replay_buffer.sample(20)
    last = samples.observations[samples.is_last]  # type: ignore[index]
    assert len(last) and th.equal(last.double().round(), th.full_like(last, 107).double())


def unequal() -> VecEnv:
    """Two environments that count from 100 and 200, with episodes of 5 and 7 steps."""
    space = spaces.Box(0, 255, (2,))
    return DummyVecEnv(
        [lambda: TimeLimit(Counting(space, BOX, start=100), 5), lambda: TimeLimit(Counting(space, BOX, start=200), 7)]
    )


@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize], ids=["plain", "normalised"])
def test_episodes_end_in_each_environment_for_itself(wrap: Callable[[VecEnv], VecEnv]) -> None:
    """With its own last observation, also at step 35, where both end."""
    buffer = tiny(wrap(unequal()), "MlpPolicy", learning_starts=1000).learn(80).replay_buffer
    assert buffer is not None and isinstance(buffer.observations, np.ndarray)
    assert buffer.stored_rows().tolist() == [40 + 8, 40 + 5]
    for i, (start, steps) in enumerate([(100, 5), (200, 7)]):
        stored = slice(buffer.stored_rows()[i])
        number = np.arange(stored.stop) % (steps + 1)  # within the episode
        np.testing.assert_array_equal(buffer.observations[stored, i, 0].round(), start + number)
        np.testing.assert_array_equal(buffer.is_first[stored, i], number == 0)
        np.testing.assert_array_equal(buffer.dones[stored, i], number == steps)


def test_states_of_several_environments_are_those_of_each_one_alone() -> None:
    """Replayed with the stored actions and classes, from each start of its own episodes."""
    model = tiny(unequal(), "MlpPolicy", learning_starts=1000).learn(40)
    buffer, world_model = model.replay_buffer, model.policy.world_model
    assert buffer is not None and isinstance(buffer.observations, np.ndarray)
    for i, rows in enumerate(buffer.stored_rows()):
        deter, stoch = world_model.rssm.initial(1)
        action = th.zeros(1, 1, 3)
        for t in np.flatnonzero(buffer.dones[:rows, i] == 0):  # the last rows of episodes have no state
            observation, is_first, action_after, classes = (
                th.as_tensor(x[t, i])[None, None] for x in (buffer.observations, buffer.is_first, buffer.actions, buffer.stoch)
            )
            with th.no_grad():
                tokens = world_model.encode({"": observation}, (1, 1))
                deter = world_model.rssm.observe(tokens, action, is_first, deter, stoch, None).deter[:, 0]
            np.testing.assert_allclose(deter[0].numpy(), buffer.deter[t, i], atol=1e-5)
            stoch = (classes == th.arange(stoch.shape[1]).view(-1, 1)).float()  # (1, C, K)
            action = action_after


def test_normalisation_is_stored_apart(tmp_path: Path) -> None:
    """The buffer keeps what the environment gave; the nets see it normalised, as in collecting."""
    env = VecNormalize(make_vec_env(lambda: RandomSpaces(spaces.Box(99.0, 101.0, (3,)), BOX), 2, seed=0))
    model = tiny(env, "MlpPolicy", **FEW).learn(80)
    buffer = model.replay_buffer
    assert buffer is not None and isinstance(buffer.observations, np.ndarray)
    stored = buffer.observations[:30]
    assert stored.min() >= 99 and stored.max() <= 101
    seen = buffer.sample(4, env=env).observations
    assert isinstance(seen, th.Tensor) and seen.abs().max() < 10


# ------------------------------------------------------------------------------------------- dm_control, as it comes


def suite_tasks() -> list[str]:
    """Every task of the suite that Shimmy registers (not the manipulation and locomotion ones)."""
    pytest.importorskip("dm_control")
    pytest.importorskip("shimmy")
    from dm_control import suite

    return [f"dm_control/{domain}-{task}-v0" for domain, task in suite.ALL_TASKS]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Your action space has dtype float64")
def test_every_task_of_the_dm_control_suite(tmp_path: Path) -> None:
    """Through Shimmy, with no wrapper of ours: a few steps, a few updates, save, load."""
    tasks = suite_tasks()
    assert len(tasks) > 40 and [task for task in tasks if task not in gym.registry] == []
    failures = {}
    for task in tasks:
        env = gym.make(task)
        try:
            check(env, tmp_path, steps=22)
        except Exception as error:
            failures[task] = repr(error)
        finally:
            env.close()
    assert failures == {}


def test_dm_control_tasks_with_odd_spaces(tmp_path: Path) -> None:
    """The ones of which the others are variants: 0-d entries, per-dimension bounds, huge bounds, a 2-d entry."""
    pytest.importorskip("dm_control")
    pytest.importorskip("shimmy")
    for name in ("walker-walk", "quadruped-walk", "lqr-lqr_2_1", "manipulator-bring_ball"):
        env = gym.make(f"dm_control/{name}-v0")
        check(env, tmp_path, steps=22)
        env.close()


# --------------------------------------------------------------------------------------------------- what is refused


UNKNOWN = {
    "Text": spaces.Text(4),
    "Sequence": spaces.Sequence(BOX),
    "Graph": spaces.Graph(BOX, None),
    "OneOf": spaces.OneOf([BOX, spaces.Discrete(2)]),
    "Tuple": spaces.Tuple([BOX, BOX]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_spaces_are_named(name: str) -> None:
    allowed = f"is a {name} space; allowed: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these"
    with pytest.raises(ValueError, match=f"the observation space {allowed}"):
        tiny(RandomSpaces(UNKNOWN[name], BOX))
    with pytest.raises(ValueError, match=f"observation 'y' {allowed}"):
        tiny(RandomSpaces(spaces.Dict({"x": BOX, "y": UNKNOWN[name]}), BOX))
    with pytest.raises(AssertionError, match="only supports"):  # SB3's own
        tiny(RandomSpaces(BOX, UNKNOWN[name]))


LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in (np.float32, np.float64)}


@pytest.mark.parametrize("dtype", LARGEST)
def test_actions_that_reach_too_far_are_refused(dtype: type) -> None:
    """Their range overflows, and with it every action."""
    largest = LARGEST[dtype]
    with pytest.raises(ValueError, match="the action space reaches from .* allowed: finite bounds with a finite difference"):
        tiny(RandomSpaces(BOX, spaces.Box(np.array([-1, -largest], dtype), np.array([1, largest], dtype), dtype=dtype)))


def test_integer_actions_that_reach_too_far_are_refused() -> None:
    """Unbounded ones, for instance: float64 does not tell their neighbours apart."""
    with pytest.raises(ValueError, match="which is more than float64 can tell apart; allowed: bounds within 2.53 of 0"):
        tiny(RandomSpaces(BOX, spaces.Box(-np.inf, np.inf, (2,), np.int64)))


def test_wide_actions_are_finite() -> None:
    """Every action up to half of what float32 holds, on both sides."""
    half = LARGEST[np.float32] / 2.5
    env = RandomSpaces(BOX, spaces.Box(-half, half, (2,)))
    tiny(env).learn(40)
    assert np.isfinite(env.actions).all()


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_numbers_that_float32_cannot_hold_are_refused(what: str) -> None:
    class Huge(RandomSpaces):
        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            observation, reward, *others = super().step(action)
            if self.steps == 5:
                observation, reward = (observation * 0 + 1e300, reward) if what == "observation" else (observation, 1e300)
            return observation, reward, *others  # type: ignore[return-value]

    model = tiny(Huge(spaces.Box(-np.inf, np.inf, (2,), np.float64), BOX))
    with pytest.raises(ValueError, match=f"the {what} of environment 0 is not finite at step 5: .*(e.300|inf).*float32"):
        model.learn(20)
    assert model.replay_buffer is not None and model.replay_buffer.size() < 5
