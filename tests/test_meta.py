"""An update runs on one device alone and waits for it nowhere, shown without a GPU: on PyTorch's ``meta`` device nothing is
computed, and a dispatch mode sees every operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from test_dreamer_gpld import BOX, RandomSpaces, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Operations whose result, or its shape, depends on values: on a GPU they wait for all that was launched before.
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal", "aten.is_nonzero")


class OneDevice(TorchDispatchMode):
    """Fails at the first operation that mixes devices, copies between them, or reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, th.Tensor)]
        name = str(func)
        if name.startswith(READS):
            raise AssertionError(f"{name} reads a value")
        if name.startswith("aten.index") and any(tensor.dtype == th.bool for tensor in tensors[1:]):
            raise AssertionError(f"{name} has a mask as an index")
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1:
            raise AssertionError(f"{name} mixes {sorted(devices)}")
        result = func(*args, **kwargs)
        made = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, th.Tensor)}
        if devices and made - devices:
            raise AssertionError(f"{name} copies from {sorted(devices)} to {sorted(made)}")
        return result


VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
MIXED = spaces.Dict({"image": spaces.Box(0, 255, (3, 64, 64), np.uint8), "vector": VECTOR})
CASES: dict[str, tuple[spaces.Space, spaces.Space, dict[str, Any]]] = {
    "vectors": (VECTOR, BOX, {}),
    "images": (MIXED, BOX, {}),
    "discrete": (VECTOR, spaces.Discrete(3), {}),
    "both penalties": (VECTOR, BOX, {"prior_penalty": 0.5}),
    "random rows": (VECTOR, BOX, {"penalty_rows": 2, "penalty_random_rows": True}),
    "exact penalty": (VECTOR, BOX, {"penalty_estimator": "exact"}),
    "dynamics": (VECTOR, BOX, {"actor_gradient": "dynamics", "imagination_starts": 3, "ent_coef": "auto"}),
    "actor's rate": (VECTOR, BOX, {"actor_learning_rate": 1e-4}),
}


def on_meta(value: Any) -> Any:
    """The same with all tensors on the meta device."""
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, th.Tensor) else leaf, value)


def updates(name: str) -> OneDevice:
    """Make two updates in float32 on the meta device, the first of which allocates the optimiser's state.

    :param name: of a case
    :return: the mode that saw the second
    """
    observations, actions, options = CASES[name]
    model = tiny(RandomSpaces(observations, actions), train_ratio=0.0, precision="float32", **options)
    model.learn(24, log_interval=None)
    batch = model.policy.to_batch(model.replay_buffer.sample(2))
    draws = model.learner.draw(*batch.rewards.shape)
    names = {parameter: name for name, parameter in model.policy.named_parameters()}
    model.policy.to("meta")  # makes new parameters
    moved = dict(model.policy.named_parameters())
    groups = model.policy.optimizer.param_groups
    for group in groups:
        group["params"] = [moved[names[parameter]] for parameter in group["params"]]
    batch, draws = on_meta(batch), on_meta(draws)
    rates = [1e-4] * len(groups)
    off = {"autocast": lambda *_, **__: contextlib.nullcontext(), "is_autocast_enabled": lambda *_: False}
    with mock.patch.multiple(th, **off):  # neither knows the meta device
        model.learner.update(batch, draws, 0, rates)
        with OneDevice() as mode:
            model.learner.update(batch, draws, 1, rates)
    return mode


@pytest.mark.parametrize("name", CASES)
def test_an_update_stays_on_its_device(name: str) -> None:
    assert updates(name).calls > 1000


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "item": (lambda: th.zeros((), device="meta").item(), "reads a value"),
    "if": (lambda: bool(th.zeros((), device="meta")), "reads a value"),
    "nonzero": (lambda: th.zeros(3, device="meta").nonzero(), "reads a value"),
    "mask": (lambda: th.zeros(3, device="meta")[th.zeros(3, device="meta", dtype=th.bool)], "mask as an index|reads a value"),
    "number": (lambda: th.zeros(3, device="meta") * th.zeros(()), "mixes"),
    "vector": (lambda: th.zeros(3, device="meta") * th.zeros(3), "mixes"),
    "copy": (lambda: th.zeros(3).to("meta"), "copies"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_mode_sees(name: str) -> None:
    fault, text = FAULTS[name]
    with OneDevice(), pytest.raises(AssertionError, match=text):
        fault()


def test_a_fault_in_an_update_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_dreamer_gpld import learner

    monkeypatch.setattr(learner, "mean", lambda loss: loss.sum() / th.tensor(float(loss.numel())))
    with pytest.raises(AssertionError, match=r"aten.div.* mixes \['cpu', 'meta'\]"):
        updates("vectors")
