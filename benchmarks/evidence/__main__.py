"""Does the penalty help? Runs with and without it, what they return, and what it changes on the way.

Usage: python -m benchmarks.evidence run [--workers 2] [--runs runs/evidence] [--blocks N]
       python -m benchmarks.evidence page

Arms are the four of ``protocol.py`` (``learning/arms.yml`` has their settings), the same tasks and seeds in each. A block is
one task and one seed in all arms: its runs are made side by side, each goes on where it was stopped, and their models are then
measured on the same episodes, two of each of them. ``run`` makes the missing blocks, those of the first seed first, and then
those of the better penalty with other weights; ``--blocks`` ends it after so many. Results are added to
``learning/ladder/ARM``: the training episodes, the evaluation at the end, ``TASK_SEED_measures.csv``, and the actions of the
episodes that models are measured on. ``page`` writes the tables of docs/evidence.md and its figure from them (``make
evidence``). How the arms are compared is in ``scores.py``.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.evidence.page import write
from benchmarks.evidence.running import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="make the blocks that are missing")
    runner.add_argument("--workers", type=int, default=2)
    runner.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="folder of the checkpoints")
    runner.add_argument("--blocks", type=float, default=math.inf, help="at most so many")
    commands.add_parser("page", help="write the tables and the figure of docs/evidence.md")
    args = parser.parse_args()
    if args.command == "run":
        return min(1, run(args.workers, args.runs, args.blocks))
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
