"""Does it learn? Small tasks, each out of reach for an agent that lacks the piece which the test guards.

Each guard is shown by a twin test with that piece broken, which must stay below the same threshold.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dreamer_gpld import DreamerGPLD

SMALL: dict[str, Any] = dict(
    model_size="debug",
    policy_kwargs=dict(deter=64, hidden=32, stoch=8, classes=4, units=32),
    batch_size=16,
    batch_length=16,
    imagination_horizon=6,
    learning_starts=200,
    learning_rate=1e-3,
    learning_rate_warmup=50,
    ent_coef=3e-3,
    buffer_size=10_000,
    device="cpu",
    precision="float32",  # on every processor
    seed=0,
)


class Cue(gym.Env):
    """The first observation holds a cue of ±1, later ones only the time. Later, action 1 pays the cue, action 0 nothing."""

    steps = 4

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,))
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cue, self.time = 2 * int(self.np_random.integers(2)) - 1, 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(self.cue) if self.time and action else 0.0
        self.time += 1
        return self._observation(), reward, self.time == self.steps, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.cue if self.time == 0 else 0, self.time / self.steps], dtype=np.float32)


class Match(gym.Env):
    """Two dials of three and two positions are shown; the action must show the same positions."""

    def __init__(self) -> None:
        self.observation_space = spaces.MultiDiscrete([3, 2])
        self.action_space = spaces.MultiDiscrete([3, 2])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time = 0
        return self._draw(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float((np.asarray(action) == self.dials).mean())
        self.time += 1
        return self._draw(), reward, False, self.time == 8, {}

    def _draw(self) -> np.ndarray:
        self.dials = self.np_random.integers(self.observation_space.nvec)
        return self.dials


class Cliff(gym.Env):
    """Action 1 pays 1 and ends the episode for good; action 0 pays 0.2 for 15 steps, which is worth 3."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,))
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.time, self.fallen = 0, False
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.time += 1
        self.fallen = bool(action == 1)
        return self._observation(), 1.0 if self.fallen else 0.2, self.fallen, self.time == 15, {}

    def _observation(self) -> np.ndarray:
        return np.array([float(self.fallen), self.time / 15], dtype=np.float32)


def mean_return(model: DreamerGPLD, env: gym.Env, episodes: int = 40) -> float:
    env.reset(seed=123)
    return float(evaluate_policy(model, Monitor(env), n_eval_episodes=episodes, deterministic=True)[0])


def train(env: gym.Env, steps: int, **kwargs: Any) -> DreamerGPLD:
    return DreamerGPLD("MlpPolicy", env, **{**SMALL, **kwargs}).learn(steps, log_interval=None)


def test_memory() -> None:
    sizes = dict(deter=128, hidden=64, stoch=8, classes=4, units=64)
    model = train(Cue(), 1500, train_ratio=128, learning_rate=2e-3, ent_coef=0.1, policy_kwargs=sizes)
    assert mean_return(model, Cue()) > 1.2  # without memory 0 on average, 1.5 at best

    # The same agent without memory: its state is dropped at every step.
    env, returns = Cue(), []
    env.reset(seed=123)
    for _ in range(40):
        observation, _ = env.reset()
        total, done = 0.0, False
        while not done:
            action, _ = model.predict(observation, None, np.ones(1, dtype=bool), deterministic=True)
            observation, reward, done, _, _ = env.step(int(action))
            total += reward
        returns.append(total)
    assert np.mean(returns) < 0.5


@pytest.mark.parametrize("broken", [False, True])
def test_multi_discrete_actions(broken: bool) -> None:
    """3.3 by chance, 8 at best."""
    sizes = {**SMALL["policy_kwargs"], "policy_weight": 0.0 if broken else 1.0}  # 0: the policy gets no gradient
    model = train(Match(), 1800, train_ratio=128, ent_coef=0.03, policy_kwargs=sizes)
    assert (mean_return(model, Match()) > 6.5) != broken


@pytest.mark.parametrize("broken", [False, True])
def test_terminal_states(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an agent that knows that the fall ends everything stays away from it."""
    if broken:  # every end counts as a time limit, so that the continue head never sees a terminal state
        monkeypatch.setattr(DreamerGPLD, "_store_transition", store_ends_as_time_limits)
    model = train(Cliff(), 1500, train_ratio=128)
    result = mean_return(model, Cliff(), 5)
    assert result < 2.0 if broken else result > 2.5  # 1 for the fall, 3 at best

    assert model.replay_buffer is not None
    batch = model.policy.to_batch(model.replay_buffer.sample(200))
    world_model = model.policy.world_model
    with th.no_grad():
        tokens = world_model.encode(batch.observations, batch.rewards.shape)
        states = world_model.rssm.observe(tokens, batch.actions, batch.is_first, batch.deter, batch.stoch, None)
        cont = th.sigmoid(world_model.cont(states.features)).squeeze(-1)  # (B, T)
    fallen = batch.observations[""][..., 0] > 0.5
    assert cont[~fallen].mean() > 0.9
    assert cont[fallen].mean() > 0.9 if broken else cont[fallen].mean() < 0.5


def store_ends_as_time_limits(self: DreamerGPLD, *args: Any) -> None:
    *others, infos = args
    ORIGINAL_STORE(self, *others, [{**info, "TimeLimit.truncated": True} for info in infos])


ORIGINAL_STORE = DreamerGPLD._store_transition
