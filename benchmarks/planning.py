"""What planning at decision time costs, and what it returns beside the policy net, with the same trained nets.

Usage: python -m benchmarks.planning time [--size 1m] [--environments 1 16] [--repeats 11]
       python -m benchmarks.planning returns FILE --task walker-walk --label "100,000 frames" [--episodes 10]
                                             [--actions "most probable" sampled] [--results FILE]
       python -m benchmarks.planning table [FILE ...]

``time``: milliseconds for a step of acting, the ways to act taking turns. ``returns``: episodes of a model (a .zip of
``model.save``) or policy (a file of ``policy.save``) with each way to act, from the same starts, appended to
``planning_returns.csv`` or another file (processes that run at once need one each); ``table`` prints them. Ways that are there
already are not run again. Let nothing run beside ``time``.
"""

from __future__ import annotations

import argparse
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from benchmarks.learning.ladder import MORE_TASKS
from benchmarks.results import read_csv, write_csv
from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.envs import make_dmc
from sb3_dreamer_gpld.planning import Planner, PlannerConfig
from sb3_dreamer_gpld.policies import DreamerPolicy

RESULTS = Path(__file__).parent / "planning_returns.csv"
STAGES = RESULTS.with_name("planning_stages.csv")  # of models with and without the penalty
ACTION_REPEAT = 2
SEED = 20_000  # of the episodes' starts, which no run was trained or chosen on
ACTIONS = ("most probable", "sampled")
# What is compared: the policy net alone; TD-MPC2's planner; one of a twelfth of its candidates; that one, close to the policy
# and looking further ahead
PLANNERS: dict[str, dict[str, Any] | None] = {
    "policy": None,
    "TD-MPC2": {},
    "small": dict(samples=128, policy_samples=12, elites=16, iterations=3),
    "near": dict(samples=64, policy_samples=32, elites=8, iterations=2, max_std=0.5, horizon=6),
}


def policy_of(file: Path) -> DreamerPolicy:
    """The policy of a model's or a policy's file."""
    if zipfile.is_zipfile(file) and file.suffix == ".zip":
        return DreamerGPLD.load(file, device="cpu").policy
    return DreamerPolicy.load(file, device="cpu")


def use(policy: DreamerPolicy, way: str) -> None:
    """Let a policy act in one of the ways of :data:`PLANNERS`."""
    settings = PLANNERS[way]
    policy.planner = None if settings is None else Planner(PlannerConfig(**settings))


def milliseconds(size: str, n_envs: int, ways: Sequence[str], repeats: int) -> dict[str, float]:
    """Median time of a sampled step for each way to act, with untrained nets on walker-walk."""
    env = make_vec_env(lambda: make_dmc("walker-walk", action_repeat=ACTION_REPEAT), n_envs=n_envs)
    policy = DreamerGPLD("MultiInputPolicy", env, model_size=size, device="cpu", seed=0).policy
    observation, starts = env.reset(), np.zeros(n_envs, bool)
    states: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):  # the first is not counted
        for way in ways:
            use(policy, way)
            start = time.perf_counter()
            _, states[way] = policy.predict(observation, states.get(way), starts)
            seconds[way].append(time.perf_counter() - start)
    return {way: 1e3 * float(np.median(values[1:])) for way, values in seconds.items()}


def returns(policy: DreamerPolicy, task: str, way: str, deterministic: bool, episodes: int) -> dict[str, float]:
    """Mean and standard deviation of the returns of episodes, and the seconds of a step."""
    use(policy, way)
    th.manual_seed(SEED)
    env, start = Monitor(make_dmc(task, action_repeat=ACTION_REPEAT, seed=SEED)), time.process_time()
    found, steps = evaluate_policy(
        policy, env, n_eval_episodes=episodes, deterministic=deterministic, return_episode_rewards=True
    )
    ms = 1e3 * (time.process_time() - start) / sum(steps)  # type: ignore[arg-type]
    return {"return": float(np.mean(found)), "std": float(np.std(found)), "ms": ms}


def run(file: Path, task: str, label: str, ways: Sequence[str], actions: Sequence[str], episodes: int, results: Path) -> None:
    """Every way that is missing, added to the results one by one.

    :param file: of the model or policy
    :param task: of the episodes
    :param label: of the model in the results
    :param ways, actions: to act, of :data:`PLANNERS` and :data:`ACTIONS`
    :param episodes: for each of them
    :param results: file that they are added to; one for each of several processes that run at once
    """
    policy = policy_of(file)
    for way in ways:
        for kind in actions:
            key = {"task": task, "model": label, "way": way, "actions": kind, "episodes": str(episodes)}
            rows: list[dict[str, Any]] = list(read_csv(results))
            if not any(all(row[name] == value for name, value in key.items()) for row in rows):
                write_csv(results, [*rows, {**key, **returns(policy, task, way, kind == ACTIONS[0], episodes)}], 4)


def table(files: Sequence[Path]) -> Iterator[str]:
    """Markdown: a row for each task and stage, a column for each kind of model and way to act. Cells are those of most
    probable / sampled actions, or of the only ones that there are.

    The label of a model is its stage, and after ", " its kind if there are several.

    :param files: of results
    """
    rows = [row for file in files for row in read_csv(file)]
    kinds = [actions for actions in ACTIONS if any(row["actions"] == actions for row in rows)]
    cells: dict[tuple[str, str], dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        stage, _, kind = row["model"].partition(", ")
        found = cells.setdefault((row["task"], stage), {}).setdefault((kind, row["way"]), {})
        found[row["actions"]] = f"{float(row['return']):.0f} ± {float(row['std']):.0f}"
    columns = sorted(
        {column for found in cells.values() for column in found},
        key=lambda column: (column[0], list(PLANNERS).index(column[1])),
    )
    yield f"| task | model | {' | '.join(', '.join(filter(None, column[::-1])) for column in columns)} |"
    yield "| --- " * (len(columns) + 2) + "|"
    for (task, stage), found in cells.items():
        returns_of = [found.get(column, {}) for column in columns]
        texts = [" / ".join(returns.get(actions, "–") for actions in kinds) if returns else "" for returns in returns_of]
        yield f"| {task} | {stage} | {' | '.join(texts)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("time", help="milliseconds for a step")
    timing.add_argument("--size", default="1m")
    timing.add_argument("--environments", type=int, nargs="+", default=[1, 16])
    timing.add_argument("--repeats", type=int, default=11)
    episodes = commands.add_parser("returns", help="episodes with each way to act")
    episodes.add_argument("file", type=Path)
    episodes.add_argument("--task", choices=MORE_TASKS, required=True)
    episodes.add_argument("--label", required=True, help='stage of the model in the table, or "stage, kind"')
    episodes.add_argument("--episodes", type=int, default=10)
    episodes.add_argument("--actions", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    episodes.add_argument("--results", type=Path, default=RESULTS)
    for command in (timing, episodes):
        command.add_argument("--ways", nargs="+", choices=PLANNERS, default=list(PLANNERS))
    shown = commands.add_parser("table", help="print what was found")
    shown.add_argument("files", type=Path, nargs="*", default=[RESULTS])
    args = parser.parse_args()
    th.set_num_threads(1)
    if args.command == "time":
        for n_envs in args.environments:
            found = milliseconds(args.size, n_envs, args.ways, args.repeats)
            print(f"{args.size}, {n_envs} environments: " + ", ".join(f"{way} {ms:.1f} ms" for way, ms in found.items()))
    elif args.command == "returns":
        run(args.file, args.task, args.label, args.ways, args.actions, args.episodes, args.results)
    else:
        print("\n".join(table(args.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
