"""What a task of dm_control returns where nothing is done: the mean, and the returns, of episodes with actions of zero.

Usage: python -m benchmarks.learning.nothing [--task quadruped-run] [--episodes 100]
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from sb3_dreamer_gpld.envs import make_dmc


def returns(task: str, episodes: int) -> np.ndarray:
    """Returns of the episodes (N,), of which the first is seeded by 0."""
    env = make_dmc(task, action_repeat=2, seed=0)
    action = np.zeros(env.action_space.shape or (), np.float32)
    found = np.zeros(episodes)
    for episode in range(episodes):
        env.reset()
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(action)
            found[episode] += float(reward)
            done = terminated or truncated
    env.close()
    return found


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
