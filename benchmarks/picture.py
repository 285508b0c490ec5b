"""Draws agents of ``trained_agents`` that move side by side, as an animated picture; README opens with it.

Usage: MUJOCO_GL=egl python -m benchmarks.picture cartpole-swingup walker-walk [--seconds 6] [--to docs/figures/agents.webp]

MuJoCo needs EGL where there is no display, see docs/troubleshooting.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch as th
from PIL import Image

from sb3_dreamer_gpld.envs import steps_per_second
from sb3_dreamer_gpld.trained import TrainedAgent, find_agent

HEIGHT, WIDTH = 180, 240
FPS = 20
MAX_BYTES = 3_000_000


def frames(agent: TrainedAgent, seconds: float, seed: int) -> Iterator[np.ndarray]:
    """Pictures of an agent at the speed of the simulation, uint8 (height, width, 3), from the start of an episode."""
    env = agent.make_env(render_mode="rgb_array", render_kwargs=dict(camera_id=0, height=HEIGHT, width=WIDTH))
    policy = agent.load()
    th.manual_seed(seed)
    rate = steps_per_second(env)
    assert rate
    obs, state, starts, drawn = env.reset(seed=seed)[0], None, True, 0
    for step in range(round(seconds * rate)):
        if step * FPS >= drawn * rate:
            picture = env.render()
            assert isinstance(picture, np.ndarray)
            yield picture
            drawn += 1
        action, state = policy.predict(obs, state, np.array([starts]), agent.deterministic)
        obs, _, terminated, truncated, _ = env.step(action)
        starts = terminated or truncated
        if starts:
            obs = env.reset()[0]


def draw(agents: list[TrainedAgent], seconds: float, seed: int, file: Path) -> int:
    """Write the picture.

    :return: its bytes
    :raises ValueError: there are too many of them
    """
    columns = zip(*(frames(agent, seconds, seed) for agent in agents), strict=False)
    first, *others = [Image.fromarray(np.concatenate(row, 1)) for row in columns]
    for quality in (80, 60, 40, 25):
        first.save(file, save_all=True, append_images=others, duration=round(1000 / FPS), loop=0, quality=quality, method=6)
        if file.stat().st_size <= MAX_BYTES:
            return file.stat().st_size
    raise ValueError(f"{file} has {file.stat().st_size} bytes, more than {MAX_BYTES}: take fewer seconds or agents")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agents", nargs="+", help="names in trained_agents, of dm_control's tasks")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0, help="of the episodes")
    parser.add_argument("--to", type=Path, default=Path("docs/figures/agents.webp"))
    args = parser.parse_args()
    th.set_num_threads(1)
    size = draw([find_agent(name) for name in args.agents], args.seconds, args.seed, args.to)
    print(f"{args.to}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
