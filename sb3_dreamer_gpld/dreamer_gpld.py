"""DreamerGPLD: DreamerV3 with the GPLD penalty as a Stable-Baselines3 algorithm."""

from __future__ import annotations

import io
import os
import pickle
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TrainFreq
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from sb3_dreamer_gpld.buffers import SequenceReplayBuffer
from sb3_dreamer_gpld.config import ActionSpec, PenaltyConfig, check_int, check_range, dynamics_share, entropy_target
from sb3_dreamer_gpld.envs import blamed_environment, lost_processes, registered
from sb3_dreamer_gpld.execution import AUTO_COMPILE_UPDATES, compile_steps, is_compiled, resolve_precision
from sb3_dreamer_gpld.nets.actor_critic import ImaginationDraws, Objective, Running
from sb3_dreamer_gpld.nets.gpld import penalty_weight
from sb3_dreamer_gpld.nets.rssm import States
from sb3_dreamer_gpld.nets.world_model import Batch, WorldModelDraws
from sb3_dreamer_gpld.optim import LaProp
from sb3_dreamer_gpld.policies import CnnPolicy, DreamerPolicy, MlpPolicy, MultiInputPolicy, RecurrentState
from sb3_dreamer_gpld.saving import (
    FORMAT_VERSION,
    atomic_file,
    check_model_file,
    module_tensors,
    restore_rng,
    rng_states,
)

SelfDreamerGPLD = TypeVar("SelfDreamerGPLD", bound="DreamerGPLD")


class Loss(NamedTuple):
    """Result of :meth:`DreamerGPLD.loss`.

    :param total: weighted sum of the losses, a scalar with gradient
    :param losses: every loss by name before its weight, each (B, T) or (B, T − 1)
    :param weights: weight of every loss by name
    :param states: posterior states of the batch
    :param metrics: further scalars to log
    :param running: what actor and critic remember after this batch
    """

    total: Tensor
    losses: dict[str, Tensor]
    weights: dict[str, float]
    states: States
    metrics: dict[str, Tensor]
    running: Running


