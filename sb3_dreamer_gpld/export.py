"""The acting step as a program that needs neither this package nor Stable-Baselines3, only PyTorch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch import Tensor, nn

from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.nets.distributions import decode_categories
from sb3_dreamer_gpld.observations import like_space, spaces_by_key
from sb3_dreamer_gpld.policies import DreamerPolicy, RecurrentState
from sb3_dreamer_gpld.saving import atomic_file

METADATA = "policy.json"


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
            self.register_buffer("low", th.as_tensor(space.low))
            self.register_buffer("high", th.as_tensor(space.high))

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
        return self.to_env_action(memory.action), tuple(memory)  # type: ignore[return-value]

    def to_env_action(self, action: Tensor) -> Tensor:
        """As :meth:`DreamerPolicy.to_env_action`, operation by operation: (E, A) → (E, *action shape)."""
        spec = self.policy.action_spec
        if spec.nvec is not None:
            return (decode_categories(action, spec.nvec) + spec.offset).view(-1, *spec.shape).to(self.dtype)
        half = (0.5 * (action + 1.0)).view(-1, *spec.shape).to(th.promote_types(action.dtype, self.dtype))
        unscaled = (self.low + half * (self.high - self.low)).to(self.dtype)
        return th.clamp(unscaled, self.low, self.high)


def export_policy(model: DreamerGPLD | DreamerPolicy, path: str | os.PathLike[str]) -> Path:
    """Write the acting step as a ``torch.export`` program, for use where only PyTorch is installed.

    The program is deterministic, runs on the processor, and takes any number of environments at a time. Observations are
    not normalised in it: with VecNormalize, give it normalised ones. Images are laid out as in ``model.observation_space``,
    that is with channels first. Beside the program, the file holds ``policy.json``: shapes and dtypes of the observations
    ("" is the key of a space that is no Dict), of the three parts of the state, and of the actions, all for one environment::

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

    :param model: a model, or its policy
    :param path: file; ``.pt2`` is added if it has no suffix. It is replaced in one go, so nobody sees half a file
    :return: the path written
    :raises ValueError: the path has another suffix than ``.pt2``
    """
    path = Path(path)
    if path.suffix == "":
        path = path.with_suffix(".pt2")
    if path.suffix != ".pt2":
        raise ValueError(f"The path of an exported policy must end in .pt2, or have no suffix, not {path.suffix!r}")
    policy = _plain_copy(model.policy if isinstance(model, DreamerGPLD) else model)
    program = th.export.export(ActingStep(policy), _example(policy), dynamic_shapes=_dynamic_shapes(policy), strict=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        th.export.save(program, file, extra_files={METADATA: json.dumps(_metadata(policy), indent=1)})
    return path


def _plain_copy(policy: DreamerPolicy) -> DreamerPolicy:
    """A copy on the processor, without compiled functions, gradients or optimiser state; draws no random number."""
    with th.random.fork_rng(devices=[]):
        copy = type(policy)(**policy._get_constructor_parameters())
    copy.load_state_dict(policy.state_dict())
    copy.set_training_mode(False)
    return copy.requires_grad_(False)


def _observation_spaces(policy: DreamerPolicy) -> dict[str, spaces.Space]:
    """By key; entries without numbers are left out."""
    return {name: entry for name, entry in spaces_by_key(policy.observation_space).items() if 0 not in (entry.shape or ())}


def _example(policy: DreamerPolicy) -> tuple[Any, tuple[Tensor, ...], Tensor]:
    """Arguments of :meth:`ActingStep.forward` for two environments."""
    observation = {}
    for name, space in _observation_spaces(policy).items():
        value = np.full(space.shape or (), getattr(space, "start", 0), space.dtype)
        observation[name] = th.as_tensor(np.stack([value, value]))
    state = tuple(policy.initial_state(2))
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
        "state": {name: list(x.shape[1:]) for name, x in state._asdict().items()},
        "action": describe(policy.action_space),
    }
