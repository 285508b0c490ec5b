"""``dreamer-gpld sweep``: many runs, on the cores of this machine or on a cluster, with Ray Tune.

Every run is an ordinary one of ``dreamer-gpld train`` in a process and a folder of its own, ``SWEEP/ARM/dreamer_gpld/TASK_N``,
so ``plot``, ``enjoy`` and the others find it. Ray decides when and where it runs, and starts it again when it fails; the run
itself goes on where it was saved last. The same command goes on with what is not finished.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sb3_dreamer_gpld.checks import unknown_name
from sb3_dreamer_gpld.zoo.arguments import NAME, choose_entry, fail, find_config
from sb3_dreamer_gpld.zoo.check import check_entry
from sb3_dreamer_gpld.zoo.environments import prepare_environment
from sb3_dreamer_gpld.zoo.recorded import Finished, changes, recorded
from sb3_dreamer_gpld.zoo.register import register

# Arms that need no file: arguments beside those of the hyperparameter file
ARMS: dict[str, dict[str, Any]] = {
    "gpld": {},
    "v3": {"posterior_penalty": 0.0, "prior_penalty": 0.0},
}
LAST_EPISODES = 10  # over which the table's return is averaged
SECONDS = 5.0  # between two looks at a run


class SweepRun(NamedTuple):
    """One run.

    :param task: id of the environment
    :param arm, seed: what is run
    :param steps: that it shall make
    :param folder: of the run
    """

    task: str
    arm: str
    seed: int
    steps: int
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it says that it has made its steps, the last that a run does, or was stopped by a callback."""
        end = Finished.read(self.folder)
        return end is not None and (end.stopped or end.steps >= self.steps)

    def progress(self) -> dict[str, float]:
        """Frames and episodes so far, and the mean return of the last episodes, from what the run has logged.

        Frames are steps of the simulator, which ``ActionRepeat`` makes several of for one of the agent.
        """
        lines = [line for file in sorted(self.folder.glob("*.monitor.csv")) for line in episodes_in(whole_lines(file))]
        rows = sorted((line.split(",") for line in lines), key=lambda row: float(row[2]))
        if not rows:
            return {"frames": 0, "return": float("nan"), "episodes": 0}
        returns = [float(row[0]) for row in rows[-LAST_EPISODES:]]
        return {"frames": sum(int(row[1]) for row in rows), "return": sum(returns) / len(returns), "episodes": len(rows)}


def whole_lines(file: Path) -> list[str]:
    """The lines of a Monitor's file, without a last one that is not written to its end yet."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].split("\n")[:-1]


def episodes_in(lines: Sequence[str]) -> list[str]:
    """Those of a Monitor's lines that tell an episode: its return, length and time, and perhaps more.

    Others, which a machine that failed may have left, are left out.
    """
    episodes = []
    for line in lines[2:]:
        with contextlib.suppress(ValueError):
            total, length, seconds = line.split(",")[:3]
            float(total), int(length), float(seconds)
            episodes.append(line)
    return episodes


def parse(args: list[str]) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="dreamer-gpld sweep",
        description="Run tasks, seeds and arms with Ray Tune; the same command goes on with what is not finished.",
    )
    parser.add_argument("--tasks", nargs="+", required=True, metavar="ENV", help="ids of environments")
    parser.add_argument("--seeds", default="0", help="such as 0-4 or 1,3,5 (default: 0)")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["gpld"],
        metavar="ARM",
        help=f"{', '.join(ARMS)}, or entries of --arms-file, with spaces or commas between (default: gpld)",
    )
    parser.add_argument("--arms-file", help="YAML file: a name for each arm, and the arguments in which it differs")
    parser.add_argument("-conf", "--conf-file", help="file of hyperparameters (default: dreamer_gpld.yml)")
    parser.add_argument("-n", "--n-timesteps", type=int, help="steps of each run (default: the file's)")
    parser.add_argument("-f", "--folder", default="sweep", help="of the runs (default: sweep)")
    parser.add_argument("--eval-freq", type=int, default=10_000, help="steps between evaluations (default: 10000)")
    parser.add_argument("--eval-episodes", type=int, default=5, help="episodes of each (default: 5)")
    parser.add_argument("--save-run", type=int, default=10_000, help="steps between saves of the whole run (default: 10000)")
    parser.add_argument("--cpus", type=float, default=1, help="processor cores for each run (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each run, 0.5 for two runs on one (default: 0)")
    parser.add_argument("--retries", type=int, default=3, help="of a run that fails or whose node dies (default: 3)")
    parser.add_argument("--address", help='of a Ray cluster, "auto" for the one that runs here (default: this machine alone)')
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments")
    options = parser.parse_args(args)
    options.arms = list(dict.fromkeys(arm for word in options.arms for arm in word.split(",")))
    return options


def parse_seeds(text: str) -> list[int]:
    """Seeds written as "0-4", "1,3,5" or both.

    :raises SystemExit: it is written in another way
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
            fail(f"--seeds {text}: allowed are numbers and ranges, such as 0-4 or 1,3,5")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return list(dict.fromkeys(seeds))


