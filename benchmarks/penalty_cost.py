"""What the GPLD penalty costs: time and peak memory of an update without it, with Hutchinson's estimator, and exact.

Usage: python -m benchmarks.penalty_cost [--sizes 1m 12m] [--repeats 15] [--batch 16] [--length 64] [--horizon 15]
       [--precision float32] [--compile] [--device cpu] [--json FILE]

The posterior is penalised at half of the states and in all rows, the paper's setting. In each repeat every arm makes one
update, in an order that rotates, and a yardstick is timed between them; ratios are medians over the repeats. Peak memory is
the largest resident set of a process of its own, the median of three. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch as th

from benchmarks.results import write_json
from benchmarks.walker import add_arguments, model_of
from benchmarks.yardstick import Yardstick, synchronize
from sb3_dreamer_gpld import DreamerGPLD

ARMS: dict[str, dict[str, Any]] = {
    "off": dict(posterior_penalty=0.0),
    "hutchinson": dict(posterior_penalty=0.5, penalty_fraction=0.5, penalty_estimator="hutchinson"),
    "exact": dict(posterior_penalty=0.5, penalty_fraction=0.5, penalty_estimator="exact"),
}
WARM_UP = 2  # updates before anything is timed
PROCESSES = 3  # whose peak memory is measured


def make(arm: str, size: str, args: argparse.Namespace) -> DreamerGPLD:
    """A model that has made its first updates."""
    model = model_of(args, model_size=size, **ARMS[arm])
    model.train(WARM_UP, args.batch)
    return model


def update_seconds(model: DreamerGPLD) -> float:
    """Time one update."""
    synchronize(model.device)
    start = time.perf_counter()
    model.train(1, model.batch_size)
    synchronize(model.device)
    return time.perf_counter() - start


def peak_mib(arm: str, size: str) -> float:
    """Median of the peak memory of processes that make some updates; they take the other arguments of this one.

    To be called while this process is small: a new one starts with the peak of the one that it comes from.
    """
    command = [sys.executable, "-m", "benchmarks.penalty_cost", *sys.argv[1:], "--sizes", size, "--peak-of", arm]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(PROCESSES)]
    return float(np.median([float(output.splitlines()[-1]) for output in outputs]))


def measure(size: str, peaks: dict[str, float], args: argparse.Namespace) -> list[dict[str, Any]]:
    """:return: a row of results for each arm"""
    models = {arm: make(arm, size, args) for arm in ARMS}
    yardstick = Yardstick(th.device(args.device))
    seconds: dict[str, list[float]] = {arm: [] for arm in (*ARMS, "yardstick")}
    for repeat in range(args.repeats):
        seconds["yardstick"].append(yardstick())
        order = list(ARMS)
        for arm in order[repeat % len(order) :] + order[: repeat % len(order)]:
            seconds[arm].append(update_seconds(models[arm]))
    rows = []
    for arm in ARMS:
        ratios = np.array(seconds[arm]) / np.array(seconds["off"])
        rows.append(
            {
                "size": size,
                "arm": arm,
                "update_ms": 1e3 * float(np.median(seconds[arm])),
                "ratio": float(np.median(ratios)),
                "ratio_quartiles": np.percentile(ratios, [25, 75]).tolist(),
                "peak_mib": peaks[arm],
                "peak_ratio": peaks[arm] / peaks["off"],
                "yardsticks": float(np.median(np.array(seconds[arm]) / np.array(seconds["yardstick"]))),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| size | penalty | update, ms | in yardsticks | ratio to off (quartiles) | peak memory, MiB | ratio to off |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['size']} | {row['arm']} | {row['update_ms']:.0f} | {row['yardsticks']:.2f} "
            f"| {row['ratio']:.3f} ({low:.3f} to {high:.3f}) | {row['peak_mib']:.0f} | {row['peak_ratio']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1m", "12m"])
    add_arguments(parser, repeats=15)
    parser.add_argument("--peak-of", choices=ARMS, help=argparse.SUPPRESS)  # what the processes of peak_mib do
    args = parser.parse_args()
    if args.peak_of:
        make(args.peak_of, args.sizes[0], args)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    peaks = {size: {arm: peak_mib(arm, size) for arm in ARMS} for size in args.sizes}
    rows = [row for size in args.sizes for row in measure(size, peaks[size], args)]
    print(
        f"batch {args.batch}x{args.length}, horizon {args.horizon}, {args.precision}, "
        f"{'compiled' if args.compile else 'not compiled'}, {th.get_num_threads()} threads, {args.repeats} repeats\n"
    )
    print(table(rows))
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    sys.exit(main())
