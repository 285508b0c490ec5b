"""Environment steps per second of the whole training loop, and where the time goes.

Usage: python -m benchmarks.learn_time [--size 1m] [--envs 1 4 16] [--steps 256] [--train-ratio 512] [--env walker-walk]
       [--precision auto] [--compile] [--json FILE]

Without ``--env`` the environment is a stand-in with walker's spaces that takes no time, so that all that is left is the
algorithm's. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.results import write_json
from benchmarks.timers import timers
from benchmarks.walker import WalkerSized
from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.envs import make_dmc

WARM_UP = 1100


def measure(args: argparse.Namespace, n_envs: int) -> dict[str, Any]:
    """Train for a while with some environments.

    :return: steps per second, the median milliseconds of acting, and each phase's share of the time
    """
    make = (lambda: make_dmc(args.env, action_repeat=2)) if args.env else WalkerSized
    model = DreamerGPLD(
        "MultiInputPolicy",
        DummyVecEnv([make] * n_envs),
        seed=0,
        model_size=args.size,
        precision=args.precision,
        compile=args.compile,
        train_ratio=0.0,
        buffer_size=100_000,
    )
    model.learn(WARM_UP, log_interval=None)
    model.train_ratio = args.train_ratio
    model.train(2, model.batch_size)
    buffer = model.replay_buffer
    assert buffer is not None and model.env is not None
    targets = [
        ("update", model.learner, "update"),
        ("acting", model, "_sample_action"),
        ("environment", model.env, "step"),
        ("replay: add", buffer, "add"),
        ("replay: sample", buffer, "sample"),
        ("replay: refresh latents", buffer, "update_latents"),
    ]
    updates = model._n_updates
    with timers(targets, model.device) as seconds:
        start = time.perf_counter()
        model.learn(args.steps, log_interval=None, reset_num_timesteps=False)
        total = time.perf_counter() - start
    shares = {name: sum(values) / total for name, values in seconds.items()}
    shares["everything else"] = 1.0 - sum(shares.values())
    return {
        "envs": n_envs,
        "steps_per_second": args.steps / total,
        "updates": model._n_updates - updates,
        "acting_ms": 1e3 * float(np.median(seconds["acting"])),
        "update_ms": 1e3 * float(np.median(seconds["update"])),
        "shares": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1m")
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=256, help="environment steps over all environments")
    parser.add_argument("--train-ratio", type=float, default=512)
    parser.add_argument("--env", help="a dm_control task, such as walker-walk")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = [measure(args, n_envs) for n_envs in args.envs]
    names = list(results[0]["shares"])
    print("| environments | steps/s | updates | acting, ms | update, ms | " + " | ".join(names) + " |")
    print("| ---: " * (5 + len(names)) + "|")
    for result in results:
        shares = " | ".join(f"{100 * result['shares'][name]:.1f} %" for name in names)
        print(
            f"| {result['envs']} | {result['steps_per_second']:.1f} | {result['updates']} | {result['acting_ms']:.2f} | "
            f"{result['update_ms']:.0f} | {shares} |"
        )
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    sys.exit(main())
