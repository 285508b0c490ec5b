"""Draws the evaluations of runs as PNG: a learning curve for each task, and the aggregate over the dm_control tasks.

Aggregates and intervals are those that Agarwal et al. recommend (NeurIPS 2021, "Deep Reinforcement Learning at the Edge of
the Statistical Precipice"): interquartile means, and percentiles of a bootstrap stratified by task.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_dreamer_gpld.saving import atomic_file
from sb3_dreamer_gpld.zoo.evaluations import read_evaluations
from sb3_dreamer_gpld.zoo.recorded import recorded

# Returns of dm_control's tasks lie between 0 and this
LARGEST_RETURN = 1000.0
_DM_CONTROL = "dm_control-"


class Run(NamedTuple):
    """Evaluations of one run.

    :param steps: the agent's steps before each, (evaluations,)
    :param returns: mean return of each, (evaluations,)
    """

    steps: np.ndarray
    returns: np.ndarray


class Style(NamedTuple):
    """How uncertain quantities are drawn.

    :param size: size of the intervals, between 0 and 1
    :param reps: bootstrap samples
    """

    size: float = 0.95
    reps: int = 2000


Runs = dict[str, dict[str, list[Run]]]  # by task and label


def main(name: str) -> None:
    """Draw what the arguments in ``sys.argv`` ask for.

    :param name: name of the algorithm, whose runs are drawn if no other is given
    :raises SystemExit: there is nothing to draw
    """
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description="Draw the returns that train --eval-freq logged: for each task the mean over the seeds, and for the "
        "dm_control tasks together aggregates of the returns divided by 1000. The bands and bars are intervals of a bootstrap "
        "over the seeds, stratified by task.",
    )
    parser.add_argument("-f", "--exp-folders", nargs="+", default=["logs"], help="folders of runs to compare (default: logs)")
    parser.add_argument(
        "-l", "--labels", nargs="+", help="a label for each folder (default: algorithm and hyperparameter file)"
    )
    parser.add_argument("-a", "--algos", nargs="+", default=[name], help=f"algorithms (default: {name})")
    parser.add_argument("-e", "--env", nargs="+", help="environments (default: all that were evaluated)")
    parser.add_argument("-o", "--output", default="plots", help="folder for the pictures (default: plots)")
    parser.add_argument("-ci", "--ci-size", type=float, default=0.95, help="size of the intervals (default: 0.95)")
    parser.add_argument("--reps", type=int, default=2000, help="bootstrap samples (default: 2000)")
    options = parser.parse_args()
    if options.labels and len(options.labels) != len(options.exp_folders):
        parser.error(f"{len(options.exp_folders)} folders need as many labels, not {len(options.labels)}")
    if not 0 < options.ci_size < 1:
        parser.error(f"--ci-size must be between 0 and 1, not {options.ci_size}")
    if options.reps < 1:
        parser.error(f"--reps must be at least 1, not {options.reps}")

    runs = read_runs(options.exp_folders, options.labels, options.algos)
    wanted = [env.replace("/", "-") for env in options.env or ()]
    if not set(wanted) <= set(runs) or not runs:
        missing = ", ".join(sorted(set(wanted) - set(runs))) or "any environment"
        raise SystemExit(
            f"{sys.argv[0]}: no evaluated run of {missing} in {', '.join(options.exp_folders)} (it has: "
            f"{', '.join(sorted(runs)) or 'none'}). Train with --eval-freq, or name other folders with -f"
        )
    runs = {task: runs[task] for task in wanted or sorted(runs)}
    draw(runs, Path(options.output), Style(options.ci_size, options.reps))


def draw(runs: Runs, output: Path, style: Style) -> None:
    """Draw a picture for each task, and the aggregate.

    :param runs: as :func:`read_runs` gives them
    :param output: folder, which is made if it is not there
    :param style: of the intervals
    """
    output.mkdir(parents=True, exist_ok=True)
    for task, by_label in runs.items():
        _draw_task(task, by_label, style, output / f"{task}.png")
    _draw_aggregate(runs, style, output / "aggregate.png")


def read_runs(folders: list[str], labels: list[str] | None, algos: list[str]) -> Runs:
    """
    :param folders: log folders of rl_zoo3
    :param labels: a label for each; None: runs are told apart by algorithm, hyperparameter file, what the command changed of
        it and of the environment, and folder
    :param algos: algorithms; their names become part of the labels if there are several
    :return: the evaluations of all runs
    """
    runs: Runs = {}
    made_with: dict[tuple[str, str], set[str]] = {}
    for number, folder in enumerate(folders):
        for algo in algos:
            for file in sorted(Path(folder, algo).glob("*_*/evaluations.npz")):
                settings = _settings(file.parent)
                if labels:
                    name = f"{labels[number]} {algo}" if len(algos) > 1 else labels[number]
                else:
                    setting = ", ".join([algo, *settings])
                    name = f"{folder}: {setting}" if len(folders) > 1 else setting
                # <environment>_<number of the run>, and the unique name that --uuid adds
                task = re.sub(r"_\d+(_[0-9a-f-]{36})?$", "", file.parent.name)
                log = read_evaluations(file)
                if log is None:
                    continue
                run = Run(log["timesteps"], log["results"].reshape(len(log["timesteps"]), -1).mean(1))
                runs.setdefault(task, {}).setdefault(name, []).append(run)
                made_with.setdefault((task, name), set()).add(", ".join(settings))
    for (task, name), several in made_with.items():
        if len(several) > 1:
            print(f"{task}: the curve {name!r} joins runs of different settings: {'; '.join(sorted(several))}")
    return {task: _comparable(task, by_label) for task, by_label in runs.items()}


def _comparable(task: str, by_label: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Runs of a task without those that had ended when another one was evaluated for the first time, the shortest first."""
    while True:
        every = [run for runs in by_label.values() for run in runs]
        first, last = max(steps[0] for steps, _ in every), min(steps[-1] for steps, _ in every)
        if first <= last:
            return by_label
        ended = sum(run[0][-1] <= last for run in every)
        print(f"{task}: {ended} run(s) of {last:,} steps left out, since another was evaluated first after {first:,}")
        kept = {label: [run for run in runs if run[0][-1] > last] for label, runs in by_label.items()}
        by_label = {label: runs for label, runs in kept.items() if runs}


