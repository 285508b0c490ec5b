"""How long one update takes, beside a yardstick of the machine measured in the same run.

Usage: python -m benchmarks.update_time --size 1m [--penalty 0.5] [--precision float32] [--compile] [--batch 16]
       [--length 64] [--horizon 15] [--repeats 11] [--device cpu] [--json FILE] [--reconstruction redundancy] [--image 64]

Updates and yardstick alternate; medians are printed. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from typing import Any

import numpy as np
import torch as th
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import write_json
from benchmarks.timers import timers
from benchmarks.walker import ImageSized, add_arguments, model_of
from benchmarks.yardstick import FLOP, Yardstick, synchronize
from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.config import RECONSTRUCTIONS
from sb3_dreamer_gpld.execution import plain_steps


def phases(model: DreamerGPLD) -> list[tuple[str, Any, str]]:
    """The methods that an update consists of."""
    policy = model.policy
    return [
        ("sample", model.replay_buffer, "sample"),
        ("refresh latents", model.replay_buffer, "update_latents"),
        ("encode", policy.world_model, "encode_targets"),
        ("observe", policy.world_model.rssm, "observe"),
        ("world model", policy.world_model, "loss"),
        ("imagine", policy.actor_critic, "_roll_out"),
        ("actor-critic", policy.actor_critic, "loss"),
        ("losses", model.learner, "weighted_loss"),
        ("random numbers", model.learner, "draw"),
        ("optimiser", policy.optimizer, "step"),
        ("update", model.learner, "update"),
    ]


def exclusive(seconds: dict[str, list[float]], total: float) -> dict[str, float]:
    """Median milliseconds of each phase without the phases inside it."""
    ms = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
    ms["world-model losses"] = ms.pop("world model") - ms["encode"] - ms["observe"]
    ms["actor-critic"] -= ms["imagine"]
    ms["backward and rest"] = ms.pop("update") - ms.pop("losses") - ms["optimiser"] - ms["random numbers"]
    ms["total"] = 1e3 * total
    return ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1m")
    parser.add_argument("--penalty", type=float, default=0.5, help="λ₀ of the posterior")
    parser.add_argument("--actor-gradient", choices=("reinforce", "dynamics"), default="reinforce")
    parser.add_argument("--reconstruction", choices=RECONSTRUCTIONS, default="decoder", help="entry of policy_kwargs")
    parser.add_argument("--image", type=int, metavar="SIDE", help="observe images of that side in place of vectors")
    parser.add_argument("--starts", type=int, help="imagination_starts; default: all states")
    add_arguments(parser, repeats=11)
    args = parser.parse_args()

    model = model_of(
        args,
        model_size=args.size,
        posterior_penalty=args.penalty,
        actor_gradient=args.actor_gradient,
        imagination_starts=args.starts,
        env=None if args.image is None else ImageSized(args.image),
        policy_kwargs=dict(reconstruction=args.reconstruction),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yardstick = Yardstick(model.device)
    for _ in range(2):
        model.train(1, args.batch)
    updates, yards = [], []
    for _ in range(args.repeats):
        yards.append(yardstick())
        synchronize(model.device)
        start = time.perf_counter()
        model.train(1, args.batch)
        synchronize(model.device)
        updates.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.learner.execution.recorder = None  # a CUDA graph has no phases
    with timers(phases(model), model.device) as seconds:
        for _ in range(args.repeats):
            model.train(1, args.batch)
    with plain_steps(model.policy), FlopCounterMode(display=False) as counter:  # it sees into no compiled function
        model.train(1, args.batch)
    flop = counter.get_total_flops()

    update, yard = float(np.median(updates)), float(np.median(yards))
    result = {
        "size": args.size,
        "reconstruction": args.reconstruction,
        "image": args.image,
        "threads": th.get_num_threads(),
        "update_ms": 1e3 * update,
        "update_ms_range": [1e3 * min(updates), 1e3 * max(updates)],
        "yardstick_ms": 1e3 * yard,
        "ratio": float(np.median(np.array(updates) / np.array(yards))),
        "gflop": flop / 1e9,
        "share_of_yardstick_rate": flop / update / (FLOP / yard),
        "extra_memory_mib": (peak - before) / 1024,
        "phases_ms": exclusive(seconds, update),
    }
    observed = "24 numbers" if args.image is None else f"images of {args.image}x{args.image} pixels"
    print(f"observations: {observed}, reconstruction: {args.reconstruction}")
    print(f"size {args.size}, batch {args.batch}x{args.length}, horizon {args.horizon}, penalty {args.penalty}, "
          f"{args.precision}, {'compiled' if args.compile else 'not compiled'}, {result['threads']} threads")  # fmt: skip
    low, high = result["update_ms_range"]
    print(f"update     {result['update_ms']:8.1f} ms   (median of {args.repeats}; {low:.1f} to {high:.1f})")
    print(f"yardstick  {result['yardstick_ms']:8.1f} ms   ({FLOP / 1e9:.0f} GFLOP of float32 matrix products)")
    print(f"ratio      {result['ratio']:8.2f}")
    print(f"work       {result['gflop']:8.1f} GFLOP, {100 * result['share_of_yardstick_rate']:.0f} % of the yardstick's rate")
    print(f"memory     {result['extra_memory_mib']:8.0f} MiB more at the peak than before the first update")
    for name, ms in sorted(result["phases_ms"].items(), key=lambda item: -item[1]):
        print(f"  {name:<20} {ms:8.1f} ms")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    sys.exit(main())
