"""Stateful predict as SB3's evaluation, rl_zoo3's enjoy and a hand-written loop use it."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecVideoRecorder
from test_dreamer_gpld import BOX, RandomSpaces, tiny

from sb3_dreamer_gpld import DreamerGPLD

DICT = spaces.Dict({"x": BOX, "kind": spaces.Discrete(4), "image": spaces.Box(0, 255, (16, 20, 3), np.uint8)})
State = tuple[np.ndarray, ...]


class FixedEpisodes(gym.Env):
    """Observations that depend on environment, episode and step only, so that every way of acting meets the same ones.

    :param number: of the environment; its episodes last 3 + number steps
    """

    observation_space, action_space = BOX, BOX

    def __init__(self, number: int) -> None:
        self.number, self.episode = number, -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return self._observation(), float(action.sum()), False, self.steps == 3 + self.number, {}

    def _observation(self) -> np.ndarray:
        generator = np.random.default_rng((self.number, self.episode, self.steps))
        return generator.uniform(-1, 1, 3).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> DreamerGPLD:
    """Has learned a little, so that actions depend on what was seen before."""
    return tiny(RandomSpaces(BOX, BOX), policy_kwargs=dict(units=32)).learn(60)


def observations(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 3)).astype(np.float32)


def by_hand(model: DreamerGPLD, episode: np.ndarray) -> np.ndarray:
    """Actions (T, A) of one environment over the observations (T, 3) of one episode."""
    actions, state = [], None
    for observation in episode:
        action, state = model.predict(observation, state, deterministic=True)
        actions.append(action)
    return np.stack(actions)


# ------------------------------------------------------------------------------------------- ways to call it


def test_the_action_depends_on_the_state(model: DreamerGPLD) -> None:
    """Without this, the tests below could not tell a kept state from a dropped one."""
    _, state = model.predict(observations(1, 5), deterministic=True)
    observation = observations(1)
    fresh, kept = (model.predict(observation, s, deterministic=True)[0] for s in (None, state))
    assert np.abs(fresh - kept).max() > 1e-5


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_environment_acts_as_if_it_were_alone(model: DreamerGPLD, n: int) -> None:
    """The loop of rl_zoo3's enjoy, with episodes of different lengths, against single environments by hand."""
    env = DummyVecEnv([lambda i=i: FixedEpisodes(i) for i in range(n)])  # type: ignore[misc]
    observation, state, episode_start = env.reset(), None, np.ones(n, dtype=bool)
    episodes: list[list[list[np.ndarray]]] = [[[]] for _ in range(n)]
    actions: list[list[np.ndarray]] = [[] for _ in range(n)]
    for _ in range(12):
        action, state = model.predict(observation, state=state, episode_start=episode_start, deterministic=True)
        for i in range(n):
            if episode_start[i]:
                episodes[i].append([])
            episodes[i][-1].append(observation[i].copy())
            actions[i].append(action[i])
        observation, _, episode_start, _ = env.step(action)
    for i in range(n):
        assert len(episodes[i]) >= 3  # one reset at least in the middle
        expected = np.concatenate([by_hand(model, np.stack(e)) for e in episodes[i] if e])
        np.testing.assert_allclose(np.stack(actions[i]), expected, atol=1e-5)


def test_evaluate_policy_resets_and_keeps_the_state(model: DreamerGPLD) -> None:
    env = DummyVecEnv([lambda: FixedEpisodes(0), lambda: FixedEpisodes(2)])
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True, warn=False)
    expected = []
    for number, episode in ((0, 0), (2, 0), (0, 1), (2, 1)):
        source = FixedEpisodes(number)
        source.episode = episode - 1
        seen, total, done = source.reset()[0], 0.0, False
        state = None
        while not done:
            action, state = model.predict(seen, state, deterministic=True)
            seen, reward, _, done, _ = source.step(action)
            total += reward
        expected.append(total)
    assert sorted(lengths) == [3, 3, 5, 5]
    np.testing.assert_allclose(sorted(returns), sorted(expected), atol=1e-5)


