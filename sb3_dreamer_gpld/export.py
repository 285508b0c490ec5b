"""The acting step as a program that needs neither this package nor Stable-Baselines3: PyTorch's, or ONNX's."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sb3_dreamer_gpld.checks import unknown_name
from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.nets.distributions import decode_categories
from sb3_dreamer_gpld.observations import like_space, space_of, spaces_by_key
from sb3_dreamer_gpld.policies import DreamerPolicy, RecurrentState, uncompiled
from sb3_dreamer_gpld.saving import atomic_file

METADATA = "policy.json"
# Names in an ONNX file, of the state before the step and after it: in one graph they must differ
STATE = ("deter", "stoch", "last_action")
NEXT_STATE = tuple(f"next_{name}" for name in STATE)


class ActingStep(nn.Module):
    """One deterministic step of acting: what :meth:`DreamerPolicy.predict` does, with tensors only.

    :param policy: the policy, used as it is
    """

    low: Tensor
    high: Tensor

    def __init__(self, policy: DreamerPolicy) -> None:
        super().__init__()
        self.policy = policy
        space = policy.action_space
        self.dtype = th.as_tensor(np.zeros((), space.dtype)).dtype
        if isinstance(space, spaces.Box):
            self.rounds = space.dtype.kind in "iu"
            bounds = (space.low, space.high)
            low, high = (x.astype(np.float64) for x in bounds) if self.rounds else bounds
            self.register_buffer("low", th.as_tensor(low))
            self.register_buffer("high", th.as_tensor(high))

    def forward(
        self, observation: Tensor | dict[str, Tensor], state: tuple[Tensor, Tensor, Tensor], episode_start: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """
        :param observation: E observations as the model's space has them, (E, *shape), by key if it is a Dict
        :param state: deter (E, D), stoch (E, C, K), action (E, A) of the last step; anything where an episode starts
        :param episode_start: where the state is dropped, bool (E,)
        :return: actions in the dtype and bounds of the space, (E, *action shape), and the new state
        """
        memory = self.policy.act(observation, RecurrentState(*state), episode_start, deterministic=True)
        return self.to_env_action(memory.action), memory.parts  # type: ignore[return-value]

    def to_env_action(self, action: Tensor) -> Tensor:
        """As :meth:`DreamerPolicy.to_env_action`, operation by operation: (E, A) → (E, *action shape)."""
        spec = self.policy.action_spec
        if spec.nvec is not None:
            return (decode_categories(action, spec.nvec) + spec.offset).view(-1, *spec.shape).to(self.dtype)
        half = (0.5 * (action + 1.0)).view(-1, *spec.shape).to(th.promote_types(action.dtype, self.low.dtype))
        unscaled = self.low + half * (self.high - self.low)
        if self.rounds:
            return th.clamp(unscaled.round(), self.low, self.high).to(self.dtype)
        return th.clamp(unscaled.to(self.dtype), self.low, self.high)


def export_policy(model: DreamerGPLD | DreamerPolicy, path: str | os.PathLike[str], format: str | None = None) -> Path:
    """Write the acting step as a program for use where only PyTorch, or only an ONNX runtime, is installed.

    The program is deterministic, runs on the processor, and takes any number of environments at a time. It acts with the
    policy net, also where the model has a planner. Observations are not normalised in it: with VecNormalize, give it
    normalised ones, which are float32 whatever the space has. Images are laid out as in
    ``model.observation_space``, that is with channels first. Beside the program, the file holds ``policy.json``: shapes and
    dtypes of the observations ("" is the key of a space that is no Dict), of the three parts of the state, and of the actions,
    all for one environment.

    A ``torch.export`` program::

        import json
        import torch

        files = {"policy.json": ""}
        step = torch.export.load("walker.pt2", extra_files=files).module()
        shapes = json.loads(files["policy.json"])["state"]  # deter, stoch, action
        state = tuple(torch.zeros(1, *shape) for shape in shapes.values())
        episode_start = torch.tensor([True])
        while True:
            action, state = step(observation, state, episode_start)  # tensors of one environment, (1, ...)
            ...
            episode_start = torch.tensor([done])

    An ONNX file, whose inputs are ``observation`` (``observation.KEY`` for each entry of a Dict), ``deter``, ``stoch``,
    ``last_action`` and ``episode_start``, and whose outputs are ``action``, ``next_deter``, ``next_stoch`` and
    ``next_last_action``; ``policy.json`` is in the model's metadata::

        import json
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession("walker.onnx")
        shapes = json.loads(session.get_modelmeta().custom_metadata_map["policy.json"])["state"]
        names = ("deter", "stoch", "last_action")
        state = {name: np.zeros((1, *shape), np.float32) for name, shape in zip(names, shapes.values())}
        start = np.array([True])
        while True:
            inputs = {"observation": observation, **state, "episode_start": start}  # arrays of one environment, (1, ...)
            action, *following = session.run(None, inputs)
            state = dict(zip(names, following))
            ...
            start = np.array([done])

    :param model: a model, or its policy, which does not know that there was a VecNormalize
    :param path: file; the format's suffix is added if it has none. It is replaced in one go, so nobody sees half a file
    :param format: "pt2" or "onnx"; None: what the path ends with, "pt2" if it has no suffix
    :return: the path written
    :raises ValueError: the format does not exist, or the path has another suffix than the format's
    :raises ModuleNotFoundError: ONNX is asked for, and one of its packages is missing
    """
    path = Path(path)
    if format not in (None, *_WRITERS):
        raise ValueError(unknown_name("The format", str(format), _WRITERS))
    if path.suffix == "":
        path = path.with_suffix(f".{format or 'pt2'}")
    suffixes = [f".{name}" for name in _WRITERS] if format is None else [f".{format}"]
    if path.suffix not in suffixes:
        raise ValueError(
            f"The path of an exported policy must end in {' or '.join(suffixes)}, or have no suffix, not {path.suffix!r}"
        )
    write = _WRITERS[path.suffix[1:]]
    if write is _write_onnx:
        _require_onnx()
    policy = _plain_copy(uncompiled(model.policy if isinstance(model, DreamerGPLD) else model))
    if isinstance(model, DreamerGPLD) and model._normalized:
        policy.observation_space = _normalized(policy, model._normalized)
    program = th.export.export(ActingStep(policy), _example(policy), dynamic_shapes=_dynamic_shapes(policy), strict=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        write(program, policy, file)
    return path


def _write_pt2(program: th.export.ExportedProgram, policy: DreamerPolicy, file: IO[bytes]) -> None:
    th.export.save(program, file, extra_files={METADATA: json.dumps(_metadata(policy), indent=1)})


def _write_onnx(program: th.export.ExportedProgram, policy: DreamerPolicy, file: IO[bytes]) -> None:
    import onnx_ir

    # In the order of the program's inputs, which is that of the space
    observations = [f"observation.{name}" if name else "observation" for name in _observation_spaces(policy)]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of PyTorch about itself
        found = th.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=[*observations, *STATE, "episode_start"],
            output_names=["action", *NEXT_STATE],
        )
    assert found is not None
    found.model.metadata_props[METADATA] = json.dumps(_metadata(policy))
    file.write(onnx_ir.to_proto(found.model).SerializeToString())


def _require_onnx() -> None:
    """:raises ModuleNotFoundError: one of the packages that write ONNX files is missing"""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'ONNX files are written with {" and ".join(missing)}: pip install "sb3-dreamer-gpld[onnx]"')


_WRITERS: dict[str, Callable[[th.export.ExportedProgram, DreamerPolicy, IO[bytes]], None]] = {
    "pt2": _write_pt2,
    "onnx": _write_onnx,
}


def _plain_copy(policy: DreamerPolicy) -> DreamerPolicy:
    """A copy on the processor, without compiled functions, planner, gradients or optimiser state; draws no random number."""
    with th.random.fork_rng(devices=[]):
        copy = type(policy)(**{**policy._get_constructor_parameters(), "planner": None})
    copy.load_state_dict(policy.state_dict())
    copy.set_training_mode(False)
    for module in copy.modules():
        if parametrize.is_parametrized(module):  # by spectral_norm: what it makes of the weights is constant now
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return copy.requires_grad_(False)


def _normalized(policy: DreamerPolicy, keys: Sequence[str]) -> spaces.Space:
    """The observation space as VecNormalize leaves it, which makes float32 of the observations of some keys."""
    made = {
        name: spaces.Box(-np.inf, np.inf, space.shape, np.float32) if name in keys else space
        for name, space in spaces_by_key(policy.observation_space).items()
    }
    return space_of(made, policy.observation_space)


def _observation_spaces(policy: DreamerPolicy) -> dict[str, spaces.Space]:
    """By key; entries without numbers are left out."""
    return {name: entry for name, entry in spaces_by_key(policy.observation_space).items() if 0 not in (entry.shape or ())}


def _example(policy: DreamerPolicy) -> tuple[Any, tuple[Tensor, ...], Tensor]:
    """Arguments of :meth:`ActingStep.forward` for two environments."""
    observation = {}
    for name, space in _observation_spaces(policy).items():
        value = np.full(space.shape or (), getattr(space, "start", 0), space.dtype)
        observation[name] = th.as_tensor(np.stack([value, value]))
    state = policy.initial_state(2).parts
    return like_space(observation, policy.observation_space), state, th.ones(2, dtype=th.bool)


def _dynamic_shapes(policy: DreamerPolicy) -> tuple[Any, ...]:
    batch = {0: th.export.Dim("n_envs", min=1)}
    observation = {name: batch for name in _observation_spaces(policy)}
    return like_space(observation, policy.observation_space), (batch, batch, batch), batch


def _metadata(policy: DreamerPolicy) -> dict[str, Any]:
    def describe(space: spaces.Space) -> dict[str, Any]:
        return {"shape": list(space.shape or ()), "dtype": str(np.dtype(space.dtype))}

    state = policy.initial_state(1)
    return {
        "observation": {name: describe(space) for name, space in _observation_spaces(policy).items()},
        "state": {name: list(x.shape[1:]) for name, x in zip(RecurrentState._fields, state.parts, strict=False)},
        "action": describe(policy.action_space),
    }
