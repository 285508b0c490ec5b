"""Any arm on any task, beside each other: what settings are chosen by, and what they reach.

Usage: python -m benchmarks.learning.ladder run --arms recipe sac --tasks walker-walk --seeds 0 1 --frames 60000 [--workers 2]
       python -m benchmarks.learning.ladder table [--arms ...] [--tasks ...] [--seeds ...] [--at 60000]
                                                    [--returns deterministic]

Arms are described in ``arms.yml``. Every run is a process with one thread, ``--workers`` of them side by side; it is saved
every few episodes, so the command can be killed and repeated at any time, and with more frames a finished run goes on. A
run's results are ``ladder/ARM/TASK_SEED.csv``, a row for every training episode (actions sampled), and
``TASK_SEED_evaluation.csv``, a row for every number of frames at which it ended: episodes with and without sampling.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
import yaml
from gymnasium.wrappers import FlattenObservation
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from benchmarks.learning.run import DIGITS, EPISODES_PER_SAVE, LastValues, rows_until
from benchmarks.results import read_columns, read_csv, write_csv
from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.envs import make_dmc

HERE = Path(__file__).parent
RESULTS = HERE / "ladder"
TASKS = (
    "walker-walk",
    "walker-run",
    "cheetah-run",
    "hopper-hop",
    "quadruped-run",
    "cartpole-swingup",
    "reacher-hard",
    "finger-spin",
)
# That a run can have; settings are chosen on walker-walk, cheetah-run, cartpole-swingup and the last two only
MORE_TASKS = (*TASKS, "quadruped-walk", "reacher-easy", "ball_in_cup-catch")
FROM_PIXELS = "-pixels"  # behind a task: pictures of 64x64 instead of numbers
PIXEL_TASKS = ("cartpole-swingup-pixels", "walker-walk-pixels")
EVERY_TASK = (*MORE_TASKS, *PIXEL_TASKS)
EPISODE_FRAMES = 1000  # of every task of dm_control here
EVALUATION_EPISODES = 10
LAST_FRAMES = 5_000  # over which a run's return is averaged
SAC_KWARGS = dict(learning_starts=10_000)  # rl_zoo3's settings of continuous control: SB3's own, and a longer warm-up
# Columns of a run that are taken from the log, where the algorithm has them
LOGGED = {
    "entropy": "actor_critic/entropy",
    "ent_coef": "actor_critic/ent_coef",
    "value": "actor_critic/value",
    "reconstruction": "loss/reconstruction",  # summed over the keys
    "reward": "loss/reward",
    "dyn": "loss/dyn",
}


class Arm(NamedTuple):
    """Settings that are compared.

    :param name: in ``arms.yml``
    :param settings: arguments of the algorithm
    :param action_repeat: simulator steps for each step of the agent
    :param target_entropy: nats for each action number; None: as in the settings
    :param unavailable: why it cannot be run any more; None: it can
    :param decay_frames: frames over which the learning rates fall linearly to a tenth, episode by episode; None: they stay
    :param fade_frames: the same of the noise that is added to collected actions
    """

    name: str
    settings: dict[str, Any]
    action_repeat: int
    target_entropy: float | None
    unavailable: str | None
    decay_frames: int | None = None
    fade_frames: int | None = None

    @property
    def is_sac(self) -> bool:
        return self.name.startswith("sac")


class Job(NamedTuple):
    """One run.

    :param arm, task, seed: what is run
    :param frames: simulator steps
    """

    arm: str
    task: str
    seed: int
    frames: int

    @property
    def file(self) -> Path:
        """Where the results lie."""
        return RESULTS / self.arm / f"{self.task}_{self.seed}.csv"

    @property
    def evaluations(self) -> Path:
        return self.file.with_name(f"{self.file.stem}_evaluation.csv")

    @property
    def finished(self) -> bool:
        """Whether it was evaluated at its last frame or later."""
        return any(int(row["frames"]) >= self.frames for row in read_csv(self.evaluations))


def read_arms() -> dict[str, Arm]:
    """The arms of ``arms.yml``; one with a ``base`` has that one's settings but for those that it names itself."""
    entries = yaml.safe_load((HERE / "arms.yml").read_text())

    def settings(name: str) -> dict[str, Any]:
        entry = dict(entries[name] or {})
        base = entry.pop("base", None)
        inherited = {} if base is None else settings(base)
        kwargs = {**inherited.get("policy_kwargs", {}), **entry.pop("policy_kwargs", {})}
        return {**inherited, **entry, **({"policy_kwargs": kwargs} if kwargs else {})}

    arms = {}
    for name in entries:
        values = settings(name)
        own = {field: values.pop(field, None) for field in ("unavailable", "decay_frames", "fade_frames")}
        repeat, target = values.pop("action_repeat", 2), values.pop("target_entropy_per_number", None)
        arms[name] = Arm(name, values, action_repeat=repeat, target_entropy=target, **own)
    return arms


