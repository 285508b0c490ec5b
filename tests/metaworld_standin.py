"""Stands in for Meta-World where it is not installed: what make_metaworld uses of it, as release 3.1.1 has it.

Its space is that of a hidden goal until one is set, ``reset`` ignores the seed, and success is a number of single steps.
tests/test_metaworld.py has the same checks of the true one.
"""

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ALL_V3_ENVIRONMENTS = dict.fromkeys(["reach-v3", "drawer-close-v3", "door-open-v3"])
MUJOCO = SimpleNamespace(__version__="3.3.0", mjNEQDATA=11)


class Task(gym.Env[np.ndarray, np.ndarray]):
    """Episodes of 5 steps; the third one is a success, in a task of this name."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}
    sawyer_observation_space = spaces.Box(-1.0, 1.0, (1,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def __init__(self, name: str, render_mode: str | None, **kwargs: Any) -> None:
        self.name, self.render_mode, self.kwargs = name, render_mode, kwargs
        self.observation_space = spaces.Box(0.0, 0.0, (1,), np.float64)

    def seed(self, seed: int) -> None:
        self.np_random = np.random.default_rng(seed)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.count, self.goal = 0, self.np_random.uniform(-1.0, 1.0, 1)
        return self.goal.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        success = float(self.count == 3 and self.name == "reach-v3")
        return self.goal.copy(), 1.0, False, self.count == 5, {"success": success}

    def render(self) -> Any:
        return np.zeros((8, 8, 3), np.uint8)


def make_mt_envs(name: str, seed: int | None = None, render_mode: str | None = None, **kwargs: Any) -> Task:
    env = Task(name, render_mode, goal_seed=seed, **kwargs)
    assert seed is not None
    env.seed(seed)
    return env
