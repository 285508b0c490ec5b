"""A long run at small size: the ring wraps many times, and nothing grows.

``SOAK_STEPS`` in the environment sets the number of environment steps (200,000).
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from test_dreamer_gpld import tiny

STEPS = int(os.environ.get("SOAK_STEPS", "200000"))
WRAPS = 20
N_ENVS = 8


class Walk(gym.Env):
    """A random walk with an image of its place; episodes of different lengths, some of them terminal."""

    observation_space = spaces.Dict({"place": spaces.Box(-9.0, 9.0, (2,)), "image": spaces.Box(0, 255, (1, 16, 16), np.uint8)})
    action_space = spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.place, self.steps = np.zeros(2, dtype=np.float32), 0
        self.length = int(self.np_random.integers(1, 60))
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.place = np.clip(self.place + action, -9, 9).astype(np.float32)
        self.steps += 1
        out = bool(np.abs(self.place).max() >= 9)
        return self._observation(), -float(np.abs(self.place).sum()), out, self.steps >= self.length, {}

    def _observation(self) -> dict:
        image = np.zeros((1, 16, 16), dtype=np.uint8)
        x, y = ((self.place + 9) / 18 * 15).astype(int)
        image[0, x, y] = 255
        return {"place": self.place.copy(), "image": image}


class Usage(NamedTuple):
    """What the process holds.

    :param memory: resident bytes
    :param tensors: tensors that Python's garbage collector knows
    :param graphs: those of them that carry a graph
    :param files: open file descriptors
    :param processes: child processes
    """

    memory: int
    tensors: int
    graphs: int
    files: int
    processes: int


def usage() -> Usage:
    psutil = pytest.importorskip("psutil")
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), th.Tensor)]
    process = psutil.Process()
    return Usage(
        process.memory_info().rss,
        len(tensors),
        sum(x.grad_fn is not None for x in tensors),
        process.num_fds() if hasattr(process, "num_fds") else 0,
        len(process.children(recursive=True)),
    )


@pytest.mark.long
def test_nothing_grows(tmp_path: Path) -> None:
    """From the first wrap on: memory within 2 %, and not one tensor, graph, file or process more."""
    before = usage()
    env = VecNormalize(make_vec_env(Walk, N_ENVS, seed=0), norm_obs_keys=["place"])
    evaluation = VecNormalize(make_vec_env(Walk, 2, seed=1), norm_obs_keys=["place"], training=False)
    model = tiny(env, "MultiInputPolicy", buffer_size=STEPS // WRAPS, train_ratio=0.25, learning_starts=200)
    model.set_logger(configure(str(tmp_path), ["csv", "tensorboard"]))
    callback = EvalCallback(evaluation, eval_freq=STEPS // 40 // N_ENVS, best_model_save_path=str(tmp_path), verbose=0)
    buffer = model.replay_buffer
    assert buffer is not None
    marks = []
    # Two wraps for everything that is made once: pages of the arrays, caches of the allocator, log files.
    for share in (0.1, 0.4, 0.7, 1.0):
        model.learn(int(share * STEPS) - model.num_timesteps, callback, log_interval=100, reset_num_timesteps=False)
        marks.append(usage())
    assert model.num_timesteps >= STEPS and buffer.rows_added.min() >= 10 * buffer.buffer_size
    assert model._n_updates >= 0.9 * STEPS * 0.25 / 32
    assert all(th.isfinite(p).all() for p in model.policy.parameters())
    first, last = marks[0], marks[-1]
    assert last.memory <= 1.02 * first.memory, [mark.memory for mark in marks]
    assert last.graphs <= first.graphs == before.graphs
    assert (last.tensors, last.files, last.processes) == (first.tensors, first.files, first.processes), marks
    assert first.processes == before.processes


@pytest.mark.long
def test_processes_and_files_are_given_back() -> None:
    """Models and environments made again and again in one process, as a study of hyperparameters does it."""
    held = []
    for _ in range(4):
        env = make_vec_env(Walk, 2, vec_env_cls=SubprocVecEnv)
        model = tiny(env, "MultiInputPolicy", learning_starts=40).learn(80)
        assert model._n_updates > 0
        env.close()
        del model, env
        held.append(usage())
    # The first run starts the server that forks the others.
    assert held[-1].processes == held[0].processes and held[-1].files == held[0].files
    assert held[-1].tensors == held[0].tensors and held[-1].graphs == held[0].graphs