def _settings(run: Path) -> list[str]:
    """What a run was made with, as far as it is recorded: the file of its hyperparameters, and what the command changed."""
    arguments = recorded(run, "args.yml")
    file = arguments.get("conf_file")
    changed = [arguments.get(name) for name in ("hyperparams", "env_kwargs")]
    parts = [Path(file).name] if isinstance(file, str) else []
    return parts + [f"{name}={value}" for values in changed if isinstance(values, dict) for name, value in values.items()]


def _common_steps(runs: list[Run]) -> np.ndarray:
    """Steps at which the runs can be compared: those of the run with the fewest evaluations, as far as all runs go."""
    first, last = max(steps[0] for steps, _ in runs), min(steps[-1] for steps, _ in runs)
    if last < max(steps[-1] for steps, _ in runs):
        print(f"Drawn up to {last:,} steps, where the shortest run ends")
    steps = min((steps for steps, _ in runs), key=len)
    inside = steps[(steps >= first) & (steps <= last)]
    return inside if len(inside) else np.array([last])


def _at(steps: np.ndarray, runs: list[Run]) -> np.ndarray:
    """Returns of the runs at the given steps, in between two evaluations on the line through them, (runs, steps)."""
    return np.stack([np.interp(steps, *run) for run in runs])


# --------------------------------------------------------------------------------------- statistics, (seeds, tasks, steps)


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over seeds and tasks, (steps,)."""
    return scores.mean((0, 1))


def median(scores: np.ndarray) -> np.ndarray:
    """Median over tasks of the mean over seeds, (steps,)."""
    return np.median(scores.mean(0), 0)


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all scores, (steps,)."""
    ordered = np.sort(scores.reshape(-1, scores.shape[-1]), 0)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut].mean(0)