def test_none_starts_fresh_whatever_came_before(model: DreamerGPLD) -> None:
    """The number of environments changes from call to call, and nothing is left over in the model."""
    first, first_state = model.predict(observations(2), deterministic=True)
    for n in (5, 1, 3):
        model.predict(observations(n, n), deterministic=True)
        model.predict(observations(1, n)[0])
    again, state = model.predict(observations(2), deterministic=True)
    np.testing.assert_array_equal(first, again)
    assert first_state is not None and state is not None
    for a, b in zip(first_state, state, strict=True):
        np.testing.assert_array_equal(a, b)
        assert isinstance(a, np.ndarray) and len(a) == 2
    for start in (np.zeros(2, dtype=bool), np.ones(2, dtype=bool)):  # a fresh state is fresh either way
        np.testing.assert_array_equal(model.predict(observations(2), None, start, deterministic=True)[0], first)


def test_no_episode_start_keeps_the_state(model: DreamerGPLD) -> None:
    _, state = model.predict(observations(3), deterministic=True)
    implicit = model.predict(observations(3, 1), state, None, deterministic=True)
    explicit = model.predict(observations(3, 1), state, np.zeros(3, dtype=bool), deterministic=True)
    reset = model.predict(observations(3, 1), state, np.ones(3, dtype=bool), deterministic=True)
    np.testing.assert_array_equal(implicit[0], explicit[0])
    assert np.abs(implicit[0] - reset[0]).max() > 1e-6


def test_two_loops_at_once_do_not_disturb_each_other(model: DreamerGPLD) -> None:
    """The memory is in the caller's hands only."""
    one, two = (np.random.default_rng(seed).uniform(-1, 1, (4, 3)).astype(np.float32) for seed in (1, 2))
    states: list[State | None] = [None, None]
    actions: list[list[np.ndarray]] = [[], []]
    for t in range(4):
        for k, episode in enumerate((one, two)):
            action, states[k] = model.predict(episode[t], states[k], deterministic=True)
            actions[k].append(action)
    for k, episode in enumerate((one, two)):
        np.testing.assert_array_equal(np.stack(actions[k]), by_hand(model, episode))


def test_the_policy_predicts_as_the_model_does(model: DreamerGPLD) -> None:
    state: State | None = None
    policy_state: State | None = None
    for t, start in enumerate(([True, True], [False, False], [True, False])):
        arguments = (observations(2, t), np.array(start))
        action, state = model.predict(arguments[0], state, arguments[1], deterministic=True)
        other, policy_state = model.policy.predict(arguments[0], policy_state, arguments[1], deterministic=True)
        np.testing.assert_array_equal(action, other)
    th.manual_seed(7)
    sampled, _ = model.predict(observations(2), state)
    th.manual_seed(7)
    np.testing.assert_array_equal(model.policy.predict(observations(2), policy_state)[0], sampled)


def test_episode_start_may_be_a_list_or_a_single_flag(model: DreamerGPLD) -> None:
    _, state = model.predict(observations(1), deterministic=True)
    dropped, _ = model.predict(observations(1, 1), state, np.array([True]), deterministic=True)
    flags: list[Any] = [[True], True]
    for flag in flags:
        np.testing.assert_array_equal(model.predict(observations(1, 1), state, flag, deterministic=True)[0], dropped)


def test_episode_start_of_another_number_of_environments(model: DreamerGPLD) -> None:
    with pytest.raises(ValueError, match="episode_start has 3 entries, but there are 2 observations"):
        model.predict(observations(2), None, np.zeros(3, dtype=bool))


# ------------------------------------------------------------------------------------------------ side effects


