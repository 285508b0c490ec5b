"""What it costs to learn in several processes: the all-reduce of the gradients, and whole updates.

Usage: python -m benchmarks.data_parallel [--sizes 1m 12m 50m] [--processes 2] [--repeats 11]
       python -m benchmarks.data_parallel --updates [--size 1m] [--batch 16] [--length 64]
       python -m benchmarks.data_parallel --paper

The first form times the exchange of one update on this machine, with gloo over loopback. The second one lets one process with
the whole batch and several with their share of it take turns, one thread each. The last one carries the bytes of an update to
GPUs, on paper: a ring all-reduce moves 2·(n − 1)/n of them through each link. Let nothing run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch as th

from benchmarks.walker import WalkerSized, filled_model
from sb3_dreamer_gpld import DreamerGPLD, parallel
from sb3_dreamer_gpld.parallel import ALONE, Processes

SIZES = ("1m", "12m", "50m")
# Bytes per second that an all-reduce gets: NVLink of an H100 as NCCL's own tests report it, and Ethernet of 25 Gbit/s
LINKS = {"NVLink": 300e9, "25 Gbit/s Ethernet": 25e9 / 8}
# Milliseconds that an update of 16×64 is assumed to take on a GPU
ASSUMED_MS = 22.0


def numbers_of(size: str) -> int:
    """Numbers in the gradient of a model of walker-walk's spaces."""
    model = DreamerGPLD("MultiInputPolicy", WalkerSized(), model_size=size, device="cpu", buffer_size=100)
    return sum(p.numel() for p in model.policy.parameters() if p.requires_grad)


def exchange(processes: Processes, numbers: int, repeats: int) -> float:
    """Median seconds in which the processes average a gradient, the copies to and from one row included."""
    gradient, seconds = [th.ones(numbers // 100) for _ in range(100)], []
    for _ in range(repeats + 1):
        processes.barrier()
        start = time.perf_counter()
        processes.average_(gradient)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def updates(processes: Processes, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of an update of the whole batch by the first process alone, and by all of them together."""
    model = filled_model(
        env=WalkerSized(),
        model_size=args.size,
        batch_size=args.batch,
        batch_length=args.length,
        precision="float32",
        device="cpu",
    )
    ways = {"alone": ALONE, "together": model.processes}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats + 1):
        for name, those in ways.items():
            processes.barrier()
            model.processes = model.learner.processes = those
            model.policy.actor_critic.gather = those.gather
            if those.size > 1 or processes.is_first:
                start = time.perf_counter()
                model.train(1, args.batch)
                found[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[1:])) for name, values in found.items() if values}


def on_paper(numbers: dict[str, int]) -> Iterator[str]:
    """Markdown: what the exchange would take on GPUs, and its share of an update that takes ``ASSUMED_MS``."""
    yield "| size | bytes of a gradient | link | 2 GPUs | 4 GPUs | 8 GPUs |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for size, count in numbers.items():
        for link, speed in LINKS.items():
            cells = []
            for n in (2, 4, 8):
                ms = 1e3 * 2 * (n - 1) / n * 4 * count / speed
                cells.append(f"{ms:.2g} ms ({ms / (ms + ASSUMED_MS):.0%})")
            yield f"| {size} | {4 * count / 1e6:.3g} MB | {link} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--updates", action="store_true")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--size", default="1m", help="of --updates")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    if args.paper:
        print("\n".join(on_paper({size: numbers_of(size) for size in args.sizes})))
        return 0
    if "WORLD_SIZE" not in os.environ:
        run = [
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(args.processes),
            "-m",
            "benchmarks.data_parallel",
        ]
        command = [sys.executable, "-m", *run, *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    th.set_num_threads(1)
    processes = parallel.current()
    if args.updates:
        found = {"size": args.size, "batch": args.batch, "length": args.length, "processes": processes.size}
        found |= updates(processes, args)  # type: ignore[arg-type]
        if processes.is_first:
            print(json.dumps(found), flush=True)
        return 0
    for size in args.sizes:
        count = numbers_of(size)
        seconds = exchange(processes, count, args.repeats)
        if processes.is_first:
            print(json.dumps({"size": size, "numbers": count, "megabytes": 4e-6 * count, "ms": 1e3 * seconds}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
