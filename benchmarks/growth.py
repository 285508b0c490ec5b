"""How the time and memory of an update grow with the size of the nets, the batch and the horizon.

Usage: python -m benchmarks.growth [--sizes 1m 12m 25m 50m] [--repeats 5] [--json FILE]

One argument is changed at a time from size 1m, batch 16x64, horizon 15. Each row is measured in a process of its own, which
gives its peak memory, with the yardstick beside it. Let nothing else run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import write_json

BASE = {"size": "1m", "batch": 16, "length": 64, "horizon": 15}
CHANGES: dict[str, tuple[int, ...]] = {"batch": (8, 32), "length": (32, 128), "horizon": (30, 50)}


def measure(repeats: int, **setting: Any) -> dict[str, Any]:
    """Result of ``benchmarks.update_time`` in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        options = [f"--{name}={value}" for name, value in setting.items()]
        command = [sys.executable, "-m", "benchmarks.update_time", *options, f"--repeats={repeats}", f"--json={file}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["12m", "25m", "50m"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = [BASE, *({**BASE, name: value} for name, values in CHANGES.items() for value in values)]
    settings += [{**BASE, "size": size} for size in args.sizes]
    results = []
    columns = ("size", "batch", "length", "horizon", "update, ms", "× the first row", "× the yardstick", "GFLOP", "extra MiB")
    print(f"| {' | '.join(columns)} |")
    print("| ---: " * len(columns) + "|")
    for setting in settings:
        result = measure(args.repeats if setting["size"] == "1m" else min(3, args.repeats), **setting)
        results.append({**setting, **result})
        share = result["update_ms"] / results[0]["update_ms"]
        cells = [setting["size"], setting["batch"], setting["length"], setting["horizon"], f"{result['update_ms']:.0f}"]
        cells += [f"{share:.2f}", f"{result['ratio']:.2f}", f"{result['gflop']:.0f}", f"{result['extra_memory_mib']:.0f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    sys.exit(main())
