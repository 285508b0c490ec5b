"""A model that is ready to train on sequences with the sizes of dm_control's walker, without the simulator."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_dreamer_gpld import DreamerGPLD


class WalkerSized(gym.Env):
    """Random observations in walker's spaces: 24 observation and 6 action numbers, episodes of 500 steps."""

    def __init__(self) -> None:
        self.observation_space = spaces.Dict(
            {
                "height": spaces.Box(-np.inf, np.inf, ()),
                "orientations": spaces.Box(-np.inf, np.inf, (14,)),
                "velocity": spaces.Box(-np.inf, np.inf, (9,)),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (6,))
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.steps += 1
        return self._observation(), float(self.np_random.random()), False, self.steps >= 500, {}

    def _observation(self) -> dict[str, np.ndarray]:
        items = self.observation_space.spaces.items()
        return {key: self.np_random.standard_normal(space.shape).astype(np.float32) for key, space in items}


class ImageSized(WalkerSized):
    """The same with random images of ``side``·``side`` pixels in place of the 24 numbers."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.observation_space = spaces.Dict({"image": spaces.Box(0, 255, (side, side, 3), np.uint8)})

    def _observation(self) -> dict[str, np.ndarray]:
        return {"image": self.np_random.integers(256, size=self.observation_space["image"].shape, dtype=np.uint8)}


def add_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Options of the benchmarks of an update.

    :param parser: gets them
    :param repeats: default of ``--repeats``
    """
    parser.add_argument("--precision", default="float32", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--horizon", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)


def model_of(args: argparse.Namespace, **kwargs: Any) -> DreamerGPLD:
    """A model with the options of :func:`add_arguments`.

    :param kwargs: further arguments of DreamerGPLD
    """
    return filled_model(
        steps=max(1100, 2 * args.length),
        precision=args.precision,
        compile=args.compile,
        batch_size=args.batch,
        batch_length=args.length,
        imagination_horizon=args.horizon,
        buffer_size=10_000,
        device=args.device,
        **kwargs,
    )


def filled_model(steps: int = 1100, env: gym.Env | None = None, **kwargs: Any) -> DreamerGPLD:
    """A model with ``steps`` stored steps and no update made.

    :param steps: environment steps to collect
    :param env: with Dict observations; None: :class:`WalkerSized`
    :param kwargs: arguments of DreamerGPLD
    """
    model = DreamerGPLD("MultiInputPolicy", env or WalkerSized(), **{"seed": 0, **kwargs})
    ratio, model.train_ratio = model.train_ratio, 0.0
    model.learn(steps, log_interval=None)
    model.train_ratio = ratio
    return model
