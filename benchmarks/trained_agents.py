"""Makes a file of ``trained_agents`` from a saved model: its policy alone, with what it returns and how it was made.

Usage: python -m benchmarks.trained_agents NAME MODEL.zip --env dm_control/walker-walk-v0 --action-repeat 2 --command "..."
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.saving import atomic_file
from sb3_dreamer_gpld.trained import FOLDER, LIST, TrainedAgent

EPISODES = 20
EVALUATION_SEED = 20_000
PACKAGES = ("sb3-dreamer-gpld", "torch", "stable-baselines3", "gymnasium", "dm-control", "mujoco")


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def evaluate(agent: TrainedAgent, model: DreamerGPLD, deterministic: bool) -> dict[str, Any]:
    """Returns of fresh episodes."""
    env = Monitor(agent.make_env())
    env.reset(seed=EVALUATION_SEED)
    model.set_random_seed(EVALUATION_SEED)
    returns, _ = evaluate_policy(model, env, EPISODES, deterministic, return_episode_rewards=True)
    return {"mean": round(float(np.mean(returns)), 1), "std": round(float(np.std(returns)), 1), "episodes": EPISODES}


def add(name: str, model_file: Path, env: str, action_repeat: int, command: str, folder: Path) -> TrainedAgent:
    """Write the policy, and its entry in the list.

    :param name: of the agent
    :param model_file: what ``model.save`` wrote
    :param env: id of the environment
    :param action_repeat: how many steps of it each action lasts
    :param command: that trained it
    :param folder: of the agents
    """
    model = DreamerGPLD.load(model_file, device="cpu")
    made_by = {
        "command": command,
        "seed": model.seed,
        "frames": action_repeat * model.num_timesteps,
        "updates": model._n_updates,
        "versions": versions(),
    }
    agent = TrainedAgent(name, folder / f"{name}.pt", env, action_repeat, True, {}, made_by)
    for kind, deterministic in (("most probable", True), ("sampled", False)):
        agent.returns[kind] = evaluate(agent, model, deterministic)
    agent = agent._replace(deterministic=agent.returns["most probable"]["mean"] >= agent.returns["sampled"]["mean"])
    folder.mkdir(exist_ok=True)
    model.policy.save(agent.file)
    file = folder / LIST
    entries = yaml.safe_load(file.read_text()) if file.exists() else {}
    entries[name] = {key: value for key, value in agent._asdict().items() if key not in ("name", "file")}
    with atomic_file(file) as out:
        out.write(yaml.safe_dump(dict(sorted(entries.items())), sort_keys=False, width=120).encode())
    return agent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the agent")
    parser.add_argument("model", type=Path, help="saved by model.save")
    parser.add_argument("--env", required=True, help="id of the environment")
    parser.add_argument("--action-repeat", type=int, default=1)
    parser.add_argument("--command", required=True, help="that trained it")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    th.set_num_threads(1)
    agent = add(args.name, args.model, args.env, args.action_repeat, args.command, args.folder)
    print(f"{agent.file}: {agent.returns}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
