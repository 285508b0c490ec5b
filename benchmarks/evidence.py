"""Does the penalty help? Runs with and without it, what they return, and what it changes on the way.

Usage: python -m benchmarks.evidence run [--workers 2] [--runs runs/evidence] [--blocks N]
       python -m benchmarks.evidence page

Arms are the four of ``ARMS`` (``learning/arms.yml`` has their settings), the same tasks and seeds in each. A block is one task
and one seed in all arms: its runs are made side by side, each goes on where it was stopped, and their models are then measured
on the same episodes, two of each of them. ``run`` makes the missing blocks, those of the first seed first, and then those of
the better penalty with other weights; ``--blocks`` ends it after so many. Results are added to ``learning/ladder/ARM``: the
training episodes, the evaluation at the end, and ``TASK_SEED_measures.csv``. ``page`` writes the tables of docs/evidence.md
and its figure from them (``make evidence``).

The analysis was written before the first run. Scores are those of whole runs (mean over all training episodes, which is the
area under the curve, and over the last tenth of the frames), divided by 1000, the largest return. Aggregates are interquartile
means; intervals are percentiles of a bootstrap that draws seeds for each task by itself; the probability of improvement is
that of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021). Differences from
no penalty are those of equal seeds. No run that reached the end is left out. The better penalty is the one with the largest
interquartile mean of the area under the curve, over all tasks and seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.learning.ladder import Job, make_env, read_arms, run_all
from benchmarks.learning.run import DIGITS
from benchmarks.results import read_columns, read_csv, write_csv
from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.diagnostics import action_smoothness
from sb3_dreamer_gpld.saving import atomic_file
from sb3_dreamer_gpld.zoo import diagnose
from sb3_dreamer_gpld.zoo.episodes import collect
from sb3_dreamer_gpld.zoo.plot import Style, interquartile_mean, interval

NONE = "penalty-none"
ARMS = {NONE: "none", "penalty-posterior": "posterior (published)", "penalty-prior": "prior", "penalty-both": "both"}
WEIGHTS = ("0.05", "5")  # λ₀ of the better penalty, beside 0.5
GROUPS = {
    "hard locomotion": ("walker-walk", "cheetah-run", "quadruped-walk", "hopper-hop"),
    "others": ("reacher-hard", "cartpole-swingup"),
}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
SEEDS = (20, 21, 22, 23)  # which no setting was chosen by
FRAMES = 40_000
LAST_SHARE = 0.1  # of the frames, over which the end of a run is averaged
LARGEST_RETURN = 1000.0
STEPS_AHEAD = (1, 5, 15, 50)  # of the open-loop errors
EPISODES = 2  # that each model of a block collects
STYLE = Style(size=0.95, reps=2000)
NO_BLOCK = "No block is finished yet."
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
FIGURE = PAGE.with_name("figures") / "evidence.png"
MEASURES = {
    "posterior_jacobian": "Jacobian norm, posterior",
    "prior_jacobian": "Jacobian norm, prior",
    "transition_ratio": "transition ratio",
    "transition_ratio_max": "its largest value",
    **{f"observation_{k}": f"error of observations, k = {k}" for k in STEPS_AHEAD},
    **{f"reward_{k}": f"error of rewards, k = {k}" for k in STEPS_AHEAD},
    "action_change": "mean change of actions",
    "action_high_frequencies": "share of high frequencies",
}


# -------------------------------------------------------------------------------------------------------------- running


def jobs_of(task: str, seed: int, arms: Iterable[str] = ARMS) -> list[Job]:
    """The runs of a block."""
    return [Job(arm, task, seed, FRAMES) for arm in arms]


def better() -> str | None:
    """The penalty that returned more, which is run with other weights, too; None: the arms are not finished."""
    if complete() != (TASKS, SEEDS):
        return None
    areas = {arm: interquartile_mean(scores_of(arm, SCORES["area"], TASKS, SEEDS))[0] for arm in ARMS if arm != NONE}
    return max(areas, key=areas.__getitem__)


def other_weights(arm: str) -> list[str]:
    """The arms with a penalty's other weights."""
    return [f"{arm}-{weight}" for weight in WEIGHTS]


def blocks() -> Iterator[list[Job]]:
    """All of them, in the order that they are made in; those of the other weights are known when the others are finished."""
    yield from (jobs_of(task, seed) for seed in SEEDS for task in TASKS)
    if arm := better():
        yield from (jobs_of(task, seed, other_weights(arm)) for seed in SEEDS for task in TASKS)


def measures_file(job: Job) -> Path:
    return job.file.with_name(f"{job.file.stem}_measures.csv")


