"""Make the blocks that are missing: the runs of one task and one seed in all arms, and then their measures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.evidence.measuring import can_be_measured, is_measured, measure
from benchmarks.evidence.protocol import every_block, other_weights
from benchmarks.evidence.scores import better
from benchmarks.learning.ladder import Job, run_all


def blocks() -> Iterator[list[Job]]:
    """All of them, in the order that they are made in; those of the other weights are known when the others are finished."""
    yield from every_block()
    if arm := better():
        yield from every_block(other_weights(arm))


def run(workers: int, runs: Path, most: float) -> int:
    """Make the blocks that are missing.

    :param workers: runs side by side
    :param runs: folder of the checkpoints
    :param most: at most so many
    :return: how many runs failed
    """
    failed = made = 0
    for jobs in blocks():
        finished = all(job.finished for job in jobs)
        if finished and all(map(is_measured, jobs)):
            continue
        if finished and not can_be_measured(jobs, runs):
            print(f"{jobs[0].task} {jobs[0].seed}: not measured, since a checkpoint is lost", flush=True)
            continue
        if made >= most:
            break
        made += 1
        in_block = run_all(jobs, workers, runs)
        failed += in_block
        if in_block == 0 and can_be_measured(jobs, runs):
            measure(jobs, runs)
    return failed
