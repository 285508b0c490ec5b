"""An update runs on one device alone and waits for it nowhere, shown without a GPU: on PyTorch's ``meta`` device nothing is
computed, and a dispatch mode sees every operation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tape import READS
from test_dreamer_gpld import BOX, RandomSpaces, tiny
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from sb3_dreamer_gpld import DreamerGPLD, transfer
from sb3_dreamer_gpld.diagnostics import measures
from sb3_dreamer_gpld.observations import like_space, spaces_by_key
from sb3_dreamer_gpld.policies import RecurrentState

# What autocast makes in bfloat16
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.convolution")


def low(args: Any) -> Any:
    """Arguments with bfloat16 in place of float32."""
    return tree_map(lambda x: x.bfloat16() if isinstance(x, th.Tensor) and x.dtype == th.float32 else x, args)


def in_bfloat16(function: Callable[..., Any], *args: Any) -> Any:
    return function(*low(args))


def indices(args: tuple) -> list[th.Tensor]:
    """The indices among the arguments of an operation like ``index`` or ``index_copy``, without the values."""
    found = args[1] if isinstance(args[1], (list, tuple)) else args[2:3]
    return [index for index in found if isinstance(index, th.Tensor)]


class OneDevice(TorchDispatchMode):
    """Fails at the first operation that mixes devices, copies between them, or reads a value.

    ``calls`` counts operations, ``launches`` those that are no mere view of what is there: on a GPU each is a kernel or more.

    :param bfloat16: matrix products are made in it, as under autocast, which does not know the meta device
    """

    def __init__(self, bfloat16: bool = False) -> None:
        super().__init__()
        self.calls = self.launches = 0
        self.bfloat16 = bfloat16

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        self.launches += not func.is_view
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, th.Tensor)]
        name = str(func)
        if name.startswith(READS):
            raise AssertionError(f"{name} reads a value")
        if self.bfloat16 and name.startswith(PRODUCTS):
            args = low(args)
        if name.startswith("aten.index") and any(index.dtype == th.bool for index in indices(args)):
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
    "normalised": (MIXED, BOX, {"policy_kwargs": {"normalize_vectors": True}}),
}


def on_meta(value: Any) -> Any:
    """The same with all tensors on the meta device."""
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, th.Tensor) else leaf, value)


def case(name: str, **options: Any) -> DreamerGPLD:
    """The model of a case.

    :param options: further arguments
    """
    observations, actions, own = CASES[name]
    return tiny(RandomSpaces(observations, actions), **own, **options)


def model_of(name: str, storage: str = "host") -> DreamerGPLD:
    """The model of a case, which was never updated."""
    return case(name, train_ratio=0.0, precision="float32", replay_buffer_kwargs={"storage": storage})


# Neither knows the meta device.
WITHOUT_AUTOCAST = {"autocast": lambda *_, **__: contextlib.nullcontext(), "is_autocast_enabled": lambda *_: False}
BFLOAT16 = WITHOUT_AUTOCAST | {"is_autocast_enabled": lambda *_: True, "get_autocast_dtype": lambda *_: th.bfloat16}


def moved_to_meta(model: DreamerGPLD) -> None:
    """Move the nets, with what the optimiser knows of them."""
    names = {parameter: name for name, parameter in model.policy.named_parameters()}
    model.policy.to("meta")  # makes new parameters
    moved = dict(model.policy.named_parameters())
    for group in model.policy.optimizer.param_groups:
        group["params"] = [moved[names[parameter]] for parameter in group["params"]]


def updates(name: str, bfloat16: bool = False) -> OneDevice:
    """Make two updates on the meta device, the first of which allocates the optimiser's state.

    :param name: of a case
    :param bfloat16: matrix products are made in it; else in float32
    :return: the mode that saw the second
    """
    model = model_of(name)
    model.learn(24, log_interval=None)
    batch = model.policy.to_batch(model.replay_buffer.sample(2))
    rates = [1e-4] * len(model.policy.optimizer.param_groups)
    inputs = [on_meta(model.learner.inputs(batch, None, number, rates)) for number in range(2)]
    moved_to_meta(model)
    convolution = functools.partial(in_bfloat16, F.conv2d) if bfloat16 else F.conv2d  # not seen by the mode
    patches = BFLOAT16 if bfloat16 else WITHOUT_AUTOCAST
    with mock.patch.multiple(th, **patches), mock.patch.object(F, "conv2d", convolution):
        with OneDevice(bfloat16):
            model.learner.step(inputs[0])
        with OneDevice(bfloat16) as mode:
            model.learner.step(inputs[1])
    return mode


# Launches of an uncompiled update of the tests' sizes. Fewer are welcome, and then the number here goes down; more mean
# that something was added to every update.
CEILINGS = {
    "vectors": 3_346,
    "images": 3_687,
    "discrete": 3_325,
    "both penalties": 3_602,
    "random rows": 3_346,
    "exact penalty": 3_433,
    "dynamics": 3_928,
    "actor's rate": 3_375,
    "redundancy": 3_427,
    "normalised": 3_719,
}


@pytest.mark.parametrize("name", CASES)
def test_an_update_stays_on_its_device(name: str) -> None:
    """And makes no more launches than it did."""
    mode = updates(name)
    assert 0.9 * CEILINGS[name] < mode.launches <= CEILINGS[name], mode.calls


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("random rows", "actor's rate")])
def test_an_update_in_bfloat16_stays_on_its_device(name: str) -> None:
    assert updates(name, bfloat16=True).launches > 0.9 * CEILINGS[name]


@contextlib.contextmanager
def copies(waits: list[int], moved: list[int] | None = None) -> Iterator[None]:
    """Allow the copies of transfer.py, of which those to the host bring zeros, and count how often the host waits for some.

    :param waits: gets an entry for each wait
    :param moved: gets the bytes of each copy from the host
    """

    def to_meta(tensor: th.Tensor, device: th.device) -> th.Tensor:
        if moved is not None and not tensor.is_meta:
            moved.append(tensor.nbytes)
        with _disable_current_modes():
            return tensor.to(device)

    def to_host(tensor: th.Tensor) -> th.Tensor:
        with _disable_current_modes():
            return th.zeros(tensor.shape, dtype=tensor.dtype)

    wait = transfer.PendingArrays.wait

    def waiting(self: transfer.PendingArrays) -> tuple[np.ndarray, ...]:
        waits.append(len(waits))
        return wait(self)

    with mock.patch.multiple(transfer, _copied_to_device=to_meta, _copied_to_host=to_host):
        with mock.patch.object(transfer.PendingArrays, "wait", waiting):
            yield


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize("name", ["vectors", "images", "discrete", "dynamics"])
def test_training_waits_at_its_end(name: str, storage: str) -> None:
    """``train`` begins each update before it looks at anything of the one before: batches, updates, latents and faults."""
    model = model_of(name, storage)
    assert model.replay_buffer is not None
    model.learn(24, log_interval=None)
    model.train(1, 2)
    model.learner.metrics.take()
    moved_to_meta(model)
    model.policy.optimizer.state.clear()
    model.device = model.replay_buffer.device = th.device("meta")
    waits: list[int] = []
    moved: list[int] = []
    begun: list[int] = []  # how often the host had waited when an update began
    step = model.learner.step

    def noted(inputs: Any) -> Any:
        begun.append(len(waits))
        return step(inputs)

    with (
        copies(waits, moved),
        mock.patch.multiple(th, **WITHOUT_AUTOCAST),
        mock.patch.object(model.learner, "step", noted),
    ):
        model.train(1, 2)  # allocates the optimiser's state, and loads the rows on the device
        for each in (waits, moved, begun):
            each.clear()
        with OneDevice():
            model.train(3, 2)
            model.learner.metrics.take()
    if storage == "device":
        assert begun == [0, 0, 0]
        assert len(waits) == 3  # the faults, and the metrics here and there
        assert len(moved) == 3 * 3  # of each update: where its rows lie, where its latents go, and the learning rates
    else:
        assert begun == [0, 0, 1]  # the latents of an update are fetched when the next one has begun
        assert len(waits) == 6  # those of three, the faults, and the metrics here and there
        assert len(moved) >= 3 * 9  # the arrays of a batch, and the learning rates


@pytest.mark.parametrize("storage", ["host", "device"])
def test_a_step_of_collecting_waits_once(storage: str) -> None:
    """For the action, and what is stored with it."""
    model = model_of("vectors", storage)
    assert model.replay_buffer is not None
    model.learn(24, log_interval=None)
    moved_to_meta(model)
    model.device = model.replay_buffer.device = th.device("meta")
    model._state = RecurrentState(*on_meta(model._state.parts))
    waits: list[int] = []
    with copies(waits), OneDevice():
        model.learn(5, reset_num_timesteps=False, log_interval=None)
    assert len(waits) == 5 and model.replay_buffer.rows_added[0] == 31  # two episodes have ended


@pytest.mark.parametrize("storage", ["host", "device"])
def test_normalizing_stays_on_its_device(storage: str) -> None:
    """VecNormalize's statistics go to the device, and what they normalise is there."""
    env = VecNormalize(DummyVecEnv([lambda: RandomSpaces(MIXED, BOX)]), norm_obs_keys=["vector"])
    model = tiny(env, train_ratio=0.0, replay_buffer_kwargs={"storage": storage})
    assert model.replay_buffer is not None
    model.learn(24, log_interval=None)
    model.replay_buffer.device = th.device("meta")
    waits: list[int] = []
    moved: list[int] = []
    with copies(waits, moved):
        model.replay_buffer.sample(2, env)
        moved.clear()
        with OneDevice():
            samples = model.replay_buffer.sample(2, env)
    assert all(leaf.is_meta for leaf in tree_leaves(samples) if isinstance(leaf, th.Tensor)) and not waits
    assert (max(moved) < 1000) == (storage == "device")


def test_measures_stay_on_their_device() -> None:
    """What ``diagnose`` measures, as far as it is tensors."""
    model = model_of("images")
    model.learn(24, log_interval=None)
    batch = on_meta(model.policy.to_batch(model.replay_buffer.sample(2)))
    model.policy.to("meta")
    with mock.patch.multiple(th, **WITHOUT_AUTOCAST), OneDevice() as mode:
        states, tokens = measures.posterior_states(model.policy, batch)
        flat = [x.flatten(0, 1) for x in (states.deter, states.stoch, tokens)]
        found = measures.smoothness(model.policy, *flat, horizon=2)
        loop = measures.open_loop(model.policy, batch, 3, 0.99)
        loop.means()
    assert found.transition_ratio.is_meta and loop.errors["observation/image"].is_meta and mode.launches > 300


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