def read_arms(names: Sequence[str], file: str | None) -> dict[str, dict[str, Any]]:
    """The arguments of each arm.

    :raises SystemExit: an arm or the file does not exist, or the file is wrong
    """
    arms = dict(ARMS)
    if file is not None:
        try:
            given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            fail(f"--arms-file {file}: {error}")
        if not isinstance(given, dict) or not all(isinstance(entry, (dict, type(None))) for entry in given.values()):
            fail(f"--arms-file {file}: allowed are names of arms with 'argument: value' lines each")
        arms |= {str(name): entry or {} for name, entry in given.items()}
    for name in names:
        if name not in arms:
            fail(unknown_name("the arm", name, arms))
    return {name: arms[name] for name in names}


def command(run: SweepRun, settings: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """The command that makes a run, or goes on with it."""
    words = [sys.executable, "-m", "sb3_dreamer_gpld.zoo", "train", "--env", run.task, "--seed", str(run.seed)]
    words += ["-conf", str(Path(find_config(options.conf_file)).absolute()), "-f", str(run.folder.parents[1])]
    words += ["--run-folder", str(run.folder), "--save-run", str(options.save_run)]
    words += ["--eval-freq", str(options.eval_freq), "--eval-episodes", str(options.eval_episodes)]
    words += [] if options.n_timesteps is None else ["-n", str(options.n_timesteps)]
    words += ["--gym-packages", *options.gym_packages] if options.gym_packages else []
    return words + (["-params", *(f"{name}:{value!r}" for name, value in settings.items())] if settings else [])


def make_run(run: SweepRun, words: list[str], threads: int, here: str, report: Any = None) -> None:
    """Make a run to its end, in a process of its own, whose output is in the run's folder.

    :param run: what is run
    :param words: the command
    :param threads: of the process
    :param here: folder that it works in
    :param report: is given the progress from time to time; None: nobody
    :raises RuntimeError: it failed; has the last lines of the output
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "output.txt"
    # Two processes that compile the same function at once can read each other's half-written files.
    cache = str((run.folder / ".compiled").absolute())
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": cache}
    with log.open("ab") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=here, preexec_fn=DIE_WITH_PARENT
        )
        try:
            while process.poll() is None:
                time.sleep(SECONDS)
                if report is not None:
                    report(run.progress())
        finally:
            process.kill()  # if Ray stops this one
            process.wait()
    if process.returncode != 0:
        end = log.read_text(errors="replace").splitlines()[-15:]
        raise RuntimeError(f"{' '.join(words)} ended with status {process.returncode}:\n" + "\n".join(end))


def _die_with_the_parent() -> None:
    """Ray may be killed, and the same command makes the run again."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


DIE_WITH_PARENT = _die_with_the_parent if sys.platform == "linux" else None


def prepare(options: argparse.Namespace) -> dict[SweepRun, list[str]]:
    """The runs and their commands, after a look at everything that could be wrong.

    :raises SystemExit: an arm, a task, a hyperparameter or a number is wrong, or Ray is missing
    """
    if importlib.util.find_spec("ray") is None:
        fail('a sweep needs Ray: pip install "sb3-dreamer-gpld[ray]"')
    for name in ("eval_freq", "eval_episodes", "save_run"):
        if getattr(options, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(options, name)}: allowed are whole numbers of at least 1")
    seeds, arms = parse_seeds(options.seeds), read_arms(options.arms, options.arms_file)
    file, folder = find_config(options.conf_file), Path(options.folder).absolute()
    runs = {}
    for task in options.tasks:
        prepare_environment(task, options.gym_packages, rendering=False)
        name, entry = choose_entry(file, task)
        for arm, settings in arms.items():
            problems = check_entry({**entry, **settings})
            if problems:
                fail("\n".join(f"{file}, {name}, arm {arm}: {problem}" for problem in problems))
            steps = int(options.n_timesteps or {**entry, **settings}["n_timesteps"])
            if options.eval_freq > steps:
                fail(
                    f"--eval-freq {options.eval_freq}: a run in {task} has {steps} steps and would never be evaluated. "
                    f"Allowed: at most {steps}"
                )
            for seed in seeds:
                place = folder / arm / NAME / f"{task.replace('/', '-')}_{seed + 1}"
                run = SweepRun(task, arm, seed, steps, place)
                before = recorded(place, "config.yml") if run.finished else {}
                if before and (found := changes(before, {**entry, **settings})):
                    fail(
                        f"{place}: the run there is finished with other hyperparameters ({found}). Allowed: the same ones, "
                        "n_timesteps excepted, or another --folder"
                    )
                runs[run] = command(run, settings, options)
    return runs


def main(args: list[str]) -> int:
    """Make the runs that are not finished, and draw what all have reached.

    :return: exit status, 1 if a run failed for good
    """
    options = parse(args)
    register()
    runs = prepare(options)
    missing = {run: words for run, words in runs.items() if not run.finished}
    print(f"{len(runs)} runs, of which {len(runs) - len(missing)} are finished")
    if missing:
        _make_runs(missing, options)
    failed = [run for run in runs if not run.finished]
    for run in failed:
        print(f"not finished: {run.task}, {run.arm}, seed {run.seed}; its output is {run.folder / 'output.txt'}")
    _draw(options, runs)
    return int(bool(failed))


def cores_of_this_job(address: str | None) -> dict[str, Any]:
    """Arguments of ``ray.init``: a Ray of one's own has the cores that this process may use, and not all of the machine.

    :param address: of a Ray that is there; None: there is none, unless RAY_ADDRESS names it
    """
    if address is not None or "RAY_ADDRESS" in os.environ:
        return {"address": address}
    from ray._private.utils import get_num_cpus  # Inside Ray: what it would take, which is all or a container's share

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else sys.maxsize
    return {"address": "local", "num_cpus": max(1, min(cores, int(get_num_cpus())))}


def _make_runs(runs: dict[SweepRun, list[str]], options: argparse.Namespace) -> None:
    import ray
    from ray import cloudpickle, tune

    by_name = {f"{run.arm} {run.task} {run.seed}": (run, words) for run, words in runs.items()}
    threads, here = max(1, int(options.cpus)), os.getcwd()

    def trainable(config: dict[str, Any]) -> None:
        run, words = by_name[config["run"]]
        make_run(run, words, threads, here, tune.report)

    # Ray's workers need nothing of this package, which takes long to import: the runs are processes of their own.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(**cores_of_this_job(options.address), include_dashboard=False, log_to_driver=False)
    try:
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": options.cpus, "gpu": options.gpus}),
            param_space={"run": tune.grid_search(list(by_name))},
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(Path(options.folder).absolute()),
                failure_config=tune.FailureConfig(max_failures=options.retries),
                verbose=1,
            ),
        ).fit()
    finally:
        ray.shutdown()


def _draw(options: argparse.Namespace, runs: dict[SweepRun, list[str]]) -> None:
    """Curves and aggregates with intervals, of the runs that were evaluated."""
    if not any((run.folder / "evaluations.npz").is_file() for run in runs):
        return print("No run was evaluated yet")
    if importlib.util.find_spec("matplotlib") is None:
        return print('Pictures need matplotlib: pip install "sb3-dreamer-gpld[extra]"')
    from sb3_dreamer_gpld.zoo import plot

    folder = Path(options.folder)
    found = plot.read_runs([str(folder / arm) for arm in options.arms], list(options.arms), [NAME])
    plot.draw(found, folder / "plots", plot.Style())
    return None
