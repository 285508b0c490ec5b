"""Shows an agent that is trained already, with the options that rl_zoo3's script has for one's own."""

from __future__ import annotations

import argparse

import numpy as np
from stable_baselines3.common.utils import set_random_seed

from sb3_dreamer_gpld.policies import DreamerPolicy
from sb3_dreamer_gpld.trained import TrainedAgent


def parse(args: list[str]) -> argparse.Namespace:
    """Read the arguments of ``enjoy --trained``."""
    parser = argparse.ArgumentParser(
        prog="dreamer-gpld enjoy", description="Show an agent that is trained already, and its returns.", allow_abbrev=False
    )
    parser.add_argument(
        "--trained", metavar="AGENT", required=True, help="its name, or a policy file with agents.yml beside it"
    )
    parser.add_argument("-n", "--n-timesteps", type=_steps, default=1000, help="steps of the agent (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes (default: 0)")
    parser.add_argument("--no-render", action="store_true", help="only print the returns")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--deterministic", action="store_true", default=None, help="take the most probable actions")
    actions.add_argument(
        "--stochastic", action="store_false", dest="deterministic", help="sample the actions (default: what returns more)"
    )
    return parser.parse_args(args)


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {steps}")
    return steps


def run(agent: TrainedAgent, policy: DreamerPolicy, options: argparse.Namespace) -> list[float]:
    """Let an agent act, and print the returns of its episodes.

    :param agent: who acts
    :param policy: of the agent, as it loads it
    :param options: of :func:`parse`
    :return: returns of the episodes that ended
    """
    deterministic = agent.deterministic if options.deterministic is None else options.deterministic
    kind = "most probable" if deterministic else "sampled"
    recorded = agent.returns[kind]
    mean, std, episodes = (recorded[key] for key in ("mean", "std", "episodes"))
    print(f"{agent.name}, {kind} actions. Recorded: {mean:.1f} +/- {std:.1f}, {episodes} episodes")
    env = agent.make_env(render_mode=None if options.no_render else "human")
    set_random_seed(options.seed)
    obs, state, starts, returns, total = env.reset(seed=options.seed)[0], None, True, [], 0.0
    for _ in range(options.n_timesteps):
        action, state = policy.predict(obs, state, np.array([starts]), deterministic)
        obs, reward, terminated, truncated, _ = env.step(action)
        if not options.no_render:
            env.render()
        total, starts = total + float(reward), terminated or truncated
        if starts:
            print(f"Episode reward: {total:.2f}")
            returns.append(total)
            obs, total = env.reset()[0], 0.0
    if returns:
        print(f"{len(returns)} episodes\nMean reward: {np.mean(returns):.2f} +/- {np.std(returns):.2f}")
    else:
        print(f"No episode ended in {options.n_timesteps} steps; reward so far: {total:.2f}")
    env.close()
    return returns
