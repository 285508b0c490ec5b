"""What a penalty changes in the models of a block: all are measured on the same episodes.

Each model of the four arms collects ``EPISODES`` with sampled actions, from the same starts; their actions are kept with the
results, and the episodes are always played again by them, so that models which are made later, on another machine, can be
measured on them, too. A row of the results is a model on the episodes of one arm. How smooth a model's own actions are is
measured on episodes of its own with the most probable actions, since sampled ones are as rough as their noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.evidence.protocol import ARMS, actions_file, checkpoint, jobs_of, measures_file
from benchmarks.learning.ladder import Job, make_env, read_arms
from benchmarks.learning.run import DIGITS
from benchmarks.results import read_csv, write_csv
from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.diagnostics import action_smoothness
from sb3_dreamer_gpld.nets.world_model import Batch
from sb3_dreamer_gpld.saving import atomic_file
from sb3_dreamer_gpld.zoo import diagnose
from sb3_dreamer_gpld.zoo.episodes import collect

EPISODES = 2  # of each model
MAX_STEPS = 1000
WINDOWS, STATES = 32, 256  # of the episodes of one arm
STEPS_AHEAD = (1, 5, 15, 50)  # of the open-loop errors
EPISODES_OF = "episodes_of"  # the column that names whose episodes a row is of
MEASURES = {
    "posterior_jacobian": "Jacobian norm, posterior",
    "prior_jacobian": "Jacobian norm, prior",
    "input_rms": "size of the posterior's input",
    "transition_ratio": "transition ratio",
    "transition_ratio_max": "its largest value",
    "observation_seen": "error of observations, all steps seen",
    **{f"observation_{k}": f"error of observations, k = {k}" for k in STEPS_AHEAD},
    "reward_seen": "error of rewards, all steps seen",
    **{f"reward_{k}": f"error of rewards, k = {k}" for k in STEPS_AHEAD},
    "action_change": "mean change of actions",
    "action_high_frequencies": "share of high frequencies",
}


def is_measured(job: Job) -> bool:
    """Whether all of the measures were written down."""
    rows = read_csv(measures_file(job))
    return bool(rows) and set(rows[0]) == {EPISODES_OF, *MEASURES}


def can_be_measured(jobs: Sequence[Job], runs: Path) -> bool:
    """Whether the checkpoints of a block are there, and the four arms' episodes or the checkpoints that collect them."""
    shared = jobs_of(jobs[0].task, jobs[0].seed)
    collected = all(actions_file(job).exists() or checkpoint(job, runs).exists() for job in shared)
    return collected and all(checkpoint(job, runs).exists() for job in jobs)


def measure(jobs: Sequence[Job], runs: Path) -> None:
    """Measure the models of a block on the episodes of the four arms.

    :param jobs: the finished runs of the block, of the four arms or with other weights
    :param runs: folder of the checkpoints
    """
    task, seed = jobs[0].task, jobs[0].seed
    models = {job: load(job, runs) for job in jobs}
    episodes = {}
    for job in jobs_of(task, seed):
        if not actions_file(job).exists():
            save_actions(job, played(models.get(job) or load(job, runs), job))
        episodes[job.arm] = played(models[jobs[0]], job, read_actions(job))
    for job, model in models.items():
        smooth = [action_smoothness(episode) for episode in played(model, job, deterministic=True)]
        own = {
            "action_change": float(np.mean([each.change for each in smooth])),
            "action_high_frequencies": float(np.mean([each.high_frequencies for each in smooth])),
        }
        rows = [{EPISODES_OF: arm, **measures_of(model, episodes[arm], seed), **own} for arm in ARMS]
        write_csv(measures_file(job), rows, DIGITS)


def load(job: Job, runs: Path) -> DreamerGPLD:
    """:raises FileNotFoundError: the checkpoint is lost"""
    return DreamerGPLD.load(checkpoint(job, runs), device="cpu")


def played(
    model: DreamerGPLD, job: Job, actions: Sequence[np.ndarray] | None = None, deterministic: bool = False
) -> list[Batch]:
    """Episodes of a model on a run's task, or of known actions; their starts depend on the seed of the run alone."""
    start = 20_000 + job.seed

    def made() -> Any:
        return make_env(read_arms()[job.arm], job.task, start)

    env = DummyVecEnv([made])
    try:
        return collect(model, env, EPISODES, MAX_STEPS, start, deterministic, actions)
    finally:
        env.close()


def save_actions(job: Job, episodes: Sequence[Batch]) -> None:
    """Keep the actions of episodes, (steps, A) each, in float16."""
    with atomic_file(actions_file(job)) as file:
        np.savez_compressed(file, *(episode.actions[0, 1:].half().numpy() for episode in episodes))


def read_actions(job: Job) -> list[np.ndarray]:
    with np.load(actions_file(job)) as arrays:
        return [arrays[f"arr_{number}"] for number in range(EPISODES)]


def measures_of(model: DreamerGPLD, episodes: list[Batch], seed: int) -> dict[str, float]:
    """The measures of a model on some episodes; states and windows depend on the seed alone."""
    numbers = {"horizon": max(STEPS_AHEAD), "seed": seed, "windows": WINDOWS, "states": STATES}
    arguments = [text for name, value in numbers.items() for text in (f"--{name}", str(value))]
    found = diagnose.measure(model, episodes, diagnose.parse(["--model", "", "--env", "", "--out", "", *arguments]))
    return {
        "posterior_jacobian": found.smoothness.posterior_jacobian.mean().item(),
        "prior_jacobian": found.smoothness.prior_jacobian.mean().item(),
        "input_rms": found.smoothness.input_rms.mean().item(),
        "transition_ratio": found.smoothness.transition_ratio.mean().item(),
        "transition_ratio_max": found.smoothness.transition_ratio.max().item(),
        **{
            f"{name}_{suffix}": value
            for name in ("observation", "reward")
            for suffix, value in [
                ("seen", found.teacher_forced[name][1:].nanmean().item()),
                *((str(k), found.errors[name][k].item()) for k in STEPS_AHEAD),
            ]
        },
    }


def measured(arm: str, tasks: Sequence[str], seeds: Sequence[int], episodes_of: Sequence[str]) -> dict[str, np.ndarray]:
    """Measures of an arm's models, (seeds, tasks) each, means over episodes; NaN where a checkpoint was lost.

    :param arm, tasks, seeds: whose
    :param episodes_of: arms whose episodes are looked at
    """

    def mean(name: str, task: str, seed: int) -> float:
        rows = read_csv(measures_file(Job(arm, task, seed, 0)))
        values = [float(row[name]) for row in rows if row[EPISODES_OF] in episodes_of]
        return float(np.mean(values)) if values else float("nan")

    return {name: np.array([[mean(name, task, seed) for task in tasks] for seed in seeds]) for name in MEASURES}
