"""What is run: arms, tasks and seeds; and which of their runs are finished."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.learning.ladder import Job

NONE = "penalty-none"
ARMS = {NONE: "none", "penalty-posterior": "posterior (published)", "penalty-prior": "prior", "penalty-both": "both"}
PENALTIES = tuple(arm for arm in ARMS if arm != NONE)
WEIGHTS = ("0.05", "5")  # λ₀ of the better penalty, beside 0.5
GROUPS = {
    "hard locomotion": ("walker-walk", "cheetah-run", "quadruped-walk", "hopper-hop"),
    "others": ("reacher-hard", "cartpole-swingup"),
}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
SEEDS = (20, 21, 22, 23)  # which no setting was chosen by
FRAMES = 40_000


def jobs_of(task: str, seed: int, arms: Iterable[str] = ARMS) -> list[Job]:
    """The runs of a block."""
    return [Job(arm, task, seed, FRAMES) for arm in arms]


def every_block(arms: Iterable[str] = ARMS) -> list[list[Job]]:
    """The runs of all blocks, those of the first seed first."""
    arms = tuple(arms)
    return [jobs_of(task, seed, arms) for seed in SEEDS for task in TASKS]


def other_weights(arm: str) -> list[str]:
    """The arms with a penalty's other weights."""
    return [f"{arm}-{weight}" for weight in WEIGHTS]


def checkpoint(job: Job, runs: Path) -> Path:
    """Of a run, in the folder of the checkpoints."""
    return runs / job.arm / f"{job.task}_{job.seed}" / "model.zip"


def measures_file(job: Job) -> Path:
    """What was measured of a run's model, a row for the episodes of each arm."""
    return job.file.with_name(f"{job.file.stem}_measures.csv")


def actions_file(job: Job) -> Path:
    """Actions of the episodes that a run's model collected, by which they can be played again."""
    return job.file.with_name(f"{job.file.stem}_actions.npz")


class Seeds(NamedTuple):
    """The seeds that arms have finished on every task that has any.

    :param tasks: with at least one such seed
    :param seeds: which, as many for each task
    """

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]

    def jobs(self, arms: Iterable[str] = ARMS) -> list[Job]:
        """Their runs in some arms."""
        arms = tuple(arms)
        return [job for task in self.tasks for seed in self.seeds for job in jobs_of(task, seed, arms)]


def complete(arms: Iterable[str] = ARMS) -> Seeds:
    """What can be compared: tasks of which the first seeds are finished in the arms, as many seeds as all these have."""
    counts = {}
    for task in TASKS:
        done = [all(job.finished for job in jobs_of(task, seed, arms)) for seed in SEEDS]
        counts[task] = done.index(False) if False in done else len(done)
    tasks = tuple(task for task, count in counts.items() if count)
    return Seeds(tasks, SEEDS[: min((counts[task] for task in tasks), default=0)])
