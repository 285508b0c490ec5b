"""Run a protocol, seed by seed, and go on where it was stopped.

Usage: python -m benchmarks.learning.run p2 [--arms gpld dreamer] [--seeds 0 1] [--threads 2] [--compile]

After every few episodes the model, its replay buffer and the results so far are saved, so the command can be killed and
repeated at any time; what is finished is left alone. The results are ``benchmarks/learning/results/PROTOCOL_ARM_SEED``
with ``_returns.csv`` (every training episode, actions sampled) and ``_losses.csv`` (means over the updates of an episode).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from benchmarks.learning.protocols import (
    ACTION_REPEAT,
    ARMS,
    EPISODE_FRAMES,
    PROTOCOLS,
    RESULTS,
    Protocol,
    algorithm,
    make_env,
    make_model,
)
from benchmarks.results import read_csv, write_csv

EPISODES_PER_SAVE = 2
DIGITS = 5


class CheckpointMissing(FileNotFoundError):
    """A run cannot go on."""


class LastValues(KVWriter):
    """Keeps the values of the last log."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.values = dict(key_values)

    def close(self) -> None:
        pass


def rows_until(path: Path, frames: int) -> list[dict[str, Any]]:
    """Rows of a CSV file up to a number of frames."""
    return [row for row in read_csv(path) if int(row["frames"]) <= frames]


def run(name: str, protocol: Protocol, arm: str, seed: int, folder: Path, compile: bool | str) -> None:
    """One run of a protocol, from where it was stopped.

    :param name: of the protocol
    :param protocol: what to run
    :param arm: in :data:`~benchmarks.learning.protocols.ARMS`
    :param seed: of everything
    :param folder: of the checkpoints
    :param compile: as in DreamerGPLD
    :raises CheckpointMissing: it was stopped, and would overwrite its results
    """
    stem = f"{name}_{arm}_{seed}"
    returns_file, losses_file = RESULTS / f"{stem}_returns.csv", RESULTS / f"{stem}_losses.csv"
    steps = protocol.frames // ACTION_REPEAT
    episode = EPISODE_FRAMES // ACTION_REPEAT
    checkpoint, buffer_file = folder / stem / "model.zip", folder / stem / "buffer.pkl"
    model: OffPolicyAlgorithm
    if checkpoint.exists() and buffer_file.exists():
        model = algorithm(arm).load(checkpoint, env=make_env(protocol, arm, seed), device="cpu")  # type: ignore[assignment]
        model.load_replay_buffer(buffer_file)
        assert model.env is not None
        model.env.seed(1000 * seed + model.num_timesteps)  # not the first episode's start again
    else:
        if len(rows_until(returns_file, protocol.frames)) > EPISODES_PER_SAVE:
            absent = buffer_file if checkpoint.exists() else checkpoint
            raise CheckpointMissing(
                f"{absent} is missing, from which the run of {returns_file.name} would go on, and beginning it anew would "
                f"overwrite its results. Allowed: other --arms or --seeds, or move {stem}_*.csv away first"
            )
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        model = make_model(protocol, arm, seed, compile)  # type: ignore[assignment]
    frames = ACTION_REPEAT * model.num_timesteps
    returns, losses = rows_until(returns_file, frames), rows_until(losses_file, frames)
    seconds = float(returns[-1]["seconds"]) if returns else 0.0
    log = LastValues()
    model.set_logger(Logger(None, [log]))
    while model.num_timesteps < steps:
        start = time.perf_counter()
        model.learn(episode, reset_num_timesteps=False, log_interval=1)
        seconds += time.perf_counter() - start
        frames = ACTION_REPEAT * model.num_timesteps
        assert model.ep_info_buffer
        ended = model.ep_info_buffer[-1]
        returns.append({"frames": frames, "episode_return": float(ended["r"]), "seconds": f"{seconds:.0f}"})
        metrics = {key: value for key, value in log.values.items() if not key.startswith(("time/", "rollout/"))}
        if "loss/total" in metrics:
            losses.append({"frames": frames, **{key: metrics[key] for key in sorted(metrics)}})
        print(f"{stem}: {frames} frames, return {ended['r']:.1f}, {seconds:.0f} s", flush=True)
        if len(returns) % EPISODES_PER_SAVE == 0 or model.num_timesteps >= steps:
            write_csv(returns_file, returns, DIGITS)  # first: rows that are too new are left out when the run goes on
            if losses:
                write_csv(losses_file, losses, DIGITS)
            model.save_replay_buffer(buffer_file)
            model.save(checkpoint)


def finished(name: str, protocol: Protocol, arm: str, seed: int) -> bool:
    """Whether the results of a run reach its last frame."""
    rows = rows_until(RESULTS / f"{name}_{arm}_{seed}_returns.csv", protocol.frames)
    return bool(rows) and int(rows[-1]["frames"]) >= protocol.frames


def main() -> int:
    """:return: exit status, 1 if a run could not go on"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=tuple(PROTOCOLS))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), help="default: all of the protocol")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all of the protocol")
    parser.add_argument("--threads", type=int, default=th.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="compile the update")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of the checkpoints")
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    protocol = PROTOCOLS[args.protocol]
    RESULTS.mkdir(exist_ok=True)
    status = 0
    for seed in args.seeds or protocol.seeds:
        for arm in args.arms or protocol.arms:
            if finished(args.protocol, protocol, arm, seed):
                print(f"{args.protocol} {arm} {seed}: is finished, and left alone")
                continue
            try:
                run(args.protocol, protocol, arm, seed, args.runs, args.compile)
            except CheckpointMissing as error:
                print(error)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
