"""The nets as one SB3 policy, with a stateful ``predict``.

Letters: E environments, B sequences, D deter, K rows, C classes, A action numbers as the nets see them.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import get_device
from torch import Tensor
from typing_extensions import Self

from sb3_dreamer_gpld.buffers import SequenceSamples
from sb3_dreamer_gpld.checks import unknown_name
from sb3_dreamer_gpld.config import ActionSpec, ModelConfig, ObservationSpec
from sb3_dreamer_gpld.nets.actor_critic import ActorCritic
from sb3_dreamer_gpld.nets.distributions import decode_categories, encode_categories
from sb3_dreamer_gpld.nets.spectral import normalize_spectrally
from sb3_dreamer_gpld.nets.world_model import Batch, WorldModel
from sb3_dreamer_gpld.observations import by_key, like_space, with_boxes
from sb3_dreamer_gpld.optim import LaProp
from sb3_dreamer_gpld.planning import Planner, PlannerConfig
from sb3_dreamer_gpld.saving import FORMAT_VERSION, atomic_file, check_version, plain_to_space, space_to_plain, without_numpy
from sb3_dreamer_gpld.transfer import to_device

CALLS_WITHOUT_STATE = 10  # of predict in a row, before a warning


class RecurrentState(NamedTuple):
    """What the agent remembers between two steps of E environments.

    :param deter: (E, D)
    :param stoch: one-hots, (E, C, K)
    :param action: last action as the nets see it, (E, A)
    :param plan: mean of the last plan, (E, H, A); None without a planner
    """

    deter: Tensor
    stoch: Tensor
    action: Tensor
    plan: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What there is of it: deter, stoch, action, and the plan if there is one."""
        return tuple(x for x in self if x is not None)


