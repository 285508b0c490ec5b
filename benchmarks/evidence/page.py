"""Tables and figure of docs/evidence.md, from the results that are there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence.measuring import MEASURES, is_measured, measured
from benchmarks.evidence.protocol import (
    ARMS,
    GROUPS,
    NONE,
    PENALTIES,
    SEEDS,
    WEIGHTS,
    Seeds,
    complete,
    every_block,
    jobs_of,
    other_weights,
)
from benchmarks.evidence.scores import (
    AREA,
    EVALUATED,
    LARGEST_RETURN,
    LAST,
    STYLE,
    Score,
    better,
    improvement,
    improvement_interval,
    rank_correlations,
    ratio,
    ratios,
    relative,
    scores_of,
    students_interval,
    within_arms,
)
from benchmarks.learning.ladder import Job
from benchmarks.results import read_csv
from sb3_dreamer_gpld.saving import atomic_file
from sb3_dreamer_gpld.zoo.plot import interquartile_mean, interval, mean

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
FIGURE = PAGE.with_name("figures") / "evidence.png"
NO_BLOCK = "No block is finished yet."
SHOWN = ("posterior_jacobian", "prior_jacobian", "transition_ratio", "observation_15")  # in the figure
BY_TASK = (*SHOWN, "reward_15", "action_change")


def cell(value: np.ndarray, bounds: Callable[[], np.ndarray], seeds: int, digits: int, sign: str = "") -> str:
    """A statistic (1,) with its interval (2, 1), which takes two seeds."""
    text = f"{value[0]:{sign}.{digits}f}"
    if seeds < 2:
        return text
    low, high = bounds()[:, 0]
    return f"{text} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def estimate(scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], digits: int = 3, sign: str = "") -> str:
    """A statistic of scores (seeds, tasks, ·) with its interval."""
    return cell(statistic(scores), lambda: interval(scores, statistic, STYLE), len(scores), digits, sign)


def number(value: float) -> str:
    """Two digits, or a dash where nothing was measured."""
    return f"{value:.2f}" if np.isfinite(value) else "–"


def correlation(measures: tuple[np.ndarray, np.ndarray]) -> str:
    """The mean of rank correlations, and of how many tasks; each has (runs, tasks)."""
    by_task = rank_correlations(*measures)
    return f"{np.mean(by_task):.2f} ({len(by_task)})" if len(by_task) else "–"


def header(*titles: str) -> Iterator[str]:
    """The first two lines of a table in Markdown."""
    yield f"| {' | '.join(titles)} |"
    yield "| --- " * len(titles) + "|"


# -------------------------------------------------------------------------------------------------------------- returns


def named(jobs: Iterable[Job]) -> str:
    """Runs by arm, task and seed."""
    titles = ARMS | {name: f"{ARMS[arm]} {name.removeprefix(arm)[1:]}" for arm in PENALTIES for name in other_weights(arm)}
    return "; ".join(f"{titles[job.arm]}, {job.task}, {job.seed}" for job in jobs) or "none"


def finished_table(found: Seeds) -> Iterator[str]:
    """How much of the protocol there is, which runs that began are not in the tables, and which were not measured."""
    blocks, shown = every_block(), found.jobs()
    done = [jobs for jobs in blocks if all(job.finished for job in jobs)]
    every = [*blocks, *(jobs for arm in PENALTIES for jobs in every_block(other_weights(arm)))]
    if arm := better():
        shown += complete(other_weights(arm)).jobs(other_weights(arm))
    began = [job for jobs in every for job in jobs if read_csv(job.file)]
    unmeasured = [job for job in began if job.finished and not is_measured(job)]
    waits = "" if len(done) == len(blocks) else "; the question is decided once, when all are"
    yield f"**{len(done)} of {len(blocks)} blocks are finished**{waits}."
    if found.seeds:
        seeds = ", ".join(map(str, found.seeds))
        alone = "" if len(found.seeds) > 1 else "; one seed has no interval"
        yield f"The tables have seeds {seeds} of {', '.join(found.tasks)}{alone}."
    left_out = named(job for job in began if job not in shown)
    yield f"Runs that are not in the means, which a seed enters when it is finished on all tasks: {left_out}."
    yield f"Finished runs whose model was not measured: {named(unmeasured)}."


def compared(arm: str, score: Score, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """Cells of an arm: its interquartile mean; differences from no penalty, their interquartile mean and their mean; its mean
    relative to that of none, and the probability of improvement over it."""
    scores = scores_of(arm, score, tasks, seeds)
    cells = [estimate(scores, interquartile_mean), "", "", "", ""]
    if arm != NONE:
        none = scores_of(NONE, score, tasks, seeds)
        pairs = np.concatenate([scores, none], -1)  # (seeds, tasks, 2)
        cells[1:] = [
            estimate(scores - none, interquartile_mean),
            estimate(scores - none, mean),
            estimate(pairs, relative, 1),
            cell(improvement(pairs), lambda: improvement_interval(pairs), len(pairs), 2),
        ]
    return " | ".join(cells)


COMPARED = (
    "interquartile mean",
    "minus none, interquartile mean",
    "minus none, mean",
    "mean, % more than none",
    "probability of improvement over none",
)


MORE = "points more than without"


def answer_table(found: Seeds) -> Iterator[str]:
    """Mean differences from no penalty in points of return, with both intervals; the first row decides."""
    yield from header(MORE, *(f"penalty on: {ARMS[arm]}" for arm in PENALTIES))
    yield from more_than_none(PENALTIES, found)


def more_than_none(arms: Sequence[str], found: Seeds) -> Iterator[str]:
    """Rows for scores and groups of tasks."""
    hard, others = (tuple(task for task in tasks if task in found.tasks) for tasks in GROUPS.values())
    for title, score, tasks in (
        ("whole runs (area under the curve), all tasks", AREA, found.tasks),
        ("whole runs, hard locomotion", AREA, hard),
        ("whole runs, others", AREA, others),
        ("last tenth, all tasks", LAST, found.tasks),
        ("last tenth, hard locomotion", LAST, hard),
        ("evaluated at the end, all tasks", EVALUATED, found.tasks),
        ("evaluated at the end, hard locomotion", EVALUATED, hard),
    ):
        if tasks:
            none = scores_of(NONE, score, tasks, found.seeds)  # (seeds, tasks, 1)
            more = [LARGEST_RETURN * (scores_of(arm, score, tasks, found.seeds) - none) for arm in arms]
            yield f"| {title} | {' | '.join(map(points, more))} |"


def points(differences: np.ndarray) -> str:
    """The mean of differences (seeds, tasks, 1) with its interval by the bootstrap and by Student's t."""
    text = estimate(differences, mean, 0, "+")
    if len(differences) < 2:
        return text
    low, high = students_interval(differences)
    return f"{text} / [{low:+.0f}, {high:+.0f}]"


