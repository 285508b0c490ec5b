"""What a run is judged by, and how arms are compared. docs/evidence.md says what of it was fixed when.

Scores are those of whole runs: the mean return of all training episodes (the area under the curve), and of those in the last
tenth of the frames, divided by 1000, the largest return. Aggregates are interquartile means over tasks and seeds, as in
Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021), whose probability of
improvement is the one here. Differences are those of equal seeds; what decides is their mean, in the area under the curve, of
the published arm from none over all tasks. Intervals are percentiles of a bootstrap that draws seeds for each task by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata, t

from benchmarks.evidence.protocol import FRAMES, PENALTIES, SEEDS, TASKS, complete
from benchmarks.learning.ladder import Job, evaluated
from benchmarks.results import read_columns
from sb3_dreamer_gpld.zoo.plot import Style, interquartile_mean

LAST_SHARE = 0.1  # of the frames, over which the end of a run is averaged
LARGEST_RETURN = 1000.0
STYLE = Style(size=0.95, reps=2000)


class Score(NamedTuple):
    """What a run is judged by.

    :param title: in tables
    :param of: the score of a run
    """

    title: str
    of: Callable[[Job], float]


def mean_return(job: Job, begin: float) -> float:
    """Mean return of the training episodes that end after ``begin`` frames, up to the end, divided by the largest one."""
    columns = read_columns(job.file)
    within = (columns["frames"] > begin) & (columns["frames"] <= FRAMES)
    return float(columns["episode_return"][within].mean()) / LARGEST_RETURN


AREA = Score("area under the curve", lambda job: mean_return(job, 0.0))
LAST = Score("last tenth", lambda job: mean_return(job, (1.0 - LAST_SHARE) * FRAMES))
EVALUATED = Score(
    "evaluated, most probable actions",
    lambda job: evaluated(job.arm, job.task, job.seed, FRAMES, "deterministic") / LARGEST_RETURN,
)


def scores_of(arm: str, score: Score, tasks: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Scores of an arm, (seeds, tasks, 1)."""
    return np.array([[[score.of(Job(arm, task, seed, FRAMES))] for task in tasks] for seed in seeds])


def better() -> str | None:
    """The penalty that returned more, which is run with other weights, too; None: the arms are not finished."""
    if complete() != (TASKS, SEEDS):
        return None
    areas = {arm: interquartile_mean(scores_of(arm, AREA, TASKS, SEEDS))[0] for arm in PENALTIES}
    return max(areas, key=areas.__getitem__)


def students_interval(differences: np.ndarray) -> tuple[float, float]:
    """Interval of a mean by Student's t, wider than the bootstrap's where seeds are few.

    The variance is that of the seeds within each task, with Welch's degrees of freedom (Biometrika 1947), since tasks are not
    equally noisy.

    :param differences: (seeds, tasks, 1), of two seeds or more
    """
    seeds, tasks, _ = differences.shape
    variances = differences[..., 0].var(0, ddof=1) / seeds  # (tasks,), of each task's mean
    if not (total := variances.sum()):
        return differences.mean(), differences.mean()
    freedom = (seeds - 1) * total**2 / (variances**2).sum()
    return t.interval(STYLE.size, freedom, differences.mean(), np.sqrt(total) / tasks)


def relative(pairs: np.ndarray) -> np.ndarray:
    """Mean score of the one arm in per cent more than that of the other, (1,).

    :param pairs: scores of both, (seeds, tasks, 2)
    """
    one, other = pairs.mean((0, 1))
    return np.array([100.0 * (one / other - 1.0)])


def improvement(pairs: np.ndarray) -> np.ndarray:
    """Probability that a run of the one arm scores more than one of the other on the same task, mean over the tasks, (1,).

    :param pairs: scores of both, (seeds, tasks, 2)
    """
    one, other = pairs[:, None, :, 0], pairs[None, :, :, 1]  # (seeds, 1, tasks), (1, seeds, tasks)
    return ((one > other) + 0.5 * (one == other)).mean((0, 1)).mean(keepdims=True)


def improvement_interval(pairs: np.ndarray, style: Style = STYLE) -> np.ndarray:
    """Its interval, from seeds drawn for each task and arm by itself, (2, 1)."""
    generator, (seeds, tasks, _) = np.random.default_rng(0), pairs.shape
    samples = []
    for _ in range(style.reps):
        drawn = [np.take_along_axis(pairs[..., arm], generator.integers(seeds, size=(seeds, tasks)), 0) for arm in range(2)]
        samples.append(improvement(np.stack(drawn, -1)))
    return np.percentile(samples, [50 * (1 - style.size), 50 * (1 + style.size)], axis=0)


def rank_correlations(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Spearman's correlation of two measures over the runs of each task that has one.

    :param x, y: (runs, tasks); a run that either is missing of, NaN, is left out, and so is a task on which one is constant
    """
    found = []
    for one, other in zip(x.T, y.T, strict=True):
        there = np.isfinite(one) & np.isfinite(other)
        ranks = [rankdata(each[there]) for each in (one, other)]
        if there.sum() > 1 and all(np.ptp(each) > 0 for each in ranks):
            found.append(float(np.corrcoef(*ranks)[0, 1]))
    return found


def within_arms(values: np.ndarray) -> np.ndarray:
    """Values of runs without what the runs of their arm have in common on a task.

    :param values: (arms, seeds, tasks), NaN where there is none
    :return: (arms · seeds, tasks)
    """
    there = np.isfinite(values)
    means = np.where(there, values, 0.0).sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True), 1)
    return (values - means).reshape(-1, values.shape[-1])


def ratios(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Geometric means over the seeds of the ratios of two measures, (tasks,); NaN where none is there or a number above 0.

    :param one, other: (seeds, tasks)
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(one / other)
    found = (column[np.isfinite(column)] for column in logs.T)
    return np.array([np.exp(each.mean()) if len(each) else np.nan for each in found])


def ratio(one: np.ndarray, other: np.ndarray) -> float:
    """Geometric mean of them over the tasks, too."""
    by_task = ratios(one, other)
    measured = by_task[np.isfinite(by_task)]
    return float(np.exp(np.log(measured).mean())) if len(measured) else float("nan")
