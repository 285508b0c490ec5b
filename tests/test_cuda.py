"""On a GPU: the same update, without waiting for the device, and a short training. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from test_parity import RECORDINGS, Recording

from sb3_dreamer_gpld import DreamerGPLD
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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training(precision: str) -> None:
    sizes: dict[str, Any] = dict(model_size="debug", batch_size=4, batch_length=8, learning_starts=32, imagination_horizon=3)
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", device="cuda", precision=precision, **sizes).learn(100)
    assert model._n_updates > 0 and next(model.policy.parameters()).is_cuda
