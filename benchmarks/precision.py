"""Losses after some updates in bfloat16 beside those in float32, from the same seeds.

Usage: python -m benchmarks.precision [--task cartpole-swingup] [--size 1m] [--updates 200] [--seeds 0 1 2 3 4]
       [--device cpu]

Each run learns from the same number of steps of a dm_control task, collected with the untrained policy. The seeds' spread in
float32 is the measure: a precision that changes a loss by less than chance does changes nothing.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from benchmarks.walker import filled_model
from sb3_dreamer_gpld.envs import make_dmc

LAST = 20  # updates over which the losses are averaged


def losses(args: argparse.Namespace, precision: str, seed: int) -> dict[str, float]:
    """Mean of every loss over the last updates of a run."""
    model = filled_model(
        env=make_dmc(args.task, action_repeat=2, seed=seed),
        model_size=args.size,
        precision=precision,
        batch_size=8,
        batch_length=16,
        learning_rate=3e-4,
        learning_rate_warmup=50,
        buffer_size=5000,
        compile=False,
        device=args.device,
        seed=seed,
    )
    model.train(args.updates - LAST, model.batch_size)
    model.learner.metrics.take()
    model.train(LAST, model.batch_size)
    return {name: value for name, value in model.learner.metrics.take().items() if name.startswith("loss/")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cartpole-swingup", help="of dm_control")
    parser.add_argument("--size", default="1m")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    runs = {precision: [losses(args, precision, seed) for seed in args.seeds] for precision in ("float32", "bfloat16")}
    print("| loss | float32, lowest to highest seed | bfloat16, lowest to highest seed | mean of bfloat16 within |")
    print("| --- " * 4 + "|")
    for name in runs["float32"][0]:
        single, half = (np.array([run[name] for run in runs[precision]]) for precision in runs)
        within = "yes" if single.min() <= half.mean() <= single.max() else "NO"
        print(f"| {name} | {single.min():.4g} to {single.max():.4g} | {half.min():.4g} to {half.max():.4g} | {within} |")


if __name__ == "__main__":
    sys.exit(main())