class DreamerPolicy(BasePolicy):
    """World model and actor-critic as one policy.

    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary
    :param lr_schedule: learning rate as a function of the remaining progress
    :param model_size: a name in :data:`~sb3_dreamer_gpld.config.SIZES`; None: "12m" with images, else "1m"
    :param net_arch: units of each layer of policy and value: a list for both, or ``dict(pi=[...], vf=[...])``,
        where ``qf``, as SB3's off-policy algorithms have it, is the same as ``vf``
    :param normalize_images: images are uint8 in [0, 255]; set False for those of other numbers, scaled by the space's
        smallest and largest bound
    :param features_extractor_kwargs: ``features_dim`` (size of the encoder's output) or ``cnn_output_dim`` (the same for
        the image encoder only)
    :param optimizer_class: optimiser
    :param optimizer_kwargs: its arguments, without the learning rate
    :param planner: :meth:`predict` plans, see :meth:`~sb3_dreamer_gpld.planning.PlannerConfig.make`; None: it takes the policy
        net's action
    :param actor_group: the optimiser has the policy's net in a group of its own, the second, for a learning rate of its own
    :param sizes: fields of :class:`~sb3_dreamer_gpld.config.ModelConfig`
    :raises ValueError: a space, size or value that is not allowed
    :raises TypeError: an argument that does not exist
    """

    # What the policy is built of: a subclass of it may name others.
    world_model_class: ClassVar[type[WorldModel]] = WorldModel
    actor_critic_class: ClassVar[type[ActorCritic]] = ActorCritic

    _calls_without_state = 0  # of predict, in a row
    _warned_of_lost_state = False

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        model_size: str | None = None,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        normalize_images: bool = True,
        features_extractor_kwargs: dict[str, Any] | None = None,
        optimizer_class: type[th.optim.Optimizer] = LaProp,
        optimizer_kwargs: dict[str, Any] | None = None,
        planner: str | Mapping[str, Any] | PlannerConfig | None = None,
        actor_group: bool = False,
        **sizes: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=isinstance(action_space, spaces.Box),
        )
        self.model_size, self.net_arch, self.sizes = model_size, net_arch, sizes
        self.actor_group = actor_group
        self._space_of_shapes = with_boxes(observation_space)
        self.observation_spec = ObservationSpec.from_space(observation_space, normalize_images)
        self.action_spec = ActionSpec.from_space(action_space)
        self.config = self._make_config()
        self.world_model = self.world_model_class(self.observation_spec, self.action_spec.size, self.config)
        self.actor_critic = self.actor_critic_class(self.action_spec, self.config)
        self.actor_critic.start_slow_value()  # a class of one's own may have another value
        normalize_spectrally(self, self.config.spectral_norm)
        planning = PlannerConfig.make(planner, self.action_spec)
        self.planner = None if planning is None else Planner(planning)
        trainable = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": trainable}]
        if actor_group:
            actor = list(self.actor_critic.policy.parameters())
            others = [p for p in trainable if not any(p is its_own for its_own in actor)]
            groups = [{"params": others}, {"params": actor}]
        self.optimizer = optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _make_config(self) -> ModelConfig:
        images = bool(self.observation_spec.images)
        size = self.model_size or ("12m" if images else "1m")
        overrides = dict(self.sizes)
        for name, value in self.features_extractor_kwargs.items():
            if name == "features_dim":
                overrides.setdefault("image_features" if images else "encoder_units", value)
            elif name == "cnn_output_dim":
                overrides.setdefault("image_features", value)
            else:
                raise TypeError(unknown_name("features_extractor_kwargs entry", name, ("features_dim", "cnn_output_dim")))
        if isinstance(self.net_arch, Mapping):
            for name in self.net_arch:
                if name not in ("pi", "vf", "qf"):
                    raise ValueError(unknown_name("net_arch entry", name, ("pi", "vf", "qf")))
            value_arch = self.net_arch.get("vf", self.net_arch.get("qf"))
            archs = {"policy_arch": self.net_arch.get("pi"), "value_arch": value_arch}
        else:
            archs = {"policy_arch": self.net_arch, "value_arch": self.net_arch}
        overrides.update({name: arch for name, arch in archs.items() if arch is not None})
        return ModelConfig.make(size, **overrides)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return dict(
            super()._get_constructor_parameters(),
            lr_schedule=self._dummy_schedule,
            model_size=self.model_size,
            net_arch=self.net_arch,
            features_extractor_kwargs=self.features_extractor_kwargs,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            planner=None if self.planner is None else dataclasses.asdict(self.planner.config),
            **self.sizes,
        )

    # ------------------------------------------------------------------------------------------ saving

    def save(self, path: str | os.PathLike[str] | io.BufferedIOBase) -> None:
        """Save nets and spaces in a file that ``torch.load(weights_only=True)`` reads: loading it runs no code.

        The optimiser is not in it: save the whole model to go on training.

        :param path: name of the file, which appears when it is complete
        :raises OSError: it could not be written; names the file
        """
        arguments = self._get_constructor_parameters()
        for name in ("observation_space", "action_space", "lr_schedule", "optimizer_class", "optimizer_kwargs"):
            arguments.pop(name, None)
        if self.planner is None:  # earlier releases read such a file too
            del arguments["planner"]
        saved = {
            "format_version": FORMAT_VERSION,
            "observation_space": space_to_plain(self.observation_space),
            "action_space": space_to_plain(self.action_space),
            "arguments": without_numpy(arguments),
            "state_dict": self.state_dict(),
        }
        with atomic_file(path) as file:
            th.save(saved, file)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | io.BufferedIOBase, device: th.device | str = "auto") -> Self:
        """Load what :meth:`save` wrote.

        :param path: name of the file
        :param device: of the policy
        :raises ValueError: it is no policy file, or one of a later version
        """
        device = get_device(device)
        try:
            saved = th.load(path, map_location="cpu", weights_only=True)  # type: ignore[arg-type]  # NumPy reads bounds there
            version = saved["format_version"]
        except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
            raise ValueError(
                f"{path} is no file of {cls.__name__}.save, or a damaged one. Allowed: a file written by policy.save; "
                "a model (a .zip of model.save) is loaded by DreamerGPLD.load"
            ) from error
        check_version(path, version)
        observation_space, action_space = plain_to_space(saved["observation_space"]), plain_to_space(saved["action_space"])
        policy = cls(observation_space, action_space, cls._dummy_schedule, **saved["arguments"])
        policy.load_state_dict(saved["state_dict"])
        return policy.to(device)

    # ------------------------------------------------------------------------------------------ acting

    def obs_to_tensor(self, observation: np.ndarray | dict[str, np.ndarray]) -> tuple[PyTorchObs, bool]:
        """As SB3 does it, but entries of a Dict without any number in them are left out.

        :param observation: one observation, or E of them
        :return: E observations on the policy's device, and whether there were E of them or one
        """
        if isinstance(observation, dict) and isinstance(self.observation_space, spaces.Dict):
            empty = {name for name, space in self.observation_space.items() if 0 in (space.shape or ())}
            observation = {name: value for name, value in observation.items() if name not in empty}
        # SB3 looks at nothing else of a policy, and would make the host wait for a copy of each key
        host = SimpleNamespace(observation_space=self._space_of_shapes, device=th.device("cpu"))
        tensors, vectorized = BasePolicy.obs_to_tensor(host, observation)  # type: ignore[arg-type]
        moved = {key: to_device(tensor, self.device) for key, tensor in by_key(tensors).items()}
        return like_space(moved, self.observation_space), vectorized

    def initial_state(self, n_envs: int) -> RecurrentState:
        """State before the first step of E environments: zeros."""
        deter, stoch = self.world_model.rssm.initial(n_envs)
        action = deter.new_zeros(n_envs, self.action_spec.size)
        return RecurrentState(deter, stoch, action, None if self.planner is None else self.planner.initial(action))

    @th.no_grad()
    def act(
        self,
        observation: PyTorchObs,
        state: RecurrentState,
        is_first: Tensor,
        deterministic: bool = False,
        planned: bool = False,
    ) -> RecurrentState:
        """One step of acting.

        :param observation: E observations, as :meth:`obs_to_tensor` gives them
        :param state: after the previous step
        :param is_first: the observation starts an episode, bool (E,)
        :param deterministic: take the most probable latent and action; no random number is drawn
        :param planned: the action is the planner's, which there must be
        :return: the state after this step; its ``action`` is the chosen one, clipped to [−1, 1] or one-hot
        """
        n, config = is_first.shape[0], self.config  # not len(): it would fix E in an exported program
        tokens = self.world_model.encode(by_key(observation), (n, 1)).squeeze(1)  # (E, tokens)
        noise = None if deterministic else th.rand(n, config.stoch, device=tokens.device)
        following = self.world_model.rssm.step(
            tokens, state.action, is_first, state.deter, state.stoch.flatten(1), noise
        )  # (E, ...)
        if planned:
            assert self.planner is not None and state.plan is not None
            stoch = following.stoch.flatten(1)  # (E, C·K)
            nets = self.world_model, self.actor_critic
            action, plan = self.planner.plan(*nets, following.deter, stoch, state.plan, is_first, deterministic)
            return RecurrentState(following.deter, following.stoch, action, plan)
        outputs = self.actor_critic.policy(following.features)  # (E, outputs)
        distribution = self.actor_critic.distribution
        if deterministic:
            action = distribution.mode(outputs)
        else:
            action = distribution.sample(outputs, distribution.draw((n,), outputs.device))
        return RecurrentState(following.deter, following.stoch, action.clamp(-1.0, 1.0), state.plan)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: bool | Sequence[bool] | np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for one or more observations, with the memory handed back by the caller.

        :param observation: one observation, or E of them
        :param state: what the last call returned; None: nothing is remembered
        :param episode_start: bool (E,), where the memory is dropped; None: nowhere
        :param deterministic: take the most probable latent and action; no random number is drawn
        :return: actions in the space's dtype and bounds, and the new memory (deter (E, D), stoch (E, C, K),
            action (E, A), and with a planner its plan (E, H, A)); the arguments are left as they are
        :raises ValueError: ``state`` or ``episode_start`` belongs to another number of environments, or ``state`` to another
            policy or planner
        """
        self.set_training_mode(False)
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
            return super().predict(observation)  # raises SB3's own message on mixed up APIs
        tensors, vectorized = self.obs_to_tensor(observation)
        n = len(next(iter(by_key(tensors).values())))
        self._warn_of_lost_state(state is None and not (episode_start is not None and np.all(episode_start)))
        if state is None:
            memory = self.initial_state(n)
        else:
            memory = self._checked_state(state, n)
        is_first = np.zeros(n, dtype=bool) if episode_start is None else np.array(episode_start, dtype=bool).reshape(-1)
        if len(is_first) != n:
            raise ValueError(f"episode_start has {len(is_first)} entries, but there are {n} observations")
        starts = th.as_tensor(is_first, device=self.device)
        memory = self.act(tensors, memory, starts, deterministic, planned=self.planner is not None)
        actions = self.to_env_action(memory.action)
        if not vectorized:
            actions = actions.squeeze(axis=0)
        return actions, tuple(x.cpu().numpy() for x in memory.parts)

    def _checked_state(self, state: tuple[np.ndarray, ...], n_envs: int) -> RecurrentState:
        """The state that the caller of :meth:`predict` hands back.

        :raises ValueError: it is of another number of environments, or of another planner or policy
        """
        if len(state) not in (3, 4):
            raise ValueError(
                f"state has {len(state)} parts; allowed: a state that this policy returned, which has three, and a fourth "
                "with a planner, or None where all episodes start"
            )
        memory = RecurrentState(*(th.as_tensor(x, dtype=th.float32, device=self.device) for x in state))
        if len(memory.deter) != n_envs:
            raise ValueError(f"state belongs to {len(memory.deter)} environments, but there are {n_envs} observations")
        for name, given, own in zip(RecurrentState._fields, memory, self.initial_state(n_envs), strict=True):
            found, expected = (None if x is None else tuple(x.shape) for x in (given, own))
            if found != expected:
                raise ValueError(
                    f"state holds a {name} of shape {found}, and this policy's has {expected}; allowed: a state that this "
                    "policy returned, or None where all episodes start"
                )
        return memory

    def _warn_of_lost_state(self, without_state: bool) -> None:
        """Warn once of ``predict`` over and over without its state, where no episode is said to start.

        :param without_state: whether this call is one of that kind
        """
        self._calls_without_state = self._calls_without_state + 1 if without_state else 0
        if self._calls_without_state == CALLS_WITHOUT_STATE and not self._warned_of_lost_state:
            self._warned_of_lost_state = True
            warnings.warn(
                f"{CALLS_WITHOUT_STATE} calls of predict without a state: the agent is recurrent, and forgets all between "
                "them. Hand back the state that it returns, action, state = model.predict(obs, state, episode_start), and "
                "say with episode_start where episodes start",
                stacklevel=4,
            )

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Actions without memory: scaled to [−1, 1] for a Box, else class indices, (E, *action shape)."""
        n = len(next(iter(by_key(observation).values())))
        is_first = th.ones(n, dtype=th.bool, device=self.device)
        action = self.act(observation, self.initial_state(n), is_first, deterministic).action
        if self.action_spec.nvec is not None:
            action = decode_categories(action, self.action_spec.nvec) + self.action_spec.offset
        return action.view(n, *self.action_spec.shape)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> Tensor:
        """The same as ``_predict``: what SB3's export guide calls."""
        return self._predict(obs, deterministic)

    # ------------------------------------------------------------------------------------------ actions

    def to_env_action(self, action: Tensor) -> np.ndarray:
        """Actions of the nets (E, A) as the environment takes them: (E, *action shape), its dtype, within its bounds."""
        if self.action_spec.nvec is not None:
            index = decode_categories(action, self.action_spec.nvec) + self.action_spec.offset
            return index.view(-1, *self.action_spec.shape).cpu().numpy().astype(self.action_space.dtype)
        assert isinstance(self.action_space, spaces.Box)
        scaled = action.view(-1, *self.action_spec.shape).cpu().numpy()
        low, high, dtype = self.action_space.low, self.action_space.high, self.action_space.dtype
        if dtype.kind in "iu":  # the nearest integer, by numbers in which no difference overflows
            low, high = low.astype(np.float64), high.astype(np.float64)
            unscaled = np.rint(low + 0.5 * (scaled + 1.0) * (high - low)).astype(dtype)
        else:
            unscaled = np.asarray(self.unscale_action(scaled)).astype(dtype)
        # Cast, then clip: a bound rounded to float32 can lie outside a float64 space.
        return np.clip(unscaled, self.action_space.low, self.action_space.high)

    def encode_stored_action(self, action: Tensor) -> Tensor:
        """Actions as the buffer keeps them (..., action_dim) as the nets see them, (..., A)."""
        if self.action_spec.nvec is None:
            return action.float()
        return encode_categories(action.long() - self.action_spec.offset, self.action_spec.nvec)

    # ------------------------------------------------------------------------------------------- replay

    def to_batch(self, samples: SequenceSamples) -> Batch:
        """Replayed windows as the nets see them.

        An action taken before the window's first observation of an episode is zeroed by the RSSM, and a latent that is
        missing in the buffer (−1) is a zero vector.
        """
        classes = th.arange(self.config.classes, device=self.device).unsqueeze(-1)  # (C, 1)
        stoch = samples.stoch.unsqueeze(-2) == classes  # (B, C, K), all False where the latent is missing
        actions = samples.prev_actions
        if self.action_spec.nvec is not None and self.action_spec.offset:
            # Zeros stand for no action; the reset masks them, but they must be encodable.
            low = self.action_spec.offset
            actions = actions.clamp(low, low + self.action_spec.nvec[0] - 1)
        return Batch(
            observations=by_key(samples.observations),
            actions=self.encode_stored_action(actions),
            rewards=samples.rewards,
            is_first=samples.is_first,
            is_last=samples.is_last,
            is_terminal=samples.is_terminal,
            deter=samples.deter,
            stoch=stoch.float(),
        )


def uncompiled(policy: Any) -> Any:
    """:return: a policy itself, where ``torch.compile(model.policy)`` has wrapped it"""
    return getattr(policy, "_orig_mod", policy)


class MlpPolicy(DreamerPolicy):
    """Policy for observation spaces that are no Dict."""


class CnnPolicy(DreamerPolicy):
    """Policy for image observations.

    :raises AssertionError: the observation space is no image
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        normalize_images: bool = True,
        **kwargs: Any,
    ) -> None:
        assert is_image_space(observation_space, check_channels=False, normalized_image=not normalize_images), (
            f"CnnPolicy needs images: a Box of uint8 in [0, 255] with three dimensions, or of other numbers with "
            f"policy_kwargs=dict(normalize_images=False); this space is {observation_space}. Use MlpPolicy instead."
        )
        super().__init__(observation_space, action_space, lr_schedule, normalize_images=normalize_images, **kwargs)


class MultiInputPolicy(DreamerPolicy):
    """Policy for Dict observation spaces.

    :raises ValueError: the observation space is no Dict
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Schedule, **kwargs: Any
    ) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(
                f"MultiInputPolicy needs a Dict observation space, not {observation_space}. Use MlpPolicy or CnnPolicy."
            )
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