@pytest.mark.parametrize("deterministic", [True, False])
def test_inputs_are_never_modified(deterministic: bool) -> None:
    model = tiny(RandomSpaces(DICT, BOX))
    env = model.get_env()
    assert env is not None
    observation = env.reset()
    assert isinstance(observation, dict)
    _, state = model.predict(observation)
    start = np.array([True])
    kept = copy.deepcopy((observation, state, start))
    results = model.predict(observation, state, start, deterministic)
    frozen = copy.deepcopy(results)
    model.predict(observation, results[1], start, deterministic)
    assert list(observation) == list(kept[0])
    for key in observation:
        np.testing.assert_array_equal(observation[key], kept[0][key])
        assert observation[key].dtype == kept[0][key].dtype
    assert state is not None and results[1] is not None
    for a, b in zip((*state, start, *results[1], results[0]), (*kept[1], kept[2], *frozen[1], frozen[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_results_are_the_callers(model: DreamerGPLD) -> None:
    """Overwriting an action or a state that was handed out changes no later answer, as evaluate_policy overwrites its."""
    observation = observations(2)
    action, state = model.predict(observation, deterministic=True)
    assert state is not None
    expected, _ = model.predict(observation, copy.deepcopy(state), deterministic=True)
    spare = copy.deepcopy(state)
    action[:] = 5.0
    np.testing.assert_array_equal(model.predict(observation, spare, deterministic=True)[0], expected)
    for x, y in zip(state, spare, strict=True):
        np.testing.assert_array_equal(x, y)  # the action that was overwritten is no part of the state
        x[:] = 0
    np.testing.assert_array_equal(model.predict(observation, spare, deterministic=True)[0], expected)


@pytest.mark.parametrize("name", ["box", "discrete"])
def test_deterministic_draws_from_no_generator(name: str) -> None:
    space = BOX if name == "box" else spaces.Discrete(4)
    model = tiny(RandomSpaces(DICT, space))
    env = model.get_env()
    assert env is not None
    observation = env.reset()
    before = th.get_rng_state(), copy.deepcopy(np.random.get_state()), random.getstate()
    space_state = copy.deepcopy(model.action_space.np_random.bit_generator.state)
    state = None
    for start in (True, False, True):
        _, state = model.predict(observation, state, np.array([start]), deterministic=True)
    assert th.equal(th.get_rng_state(), before[0])
    after = np.random.get_state()
    assert (after[1] == before[1][1]).all() and after[2:] == before[1][2:]
    assert random.getstate() == before[2]
    assert model.action_space.np_random.bit_generator.state == space_state
    model.predict(observation, state)
    assert not th.equal(th.get_rng_state(), before[0])  # a sampled action does draw


def test_training_mode_does_not_matter() -> None:
    """In it the vectors of spectral norms move with each use."""
    model = tiny(RandomSpaces(BOX, BOX), policy_kwargs=dict(spectral_norm=["posterior", "actor"])).learn(40)
    expected, _ = model.predict(observations(2), deterministic=True)
    before = copy.deepcopy(model.policy.state_dict())
    model.policy.set_training_mode(True)
    np.testing.assert_array_equal(model.predict(observations(2), deterministic=True)[0], expected)
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())


@pytest.mark.parametrize("n_envs", [1, 2])
def test_an_evaluation_in_the_middle_changes_nothing(n_envs: int) -> None:
    """Bit-identical parameters, buffer and state with and without evaluations of another number of environments."""

    def run(evaluate: bool) -> DreamerGPLD:
        model = tiny(make_vec_env(lambda: RandomSpaces(BOX, BOX), n_envs, seed=3), "MlpPolicy")
        callback = EvalCallback(
            make_vec_env(lambda: FixedEpisodes(1), 3), n_eval_episodes=4, eval_freq=7, deterministic=True, verbose=0
        )
        model.learn(90, callback=callback if evaluate else None)
        assert not evaluate or (callback.n_calls >= 45 and np.isfinite(callback.last_mean_reward))
        return model

    plain, evaluated = run(False), run(True)
    assert plain._n_updates == evaluated._n_updates > 0
    for (name, a), b in zip(plain.policy.state_dict().items(), evaluated.policy.state_dict().values(), strict=True):
        assert th.equal(a, b), name
    assert plain._state is not None and evaluated._state is not None
    for a, b in zip(plain._state.parts, evaluated._state.parts, strict=True):
        assert th.equal(a, b)
    assert plain.replay_buffer is not None and evaluated.replay_buffer is not None
    for name in ("observations", "actions", "rewards", "is_first", "deter", "stoch"):
        np.testing.assert_array_equal(getattr(plain.replay_buffer, name), getattr(evaluated.replay_buffer, name), name)


# --------------------------------------------------------------------------------------------- dtype and bounds

ACTIONS = {
    "float64, per dimension": spaces.Box(np.array([-1.0, -1.0, -0.8]), np.array([1.0, 1.1, 0.8]), dtype=np.float64),
    "float32, odd bounds": spaces.Box(np.array([0.1, -7.3], np.float32), np.array([0.7, 1e-3], np.float32)),
    "float64, tenths": spaces.Box(-0.1, 0.1, (4,), np.float64),
    "float64, huge": spaces.Box(-1e10, 1e10, (2,), np.float64),
    "0-d": spaces.Box(-2.0, 3.0, (), np.float64),
    "2-d": spaces.Box(-2.0, 3.0, (2, 3)),
    "int8, wider than its positive half": spaces.Box(-100, 100, (3,), np.int8),
    "int32, all": spaces.Box(np.iinfo(np.int32).min, np.iinfo(np.int32).max, (2,), np.int32),
    "uint8": spaces.Box(0, 10, (2,), np.uint8),
    "discrete": spaces.Discrete(3, start=-7),
    "multi-discrete": spaces.MultiDiscrete([2, 3, 7]),
    "multi-binary": spaces.MultiBinary(5),
}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("bias", [-50.0, 0.0, 50.0])
def test_actions_are_in_the_space(name: str, bias: float) -> None:
    """Also where the policy drives every number to a bound; deterministic, sampled, single and several at once."""
    space = ACTIONS[name]
    model = tiny(RandomSpaces(BOX, space))
    with th.no_grad():
        for part in model.policy.actor_critic.policy.output.parts:
            part.bias += bias
    for deterministic in (True, False):
        single, _ = model.predict(observations(1)[0], deterministic=deterministic)
        several, _ = model.predict(observations(4), deterministic=deterministic)
        assert np.shape(single) == space.shape and several.shape == (4, *(space.shape or ()))
        for action in (single, *several):
            assert np.asarray(action).dtype == space.dtype
            assert space.contains(np.asarray(action) if isinstance(space, spaces.Box) else action), action
        if deterministic and bias and isinstance(space, spaces.Box):
            bound = space.high if bias > 0 else space.low
            width = space.high.astype(float) - space.low
            np.testing.assert_allclose((single.astype(float) - bound) / width, 0.0, atol=1e-6)


def test_integers_are_the_nearest_ones() -> None:
    policy = tiny(RandomSpaces(BOX, spaces.Box(np.array([-1, 0, -100]), np.array([1, 10, 100]), dtype=np.int8))).policy
    numbers = th.tensor([[-0.6, -0.96, -0.6], [-0.4, -0.84, 0.003], [0.6, 0.99, 0.996]])
    assert policy.to_env_action(numbers).tolist() == [[-1, 0, -60], [0, 1, 0], [1, 10, 100]]


@pytest.mark.parametrize("board", [spaces.MultiDiscrete(np.full((3, 3), 3)), spaces.MultiDiscrete([[2, 3, 4], [5, 2, 3]])])
def test_a_single_observation_of_two_dimensions_is_one(board: spaces.MultiDiscrete) -> None:
    model = tiny(RandomSpaces(board, BOX))
    one, _ = model.predict(board.sample(), deterministic=True)
    two, _ = model.predict(np.stack([board.sample(), board.sample()]), deterministic=True)
    assert one.shape == BOX.shape and two.shape == (2, *BOX.shape)


def test_images_are_taken_in_both_layouts() -> None:
    """The model's space is channels first, as VecTransposeImage makes it; predict takes what the environment gives."""
    model = tiny(RandomSpaces(spaces.Box(0, 255, (20, 24, 3), np.uint8), BOX), "CnnPolicy")
    image = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), dtype=np.uint8)
    last, _ = model.predict(image, deterministic=True)
    first, _ = model.predict(np.moveaxis(image, -1, 1), deterministic=True)
    np.testing.assert_array_equal(last, first)
    single, _ = model.predict(image[0], deterministic=True)
    np.testing.assert_allclose(single, last[0], atol=1e-6)


def test_a_video_is_recorded(tmp_path: Path) -> None:
    """SB3's VecVideoRecorder around several environments, as its guide uses it."""
    pytest.importorskip("moviepy")
    model = tiny("CartPole-v1")
    env = make_vec_env("CartPole-v1", n_envs=2, env_kwargs={"render_mode": "rgb_array"})
    env = VecVideoRecorder(env, str(tmp_path), record_video_trigger=lambda step: step == 0, video_length=10)
    observation, state, episode_start = env.reset(), None, np.ones(2, dtype=bool)
    for _ in range(11):
        action, state = model.predict(observation, state, episode_start, deterministic=True)
        observation, _, episode_start, _ = env.step(action)
    env.close()
    (video,) = tmp_path.glob("*.mp4")
    assert video.stat().st_size > 1000