def measure(jobs: Sequence[Job], runs: Path) -> None:
    """Measure the models of a block on the episodes of all arms; those with other weights on the same.

    :param jobs: the finished runs of the block
    :param runs: folder of the checkpoints
    :raises FileNotFoundError: a checkpoint is lost
    """
    arms = read_arms()
    task, seed = jobs[0].task, jobs[0].seed
    shared = jobs_of(task, seed)
    models = {
        job: DreamerGPLD.load(runs / job.arm / f"{task}_{seed}" / "model.zip", device="cpu")
        for job in dict.fromkeys([*shared, *jobs])
    }
    collected = {}
    for job, model in models.items():
        env = DummyVecEnv([lambda job=job: make_env(arms[job.arm], task, 20_000 + seed)])  # type: ignore[misc]
        collected[job] = collect(model, env, EPISODES, 1000, seed=20_000 + seed)
        env.close()
    episodes = [episode for job in shared for episode in collected[job]]
    arguments = ["--model", "", "--env", "", "--out", "", "--horizon", str(max(STEPS_AHEAD)), "--seed", str(seed)]
    for job in jobs:
        found = diagnose.measure(models[job], episodes, diagnose.parse(arguments))
        smooth = [action_smoothness(episode) for episode in collected[job]]
        row: dict[str, Any] = {
            "posterior_jacobian": found.smoothness.posterior_jacobian.mean().item(),
            "prior_jacobian": found.smoothness.prior_jacobian.mean().item(),
            "transition_ratio": found.smoothness.transition_ratio.mean().item(),
            "transition_ratio_max": found.smoothness.transition_ratio.max().item(),
            **{f"observation_{k}": found.errors["observation"][k].item() for k in STEPS_AHEAD},
            **{f"reward_{k}": found.errors["reward"][k].item() for k in STEPS_AHEAD},
            "action_change": float(np.mean([each.change for each in smooth])),
            "action_high_frequencies": float(np.mean([each.high_frequencies for each in smooth])),
        }
        write_csv(measures_file(job), [row], DIGITS)


def run(workers: int, runs: Path, most: float) -> int:
    """Make the blocks that are missing.

    :param workers: runs side by side
    :param runs: folder of the checkpoints
    :param most: at most so many
    :return: how many runs failed
    """
    failed = made = 0
    for jobs in blocks():
        if all(job.finished and measures_file(job).exists() for job in jobs):
            continue
        if made >= most:
            break
        made += 1
        in_block = run_all(jobs, workers, runs)
        failed += in_block
        if in_block == 0:
            try:
                measure(jobs, runs)
            except FileNotFoundError as error:
                print(f"{jobs[0].task} {jobs[0].seed}: not measured, since a checkpoint is lost ({error})", flush=True)
    return failed


# ------------------------------------------------------------------------------------------------------------- analysis


class Score(NamedTuple):
    """What a run is judged by.

    :param title: in tables
    :param of: the score of a run's columns, see ``learning/ladder.py``
    """

    title: str
    of: Callable[[dict[str, np.ndarray]], float]


def mean_return(columns: dict[str, np.ndarray], begin: float) -> float:
    """Mean return of the training episodes that end after ``begin`` frames, up to the end, divided by the largest one."""
    within = (columns["frames"] > begin) & (columns["frames"] <= FRAMES)
    return float(columns["episode_return"][within].mean()) / LARGEST_RETURN


SCORES = {
    "area": Score("area under the curve", lambda columns: mean_return(columns, 0.0)),
    "last": Score("last tenth", lambda columns: mean_return(columns, (1.0 - LAST_SHARE) * FRAMES)),
}


class Seeds(NamedTuple):
    """The seeds that arms have finished on every task that has any.

    :param tasks: with at least one such seed
    :param seeds: which, as many for each task
    """

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]


def complete(arms: Iterable[str] = ARMS) -> Seeds:
    """What can be compared: tasks of which the first seeds are finished in the arms, as many seeds as all these have."""
    counts = {}
    for task in TASKS:
        done = [all(job.finished for job in jobs_of(task, seed, arms)) for seed in SEEDS]
        counts[task] = done.index(False) if False in done else len(done)
    tasks = tuple(task for task, count in counts.items() if count)
    return Seeds(tasks, SEEDS[: min((counts[task] for task in tasks), default=0)])


