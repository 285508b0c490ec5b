"""How often intervals of docs/evidence.md hold the truth, in a simulation.

Usage: python -m benchmarks.evidence.coverage [--simulations 500]

Scores of two equal arms are normal numbers, so that their true difference is 0, and the true probability of improvement ½.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from benchmarks.evidence.page import header
from benchmarks.evidence.protocol import GROUPS, SEEDS, TASKS
from benchmarks.evidence.scores import improvement_interval
from sb3_dreamer_gpld.zoo.plot import Style, interval, mean

STYLE = Style(size=0.95, reps=500)
SIZES = {"all": len(TASKS), **{name: len(tasks) for name, tasks in GROUPS.items()}}


def coverage(seeds: int, tasks: int, simulations: int) -> tuple[float, float]:
    """Share of simulations in which the interval of the mean difference, and of the probability of improvement, has the truth.

    :param seeds, tasks: of each arm
    :param simulations: how many
    """
    generator = np.random.default_rng(0)
    differences = improvements = 0
    for _ in range(simulations):
        pairs = generator.standard_normal((seeds, tasks, 2))
        low, high = interval(pairs[..., :1] - pairs[..., 1:], mean, STYLE)
        differences += int(low[0] <= 0.0 <= high[0])
        low, high = improvement_interval(pairs, STYLE)
        improvements += int(low[0] <= 0.5 <= high[0])
    return differences / simulations, improvements / simulations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=500)
    args = parser.parse_args()
    print("\n".join(header("tasks", "seeds", "mean difference", "probability of improvement")))
    for name, tasks in SIZES.items():
        for seeds in range(2, len(SEEDS) + 1):
            shares = coverage(seeds, tasks, args.simulations)
            print(f"| {name} | {seeds} | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
