"""Draw the learning curves of a protocol and print its tables.

Usage: python -m benchmarks.learning.draw p2 [--out docs/figures]

The figure has the mean over seeds with its 95 % bootstrap interval (beyond the shortest run's end the mean of the others),
and the run of the authors' release where there is one. The tables (Markdown) are the return over the last 5,000 frames; beside
a reference, every loss at some numbers of updates with the spread of the seeds; and how fast the critic's values rise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.learning.protocols import ARMS, COMMON, EPISODE_FRAMES, PROTOCOLS, REFERENCE, RESULTS, Protocol
from benchmarks.results import read_columns
from sb3_dreamer_gpld.saving import atomic_file
from sb3_dreamer_gpld.zoo.plot import Style, interval, mean

LAST_FRAMES = 5_000
PUBLISHED = "DreamerV3, run by TD-MPC2's authors"
LOSS_UPDATES = (600, 1500, 2500, 3400)
RATE_SUMS = (0.1, 0.2, 0.3, 0.4)
MARGIN = 0.1  # by which the seeds' spread is widened in the comparison of losses
# Columns of a reference, not all in each, and the metrics of ours that they stand beside (summed where there are several).
LOSSES = {
    "reconstruction": "loss/reconstruction",
    "rew": "loss/reward",
    "con": "loss/continue",
    "dyn": "loss/dyn",
    "rep": "loss/rep",
    "gp_post": "gpld/posterior_penalty",
    "value": "loss/value",
    "entropy": "actor_critic/entropy",
    "imagined_value": "actor_critic/value",
}
LABELS = {
    "gpld": "DreamerV3 + GPLD",
    "gpld-rate": "DreamerV3 + GPLD, learning rate × 4",
    "gpld-start": "DreamerV3 + GPLD, updates from 256 steps on",
    "dreamer": "DreamerV3 (λ = 0)",
    "sac": "SAC",
}
Columns = dict[str, np.ndarray]


def runs(name: str, arm: str, kind: str) -> dict[int, Columns]:
    """Results of an arm by seed, as far as there are any.

    :param kind: "returns" or "losses"; losses have a column "updates", as those of a reference: the number of updates in the
        middle of those that a row is the mean of
    """
    paths = sorted(RESULTS.glob(f"{name}_{arm}_*_{kind}.csv"))
    by_seed = {int(path.stem.split("_")[-2]): read_columns(path) for path in paths}
    if kind == "losses":
        for columns in by_seed.values():
            ends = columns["train/n_updates"]
            columns["updates"] = (ends + np.concatenate([[0], ends[:-1]])) / 2
    return by_seed


def bootstrap(values: np.ndarray) -> np.ndarray:
    """95 % interval of the mean over seeds (seeds, points), (2, points)."""
    return interval(values[:, None], mean, Style(size=0.95, reps=2000))


def last_returns(columns: Columns, frames: float | None = None) -> float:
    """Mean return of the training episodes in the last frames.

    :param frames: where the last frames end; at the end of the run by default
    """
    end = columns["frames"][-1] if frames is None else frames
    within = (columns["frames"] > end - LAST_FRAMES) & (columns["frames"] <= end)
    return float(columns["episode_return"][within].mean())


def draw(name: str, protocol: Protocol, out: Path) -> None:
    """Learning curves as PNG."""
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for arm in protocol.arms:
        by_seed = list(runs(name, arm, "returns").values())
        if not by_seed:
            continue
        frames = max((columns["frames"] for columns in by_seed), key=len)
        points = min(len(columns["frames"]) for columns in by_seed)  # of all seeds
        returns = np.full((len(by_seed), len(frames)), np.nan)  # (seeds, points of the longest)
        for row, columns in zip(returns, by_seed, strict=True):
            row[: len(columns["frames"])] = columns["episode_return"]
        seeds = "1 seed" if len(returns) == 1 else f"{len(returns)} seeds"
        (line,) = axes.plot(frames, np.nanmean(returns, 0), label=f"{LABELS[arm]} ({seeds})")
        if len(returns) > 1:
            axes.fill_between(frames[:points], *bootstrap(returns[:, :points]), alpha=0.25, color=line.get_color())
    if protocol.reference:
        reference = read_columns(REFERENCE / f"{protocol.reference}.csv")
        axes.plot(reference["frames"], reference["episode_return"], "k--", label="authors' GPLD release (1 seed)")
    if protocol.published is not None:
        axes.plot(protocol.frames, protocol.published, "k*", markersize=10, label=f"{PUBLISHED} (3 seeds)")
    axes.set(title=protocol.task, xlabel="frames", ylabel="return of training episodes")
    figure.legend(loc="outside lower center")
    axes.grid(alpha=0.3)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / f"learning_{name}.png") as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def return_row(title: str, values: np.ndarray, interval: str = "", minutes: str = "") -> str:
    """Row of :func:`return_table` with the returns of each seed."""
    each = ", ".join(f"{value:.0f}" for value in values)
    return f"| {title} | {len(values)} | {values.mean():.0f}{interval} | {each} | {minutes} |"


def return_table(name: str, protocol: Protocol) -> list[str]:
    """Return over the last frames and time of every arm."""
    lines = [f"| {protocol.task} | seeds | return, last {LAST_FRAMES:,} frames | of each seed | minutes a run |"]
    lines.append("| --- | --- | --- | --- | --- |")
    last = {}
    for arm in protocol.arms:
        by_seed = runs(name, arm, "returns")
        by_seed = {seed: columns for seed, columns in by_seed.items() if columns["frames"][-1] >= protocol.frames}
        if not by_seed:
            lines.append(f"| {LABELS[arm]} | none finished | | | |")
            continue
        values = np.array([last_returns(columns) for columns in by_seed.values()])
        last[arm] = values
        interval = "" if len(values) < 2 else " [{:.0f}, {:.0f}]".format(*bootstrap(values[:, None])[:, 0])
        minutes = np.median([columns["seconds"][-1] / 60 for columns in by_seed.values()])
        lines.append(return_row(LABELS[arm], values, interval, f"{minutes:.0f}"))
    if protocol.reference:
        reference = read_columns(REFERENCE / f"{protocol.reference}.csv")
        end, title = reference["frames"][-1], "authors' GPLD release"
        if end < protocol.frames - LAST_FRAMES:
            title += f", at {end:,.0f} frames"
            for arm in protocol.arms:
                by_seed = runs(name, arm, "returns")
                as_far = [columns for columns in by_seed.values() if columns["frames"][-1] > end - EPISODE_FRAMES]
                if as_far:
                    values = np.array([last_returns(columns, end) for columns in as_far])
                    lines.append(return_row(f"{LABELS[arm]}, at {end:,.0f} frames", values))
        lines.append(f"| {title} | 1 | {last_returns(reference):.0f} | | |")
    if protocol.published is not None:
        lines.append(f"| {PUBLISHED} | 3 | {protocol.published:.0f} | | |")
    if {"gpld", "dreamer"} <= last.keys():
        rng = np.random.default_rng(0)
        means = [rng.choice(values, (2000, len(values))).mean(1) for values in (last["gpld"], last["dreamer"])]
        low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
        difference = last["gpld"].mean() - last["dreamer"].mean()
        lines.append(f"\nλ₀ = 0.5 minus λ₀ = 0: {difference:.0f}, 95 % interval [{low:.0f}, {high:.0f}].")
    return lines


def loss_table(name: str, protocol: Protocol) -> list[str]:
    """Losses beside those of the reference, at some numbers of updates."""
    by_seed = list(runs(name, protocol.reference_arm, "losses").values())
    assert protocol.reference
    reference = read_columns(REFERENCE / f"{protocol.reference}_losses.csv")
    lines = ["| updates | loss | reference | ours, lowest to highest seed | within the widened spread |", "| --- " * 5 + "|"]
    within = []
    for updates in LOSS_UPDATES:
        if not by_seed or any(columns["updates"][-1] < updates for columns in [reference, *by_seed]):
            continue
        for name_, metric in LOSSES.items():
            if name_ not in reference:
                continue
            theirs = float(np.interp(updates, reference["updates"], reference[name_]))
            ours = []
            for columns in by_seed:
                total = sum(values for key, values in columns.items() if key == metric or key.startswith(f"{metric}/"))
                ours.append(float(np.interp(updates, columns["updates"], total)))
            low, high = min(ours), max(ours)
            if name_ != "rep":  # equal to dyn
                within.append(low <= theirs <= high)
            widened = low - MARGIN * abs(low) <= theirs <= high + MARGIN * abs(high)
            lines.append(f"| {updates} | {name_} | {theirs:.3f} | {low:.3f} to {high:.3f} | {'yes' if widened else 'NO'} |")
    lines.append(f"\nWithin the seeds' spread itself: {sum(within)} of {len(within)}.")
    return lines


def value_table(name: str, protocol: Protocol) -> list[str]:
    """Mean value of imagined states after equal sums of learning rates, which is how far weights can have moved."""
    lines = ["| sum of learning rates | arm | updates | value of imagined states, over the seeds |", "| --- " * 4 + "|"]
    for arm in protocol.arms:
        by_seed = runs(name, arm, "losses").values()
        settings = {**COMMON, **protocol.settings, **ARMS[arm]}
        for total in RATE_SUMS:
            updates = total / settings["learning_rate"] + settings["learning_rate_warmup"] / 2  # the rate rises from 0
            if not by_seed or any(run["updates"][-1] < updates for run in by_seed):
                continue
            values = [np.interp(updates, run["updates"], run["actor_critic/value"]) for run in by_seed]
            spread = " to ".join(f"{value:.1f}" for value in sorted({min(values), max(values)}))
            lines.append(f"| {total} | {LABELS[arm]} | {updates:,.0f} | {spread} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=tuple(PROTOCOLS))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    protocol = PROTOCOLS[args.protocol]
    draw(args.protocol, protocol, args.out)
    print("\n".join(return_table(args.protocol, protocol)))
    if protocol.reference:
        print()
        print("\n".join(loss_table(args.protocol, protocol)))
    print()
    print("\n".join(value_table(args.protocol, protocol)))


if __name__ == "__main__":
    sys.exit(main())
