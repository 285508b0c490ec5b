"""What is run: tasks, frames, settings and arms of every protocol, and where its results lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import FlattenObservation
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.envs import make_dmc

HERE = Path(__file__).parent
RESULTS = HERE / "results"  # one CSV of returns and one of losses per run
REFERENCE = HERE / "reference"  # runs of the authors' release
ACTION_REPEAT = 2
EPISODE_FRAMES = 1000


@dataclass(frozen=True)
class Protocol:
    """One comparison.

    :param task: of dm_control, observed as numbers, every action applied twice
    :param frames: simulator steps; the agent makes half as many
    :param arms: names in :data:`ARMS`
    :param seeds: seeds of each arm
    :param settings: arguments of DreamerGPLD that differ from :data:`COMMON`
    :param reference: name of the authors' run in :data:`REFERENCE`, if there is one
    :param reference_arm: the arm with the settings of that run
    :param published: return of DreamerV3 at the last frame, as run by TD-MPC2's authors (mean of 3 seeds, larger nets)
    """

    task: str
    frames: int
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    reference_arm: str = "gpld"
    published: float | None = None


COMMON: dict[str, Any] = dict(
    model_size="1m",
    batch_size=16,
    batch_length=64,
    train_ratio=256,
    imagination_horizon=15,
    learning_starts=1024,
    learning_rate=4e-5,
    learning_rate_warmup=1000,
    posterior_penalty=0.5,
    penalty_fraction=0.5,
    penalty_schedule="sqrt_time",
    penalty_min=0.001,
    precision="float32",
    device="cpu",
)
# What arms change. "gpld" is the setting of the paper, "dreamer" the same without the penalty, and "gpld-rate" has a learning
# rate that makes up for nets 64 units wide, not 256 as the published ones: at one rate of LaProp, what a unit computes moves
# in proportion to the number of its inputs. "gpld-start" begins to update with one batch of 8×32 steps stored, as the authors'
# release does.
ARMS: dict[str, dict[str, Any]] = {
    "gpld": {},
    "gpld-rate": {"learning_rate": COMMON["learning_rate"] * 256 / 64},
    "gpld-start": {"learning_starts": 256},
    "dreamer": {"posterior_penalty": 0.0},
    "sac": {},
}
# As DreamerV3's published curves of control from vectors: bfloat16 products where they are faster.
AS_PUBLISHED: dict[str, Any] = {"train_ratio": 512, "precision": "auto"}
# What zoo_configs/dreamer_gpld_cpu.yml had for every environment before the search (the ladder's arm "before"): an eighth of
# the replayed steps of the published runs.
FOR_PROCESSORS: dict[str, Any] = {
    "learning_rate": 4e-4,
    "learning_rate_warmup": 200,
    "batch_size": 8,
    "batch_length": 32,
    "train_ratio": 64,
}
SEEDS = (0, 1, 2, 3, 4)
PROTOCOLS = {
    "p1": Protocol("walker-walk", 30_000, ("gpld",), SEEDS, reference="walker_walk_p1"),
    "p2": Protocol(
        "cartpole-swingup",
        20_000,
        ("gpld", "dreamer"),
        SEEDS,
        {"learning_rate": 3e-4, "learning_rate_warmup": 200},
        reference="cartpole_swingup_p2",
    ),
    "p3-walker": Protocol("walker-walk", 100_000, ("gpld", "gpld-rate", "sac"), (0, 1), AS_PUBLISHED, published=630),
    "p3-cartpole": Protocol("cartpole-swingup", 100_000, ("gpld", "gpld-rate", "sac"), (0, 1), AS_PUBLISHED, published=677),
    "p4-walker": Protocol(
        "walker-walk",
        100_000,
        ("gpld", "gpld-start"),
        (0, 1),
        FOR_PROCESSORS,
        reference="walker_walk_p4",
        reference_arm="gpld-start",
    ),
    "p4-cartpole": Protocol("cartpole-swingup", 100_000, ("gpld",), (0, 1), FOR_PROCESSORS),
}


def make_env(protocol: Protocol, arm: str, seed: int) -> gym.Env:
    """The task; SAC sees its observations as one vector."""
    env = make_dmc(protocol.task, action_repeat=ACTION_REPEAT, seed=seed)
    return Monitor(FlattenObservation(env) if arm == "sac" else env)


def make_model(protocol: Protocol, arm: str, seed: int, compile: bool | str) -> BaseAlgorithm:
    """A fresh model of an arm."""
    env = make_env(protocol, arm, seed)
    if arm == "sac":  # rl_zoo3's settings of SAC for continuous control: SB3's own defaults, and a longer warm-up
        return SAC("MlpPolicy", env, learning_starts=10_000, seed=seed, device="cpu")
    kwargs = {**COMMON, **protocol.settings, **ARMS[arm]}
    return DreamerGPLD("MultiInputPolicy", env, seed=seed, compile=compile, buffer_size=protocol.frames, **kwargs)


def algorithm(arm: str) -> type[BaseAlgorithm]:
    """The class that loads a run's checkpoint."""
    return SAC if arm == "sac" else DreamerGPLD
