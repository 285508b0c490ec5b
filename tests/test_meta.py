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

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.observations import like_space, spaces_by_key
from sb3_dreamer_gpld.policies import RecurrentState

# Operations whose result, or its shape, depends on values: on a GPU they wait for all that was launched before.
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal", "aten.is_nonzero")


class OneDevice(TorchDispatchMode):
    """Fails at the first operation that mixes devices, copies between them, or reads a value.

    ``calls`` counts operations, ``launches`` those that are no mere view of what is there: on a GPU each is a kernel or more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        self.launches += not func.is_view
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
    "redundancy": (MIXED, BOX, {"policy_kwargs": {"reconstruction": "redundancy"}}),
}


def on_meta(value: Any) -> Any:
    """The same with all tensors on the meta device."""
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, th.Tensor) else leaf, value)


def model_of(name: str) -> DreamerGPLD:
    """The model of a case, which was never updated."""
    observations, actions, options = CASES[name]
    return tiny(RandomSpaces(observations, actions), train_ratio=0.0, precision="float32", **options)


# Neither knows the meta device.
WITHOUT_AUTOCAST = {"autocast": lambda *_, **__: contextlib.nullcontext(), "is_autocast_enabled": lambda *_: False}


def updates(name: str) -> OneDevice:
    """Make two updates in float32 on the meta device, the first of which allocates the optimiser's state.

    :param name: of a case
    :return: the mode that saw the second
    """
    model = model_of(name)
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
    with mock.patch.multiple(th, **WITHOUT_AUTOCAST):
        model.learner.update(batch, draws, 0, rates)
        with OneDevice() as mode:
            model.learner.update(batch, draws, 1, rates)
    return mode


# Launches of an uncompiled update of the tests' sizes. Fewer are welcome, and then the number here goes down; more mean
# that something was added to every update.
CEILINGS = {
    "vectors": 3_346,
    "images": 3_657,
    "discrete": 3_325,
    "both penalties": 3_602,
    "random rows": 3_346,
    "exact penalty": 3_433,
    "dynamics": 3_928,
    "actor's rate": 3_375,
    "redundancy": 3_427,
}


@pytest.mark.parametrize("name", CASES)
def test_an_update_stays_on_its_device(name: str) -> None:
    """And makes no more launches than it did."""
    mode = updates(name)
    assert 0.9 * CEILINGS[name] < mode.launches <= CEILINGS[name], mode.calls


ACTING_CEILINGS = {"vectors": 151, "images": 197, "discrete": 151}  # sampled


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["vectors", "images", "discrete"])
def test_acting_stays_on_its_device(name: str, deterministic: bool) -> None:
    """Of two environments, from one step's state to the next."""
    policy = model_of(name).policy
    sample = {key: np.zeros((2, *space.shape), space.dtype) for key, space in spaces_by_key(policy.observation_space).items()}
    observation = on_meta(like_space({key: th.as_tensor(value) for key, value in sample.items()}, policy.observation_space))
    state, is_first = on_meta(policy.initial_state(2).parts), th.ones(2, dtype=th.bool, device="meta")
    policy.to("meta")
    with OneDevice() as mode:
        following = policy.act(observation, RecurrentState(*state), is_first, deterministic)
    assert [tensor.shape for tensor in following.parts] == [tensor.shape for tensor in state]
    assert mode.launches <= ACTING_CEILINGS[name]


@pytest.mark.parametrize("deterministic", [True, False])
def test_planning_stays_on_its_device(deterministic: bool) -> None:
    policy = tiny(RandomSpaces(BOX, BOX), planner=dict(samples=8, policy_samples=2, elites=3)).policy
    observation, state = on_meta(th.zeros(2, 3)), on_meta(policy.initial_state(2).parts)
    is_first = th.ones(2, dtype=th.bool, device="meta")
    policy.to("meta")
    with mock.patch.multiple(th, **WITHOUT_AUTOCAST):
        policy.act(observation, RecurrentState(*state), is_first, deterministic, planned=True)  # draws what is kept
        with OneDevice() as mode:
            following = policy.act(observation, RecurrentState(*state), is_first, deterministic, planned=True)
    assert [tensor.shape for tensor in following.parts] == [tensor.shape for tensor in state]
    assert mode.launches > 500


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
