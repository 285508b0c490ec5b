"""Recorded episodes, and windows cut from them."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.diagnostics import undisturbed
from sb3_dreamer_gpld.zoo.episodes import collect, cut_windows, filtered

LENGTH = 6  # steps of an episode of Noting


class Noting(gym.Env):
    """The observation is the number of steps; every action is noted, and the episode ends for good after LENGTH steps."""

    observation_space: spaces.Space = spaces.Box(0.0, np.inf, (1,))

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space
        self.taken: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.taken.append(action)
        self.steps += 1
        return np.full(1, self.steps, np.float32), 10.0 * self.steps, self.steps == LENGTH, False, {}


def make(action_space: spaces.Space) -> tuple[DreamerGPLD, Noting]:
    env = Noting(action_space)
    return DreamerGPLD("MlpPolicy", env, model_size="debug", buffer_size=100, device="cpu", seed=0), env


@pytest.mark.parametrize("max_steps", [LENGTH, LENGTH + 1, LENGTH - 2])
def test_an_episode_goes_from_its_first_observation_to_its_last(max_steps: int) -> None:
    model, _ = make(spaces.Box(-1, 1, (2,)))
    steps = min(max_steps, LENGTH)
    numbers = th.arange(steps + 1.0)
    for episode in collect(model, model.get_env(), 2, max_steps):
        th.testing.assert_close(episode.observations[""], numbers[None, :, None], rtol=0, atol=0)
        th.testing.assert_close(episode.rewards, 10 * numbers[None], rtol=0, atol=0)
        assert episode.is_first.tolist() == [[True] + [False] * steps]
        assert episode.is_last.tolist() == [[False] * steps + [True]]
        assert episode.is_terminal[0, -1].item() == (steps == LENGTH)  # cut by max_steps is no end for good
        assert not episode.is_terminal[0, :-1].any()
        assert not episode.deter.any() and not episode.stoch.any()


def test_a_planner_plans_the_actions_of_episodes() -> None:
    """As in predict: what is measured is the agent that an evaluation shows."""
    env = Noting(spaces.Box(-1, 1, (2,)))
    planner = dict(samples=8, policy_samples=2, elites=4, iterations=1)
    model = DreamerGPLD("MlpPolicy", env, model_size="debug", device="cpu", seed=0, planner=planner)
    (episode,) = collect(model, model.get_env(), 1, 20, seed=3, deterministic=True)
    env.reset()
    env.taken.clear()
    with undisturbed(model.policy, 3):
        state = None
        for step in range(LENGTH):
            action, state = model.predict(np.full(1, step, np.float32), state, [step == 0], deterministic=True)
            env.step(action)
    np.testing.assert_allclose(episode.actions[0, 1:], np.stack(env.taken), atol=1e-6)
    model.policy.planner = None
    (without,) = collect(model, model.get_env(), 1, 20, seed=3, deterministic=True)
    assert not np.allclose(episode.actions, without.actions, atol=1e-2)


def test_actions_are_those_that_were_taken() -> None:
    model, env = make(spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32)))
    (episode,) = collect(model, model.get_env(), 1, 20)
    expected = np.stack(env.taken) * [0.5, 2.0] - [0.0, 1.0]  # to [-1, 1]
    np.testing.assert_allclose(episode.actions[0, 1:], expected, atol=1e-6)
    assert not episode.actions[0, 0].any()

    model, env = make(spaces.Discrete(4, start=1))
    (episode,) = collect(model, model.get_env(), 1, 20)
    assert (episode.actions[0, 1:].argmax(-1) + 1).tolist() == [int(action) for action in env.taken]
    assert len(set(map(int, env.taken))) > 1


def test_collecting_leaves_the_model_and_the_random_numbers_alone() -> None:
    model, _ = make(spaces.Box(-1, 1, (1,)))
    before = th.get_rng_state(), np.random.get_state()[1].tolist(), model.replay_buffer.rng.bit_generator.state
    first, again = (collect(model, model.get_env(), 1, 20, seed=3)[0] for _ in range(2))
    other = collect(model, model.get_env(), 1, 20, seed=4)[0]
    assert th.equal(first.actions, again.actions) and not th.equal(first.actions, other.actions)
    after = th.get_rng_state(), np.random.get_state()[1].tolist(), model.replay_buffer.rng.bit_generator.state
    assert th.equal(before[0], after[0]) and before[1:] == after[1:]
    assert model.replay_buffer.size() == 0


def test_windows_carry_the_states_before_them_and_go_on_after_the_end() -> None:
    model, _ = make(spaces.Box(-1, 1, (2,)))
    episodes = collect(model, model.get_env(), 2, 20)
    with undisturbed(model.policy, 0):
        states = [filtered(model.policy, episode) for episode in episodes]
    windows = cut_windows(episodes, states, [(0, 0), (1, 2), (0, LENGTH - 1)], 4)
    assert windows.rewards.tolist() == [[0, 10, 20, 30], [20, 30, 40, 50], [50, 60, 60, 60]]
    assert windows.is_first.tolist() == [[True, False, False, False], [False] * 4, [False, False, True, True]]
    assert not windows.deter[0].any() and th.equal(windows.deter[1], states[1].deter[1])
    assert th.equal(windows.stoch[2], states[0].stoch[LENGTH - 2])
    assert th.equal(windows.actions[1], episodes[1].actions[0, 2:6])


def test_states_do_not_depend_on_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make(spaces.Box(-1, 1, (2,)))
    (episode,) = collect(model, model.get_env(), 1, 20)
    monkeypatch.setattr(th, "rand", lambda *shape, device=None: th.full(shape, 0.3, device=device))  # equal draws
    with undisturbed(model.policy, 0):
        whole = filtered(model.policy, episode)
        monkeypatch.setattr("sb3_dreamer_gpld.zoo.episodes.SEGMENT", 3)  # 7 steps are no whole number of segments
        parts = filtered(model.policy, episode)
    assert len(whole.deter) == LENGTH + 1
    for expected, found in zip(whole, parts, strict=True):
        th.testing.assert_close(found, expected)


def test_parts_of_a_batch() -> None:
    model, _ = make(spaces.Discrete(3))
    (batch,) = collect(model, model.get_env(), 1, 20)
    middle = batch.steps(slice(2, 5))
    assert middle.rewards.tolist() == [[20, 30, 40]] and middle.observations[""].flatten().tolist() == [2, 3, 4]
    assert th.equal(middle.actions, batch.actions[:, 2:5]) and th.equal(middle.deter, batch.deter)
    assert [x.shape[1] for x in middle[1:6]] == [3] * 5
    assert batch.steps(th.tensor([6, 6, 0])).is_last.tolist() == [[True, True, False]]
    both = type(batch).join([middle, batch.steps(slice(0, 3))])
    assert both.rewards.tolist() == [[20, 30, 40], [0, 10, 20]] and len(both.deter) == len(both.stoch) == 2
    last = both.select(slice(1, None))
    assert all(th.equal(x, y) for x, y in zip(last[1:], batch.steps(slice(0, 3))[1:], strict=True))
    assert last.observations[""].flatten().tolist() == [0, 1, 2]
