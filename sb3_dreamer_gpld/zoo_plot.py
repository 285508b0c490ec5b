"""Draws the evaluations of runs as PNG with rl_zoo3's plots: a curve for each task, and the aggregate over dm_control."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from rl_zoo3.plots import all_plots, plot_from_file  # noqa: E402

# Returns of dm_control's tasks lie between 0 and this
_LARGEST_RETURN = 1000.0


def main(name: str) -> None:
    """Draw what the arguments in ``sys.argv`` ask for.

    :param name: name of the algorithm, whose runs are drawn if no other is given
    :raises SystemExit: there is nothing to draw
    """
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        description="Draw the returns that train --eval-freq logged: mean over the seeds and its standard error for each "
        "task, and for the dm_control tasks together, with returns divided by 1000, rliable's aggregates and their stratified "
        "bootstrap intervals. Other options are those of rl_zoo3's all_plots, such as -max and --no-million.",
    )
    parser.add_argument("-f", "--exp-folders", nargs="+", default=["logs"], help="folders of runs to compare (default: logs)")
    parser.add_argument("-l", "--labels", nargs="+", help="a label for each folder")
    parser.add_argument("-a", "--algos", nargs="+", default=[name], help=f"algorithms (default: {name})")
    parser.add_argument("-e", "--env", nargs="+", help="environments (default: all that were evaluated)")
    parser.add_argument("-o", "--output", default="plots", help="folder for the pictures (default: plots)")
    parser.add_argument("-ci", "--ci-size", type=float, default=0.95, help="size of the intervals (default: 0.95)")
    options, rest = parser.parse_known_args(sys.argv[1:])
    if options.labels and len(options.labels) != len(options.exp_folders):
        parser.error(f"{len(options.exp_folders)} folders need as many labels, not {len(options.labels)}")
    labels = options.labels or options.exp_folders
    tasks = [env.replace("/", "-") for env in options.env or ()] or _find_tasks(options.exp_folders, options.algos)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)

    arguments = ["-a", *options.algos, "-e", *tasks, "-f", *options.exp_folders, "-l", *labels]
    arguments += ["-o", str(output / "results"), "--no-display", *rest]
    _draw(all_plots, arguments, [output / f"{task}.png" for task in tasks])
    curves = pickle.loads((output / "results.pkl").read_bytes())  # made just now
    if not any(curves[task] for task in tasks):
        raise SystemExit(
            f"{sys.argv[0]}: no run of {', '.join(options.algos)} in {', '.join(options.exp_folders)} has two or more evaluations"
        )
    _aggregate(curves, labels if len(options.algos) == 1 else None, options.ci_size, output)


def _find_tasks(folders: list[str], algos: list[str]) -> list[str]:
    """Names of the environments of all runs that were evaluated, as they are in the names of folders.

    :raises SystemExit: there is none
    """
    files = [file for folder in folders for algo in algos for file in Path(folder, algo).glob("*_*/evaluations.npz")]
    tasks = {re.sub(r"_\d+(_[0-9a-f-]{36})?$", "", file.parent.name) for file in files}
    if not tasks:
        places = ", ".join(os.path.join(folder, algo) for folder in folders for algo in algos)
        raise SystemExit(
            f"{sys.argv[0]}: no run in {places} was evaluated: train with --eval-freq, or give other folders with -f"
        )
    return sorted(tasks)


def _draw(function: Callable[[], None], arguments: list[str], files: Iterable[Path]) -> None:
    """Run a script of rl_zoo3 and save its first figures."""
    sys.argv = [sys.argv[0], *arguments]
    plt.close("all")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
        function()
    for number, file in zip(plt.get_fignums(), files, strict=False):
        plt.figure(number).savefig(file, dpi=150, bbox_inches="tight")
        print(f"Saved {file}")
    plt.close("all")


def _aggregate(curves: dict[str, Any], labels: list[str] | None, interval: float, output: Path) -> None:
    """Draw the aggregates over the dm_control tasks that all labels have.

    :param curves: what rl_zoo3 made of the runs, by task and label
    :param labels: the labels as the user gave them
    :param interval: size of the intervals
    :param output: folder for the pictures
    """
    names = {name for task in curves if task != "results_table" for name in curves[task]}
    tasks = [task for task in curves if task.startswith("dm_control-") and set(curves[task]) == names]
    if not tasks:
        print("No aggregate: there is no dm_control task with runs under every label")
        return
    evaluations = min(len(curves[task][name]["mean_per_eval"]) for task in tasks for name in names)
    for curve in (curves[task][name] for task in tasks for name in names):
        returns = np.asarray(curve["mean_per_eval"]) / _LARGEST_RETURN  # (evaluations, seeds)
        # rl_zoo3 averages over the seeds here if there is only one, or only one episode
        curve["last_evals"] = returns[-1]
        curve["mean_per_eval"] = returns[:evaluations]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "normalized.pkl"
        file.write_bytes(pickle.dumps({"results_table": curves["results_table"], **{task: curves[task] for task in tasks}}))
        arguments = ["-i", str(file), "--skip-timesteps", "--rliable", "-iqm", "-ci", str(interval)]
        arguments += ["-l", *labels] if labels else []
        files = [output / f"{name}.png" for name in ("aggregate", "performance_profile", "sample_efficiency")]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not found for normalizing scores")  # normalised here
            _draw(plot_from_file, arguments, files)
