"""Train a small agent on a dm_control task for a few minutes and show what it learned.

Usage: python examples/demo.py [--config examples/demo.yml] [--out runs/demo]

The exit status is 0 if the trained policy's mean return is at least five times the random policy's, else 1.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import torch as th
import yaml
from matplotlib import pyplot as plt
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor, load_results

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.envs import make_dmc
from sb3_dreamer_gpld.saving import atomic_file

FACTOR = 5.0  # the trained return must be at least so many times the random one


class StopAfter(BaseCallback):
    """Stop training after so many minutes, so that the demo ends in time on a slow machine too."""

    def __init__(self, minutes: float) -> None:
        super().__init__()
        self.deadline = time.monotonic() + 60 * minutes

    def _on_step(self) -> bool:
        return time.monotonic() < self.deadline


def random_return(env: gym.Env, episodes: int) -> tuple[float, float]:
    """Mean and standard deviation of the return of uniformly random actions."""
    env.action_space.seed(0)
    returns = []
    for episode in range(episodes):
        env.reset(seed=1000 + episode)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns)), float(np.std(returns))


def plot_learning_curve(folder: Path, task: str, baseline: float, path: Path) -> None:
    """Return of every training episode, and the random policy's mean."""
    results = load_results(str(folder))
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(results["l"].cumsum(), results["r"], marker="o", label="training episodes")
    axes.axhline(baseline, color="gray", linestyle="--", label="random policy (mean)")
    axes.set(xlabel="environment steps", ylabel="return", title=task)
    axes.legend()
    figure.tight_layout()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("demo.yml"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is rendered here
    matplotlib.use("Agg")
    logging.getLogger("absl").setLevel(logging.ERROR)  # dm_control's models use names that MuJoCo calls deprecated
    settings: dict[str, Any] = yaml.safe_load(args.config.read_text())
    th.set_num_threads(1)  # more threads gain nothing for so small a net, and lose much on a busy machine
    args.out.mkdir(parents=True, exist_ok=True)

    def make_env() -> gym.Env:
        return make_dmc(settings["task"], action_repeat=settings["action_repeat"])

    random_mean, random_std = random_return(make_env(), settings["eval_episodes"])
    env = Monitor(make_env(), str(args.out / "training"))
    model = DreamerGPLD(settings["policy"], env, tensorboard_log=str(args.out / "tensorboard"), **settings["model"])
    parameters = sum(p.numel() for p in model.policy.parameters() if p.requires_grad)
    print(f"Training on {settings['task']} for up to {settings['n_timesteps']:,} steps, with {parameters:,} parameters")
    print(f"Settings: {args.config}")
    start = time.monotonic()
    model.learn(settings["n_timesteps"], callback=StopAfter(settings["max_minutes"]), log_interval=1, progress_bar=True)
    minutes = (time.monotonic() - start) / 60
    model.save(args.out / "model")
    mean, std = evaluate_policy(model, Monitor(make_env()), n_eval_episodes=settings["eval_episodes"], deterministic=True)
    plot_learning_curve(args.out, settings["task"], random_mean, args.out / "learning_curve.png")

    print(f"\nTrained for {model.num_timesteps:,} steps ({model._n_updates:,} updates) in {minutes:.1f} minutes.")
    print(f"Mean return of {settings['eval_episodes']} evaluation episodes:")
    print(f"  random policy   {random_mean:8.1f} ± {random_std:.1f}")
    print(f"  trained policy  {mean:8.1f} ± {std:.1f}")
    print(f"\nModel:           {args.out / 'model.zip'} (DreamerGPLD.load)")
    print(f"Learning curve:  {args.out / 'learning_curve.png'}")
    print(f"TensorBoard:     tensorboard --logdir {args.out / 'tensorboard'}")
    if mean < FACTOR * random_mean:
        print(f"\nThe trained policy did not reach {FACTOR:g} times the random policy's return.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