def returns_table(found: Seeds) -> Iterator[str]:
    """Scores of each arm over the tasks, beside no penalty."""
    yield from header("tasks", "score", "penalty on", *COMPARED)
    groups = {"all": found.tasks, **{name: tuple(t for t in tasks if t in found.tasks) for name, tasks in GROUPS.items()}}
    for group, tasks in groups.items():
        for score in (AREA, LAST) if tasks else ():
            for arm, title in ARMS.items():
                yield f"| {group} | {score.title} | {title} | {compared(arm, score, tasks, found.seeds)} |"


def by_task(arm: str, score: Score, found: Seeds, minus: str | None = None) -> str:
    """Cells of an arm: returns on each task, mean and every seed, and behind a semicolon :func:`further` seeds; minus those of
    another arm."""
    sign = "" if minus is None else "+"

    def returns(task: str, seeds: Sequence[int]) -> np.ndarray:
        values = LARGEST_RETURN * scores_of(arm, score, [task], seeds)[:, 0, 0]
        return values if minus is None else values - LARGEST_RETURN * scores_of(minus, score, [task], seeds)[:, 0, 0]

    def listed(values: np.ndarray) -> str:
        return ", ".join(f"{x:{sign}.0f}" for x in values)

    cells = []
    for task in found.tasks:
        values, more = returns(task, found.seeds), further(task, found)
        behind = f"; {listed(returns(task, more))}" if more else ""
        cells.append(f"{values.mean():{sign}.0f} ({listed(values)}{behind})")
    return " | ".join(cells)