class DreamerGPLD(OffPolicyAlgorithm):
    """DreamerV3 (Hafner et al., Nature 2025) with the GPLD Jacobian penalty (Sonigra & Kumar 2026, arXiv 2605.23089).

    A recurrent world model is learned from replayed sequences; actor and critic are learned on rollouts that it
    imagines. With ``posterior_penalty=0, prior_penalty=0`` this is plain DreamerV3.

    :param policy: "MlpPolicy", "CnnPolicy" or "MultiInputPolicy"
    :param env: the environment (an id, an environment, or a vectorised one); ids of dm_control need no ``import shimmy``
    :param learning_rate: learning rate, or a function of the remaining progress
    :param buffer_size: rows of the replay buffer, over all environments
    :param learning_starts: rows that must be stored before the first update; actions come from the policy at all times
    :param batch_size: sequences in a batch, B
    :param gamma: discount; the paper's 1 − 1/333
    :param train_freq: collect that many steps, or ``(n, "episode")``, between updates
    :param gradient_steps: updates after each collection, −1 for as many as environment steps; None: by ``train_ratio``
    :param action_noise: added to the sampled action (Box only)
    :param replay_buffer_class: a subclass of SequenceReplayBuffer
    :param replay_buffer_kwargs: its further arguments
    :param optimize_memory_usage: not needed, each observation is stored once; only False is allowed
    :param policy_kwargs: arguments of the policy: single sizes of a net, ``net_arch``, ``normalize_images``, optimiser
    :param stats_window_size: episodes over which the logged return is averaged
    :param tensorboard_log: folder of the TensorBoard logs
    :param verbose: 0 nothing, 1 info, 2 debug
    :param device: "cpu", "cuda" or "auto"
    :param seed: of all random generators
    :param _init_setup_model: build the nets now
    :param model_size: "1m" to "400m" or "debug"; None: "1m" for vectors, "12m" with images
    :param batch_length: steps of a replayed sequence, T
    :param train_ratio: replayed steps per environment step, used unless ``gradient_steps`` is given; a fraction of an
        update is kept for later. None: half a batch, an update every other step, which makes the paper's 512 with the
        paper's batch of 16×64 and keeps small batches cheap
    :param imagination_horizon: imagined steps, H
    :param return_lambda: λ of the returns
    :param ent_coef: weight of the policy's entropy; "auto" or "auto_0.001" (where it starts): it rises while the entropy is
        below ``target_entropy``, and never sinks below its start
    :param target_entropy: nats, used if ``ent_coef`` is "auto"; "auto": for a Box a standard deviation of 0.242 per
        number, for other actions 0
    :param actor_gradient: "reinforce" (Nature 2025); "dynamics": through the imagined dynamics (Hafner et al., "Dream to
        Control", ICLR 2020, and the authors' release of 2023), for actions in a Box; a share of it in [0, 1]; or "auto":
        "dynamics" for a Box, else "reinforce", as that release does
    :param actor_learning_rate: learning rate of the policy's net, or a function of the remaining progress; None:
        ``learning_rate``. It is warmed up with the other
    :param imagination_starts: rollouts start from that many of the last states of each sequence (the authors' ``imag_last``);
        None: from all
    :param learning_rate_warmup: updates over which the learning rate rises linearly from 0
    :param posterior_penalty: λ₀ of the penalty on the posterior; 0: none
    :param prior_penalty: λ₀ of the penalty on the prior; 0: none
    :param penalty_fraction: share of the states that are penalised
    :param penalty_rows: rows penalised; None: all
    :param penalty_random_rows: draw these rows afresh at each update
    :param penalty_estimator: "hutchinson" or "exact"
    :param penalty_schedule: name of the schedule of λ, or a dict with "name" and its parameters
    :param penalty_min: smallest λ
    :param penalty_start: environment steps before the penalty starts; its schedule counts updates from there
    :param precision: "float32", "bfloat16", or "auto": bfloat16 where the hardware multiplies it faster
    :param compile: True, False, or "auto": compile the update if the run is long enough to pay for it
    :raises ValueError, TypeError: an argument is not allowed; the text names it and what is
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DreamerPolicy
    replay_buffer: SequenceReplayBuffer | None

    def __init__(
        self,
        policy: str | type[DreamerPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 4e-5,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1024,
        batch_size: int = 16,
        gamma: float = 1 - 1 / 333,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int | None = None,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[SequenceReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        device: th.device | str = "auto",
        seed: int | None = None,
        _init_setup_model: bool = True,
        model_size: str | None = None,
        batch_length: int = 64,
        train_ratio: float | None = None,
        imagination_horizon: int = 15,
        return_lambda: float = 0.95,
        ent_coef: float | str = 3e-4,
        target_entropy: float | str = "auto",
        actor_gradient: float | str = "reinforce",
        actor_learning_rate: float | Schedule | None = None,
        imagination_starts: int | None = None,
        learning_rate_warmup: int = 1000,
        posterior_penalty: float = 0.5,
        prior_penalty: float = 0.0,
        penalty_fraction: float = 0.5,
        penalty_rows: int | None = None,
        penalty_random_rows: bool = False,
        penalty_estimator: str = "hutchinson",
        penalty_schedule: str | dict[str, Any] = "sqrt_time",
        penalty_min: float = 0.001,
        penalty_start: int = 0,
        precision: str = "auto",
        compile: bool | str = "auto",
    ) -> None:
        super().__init__(
            policy,
            registered(env),
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,  # type: ignore[arg-type]
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self.model_size = model_size
        self.batch_length = batch_length
        self.train_ratio: float = train_ratio  # type: ignore[assignment]  # None becomes a number in _check_arguments
        self.imagination_horizon = imagination_horizon
        self.return_lambda = return_lambda
        self.ent_coef = ent_coef
        self.target_entropy = target_entropy
        self.actor_gradient = actor_gradient
        self.actor_learning_rate = actor_learning_rate
        self.imagination_starts = imagination_starts
        self.learning_rate_warmup = learning_rate_warmup
        self.posterior_penalty = posterior_penalty
        self.prior_penalty = prior_penalty
        self.penalty_fraction = penalty_fraction
        self.penalty_rows = penalty_rows
        self.penalty_random_rows = penalty_random_rows
        self.penalty_estimator = penalty_estimator
        self.penalty_schedule = penalty_schedule
        self.penalty_min = penalty_min
        self.penalty_start = penalty_start
        self.precision = precision
        self.compile = compile
        # Replayed steps that are due but make no whole update yet.
        self._update_credit = 0.0
        self._penalty_update = 0  # number of the first update with the penalty; moved on until penalty_start is reached
        self.format_version = FORMAT_VERSION
        self._rng_states: dict[str, Any] | None = None  # of a loaded run, until it goes on
        self._state: RecurrentState | None = None
        self._metric_sums: dict[str, Tensor] = {}
        self._metric_count = 0
        # Of each update since the last look: its number, the names of its losses, and flags (losses + 1,) of what was not
        # finite, the gradient last
        self._faults: list[tuple[int, tuple[str, ...], Tensor]] = []
        # Steps of the wrapped environments: more than num_timesteps where actions are repeated.
        self.num_frames = 0
        self._update_seconds, self._logged_at = 0.0, time.perf_counter()
        if _init_setup_model:
            self._setup_model()

    # -------------------------------------------------------------------------------------------- set-up

    def _setup_model(self) -> None:
        self._check_arguments()
        self._setup_lr_schedule()
        own_rate = {} if self.actor_learning_rate is None else {"actor_group": True}
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            **{"model_size": self.model_size, **own_rate, **self.policy_kwargs},
        )
        self.policy = self.policy.to(self.device)
        rows = self.policy.config.stoch
        if self.penalty_rows is not None and self.penalty_rows > rows:
            raise ValueError(f"penalty_rows must be at most {rows}, the rows of the stochastic state, not {self.penalty_rows}")
        self._make_replay_buffer()
        self._convert_train_freq()
        self._state = None  # the number of environments may have changed in load()
        self._metric_sums, self._metric_count, self._faults = {}, 0, []

    def _make_replay_buffer(self) -> None:
        if self.replay_buffer_class is None:
            self.replay_buffer_class = SequenceReplayBuffer
        if not issubclass(self.replay_buffer_class, SequenceReplayBuffer):
            raise ValueError(
                "replay_buffer_class must be SequenceReplayBuffer or a subclass of it, since DreamerGPLD learns from "
                f"sequences, not {self.replay_buffer_class.__name__}"
            )
        if self.replay_buffer is None:
            config = self.policy.config
            self.replay_buffer = self.replay_buffer_class(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                optimize_memory_usage=self.optimize_memory_usage,
                **{
                    "batch_length": self.batch_length,
                    "deter": config.deter,
                    "stoch": config.stoch,
                    "classes": config.classes,
                    "seed": self.seed,
                    **self.replay_buffer_kwargs,
                },
            )

    def _check_arguments(self) -> None:
        for name, minimum in (
            ("buffer_size", 1),
            ("learning_starts", 0),
            ("batch_size", 1),
            ("batch_length", 1),
            ("imagination_horizon", 1),
            ("learning_rate_warmup", 0),
        ):
            check_int(name, getattr(self, name), minimum)
        if self.gradient_steps is not None:
            check_int("gradient_steps (or None)", self.gradient_steps, -1)
        if self.train_ratio is None:
            self.train_ratio = self.batch_size * self.batch_length / 2
        check_range("train_ratio", self.train_ratio, 0.0, float("inf"))
        check_range("gamma", self.gamma, 0.0, 1.0)
        check_range("return_lambda", self.return_lambda, 0.0, 1.0)
        if self.imagination_starts is not None:
            check_int("imagination_starts (or None)", self.imagination_starts, 1)
            if self.imagination_starts > self.batch_length:
                raise ValueError(
                    f"imagination_starts must be at most batch_length={self.batch_length}, not {self.imagination_starts}"
                )
        if self.actor_learning_rate is not None and not callable(self.actor_learning_rate):
            check_range("actor_learning_rate (or None, or a function)", self.actor_learning_rate, 0.0, float("inf"))
        actions = ActionSpec.from_space(self.action_space)
        dynamics_share(self.actor_gradient, actions)
        entropy_target(self.ent_coef, self.target_entropy, actions)
        check_range("penalty_start", self.penalty_start, 0.0, float("inf"))
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be 'auto', 'float32' or 'bfloat16', not {self.precision!r}")
        if self.compile not in ("auto", True, False):
            raise ValueError(f"compile must be 'auto', True or False, not {self.compile!r}")
        _ = self.penalty  # checks the rest

    @property
    def penalty(self) -> PenaltyConfig:
        """Setting of the GPLD penalty; its start is counted in updates here."""
        return PenaltyConfig(
            posterior=self.posterior_penalty,
            prior=self.prior_penalty,
            fraction=self.penalty_fraction,
            rows=self.penalty_rows,
            random_rows=self.penalty_random_rows,
            estimator=self.penalty_estimator,
            schedule=self.penalty_schedule,
            minimum=self.penalty_min,
            start=self._penalty_update,
        )

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        rates = [self.learning_rate] if self.actor_learning_rate is None else [self.learning_rate, self.actor_learning_rate]
        self._lr_schedules = [FloatSchedule(rate) for rate in rates]  # of the optimiser's groups

    @property
    def objective(self) -> Objective:
        """What actor and critic are trained for."""
        actions = self.policy.action_spec
        ent_coef, target_entropy = entropy_target(self.ent_coef, self.target_entropy, actions)
        share = dynamics_share(self.actor_gradient, actions)
        return Objective(self.gamma, self.return_lambda, ent_coef, target_entropy, share, self.imagination_starts)

    # ----------------------------------------------------------------------------------------- collecting

    @th.inference_mode()
    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Act on the last observations; the recurrent state follows every step, with the action really taken.

        There is no random warm-up: the untrained policy acts from the first step.
        """
        if self._state is None:
            self._state = self.policy.initial_state(n_envs)
        assert self._last_obs is not None and self._last_episode_starts is not None
        observation, _ = self.policy.obs_to_tensor(self._last_obs)
        is_first = th.as_tensor(self._last_episode_starts, dtype=th.bool, device=self.device)
        self._state = self.policy.act(observation, self._state, is_first)
        if action_noise is not None and self.policy.action_spec.nvec is None:
            noise = th.as_tensor(np.asarray(action_noise(), dtype=np.float32), device=self.device)
            noisy = self._state.action + noise.view_as(self._state.action)
            self._state = self._state._replace(action=noisy.clamp(-1.0, 1.0))
        action = self.policy.to_env_action(self._state.action)
        if self.policy.action_spec.nvec is None:
            return action, self._state.action.cpu().numpy()
        return action, action

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        self._check_finite(new_obs, reward, infos)
        assert isinstance(replay_buffer, SequenceReplayBuffer) and self._state is not None
        assert self._last_episode_starts is not None
        replay_buffer.stage(
            self._last_episode_starts, self._state.deter.cpu().numpy(), self._state.stoch.argmax(-2).cpu().numpy()
        )
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self.num_frames += sum(frames if isinstance(frames := info.get("frames"), int) else 1 for info in infos)
        self._last_episode_starts = dones  # SB3's off-policy code never updates it

    def _check_finite(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray | None = None,
        infos: list[dict[str, Any]] | None = None,
    ) -> None:
        """:raises ValueError: NaN or infinity; names the key, the environment's index and the step"""

        def check(name: str, values: np.ndarray, first_env: int = 0) -> None:
            values = np.asarray(values)
            if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                finite = np.isfinite(values.reshape(len(values), -1)).all(1)
                env = first_env + int(np.flatnonzero(~finite)[0])
                raise ValueError(
                    f"{name} of environment {env} is not finite at step {self.num_timesteps}: {values[env - first_env]}. "
                    "Allowed: finite numbers. Nothing of this step was stored"
                )

        by_key = observation if isinstance(observation, dict) else {"": observation}
        for key, values in by_key.items():
            check(f"observation {key!r}" if key else "the observation", values)
        if reward is not None:
            check("the reward", reward)
        for env, info in enumerate(infos or ()):
            terminal = info.get("terminal_observation")
            if terminal is not None:
                for key, value in (terminal if isinstance(terminal, dict) else {"": terminal}).items():
                    check(f"terminal observation {key!r}" if key else "the terminal observation", np.asarray(value)[None], env)

    # ------------------------------------------------------------------------------------------- learning

    def learn(
        self: SelfDreamerGPLD,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DreamerGPLD",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDreamerGPLD:
        """Collect and learn, as every SB3 algorithm does.

        The loop is that of ``OffPolicyAlgorithm``, but for the number of updates: see ``train_ratio``.

        :param total_timesteps: environment steps, over all environments
        :param callback: called at every step
        :param log_interval: episodes between two logs; None: none
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: start counting afresh, and reset the environment
        :param progress_bar: show one
        :raises ValueError: an observation or reward has the wrong shape or is not finite; names the environment
        :raises RuntimeError: the process of an environment ended; names the environment and the exit code
        """
        with self._naming_environments():
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
        self.num_frames = 0 if reset_num_timesteps else self.num_frames
        self._update_seconds, self._logged_at = 0.0, time.perf_counter()
        self._compile_if_it_pays(total_timesteps - self.num_timesteps)
        callback.on_training_start(locals(), globals())
        assert self.env is not None and isinstance(self.train_freq, TrainFreq) and self._last_obs is not None
        self._check_normalization()
        self._check_finite(self._last_obs)
        self._resume(reset_num_timesteps)
        while self.num_timesteps < total_timesteps:
            with self._naming_environments():
                rollout = self.collect_rollouts(
                    self.env,
                    train_freq=self.train_freq,
                    action_noise=self.action_noise,
                    callback=callback,
                    learning_starts=self.learning_starts,
                    replay_buffer=self.replay_buffer,
                    log_interval=log_interval,
                )
            if not rollout.continue_training:
                break
            updates = self._due_updates(rollout.episode_timesteps)
            if updates > 0:
                start = time.perf_counter()
                self.train(gradient_steps=updates, batch_size=self.batch_size)
                self._update_seconds += time.perf_counter() - start
        callback.on_training_end()
        return self

    @contextmanager
    def _naming_environments(self) -> Iterator[None]:
        """Errors of environments say which one it was: as a note, from Python 3.11 on.

        :raises RuntimeError: in place of a broken connection to an environment whose process ended; names it
        """
        try:
            yield
        except (EOFError, ConnectionError) as error:
            lost = "" if self.env is None else lost_processes(self.env)
            if not lost:
                raise
            raise RuntimeError(f"At step {self.num_timesteps} {lost}") from error
        except Exception as error:
            blamed = "" if self.env is None else blamed_environment(error, self.env)
            if blamed and hasattr(error, "add_note"):
                error.add_note(f"It was raised at step {self.num_timesteps} by {blamed}")
            raise

    def _resume(self, reset_num_timesteps: bool) -> None:
        """Go on as a loaded run: with its random numbers, and with a word of warning if its replay buffer is missing."""
        if not reset_num_timesteps:
            if self._rng_states is not None:
                restore_rng(self._rng_states, self.device)
            assert self.replay_buffer is not None
            if self._n_updates and not self.replay_buffer.size():
                warnings.warn(
                    f"The replay buffer is empty after {self.num_timesteps} steps: what was collected before is lost, and "
                    f"updates go on after {self.learning_starts} new steps. To keep it, use save_replay_buffer and "
                    "load_replay_buffer",
                    stacklevel=3,
                )
        self._rng_states = None

    def _check_normalization(self) -> None:
        """:raises ValueError: a wrapper outside VecNormalize changes the shape, so that what is stored cannot be normalised"""
        if self._vec_normalize_env is None:
            return

        def shapes(space: spaces.Space) -> Any:
            return {k: s.shape for k, s in space.items()} if isinstance(space, spaces.Dict) else space.shape

        inner, outer = shapes(self._vec_normalize_env.observation_space), shapes(self.observation_space)
        if inner != outer:
            raise ValueError(
                f"VecNormalize sees observations of shape {inner}, the algorithm {outer}. VecNormalize must be the outermost "
                "of the wrappers that change the shape: VecNormalize(VecTransposeImage(VecFrameStack(env)))"
            )

    def _compile_if_it_pays(self, steps: int) -> None:
        """Compile the update if asked to, or with "auto" if the run of ``steps`` environment steps is long enough."""
        if self.compile == "auto":
            per_step = self.train_ratio / (self.batch_size * self.batch_length)
            if self.gradient_steps is not None:
                per_step = self.gradient_steps if self.gradient_steps > 0 else 1.0
            wanted = steps * per_step >= AUTO_COMPILE_UPDATES
        else:
            wanted = bool(self.compile)
        if wanted and not is_compiled(self.policy):
            if self.verbose >= 1:
                print("Compiling the update: the first one takes one to four minutes (compile=False turns this off)")
            # The exact norm's strips would be as many kernels, and its products are as fast uncompiled.
            compile_steps(self.policy, leave_out=("penalty_losses",) if self.penalty_estimator == "exact" else ())

    def _due_updates(self, steps: int) -> int:
        """Updates to make after ``steps`` environment steps."""
        assert self.replay_buffer is not None
        if self.gradient_steps is not None:
            if self.num_timesteps <= self.learning_starts:
                return 0
            return self.gradient_steps if self.gradient_steps >= 0 else steps
        capacity = self.replay_buffer.buffer_size  # rows of one environment
        stored = int(self.replay_buffer.stored_rows().sum())
        if stored <= min(self.learning_starts, capacity * self.n_envs - 1) or not self.replay_buffer.has_window():
            return 0
        self._update_credit += steps * self.train_ratio
        replayed = self.batch_size * self.batch_length
        updates = int(self._update_credit // replayed)
        self._update_credit -= updates * replayed
        return updates

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Make updates from replayed windows.

        :param gradient_steps: updates
        :param batch_size: windows in each
        :raises FloatingPointError: a loss is not finite; the parameters are left as they are
        """
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        world_model, actor_critic = self.policy.world_model, self.policy.actor_critic
        self._faults = []
        if self.num_timesteps < self.penalty_start and self._n_updates <= self._penalty_update:
            self._penalty_update = self._n_updates + gradient_steps
        for _ in range(gradient_steps):
            samples = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            batch = self.policy.to_batch(samples)
            sequences, steps = batch.rewards.shape
            states = self.update(
                batch,
                world_model.draw(sequences, steps, self.penalty),
                actor_critic.draw(sequences * min(steps, self.imagination_starts or steps), self.imagination_horizon),
            )
            self.replay_buffer.update_latents(samples.envs, samples.starts, states.deter, states.stoch.argmax(-2))
        self._raise_faults()
        for name, group in zip(("learning_rate", "actor_learning_rate"), self.policy.optimizer.param_groups, strict=False):
            self.logger.record(f"train/{name}", group["lr"])
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def update(self, batch: Batch, world_draws: WorldModelDraws, imagination_draws: ImaginationDraws) -> States:
        """One update of all parameters, without waiting for the device anywhere.

        A loss or gradient that is not finite leaves the parameters as they are; :meth:`train` finds out at its end.

        :param batch: replayed sequences
        :param world_draws, imagination_draws: every random number that the update needs
        :return: posterior states of the batch without gradient, with which the stored ones are refreshed
        """
        warmup = min(1.0, self._n_updates / self.learning_rate_warmup) if self.learning_rate_warmup else 1.0
        for group, schedule in zip(self.policy.optimizer.param_groups, self._lr_schedules, strict=True):
            group["lr"] = warmup * schedule(self._current_progress_remaining)
        dtype = resolve_precision(self.precision, self.device)
        with th.autocast(self.device.type, dtype, enabled=dtype != th.float32):
            result = self.loss(batch, world_draws, imagination_draws)
        self.policy.optimizer.zero_grad(set_to_none=True)
        result.total.backward()
        grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
        grad_norm = th.linalg.vector_norm(th.stack(th._foreach_norm(grads)))
        means = {name: mean(loss.detach()) for name, loss in result.losses.items()}
        faults = ~th.isfinite(th.stack([*means.values(), grad_norm]))  # (losses + 1,)
        fault = faults.any()
        for grad in grads:
            grad.masked_fill_(fault, 0.0)
        if isinstance(self.policy.optimizer, LaProp):  # any other goes on with its momentum alone
            self.policy.optimizer.found_inf = fault.float()
        self.policy.optimizer.step()
        self.policy.actor_critic.update_slow_value(1.0 - fault.float())
        self.policy.actor_critic.keep(result.running, fault)
        self._faults.append((self._n_updates, tuple(means), faults))
        self._n_updates += 1
        self._collect_metrics(result, means, grad_norm)
        return States(*(state.detach() for state in result.states))  # without the graph, which keeps memory

    def loss(self, batch: Batch, world_draws: WorldModelDraws, imagination_draws: ImaginationDraws) -> Loss:
        """All losses of one update; arguments as in :meth:`update`. Changes nothing."""
        world_model, actor_critic, penalty = self.policy.world_model, self.policy.actor_critic, self.penalty
        losses, states = world_model.loss(batch, world_draws, penalty, self.gamma)
        more, metrics, running = actor_critic.loss(world_model, batch, states, imagination_draws, self.objective)
        losses.update(more)
        weights = {name: self._loss_weight(name, penalty) for name in losses}
        total = sum((weights[name] * mean(loss) for name, loss in losses.items()), th.zeros((), device=self.device))
        return Loss(total, losses, weights, states, metrics, running)

    def _loss_weight(self, name: str, penalty: PenaltyConfig) -> float:
        if name.endswith("_penalty"):
            return penalty_weight(penalty, getattr(penalty, name.removesuffix("_penalty")), self._n_updates)
        return getattr(self.policy.config, f"{name.split('/')[0]}_weight")

    def _raise_faults(self) -> None:
        """Look at the flags of the updates made since the last time.

        :raises FloatingPointError: names the first update with a loss or gradient that was not finite, and the losses
        """
        faults, self._faults = self._faults, []
        if not faults or not th.stack([flags for _, _, flags in faults]).any():
            return
        update, names, flags = next(entry for entry in faults if entry[2].any())
        bad = [name for name, flag in zip(names, flags.tolist(), strict=False) if flag]
        what = f"the losses {', '.join(bad)}" if bad else "the gradient"
        raise FloatingPointError(
            f"Update {update}: {what} became not finite; the parameters were not changed. "
            "Look for extreme rewards or observations, or lower the learning rate"
        )

    # ------------------------------------------------------------------------------------------- logging

    def _collect_metrics(self, result: Loss, means: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Add to the sums that :meth:`dump_logs` averages; nothing is read from the device here."""
        values = {f"loss/{name.rstrip('/')}": value for name, value in means.items()}
        values["loss/total"] = result.total.detach()
        values["train/grad_norm"] = grad_norm
        values.update({f"actor_critic/{name}": metric for name, metric in result.metrics.items()})
        for name, weight in result.weights.items():
            if name.endswith("_penalty"):
                kind = name.removesuffix("_penalty")
                values[f"gpld/{kind}_lambda"] = th.as_tensor(weight)
                values[f"gpld/{kind}_penalty"] = values.pop(f"loss/{name}")
        for name, value in values.items():
            self._metric_sums[name] = self._metric_sums[name] + value if name in self._metric_sums else value
        self._metric_count += 1

    def dump_logs(self) -> None:
        """Write the log: means of every metric over the updates since the last time, and the share of time they took."""
        for name, total in self._metric_sums.items():
            self.logger.record(name, total.item() / self._metric_count)
        self._metric_sums, self._metric_count = {}, 0
        now = time.perf_counter()
        self.logger.record("time/update_share", self._update_seconds / max(now - self._logged_at, 1e-9))
        self._update_seconds, self._logged_at = 0.0, now
        if self.num_frames > self.num_timesteps:
            self.logger.record("time/frames", self.num_frames)
        super().dump_logs()

    # -------------------------------------------------------------------------------------------- saving

    def save(
        self,
        path: str | os.PathLike[str] | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Save everything but the replay buffer, the states of the random generators included.

        :param path: name of the file, which appears when it is complete; ".zip" is added
        :param exclude: further attributes to leave out
        :param include: attributes to keep that are usually left out
        :raises OSError: it could not be written; names the file. One that was there before is unchanged
        """
        self._rng_states = rng_states(self.device)
        try:
            with atomic_file(path, "zip") as file:
                super().save(file, exclude, include)  # type: ignore[arg-type]
        finally:
            self._rng_states = None

    @classmethod
    def load(
        cls: type[SelfDreamerGPLD],
        path: str | os.PathLike[str] | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfDreamerGPLD:
        """Load a model. With ``load_replay_buffer`` and ``learn(..., reset_num_timesteps=False)`` a run saved at an
        episode's end goes on bit for bit as if it had not stopped.

        A model file can run code when it is loaded: load only files that you trust. Arguments as in SB3.

        :raises FileNotFoundError: there is no such file
        :raises ValueError: the file is truncated, of another algorithm, of a later version, or of other spaces than ``env``
        :raises RuntimeError: nets of another size are asked for than those of the file
        """
        check_model_file(path)
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)  # type: ignore[arg-type]

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Load parameters, as in SB3.

        :raises RuntimeError: they belong to nets of another size or other spaces; names the first tensors that differ
        :raises ValueError: the actor had a learning rate of its own there and has none here, or the other way round
        """
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except ValueError as error:
            if "parameter groups" not in str(error):
                raise
            given = "None" if self.actor_learning_rate is None else "given"
            raise ValueError(
                f"The optimiser of this file has other groups than this model's, whose actor_learning_rate is {given}. "
                "Allowed: the same choice, None or a learning rate, as when the file was saved; or take single modules by "
                "load_modules"
            ) from error
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise RuntimeError(  # the type that SB3 raises
                f"These parameters belong to a model of another size or of other spaces than this one (model_size="
                f"{self.model_size!r}). Load the file with DreamerGPLD.load and without model_size or policy_kwargs, or take "
                f"over single modules by load_modules. The differences: {str(error)[:500]}"
            ) from error

    def load_modules(self, path: str | os.PathLike[str] | io.BufferedIOBase, modules: Sequence[str]) -> None:
        """Warm start: take single modules from a saved model; all else stays as it is, the optimiser included.

        :param path: a file of :meth:`save`
        :param modules: some of "encoder", "rssm", "decoder", "reward", "continue", "actor", "critic"
        :raises ValueError: an unknown name, or tensors of other shapes; nothing is loaded then
        """
        check_model_file(path)
        _, params, _ = load_from_zip_file(path, load_data=False, device=self.device)  # type: ignore[arg-type]
        tensors = module_tensors(params["policy"], self.policy.state_dict(), modules)  # type: ignore[arg-type]
        self.policy.load_state_dict(tensors, strict=False)

    def save_replay_buffer(self, path: str | os.PathLike[str] | io.BufferedIOBase) -> None:
        """Save the replay buffer, as far as it is filled.

        :param path: name of the file, which appears when it is complete; ".pkl" is added
        :raises OSError: it could not be written; names the file. One that was there before is unchanged
        """
        with atomic_file(path, "pkl") as file:
            super().save_replay_buffer(file)  # type: ignore[arg-type]

    def load_replay_buffer(self, path: str | os.PathLike[str] | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """Load a replay buffer. The file can run code when it is loaded: load only files that you trust.

        :param path: a file of :meth:`save_replay_buffer`
        :param truncate_last_traj: for SB3's HER buffer; without effect here
        :raises ValueError: it is truncated, or of another number of environments, other spaces or other sizes of the
            recurrent state; the present buffer is kept
        """
        present = self.replay_buffer
        try:
            super().load_replay_buffer(path, truncate_last_traj)  # type: ignore[arg-type]
        except (EOFError, pickle.UnpicklingError, AssertionError) as error:
            self.replay_buffer = present
            raise ValueError(f"{path} is no replay buffer, or a truncated one: {error}") from error
        loaded, config = self.replay_buffer, self.policy.config
        self.replay_buffer = present
        if not isinstance(loaded, SequenceReplayBuffer):
            raise ValueError(f"{path} holds a {type(loaded).__name__}; allowed: SequenceReplayBuffer")
        for name, its, ours in (
            ("observation space", loaded.observation_space, self.observation_space),
            ("action space", loaded.action_space, self.action_space),
            ("number of environments", loaded.n_envs, self.n_envs),
            ("deter", loaded.deter_size, config.deter),
            ("stoch", loaded.stoch_size, config.stoch),
        ):
            if its != ours:
                raise ValueError(f"{path} does not belong to this model: its {name} is {its}, the model's {ours}")
        self.replay_buffer = loaded

    def _excluded_save_params(self) -> list[str]:
        own = ["_state", "_lr_schedules", "_metric_sums", "_metric_count", "_faults", "_update_seconds", "_logged_at"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []


def mean(loss: Tensor) -> Tensor:
    """Mean over all entries; 0 for an empty tensor (windows of a single step have no transition)."""
    return loss.sum() / max(1, loss.numel())