def scores_of(arm: str, score: Score, tasks: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Scores of an arm, (seeds, tasks, 1)."""
    return np.array([[[score.of(read_columns(Job(arm, task, seed, FRAMES).file))] for task in tasks] for seed in seeds])


def improvement(pairs: np.ndarray) -> np.ndarray:
    """Probability that a run of the one arm scores more than one of the other on the same task, mean over the tasks, (1,).

    :param pairs: scores of both, (seeds, tasks, 2)
    """
    one, other = pairs[:, None, :, 0], pairs[None, :, :, 1]  # (seeds, 1, tasks), (1, seeds, tasks)
    return ((one > other) + 0.5 * (one == other)).mean((0, 1)).mean(keepdims=True)


def improvement_interval(pairs: np.ndarray, style: Style = STYLE) -> np.ndarray:
    """Its interval, from seeds drawn for each task and arm by itself, (2,)."""
    generator, (seeds, tasks, _) = np.random.default_rng(0), pairs.shape
    samples = []
    for _ in range(style.reps):
        drawn = [np.take_along_axis(pairs[..., arm], generator.integers(seeds, size=(seeds, tasks)), 0) for arm in range(2)]
        samples.append(improvement(np.stack(drawn, -1))[0])
    return np.percentile(samples, [50 * (1 - style.size), 50 * (1 + style.size)])


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation of two measures over the runs of each task, mean over the tasks.

    :param x, y: (runs, tasks)
    """
    ranks = [rankdata(each, axis=0) for each in (x, y)]
    centred = [each - each.mean(0) for each in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    with np.errstate(invalid="ignore"):
        return float(np.nanmean((centred[0] * centred[1]).sum(0) / scale))


def measured(arm: str, found: Seeds) -> dict[str, np.ndarray]:
    """Measures of an arm's models, (seeds, tasks) each; NaN where a checkpoint was lost."""
    rows = [[read_csv(measures_file(Job(arm, task, seed, FRAMES))) for task in found.tasks] for seed in found.seeds]
    return {name: np.array([[float(row[0][name]) if row else math.nan for row in line] for line in rows]) for name in MEASURES}


# ----------------------------------------------------------------------------------------------------------------- page


def cell(value: float, bounds: np.ndarray, digits: int = 3) -> str:
    return f"{value:.{digits}f} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def compared(arm: str, score: Score, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """Cells of an arm: its interquartile mean, the difference from no penalty, and the probability of improvement over it."""
    scores = scores_of(arm, score, tasks, seeds)
    cells = [cell(interquartile_mean(scores)[0], interval(scores, interquartile_mean, STYLE)[:, 0]), "", ""]
    if arm != NONE:
        none = scores_of(NONE, score, tasks, seeds)
        difference, pairs = scores - none, np.concatenate([scores, none], -1)
        cells[1] = cell(interquartile_mean(difference)[0], interval(difference, interquartile_mean, STYLE)[:, 0])
        cells[2] = cell(improvement(pairs)[0], improvement_interval(pairs), 2)
    return " | ".join(cells)


def returns_table(found: Seeds) -> Iterator[str]:
    """Markdown: interquartile means of each arm, differences from no penalty, and probabilities of improvement."""
    yield "| tasks | score | penalty on | interquartile mean | minus none, same seeds | probability of improvement over none |"
    yield "| --- | --- | --- | --- | --- | --- |"
    groups = {"all": found.tasks, **{name: tuple(t for t in tasks if t in found.tasks) for name, tasks in GROUPS.items()}}
    for group, tasks in groups.items():
        for score in SCORES.values() if tasks else ():
            for arm, title in ARMS.items():
                yield f"| {group} | {score.title} | {title} | {compared(arm, score, tasks, found.seeds)} |"


def weights_table(_: Seeds) -> Iterator[str]:
    """Markdown: the better penalty with other weights, over the tasks and seeds that these have finished; what they change."""
    arm = better()
    found = complete(other_weights(arm)) if arm else Seeds((), ())
    if arm is None or not found.seeds:
        yield NO_BLOCK
        return
    yield f"| λ₀ on {ARMS[arm]} | score | interquartile mean | minus none, same seeds | probability of improvement over none |"
    yield "| --- | --- | --- | --- | --- |"
    weak, strong = other_weights(arm)
    by_weight = {WEIGHTS[0]: weak, "0.5": arm, WEIGHTS[1]: strong}
    for score in SCORES.values():
        for weight, name in by_weight.items():
            yield f"| {weight} | {score.title} | {compared(name, score, found.tasks, found.seeds)} |"
    yield ""
    yield f"| measure, relative to none | {' | '.join(by_weight)} |"
    yield "| --- " * (len(by_weight) + 1) + "|"
    none, by_arm = measured(NONE, found), {name: measured(name, found) for name in by_weight.values()}
    for measure, title in MEASURES.items():
        yield f"| {title} | {' | '.join(f'{ratio(each[measure], none[measure]):.2f}' for each in by_arm.values())} |"


def tasks_table(found: Seeds) -> Iterator[str]:
    """Markdown: returns of each task over the last tenth, mean and every seed."""
    yield f"| penalty on | {' | '.join(found.tasks)} |"
    yield "| --- " * (len(found.tasks) + 1) + "|"
    for arm, title in ARMS.items():
        scores = LARGEST_RETURN * scores_of(arm, SCORES["last"], found.tasks, found.seeds)[..., 0]  # (seeds, tasks)
        cells = (f"{each.mean():.0f} ({', '.join(f'{x:.0f}' for x in each)})" for each in scores.T)
        yield f"| {title} | {' | '.join(cells)} |"


def measures_table(found: Seeds) -> Iterator[str]:
    """Markdown: what the penalty changes on the way, and how it goes with the return over the last tenth."""
    by_arm = {arm: measured(arm, found) for arm in ARMS}
    returns = np.concatenate([scores_of(arm, SCORES["last"], found.tasks, found.seeds)[..., 0] for arm in ARMS])
    titles = [title for arm, title in ARMS.items() if arm != NONE]
    yield f"| measure, relative to none | {' | '.join(titles)} | rank correlation with the return |"
    yield "| --- " * (len(titles) + 2) + "|"
    for name, title in MEASURES.items():
        cells = [f"{ratio(by_arm[arm][name], by_arm[NONE][name]):.2f}" for arm in ARMS if arm != NONE]
        every = np.concatenate([by_arm[arm][name] for arm in ARMS])
        yield f"| {title} | {' | '.join(cells)} | {rank_correlation(every, returns):.2f} |"


def figure_link(_: Seeds) -> Iterator[str]:
    """Markdown: the figure of :func:`draw`."""
    yield f"![Returns with the penalty minus without it, and what it changes in the model](figures/{FIGURE.name})"


def ratio(one: np.ndarray, other: np.ndarray) -> float:
    """Geometric mean of the ratios of two measures."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.exp(np.nanmean(np.log(one / other))))


TABLES = {
    "returns": returns_table,
    "tasks": tasks_table,
    "weights": weights_table,
    "figure": figure_link,
    "measures": measures_table,
}


def filled(page: str, found: Seeds) -> str:
    """The page with its tables and figure as the results have them, between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, table in TABLES.items():
        before, rest = page.split(f"<!-- table: {name} -->\n")
        _, after = rest.split("<!-- end -->\n", 1)
        text = "\n".join(table(found)) if found.seeds else NO_BLOCK
        page = f"{before}<!-- table: {name} -->\n{text}\n<!-- end -->\n{after}"
    return page


def draw(found: Seeds) -> None:
    """The differences from no penalty, and what it changes in the model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    others = [arm for arm in ARMS if arm != NONE]
    for offset, (name, score) in zip((-0.12, 0.12), SCORES.items(), strict=True):
        none = scores_of(NONE, score, found.tasks, found.seeds)
        for number, arm in enumerate(others):
            difference = scores_of(arm, score, found.tasks, found.seeds) - none
            low, high = interval(difference, interquartile_mean, STYLE)[:, 0]
            middle = interquartile_mean(difference)[0]
            errors = [[middle - low], [high - middle]]
            colour = f"C{list(SCORES).index(name)}"
            label = score.title if number == 0 else None
            left.errorbar(number + offset, middle, errors, fmt="o", capsize=4, color=colour, label=label)
    left.axhline(0.0, color="grey", lw=0.8)
    left.set_xticks(range(len(others)), [ARMS[arm] for arm in others])
    left.set_ylabel("return / 1000 minus that of none")
    left.legend()
    shown = ("posterior_jacobian", "prior_jacobian", "transition_ratio", "observation_15")
    by_arm = {arm: measured(arm, found) for arm in ARMS}
    for number, arm in enumerate(others):
        heights = [ratio(by_arm[arm][name], by_arm[NONE][name]) for name in shown]
        right.bar(np.arange(len(shown)) + 0.25 * (number - 1), heights, 0.25, label=ARMS[arm])
    right.axhline(1.0, color="grey", lw=0.8)
    right.set_xticks(range(len(shown)), [MEASURES[name].replace(", ", "\n") for name in shown], fontsize=8)
    right.set_ylabel("relative to none")
    right.legend()
    with atomic_file(FIGURE) as file:
        figure.savefig(file, format="png", dpi=120)


# --------------------------------------------------------------------------------------------------------- command line


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
    found = complete()
    text = filled(PAGE.read_text(encoding="utf-8"), found)
    with atomic_file(PAGE) as file:
        file.write(text.encode())
    if found.seeds:
        draw(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