def further(task: str, found: Seeds) -> list[int]:
    """Seeds that are finished on a task, and not on all."""
    return [seed for seed in SEEDS if seed not in found.seeds and all(job.finished for job in jobs_of(task, seed))]


def tasks_table(found: Seeds) -> Iterator[str]:
    """Returns on each task at the end."""
    yield from header("score", "penalty on", *found.tasks)
    for score in (LAST, EVALUATED):
        for arm, title in ARMS.items():
            yield f"| {score.title} | {title} | {by_task(arm, score, found)} |"


def differences_table(found: Seeds) -> Iterator[str]:
    """Differences from no penalty on each task."""
    yield from header("minus none, same seed", "penalty on", *found.tasks)
    for score in (AREA, LAST):
        for arm in PENALTIES:
            yield f"| {score.title} | {ARMS[arm]} | {by_task(arm, score, found, NONE)} |"


def weights_table(_: Seeds) -> Iterator[str]:
    """The better penalty with other weights, over the tasks and seeds that these have finished; what they change, on episodes
    that none of the models collected."""
    arm = better()
    found = complete(other_weights(arm)) if arm else Seeds((), ())
    if arm is None or not found.seeds:
        yield NO_BLOCK
        return
    yield f"Seeds {', '.join(map(str, found.seeds))} of {', '.join(found.tasks)}."
    yield ""
    weak, strong = other_weights(arm)
    by_weight = {WEIGHTS[0]: weak, "0.5": arm, WEIGHTS[1]: strong}
    yield from header(MORE, *(f"λ₀ on {ARMS[arm]}: {weight}" for weight in by_weight))
    yield from more_than_none(list(by_weight.values()), found)
    yield ""
    yield from header(f"λ₀ on {ARMS[arm]}", "score", *COMPARED)
    for score in (AREA, LAST):
        for weight, name in by_weight.items():
            yield f"| {weight} | {score.title} | {compared(name, score, found.tasks, found.seeds)} |"
    yield ""
    yield from header("measure, relative to none", *by_weight)
    others = [each for each in PENALTIES if each != arm]
    of = {name: measured(name, *found, others) for name in (NONE, *by_weight.values())}
    for measure, title in MEASURES.items():
        yield f"| {title} | {' | '.join(number(ratio(of[name][measure], of[NONE][measure])) for name in by_weight.values())} |"


# ------------------------------------------------------------------------------------------------------------- measures


def measures_table(found: Seeds) -> Iterator[str]:
    """What the penalty changes on the way, and how it goes with the return over the last tenth."""
    of = {arm: measured(arm, *found, tuple(ARMS)) for arm in ARMS}
    returns = np.stack([scores_of(arm, LAST, *found)[..., 0] for arm in ARMS])  # (arms, seeds, tasks)
    yield from header(
        "measure, relative to none",
        *(ARMS[arm] for arm in PENALTIES),
        "rank correlation with the last tenth, all runs (tasks)",
        "within arms (tasks)",
    )
    for name, title in MEASURES.items():
        values = np.stack([of[arm][name] for arm in ARMS])  # (arms, seeds, tasks)
        seen = np.where(np.isfinite(values), returns, np.nan)  # of the models that were measured
        flat = values.reshape(-1, values.shape[-1]), seen.reshape(-1, seen.shape[-1])
        cells = [number(ratio(of[arm][name], of[NONE][name])) for arm in PENALTIES]
        cells += map(correlation, (flat, (within_arms(values), within_arms(seen))))
        yield f"| {title} | {' | '.join(cells)} |"


def measures_by_task_table(found: Seeds) -> Iterator[str]:
    """The ratios of some measures on each task."""
    yield from header("measure, relative to none", "penalty on", *found.tasks)
    of = {arm: measured(arm, *found, tuple(ARMS)) for arm in ARMS}
    for name in BY_TASK:
        for arm in PENALTIES:
            yield f"| {MEASURES[name]} | {ARMS[arm]} | {' | '.join(map(number, ratios(of[arm][name], of[NONE][name])))} |"