def make_env(arm: Arm, task: str, seed: int) -> gym.Env:
    """The task; SAC sees its observations as one vector."""
    env = make_dmc(task.removesuffix(FROM_PIXELS), task in PIXEL_TASKS, arm.action_repeat, seed=seed)
    return Monitor(FlattenObservation(env) if arm.is_sac else env)


def make_model(arm: Arm, job: Job) -> OffPolicyAlgorithm:
    """A fresh model of an arm."""
    env = make_env(arm, job.task, job.seed)
    if arm.is_sac:
        return SAC("MlpPolicy", env, seed=job.seed, device="cpu", **{**SAC_KWARGS, **arm.settings})
    assert env.action_space.shape is not None
    target = {} if arm.target_entropy is None else {"target_entropy": arm.target_entropy * math.prod(env.action_space.shape)}
    return DreamerGPLD("MultiInputPolicy", env, seed=job.seed, device="cpu", compile=True, **arm.settings, **target)


def row(model: OffPolicyAlgorithm, frames: int, seconds: float, log: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an episode."""
    assert model.ep_info_buffer
    logged = {
        column: sum((value for key, value in log.items() if key == name or key.startswith(f"{name}/")), 0.0)
        for column, name in LOGGED.items()
    }
    return {
        "frames": frames,
        "episode_return": float(model.ep_info_buffer[-1]["r"]),
        "core_seconds": round(seconds),
        "updates": model._n_updates,
        **(logged if "loss/total" in log else dict.fromkeys(LOGGED, "")),
    }


def run(job: Job, folder: Path) -> None:
    """One run, from where it was stopped.

    :param job: what to run
    :param folder: of the checkpoints
    """
    arm = read_arms()[job.arm]
    checkpoint = folder / job.arm / f"{job.task}_{job.seed}" / "model.zip"
    buffer_file = checkpoint.with_name("buffer.pkl")
    model: OffPolicyAlgorithm
    if checkpoint.exists() and buffer_file.exists():
        algorithm = SAC if arm.is_sac else DreamerGPLD
        model = algorithm.load(checkpoint, env=make_env(arm, job.task, job.seed), device="cpu")  # type: ignore[assignment]
        model.load_replay_buffer(buffer_file)
        assert model.env is not None
        model.env.seed(1000 * job.seed + model.num_timesteps)  # not the first episode's start again
    else:
        if known := read_csv(job.file):
            raise FileNotFoundError(
                f"{job.file} has a run of {known[-1]['frames']} frames, and its checkpoint in {checkpoint.parent} is missing: "
                "from the start it would be another run, which would take the place of that one. Allowed: another seed, the "
                "folder of its checkpoint (--runs), or without that file"
            )
        model = make_model(arm, job)
    frames = arm.action_repeat * model.num_timesteps
    rows = rows_until(job.file, frames)
    seconds = float(rows[-1]["core_seconds"]) if rows else 0.0
    log = LastValues()
    model.set_logger(Logger(None, [log]))
    while frames < job.frames:
        set_rates_and_noise(model, arm, frames)
        start = time.process_time()
        model.learn(EPISODE_FRAMES // arm.action_repeat, reset_num_timesteps=False, log_interval=1)
        seconds += time.process_time() - start
        frames = arm.action_repeat * model.num_timesteps
        rows.append(row(model, frames, seconds, log.values))
        if len(rows) % EPISODES_PER_SAVE == 0 or frames >= job.frames:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            write_csv(job.file, rows, DIGITS)  # first: rows that are too new are left out when the run goes on
            model.save_replay_buffer(buffer_file)
            model.save(checkpoint)
    evaluate(model, arm, job, frames)


def share_left(frames: int, fall: int | None) -> float:
    """What is left after some frames of what falls linearly to a tenth over ``fall`` frames; None: all of it."""
    return 1.0 if fall is None else 1.0 - 0.9 * min(1.0, frames / fall)


def set_rates_and_noise(model: OffPolicyAlgorithm, arm: Arm, frames: int) -> None:
    """Those of an arm after some frames, where they fall."""
    if arm.decay_frames is not None:
        for name in ("learning_rate", "actor_learning_rate"):
            if arm.settings.get(name) is not None:
                setattr(model, name, arm.settings[name] * share_left(frames, arm.decay_frames))
        model._setup_lr_schedule()
    if arm.fade_frames is not None:
        assert isinstance(model, DreamerGPLD)
        model.exploration_noise = arm.settings["exploration_noise"] * share_left(frames, arm.fade_frames)


def evaluate(model: OffPolicyAlgorithm, arm: Arm, job: Job, frames: int) -> None:
    """Episodes of fresh seeds, with the most probable action and with sampled ones."""
    found: dict[str, Any] = {"frames": frames, "episodes": EVALUATION_EPISODES}
    for name, deterministic in (("deterministic", True), ("sampled", False)):
        env = make_env(arm, job.task, 10_000 + job.seed)
        returns, _ = evaluate_policy(
            model, env, n_eval_episodes=EVALUATION_EPISODES, deterministic=deterministic, return_episode_rewards=True
        )
        found |= {name: float(np.mean(returns)), f"{name}_std": float(np.std(returns))}
    write_csv(job.evaluations, [*rows_until(job.evaluations, frames - 1), found], DIGITS)


def run_all(jobs: Sequence[Job], workers: int, folder: Path) -> int:
    """Runs that are not finished, some side by side, each in a process with one thread.

    :return: how many failed
    """
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(workers):
        slots.put(slot)

    def start(job: Job) -> int:
        slot = slots.get()
        # Two processes that compile the same function at once can read each other's half-written files.
        cache = folder / "compiled" / str(slot)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache.absolute())}
        command = [sys.executable, "-m", "benchmarks.learning.ladder", "one", *map(str, job), "--runs", str(folder)]
        print(f"{' '.join(map(str, job))}: starts", flush=True)
        status = subprocess.run(command, env=environment, check=False).returncode
        print(f"{' '.join(map(str, job))}: {'done' if status == 0 else f'FAILED with {status}'}", flush=True)
        slots.put(slot)
        return status

    missing = [job for job in jobs if not job.finished]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished, and left alone", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        return sum(status != 0 for status in pool.map(start, missing))


# ------------------------------------------------------------------------------------------------------------ tables


def results(arm: str, task: str, seeds: Sequence[int] | None, at: int) -> dict[int, dict[str, np.ndarray]]:
    """Runs of an arm that reached ``at`` frames, by seed."""
    found = {}
    for path in sorted((RESULTS / arm).glob(f"{task}_*.csv")):
        seed = path.stem.removeprefix(f"{task}_")
        if seed.isdigit() and (seeds is None or int(seed) in seeds):
            columns = read_columns(path)
            if columns["frames"][-1] >= at:
                found[int(seed)] = columns
    return dict(sorted(found.items()))


def return_at(columns: dict[str, np.ndarray], at: int) -> float:
    """Mean return of the training episodes in the last frames before ``at``."""
    within = (columns["frames"] > at - LAST_FRAMES) & (columns["frames"] <= at)
    return float(columns["episode_return"][within].mean())


def evaluated(arm: str, task: str, seed: int, at: int, kind: str) -> float:
    """Mean return of the evaluation after ``at`` frames; NaN where there was none.

    :param kind: "deterministic" or "sampled" actions
    """
    rows = read_csv(Job(arm, task, seed, at).evaluations)
    return next((float(row[kind]) for row in rows if int(row["frames"]) == at), math.nan)


def last_value(columns: dict[str, np.ndarray], name: str, at: int) -> float:
    return float(columns[name][columns["frames"] <= at][-1])


def table(
    arms: Sequence[str], tasks: Sequence[str], seeds: Sequence[int] | None, at: int, kind: str = "training"
) -> Iterator[str]:
    """Markdown: for each arm the mean return per task and over the tasks, core-minutes and updates; seeds in brackets.

    :param kind: "training": the last episodes, or the evaluation with "deterministic" or "sampled" actions
    """
    yield f"| arm, at {at:,} frames | {' | '.join(tasks)} | mean | core-minutes | updates |"
    yield "| --- " * (len(tasks) + 4) + "|"
    for arm in arms:
        by_task = {task: results(arm, task, seeds, at) for task in tasks}
        if not any(by_task.values()):
            continue
        cells, means = [], []
        for task, runs in by_task.items():
            found = {
                seed: return_at(columns, at) if kind == "training" else evaluated(arm, task, seed, at, kind)
                for seed, columns in runs.items()
            }
            returns = [value for value in found.values() if math.isfinite(value)]
            cells.append(f"{np.mean(returns):.0f} ({', '.join(f'{x:.0f}' for x in returns)})" if returns else "")
            means += [np.mean(returns)] if returns else []
        every = [columns for runs in by_task.values() for columns in runs.values()]
        minutes = np.mean([last_value(columns, "core_seconds", at) for columns in every]) / 60
        updates = np.mean([last_value(columns, "updates", at) for columns in every])
        mean = f"{np.mean(means):.0f}" if len(means) == len(tasks) else ""
        yield f"| {arm} | {' | '.join(cells)} | {mean} | {minutes:.0f} | {updates:,.0f} |"


# ------------------------------------------------------------------------------------------------------ command line


def one_of(kind: str, allowed: Sequence[str]) -> Callable[[str], str]:
    """Type of an argument of the command line that must be one of some names."""

    def check(name: str) -> str:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"there is no {kind} {name!r}; allowed: {', '.join(allowed)}")
        return name

    return check


def main() -> int:
    arms = read_arms()
    runnable = [name for name, arm in arms.items() if arm.unavailable is None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    many = commands.add_parser("run", help="run what is not finished")
    one = commands.add_parser("one", help="a single run, in this process")
    show = commands.add_parser("table", help="print the returns of runs that got that far")
    for command in (many, show):
        command.add_argument("--arms", nargs="+", type=one_of("arm", list(arms)), default=runnable)
        command.add_argument("--tasks", nargs="+", type=one_of("task", EVERY_TASK), default=TASKS)
    many.add_argument("--seeds", nargs="+", type=int, default=[0])
    many.add_argument("--frames", type=int, default=60_000)
    many.add_argument("--workers", type=int, default=2)
    show.add_argument("--seeds", nargs="+", type=int, help="default: all")
    show.add_argument("--at", type=int, default=60_000, help="frames")
    show.add_argument(
        "--returns",
        choices=("training", "deterministic", "sampled"),
        default="training",
        help="of the last training episodes, or of the evaluation there with most probable or sampled actions",
    )
    one.add_argument("arm", type=one_of("arm", list(arms)))
    one.add_argument("task", type=one_of("task", EVERY_TASK))
    one.add_argument("seed", type=int)
    one.add_argument("frames", type=int)
    for command in (many, one):
        command.add_argument("--runs", type=Path, default=Path("runs/ladder"), help="folder of the checkpoints")
    args = parser.parse_args()
    if args.command != "table":
        names, tasks = (args.arms, args.tasks) if args.command == "run" else ([args.arm], [args.task])
        for name in names:
            if why := arms[name].unavailable:
                parser.error(f"the arm {name} cannot be run: {why}")
            if arms[name].is_sac and (pictures := [task for task in tasks if task in PIXEL_TASKS]):
                parser.error(f"the arm {name} cannot be run on {', '.join(pictures)}; allowed: tasks without {FROM_PIXELS}")
    if args.command == "one":
        th.set_num_threads(1)
        run(Job(args.arm, args.task, args.seed, args.frames), args.runs)
    elif args.command == "run":
        jobs = [Job(arm, task, seed, args.frames) for seed in args.seeds for task in args.tasks for arm in args.arms]
        return min(1, run_all(jobs, args.workers, args.runs))
    else:
        print("\n".join(table(args.arms, args.tasks, args.seeds, args.at, args.returns)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
