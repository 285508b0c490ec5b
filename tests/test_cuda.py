"""On a GPU: the same update, without waiting for the device, and a short training. Skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize
from test_parity import RECORDINGS, Recording

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.execution import CudaGraphs
from sb3_dreamer_gpld.learner import Draws

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")]


def on_gpu(value: Any) -> Any:
    """A named tuple of tensors, and dicts of them, on the GPU."""
    if isinstance(value, th.Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {key: on_gpu(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(on_gpu(part) for part in value))
    return value


@pytest.mark.parametrize("name", ["cont0", "disc0", "image0"])
def test_update_is_the_recorded_one_and_does_not_wait(name: str) -> None:
    recording = Recording(RECORDINGS[name])
    model = recording.model()
    model.device = th.device("cuda")
    model.policy = model.policy.cuda()
    arguments = [
        on_gpu(recording.batch(model)),
        on_gpu(Draws(recording.world_draws(model), recording.imagination_draws(model))),
        model._n_updates,
    ]
    result = model.learner.loss(*arguments)
    th.testing.assert_close(result.total.detach().cpu(), recording.tensor("loss_total"), rtol=1e-4, atol=0.0)
    model.learner.update(*arguments, [1e-4])  # allocates the optimiser's state
    th.cuda.set_sync_debug_mode("error")
    try:
        model.learner.update(*arguments, [1e-4])
    finally:
        th.cuda.set_sync_debug_mode("default")


SIZES: dict[str, Any] = dict(
    model_size="debug", batch_size=4, batch_length=8, learning_starts=32, imagination_horizon=3, train_ratio=32.0
)


def recorded(model: DreamerGPLD) -> DreamerGPLD:
    """Record its updates and steps of acting as CUDA graphs, uncompiled."""
    model.learner.execution.recorder = CudaGraphs(model.device)
    return model


def assert_captured(model: DreamerGPLD) -> None:
    assert model.learner.execution.captured("step") and model.learner.execution.captured("_act")


@pytest.mark.parametrize("options", [{}, {"actor_gradient": "dynamics", "ent_coef": "auto"}, {"penalty_estimator": "exact"}])
def test_captured_training_is_the_same(options: dict[str, Any]) -> None:
    """Learning rates, λ and random numbers are those of each update: the seed repeats the run without the graphs."""
    learned = dict(
        learning_rate=lambda left: 1e-3 * left, penalty_schedule="linear", seed=0, device="cuda", **SIZES, **options
    )
    plain = DreamerGPLD("MlpPolicy", "Pendulum-v1", **learned).learn(80)
    other = recorded(DreamerGPLD("MlpPolicy", "Pendulum-v1", **learned)).learn(80)
    assert_captured(other)
    for name, value in plain.policy.state_dict().items():
        th.testing.assert_close(other.policy.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_captured_updates_draw_anew() -> None:
    model = recorded(DreamerGPLD("MlpPolicy", "Pendulum-v1", seed=0, device="cuda", **SIZES)).learn(60)
    logs = []
    for _ in range(2):
        model.learner.metrics.take()
        model.train(1, 4)
        logs.append(model.learner.metrics.take())
    assert_captured(model)
    assert logs[0]["loss/total"] != logs[1]["loss/total"]


def test_a_captured_update_does_not_wait() -> None:
    model = recorded(DreamerGPLD("MlpPolicy", "Pendulum-v1", seed=0, device="cuda", **SIZES)).learn(60)
    samples = model.replay_buffer.sample(4)
    th.cuda.set_sync_debug_mode("error")
    try:
        model.learner.update(model.policy.to_batch(samples), None, model._n_updates, [1e-4])
    finally:
        th.cuda.set_sync_debug_mode("default")
    assert_captured(model)


def test_a_loaded_model_is_captured_anew(tmp_path: Path) -> None:
    model = recorded(DreamerGPLD("MlpPolicy", "Pendulum-v1", seed=0, device="cuda", **SIZES)).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = recorded(DreamerGPLD.load(tmp_path / "model", env=model.env, device="cuda"))
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(40, reset_num_timesteps=False)
    assert_captured(loaded)
    model.set_parameters(loaded.get_parameters())
    model.learn(20, reset_num_timesteps=False)
    assert_captured(model)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training(precision: str) -> None:
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", device="cuda", precision=precision, **SIZES).learn(100)
    assert model._n_updates > 0 and next(model.policy.parameters()).is_cuda


def test_rows_on_the_gpu() -> None:
    """Batches of a training are those of the same rows on the host, with VecNormalize too, and are read without a wait."""
    sizes = dict(buffer_size=80, replay_buffer_kwargs={"storage": "device"}, **SIZES)  # fewer rows than steps
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", device="cuda", **sizes).learn(100)
    buffer, host = model.replay_buffer, copy.deepcopy(model.replay_buffer)
    assert buffer is not None and host is not None and model._n_updates > 0
    host.storage = "host"
    env = VecNormalize(model.get_env())
    env.obs_rms.mean, env.obs_rms.var = np.array([0.1, -0.2, 0.3]), np.array([0.3, 0.7, 2.1])
    buffer.sample(4, env)
    host.sample(4, env)
    th.cuda.set_sync_debug_mode("error")
    try:
        samples = buffer.sample(4, env)
        deter = th.arange(4 * 8 * 32, dtype=th.float32, device="cuda").view(4, 8, 32)
        buffer.update_latents(samples.envs, samples.starts, deter, samples.stoch.unsqueeze(1).expand(4, 8, -1))
    finally:
        th.cuda.set_sync_debug_mode("default")
    same = host.sample(4, env)
    host.update_latents(samples.envs, samples.starts, deter, samples.stoch.unsqueeze(1).expand(4, 8, -1))
    for ours, expected in zip(samples[:-2], same[:-2], strict=True):
        assert ours.is_cuda and ours.dtype == expected.dtype
        th.testing.assert_close(ours, expected, rtol=1e-6, atol=0.0)
    np.testing.assert_array_equal(samples.starts, same.starts)
    np.testing.assert_array_equal(buffer.deter, host.deter[: buffer.size()])
    np.testing.assert_array_equal(buffer.stoch, host.stoch[: buffer.size()])


def test_too_little_memory_of_the_gpu_is_named() -> None:
    model = DreamerGPLD(
        "MlpPolicy", "Pendulum-v1", device="cuda", buffer_size=10**10, replay_buffer_kwargs={"storage": "device"}
    )
    with pytest.raises(
        MemoryError, match=r"10,000,000,000 rows needs .* bytes on 'cuda.*are free; allowed: a smaller buffer_size"
    ):
        model.learn(10)
