"""What a task of dm_control returns where nothing is done: the mean, and the returns, of episodes with actions of zero.

Usage: python -m benchmarks.learning.nothing [--task quadruped-run] [--episodes 100]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dreamer_gpld.envs import make_dmc


class Nothing:
    """A policy whose actions are zero."""

    def __init__(self, size: int) -> None:
        self.size = size

    def predict(self, _: Any, state: None, episode_start: np.ndarray, deterministic: bool) -> tuple[np.ndarray, None]:
        return np.zeros((len(episode_start), self.size), np.float32), None


def returns(task: str, episodes: int) -> np.ndarray:
    """Returns of the episodes (N,), of which the first is seeded by 0."""
    env = Monitor(make_dmc(task, action_repeat=2, seed=0))
    policy = Nothing(*env.action_space.shape)
    return np.array(evaluate_policy(policy, env, n_eval_episodes=episodes, return_episode_rewards=True)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="quadruped-run")
    parser.add_argument("--episodes", type=int, default=100)
    args = parser.parse_args()
    found = returns(args.task, args.episodes)
    print(f"{args.task}, {args.episodes} episodes: mean {found.mean():.0f}")
    print(" ".join(f"{each:.0f}" for each in np.sort(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
