"""How often intervals of docs/evidence.md hold the truth, in a simulation.

Usage: python -m benchmarks.evidence.coverage [--simulations 500]

Scores of two equal arms are normal numbers, so that their true difference is 0, and the true probability of improvement ½.
They have the same deviation on every task, or the one that the differences between the published penalty and none have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks.evidence.page import header
from benchmarks.evidence.protocol import GROUPS, NONE, PENALTIES, SEEDS, TASKS, Seeds, complete
from benchmarks.evidence.scores import AREA, improvement_interval, scores_of, students_interval
from sb3_dreamer_gpld.zoo.plot import Style, interval, mean

STYLE = Style(size=0.95, reps=500)
PUBLISHED = PENALTIES[0]


def coverage(seeds: int, noise: Sequence[float], simulations: int) -> tuple[float, float, float]:
    """Share of simulations in which an interval has the truth.

    :param seeds: of each arm
    :param noise: standard deviation of the scores on each task
    :param simulations: how many
    :return: of the mean difference by the bootstrap and by Student's t, and of the probability of improvement
    """
    generator = np.random.default_rng(0)
    differences = students = improvements = 0
    for _ in range(simulations):
        pairs = generator.standard_normal((seeds, len(noise), 2)) * np.asarray(noise)[:, None]  # (seeds, tasks, 2)
        difference = pairs[..., :1] - pairs[..., 1:]  # (seeds, tasks, 1)
        low, high = interval(difference, mean, STYLE)
        differences += int(low[0] <= 0.0 <= high[0])
        low, high = students_interval(difference)
        students += int(low <= 0.0 <= high)
        low, high = improvement_interval(pairs, STYLE)
        improvements += int(low[0] <= 0.5 <= high[0])
    return differences / simulations, students / simulations, improvements / simulations


def noise_seen(found: Seeds) -> dict[str, float]:
    """Standard deviation over the seeds of the difference between the published penalty and none, by task."""
    difference = scores_of(PUBLISHED, AREA, *found) - scores_of(NONE, AREA, *found)  # (seeds, tasks, 1)
    return dict(zip(found.tasks, difference[..., 0].std(0, ddof=1).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=500)
    args = parser.parse_args()
    print("\n".join(header("noise", "tasks", "seeds", "mean difference", "by Student's t", "probability of improvement")))
    for kind, noise in (("equal", dict.fromkeys(TASKS, 1.0)), ("as seen", noise_seen(complete()))):
        for name, tasks in {"all": TASKS, **GROUPS}.items():
            for seeds in range(2, len(SEEDS) + 1):
                shares = coverage(seeds, [noise[task] for task in tasks], args.simulations)
                print(f"| {kind} | {name} | {seeds} | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