def figure_link(_: Seeds) -> Iterator[str]:
    """The figure of :func:`draw`."""
    yield f"![Returns with the penalty minus without it, and what it changes in the model](figures/{FIGURE.name})"


def draw(found: Seeds) -> None:
    """The differences from no penalty, and what it changes in the model; dots are tasks, every seed to the left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.3])
    none = LARGEST_RETURN * scores_of(NONE, AREA, *found)
    for place, arm in enumerate(PENALTIES):
        difference = LARGEST_RETURN * scores_of(arm, AREA, *found) - none  # (seeds, tasks, 1)
        for task, values in enumerate(np.moveaxis(difference[..., 0], 1, 0)):
            label = found.tasks[task] if place == 0 else None
            left.plot(np.full(len(values), place - 0.25 + 0.06 * task), values, "o", ms=4, color=f"C{task}", label=label)
        middle = mean(difference)[0]
        low, high = interval(difference, mean, STYLE)[:, 0] if len(difference) > 1 else (middle, middle)
        bar = [[middle - low], [high - middle]] if len(difference) > 1 else None
        left.errorbar(place + 0.2, middle, bar, fmt="D", capsize=5, color="k", label="mean" if place == 0 else None)
    left.axhline(0.0, color="grey", lw=0.8)
    left.set_xticks(range(len(PENALTIES)), [ARMS[arm] for arm in PENALTIES])
    left.set_ylabel("mean return over the run, minus that of none")
    left.legend(fontsize=7)
    of = {arm: measured(arm, *found, tuple(ARMS)) for arm in ARMS}
    for place, arm in enumerate(PENALTIES):
        x = np.arange(len(SHOWN)) + 0.25 * (place - 1)  # (measures,)
        right.bar(x, [ratio(of[arm][name], of[NONE][name]) for name in SHOWN], 0.22, label=ARMS[arm])
        for at, name in zip(x, SHOWN, strict=True):
            values = ratios(of[arm][name], of[NONE][name])
            right.plot(np.full(len(values), at), values, "k.", ms=3)
    right.axhline(1.0, color="grey", lw=0.8)
    right.set_xticks(
        range(len(SHOWN)), [MEASURES[name].replace(", ", "\n").replace(" of", "\nof") for name in SHOWN], fontsize=8
    )
    right.set_ylabel("relative to none")
    right.legend(title="penalty on", fontsize=8, loc="upper right")
    left.set_xlabel("penalty on")
    with atomic_file(FIGURE) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Description": drawn_from(found)})


def drawn_from(found: Seeds) -> str:
    """A digest of the numbers in the figure, which it carries along."""
    of = {arm: measured(arm, *found, tuple(ARMS)) for arm in ARMS}
    numbers = [scores_of(arm, AREA, *found) for arm in ARMS]
    numbers += [ratios(of[arm][name], of[NONE][name]) for arm in PENALTIES for name in SHOWN]
    text = ",".join(f"{x:.4g}" for each in numbers for x in each.ravel())
    return hashlib.sha256(text.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------- page


TABLES = {
    "answer": answer_table,
    "finished": finished_table,
    "returns": returns_table,
    "differences": differences_table,
    "tasks": tasks_table,
    "weights": weights_table,
    "figure": figure_link,
    "measures": measures_table,
    "measures by task": measures_by_task_table,
}


def filled(page: str, found: Seeds) -> str:
    """The page with its tables and figure as the results have them, between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, table in TABLES.items():
        before, rest = page.split(f"<!-- table: {name} -->\n")
        _, after = rest.split("<!-- end -->\n", 1)
        text = "\n".join(table(found)) if found.seeds or table is finished_table else NO_BLOCK
        page = f"{before}<!-- table: {name} -->\n{text}\n<!-- end -->\n{after}"
    return page


def write() -> None:
    """Write the tables and the figure."""
    found = complete()
    text = filled(PAGE.read_text(encoding="utf-8"), found)
    with atomic_file(PAGE) as file:
        file.write(text.encode())
    if found.seeds:
        draw(found)