def optimality_gap(scores: np.ndarray) -> np.ndarray:
    """Mean distance to a score of 1, (steps,); less is better."""
    return 1 - np.minimum(scores, 1).mean((0, 1))


def interval(scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], style: Style) -> np.ndarray:
    """Interval of a statistic, from seeds drawn with replacement for each task by itself, (2, steps)."""
    generator, tasks = np.random.default_rng(0), np.arange(scores.shape[1])
    draws = (generator.integers(len(scores), size=scores.shape[:2]) for _ in range(style.reps))
    samples = [statistic(scores[seeds, tasks]) for seeds in draws]
    return np.percentile(samples, [50 * (1 - style.size), 50 * (1 + style.size)], axis=0)


# ------------------------------------------------------------------------------------------------------------- pictures


def _draw_curves(
    axes: Axes, steps: np.ndarray, scores: dict[str, np.ndarray], statistic: Callable[[np.ndarray], np.ndarray], style: Style
) -> None:
    for label, score in scores.items():
        seeds = f"{len(score)} seed{'s' if len(score) > 1 else ''}"
        axes.plot(steps, statistic(score), label=f"{label} ({seeds})", marker=".")
        axes.fill_between(steps, *interval(score, statistic, style), alpha=0.25)
    axes.set_xlabel("agent steps")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_task(task: str, by_label: dict[str, list[Run]], style: Style, file: Path) -> None:
    steps = _common_steps([run for runs in by_label.values() for run in runs])
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw_curves(axes, steps, {label: _at(steps, runs)[:, None] for label, runs in by_label.items()}, mean, style)
    axes.set_title(task)
    axes.set_ylabel("return, mean over seeds")
    _save(figure, file)


def _draw_aggregate(runs: Runs, style: Style, file: Path) -> None:
    """Interquartile mean of the normalised returns over tasks and seeds, and four aggregates at the end."""
    file.unlink(missing_ok=True)  # of other runs
    labels = list(dict.fromkeys(label for by_label in runs.values() for label in by_label))
    tasks = [task for task in runs if task.startswith(_DM_CONTROL) and set(runs[task]) == set(labels)]
    if not tasks:
        print("No aggregate: there is no dm_control task with runs under every label")
        return
    every = [run for task in tasks for label in labels for run in runs[task][label]]
    if min(steps[-1] for steps, _ in every) < max(steps[0] for steps, _ in every):
        print("No aggregate: runs of one task end before those of another were evaluated")
        return
    steps = _common_steps(every)
    scores = {}
    for label in labels:
        seeds = min(len(runs[task][label]) for task in tasks)  # as many as every task has
        scores[label] = np.stack([_at(steps, runs[task][label][:seeds]) for task in tasks], 1) / LARGEST_RETURN

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, *rest = figure.subplots(1, 5, width_ratios=[2.6, 1, 1, 1, 1])
    _draw_curves(left, steps, scores, interquartile_mean, style)
    left.set_title(f"{len(tasks)} dm_control task{'s' if len(tasks) > 1 else ''}")
    left.set_ylabel("return / 1000, interquartile mean")
    for number, (axes, statistic) in enumerate(zip(rest, (median, interquartile_mean, mean, optimality_gap), strict=True)):
        for row, label in enumerate(labels):
            last = scores[label][..., -1:]
            low, high = interval(last, statistic, style)[:, 0]
            axes.barh(row, high - low, left=low, height=0.5, alpha=0.5, color=f"C{row}")
            axes.vlines(statistic(last)[0], row - 0.25, row + 0.25, color="k")
        axes.use_sticky_edges = False  # so that a bar does not begin at the frame
        axes.set_yticks(range(len(labels)), labels if number == 0 else [""] * len(labels))
        axes.invert_yaxis()
        axes.set_title(statistic.__name__.replace("_", " "))
        axes.set_xlabel(f"at {steps[-1]:,} steps")
        axes.grid(alpha=0.3)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    with atomic_file(file) as picture:
        figure.savefig(picture, format=file.suffix[1:], dpi=150)
    print(f"Saved {file}")
