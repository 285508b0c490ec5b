"""Print and draw what an arm reaches on the eight tasks, beside SAC and published agents.

Usage: python -m benchmarks.learning.confirmation [--arm rw10-rate16-explore-normalize] [--seeds 30 31 32] [--out docs/figures]

The runs are those of ``benchmarks.learning.ladder``. The table (Markdown) has the evaluations after 100,000 frames, a number
for each seed, and the last training episodes; the figure, ``confirmation.png``, has the returns of training episodes, and the
evaluations as dots. SAC's are training episodes, of all runs of its arm and of the protocols ``p3-walker`` and
``p3-cartpole``, which have the same settings. What others publish is in ``published.yml``, with its source.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml
from stable_baselines3.common.results_plotter import window_func

from benchmarks.learning import draw, ladder
from benchmarks.results import read_csv
from sb3_dreamer_gpld.saving import atomic_file

PUBLISHED = Path(__file__).with_name("published.yml")
FRAMES = 100_000
ARM = "rw10-rate16-explore-normalize"  # preset("cpu")
SEEDS = [30, 31, 32]  # that the search never saw
EPISODES = 5  # over which a curve is averaged
SAC_PROTOCOLS = {"walker-walk": "p3-walker", "cartpole-swingup": "p3-cartpole"}
OURS = 'preset("cpu"), each seed'
AUTHORS = "DreamerV3 by its authors: mean, least and most of 5 seeds"
EVALUATED = "the same, evaluated: most probable actions"
# Means that the authors of TD-MPC2 publish, as published.yml calls them
BY_OTHERS = ("dreamer_by_others", "sac_by_others", "td_mpc2")
COLUMNS = (
    "task",
    "seeds",
    "most probable actions",
    "sampled",
    "training",
    "core-minutes",
    "SAC, training",
    "DreamerV3 by its authors",
    "DreamerV3 by TD-MPC2's",
    "SAC by TD-MPC2's",
    "TD-MPC2",
)
Columns = dict[str, np.ndarray]


def sac_runs(task: str) -> list[Columns]:
    """Every finished run of SAC on a task."""
    found = list(ladder.results("sac", task, None, FRAMES).values())
    if protocol := SAC_PROTOCOLS.get(task):
        runs = draw.runs(protocol, "sac", "returns").values()
        found += [columns for columns in runs if columns["frames"][-1] >= FRAMES]
    return found


def published_dreamer(published: dict[str, Any], task: str) -> tuple[int, str]:
    """DreamerV3's return at the last frames by its authors, or by others where these have not run the task: the mean, and the
    mean with the least and the most of the seeds."""
    if task not in published["dreamer"]:
        return published["dreamer_by_others"][task], "–"
    mean, least, most = published["dreamer"][task][-1]
    return mean, f"{mean} ({least} to {most})" if most else str(mean)


def several(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


def table(arm: str, seeds: Sequence[int], published: dict[str, Any]) -> Iterator[str]:
    """Markdown: for each task the returns of every seed; in the last row means over the tasks of the means over the seeds."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "| --- " * len(COLUMNS) + "|"
    kinds = ("deterministic", "sampled", "training", "sac", "dreamer", *BY_OTHERS)
    means: dict[str, list[float]] = {kind: [] for kind in kinds}
    for task in ladder.TASKS:
        runs = ladder.results(arm, task, seeds, FRAMES)
        found = {
            kind: [ladder.evaluated(arm, task, seed, FRAMES, kind) for seed in runs] for kind in ("deterministic", "sampled")
        }
        found["training"] = [ladder.return_at(columns, FRAMES) for columns in runs.values()]
        found["sac"] = [ladder.return_at(columns, FRAMES) for columns in sac_runs(task)]
        for kind, values in found.items():
            means[kind] += [float(np.mean(values))] if values else []
        mean, dreamer = published_dreamer(published, task)
        means["dreamer"].append(mean)
        for kind in BY_OTHERS:
            means[kind].append(published[kind][task])
        minutes = [ladder.last_value(columns, "core_seconds", FRAMES) / 60 for columns in runs.values()]
        ours = [several(found[kind]) for kind in ("deterministic", "sampled", "training")]
        cells = [task, several(list(runs)), *ours, several(minutes), several(found["sac"]), dreamer]
        yield f"| {' | '.join([*cells, *(str(published[kind][task]) for kind in BY_OTHERS)])} |"
    mean_of = {
        kind: f"{np.mean(values):.0f}" if len(values) == len(ladder.TASKS) and math.isfinite(sum(values)) else ""
        for kind, values in means.items()
    }
    ours = [mean_of[kind] for kind in ("deterministic", "sampled", "training")]
    cells = ["mean of the eight", "", *ours, "", mean_of["sac"], mean_of["dreamer"]]
    yield f"| {' | '.join([*cells, *(mean_of[kind] for kind in BY_OTHERS)])} |"


def figure(arm: str, seeds: Sequence[int], published: dict[str, Any], file: Path) -> None:
    """A panel for each task."""
    fig, axes = plt.subplots(2, 4, figsize=(12, 5.5), layout="constrained", sharex=True)
    handles: dict[str, Any] = {}
    frames = np.array(published["dreamer"]["frames"]) / 1000
    for axis, task in zip(axes.flat, ladder.TASKS, strict=True):
        ours = ladder.results(arm, task, seeds, 1)
        for label, color, runs in ((OURS, "C0", list(ours.values())), ("SAC, each seed", "C1", sac_runs(task))):
            for columns in runs:
                episodes = min(EPISODES, len(columns["frames"]))
                at, returns = window_func(columns["frames"], columns["episode_return"], episodes, np.mean)
                (handles[label],) = axis.plot(at / 1000, returns, color=color, linewidth=1.2)
        for seed in ours:
            for row in read_csv(ladder.Job(arm, task, seed, FRAMES).evaluations):
                at, returned = float(row["frames"]) / 1000, float(row["deterministic"])
                (handles[EVALUATED],) = axis.plot(at, returned, "C0o", markersize=5, clip_on=False, zorder=3)
        if task in published["dreamer"]:
            mean, least, most = np.array(published["dreamer"][task]).T
            (handles[AUTHORS],) = axis.plot(frames, mean, "k--", linewidth=1.2)
            axis.fill_between(frames, least, most, color="k", alpha=0.1)
        else:
            axis.plot(FRAMES / 1000, published["dreamer_by_others"][task], "k*")
        (handles["TD-MPC2, published"],) = axis.plot(FRAMES / 1000, published["td_mpc2"][task], "C3D", clip_on=False)
        axis.set(title=task, xlim=(0, FRAMES / 1000), ylim=(0, max(100, axis.get_ylim()[1])))
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("thousand frames")
    for axis in axes[:, 0]:
        axis.set_ylabel("return, training episodes")
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as written:
        fig.savefig(written, format="png", dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = list(ladder.read_arms())
    parser.add_argument("--arm", type=ladder.one_of("arm", arms), default=ARM)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the figure")
    args = parser.parse_args()
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    print("\n".join(table(args.arm, args.seeds, published)))
    figure(args.arm, args.seeds, published, args.out / "confirmation.png")


if __name__ == "__main__":
    main()
