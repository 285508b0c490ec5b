"""DreamerGPLD: DreamerV3 with the GPLD penalty as a Stable-Baselines3 algorithm."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar
from weakref import WeakSet

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_dreamer_gpld import parallel
from sb3_dreamer_gpld.arguments import (
    check_arguments,
    check_environments,
    check_processes,
    check_with_nets,
    dynamics_share,
    entropy_target,
    naming_unknown,
    warn_without_gpu,
    window_steps,
)
from sb3_dreamer_gpld.buffers import SequenceReplayBuffer
from sb3_dreamer_gpld.callbacks import callbacks_of_all
from sb3_dreamer_gpld.checks import check_int
from sb3_dreamer_gpld.config import ObservationSpec, PenaltyConfig
from sb3_dreamer_gpld.environment_checks import (
    check_finite,
    check_normalization,
    check_normalized_images,
    check_same_units,
    naming_environments,
    warn_of_other_units,
    whereabouts,
)
from sb3_dreamer_gpld.envs import frames_of, registered
from sb3_dreamer_gpld.execution import AUTO_COMPILE_UPDATES, addresses
from sb3_dreamer_gpld.exploration import correlated_noise, episodes_of
from sb3_dreamer_gpld.learner import Learner, LearnerConfig
from sb3_dreamer_gpld.logs import record_all
from sb3_dreamer_gpld.nets.actor_critic import Objective
from sb3_dreamer_gpld.observations import normalized_keys, with_last_observations
from sb3_dreamer_gpld.pace import (
    Pace,
    UpdateRatio,
    needs_whole_windows,
    rows_before_updates,
    show_steps_of_others,
    tell,
    updates_per_step,
    warn_before_updates,
    warn_without_room,
    warn_without_updates,
)
from sb3_dreamer_gpld.planning import PlannerConfig
from sb3_dreamer_gpld.policies import CnnPolicy, DreamerPolicy, MlpPolicy, MultiInputPolicy, RecurrentState
from sb3_dreamer_gpld.replay.refresh import LatentRefresh
from sb3_dreamer_gpld.resumable import ResumableAlgorithm
from sb3_dreamer_gpld.saving import restore_rng
from sb3_dreamer_gpld.transfer import to_device, to_host

PUBLISHED_STEPS = 16 * 64  # that an update replays
_HANDED_ON = WeakSet[Logger]()  # which another model has, and no model closes


class ActingInputs(NamedTuple):
    """What a step of acting depends on.

    :param observation: of E environments
    :param state: after the step before
    :param is_first: the observation starts an episode, bool (E,)
    """

    observation: PyTorchObs
    state: RecurrentState
    is_first: th.Tensor


SelfDreamerGPLD = TypeVar("SelfDreamerGPLD", bound="DreamerGPLD")


class DreamerGPLD(ResumableAlgorithm):
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
    :param exploration_noise: standard deviation of correlated noise (Ornstein-Uhlenbeck) that is added to collected actions in
        a Box, in their range scaled to [−1, 1]; 0: none, as published. ``action_noise`` takes its place where it is given
    :param exploration_share: share of the episodes that have ``exploration_noise``, in (0, 1]; the others show the agent what
        it does without it. Of no effect without ``exploration_noise``, or with ``action_noise``
    :param planner: "mppi": :meth:`predict`, and with it every evaluation, plans each action (Hansen et al., "TD-MPC2", ICLR
        2024), for actions in a Box; or a dict of settings that differ from TD-MPC2's, see
        :class:`~sb3_dreamer_gpld.planning.PlannerConfig`; None: actions are the policy net's
    :param plan_in_training: collected actions are planned as well
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
    :param policy_penalty: weight of the squared gradient of log π(a | s) in the policy's input s, at the states that rollouts
        start from (Lipschitz-constrained policies, Chen et al. 2024, who take 0.002); 0: none
    :param precision: "float32", "bfloat16", or "auto": bfloat16 where the hardware multiplies it faster
    :param compile: True, False, or "auto": compile the update if the run is long enough to pay for it. On a GPU the compiled
        update and a step of acting are recorded as CUDA graphs, too
    :raises ValueError, TypeError: an argument is not allowed; the text names it and what is
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DreamerPolicy
    replay_buffer: SequenceReplayBuffer | None
    learner: Learner
    learner_class: ClassVar[type[Learner]] = Learner  # a subclass may name another

    @naming_unknown
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
        exploration_noise: float = 0.0,
        exploration_share: float = 1.0,
        planner: str | dict[str, Any] | PlannerConfig | None = None,
        plan_in_training: bool = False,
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
        policy_penalty: float = 0.0,
        precision: str = "auto",
        compile: bool | str = "auto",
    ) -> None:
        env = maybe_make_env(registered(env), verbose)
        if isinstance(env, (gym.Env, VecEnv)):  # of others SB3 says what is wrong
            ObservationSpec.from_space(env.observation_space)  # before SB3 stumbles over a space that it does not know
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
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
        warn_without_gpu(device, self.device)
        self.model_size = model_size
        self.batch_length = batch_length
        self.train_ratio: float = train_ratio  # type: ignore[assignment]  # None becomes a number in check_arguments
        self.imagination_horizon = imagination_horizon
        self.return_lambda = return_lambda
        self.ent_coef = ent_coef
        self.target_entropy = target_entropy
        self.actor_gradient = actor_gradient
        self.actor_learning_rate = actor_learning_rate
        self.imagination_starts = imagination_starts
        self.exploration_noise, self.exploration_share = exploration_noise, exploration_share
        self.planner = planner
        self.plan_in_training = plan_in_training
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
        self.policy_penalty = policy_penalty
        self.precision = precision
        self.compile = compile
        self._penalty_update = 0  # number of the first update with the penalty; moved on until penalty_start is reached
        self._penalty_waits: int | None = None  # the penalty_start that it was moved on to, which counts once
        self._scheduled_for: Any = None  # the learning_rate that lr_schedule was made of
        self.update_ratio = UpdateRatio()
        self._left_at: bytes | None = None  # where the last learn() left the environments
        self._was_stopped = False  # by a callback
        self._steps_without_credit = 0  # stored by a collection that goes on, of this process
        # By a VecNormalize when it learned last: keys of observations, and whether rewards were
        self._normalized: tuple[str, ...] = ()
        self._rewards_normalized = False
        self._state: RecurrentState | None = None
        self._latents: list[np.ndarray] = []  # of the last step on the host: deter (E, D), class indices (E, K)
        # Steps of the wrapped environments: more than num_timesteps where actions are repeated.
        self.num_frames = 0
        self._update_seconds, self._logged_at, self._logged_step = 0.0, time.perf_counter(), -1
        if _init_setup_model:
            self._setup_model()

    # -------------------------------------------------------------------------------------------- set-up

    def _setup_model(self) -> None:
        self.processes = parallel.current()
        if not self.processes.is_first:
            self.verbose, self.tensorboard_log = 0, None
        check_arguments(self)
        if isinstance(self.action_noise, VectorizedActionNoise) and self.action_noise.n_envs != self.n_envs:
            self.action_noise = self.action_noise.base_noise  # of a loaded model; learn() makes one for each environment
        self._setup_lr_schedule()
        if not (isinstance(self.policy_class, type) and issubclass(self.policy_class, DreamerPolicy)):
            raise ValueError(
                f"policy must be one of {', '.join(map(repr, self.policy_aliases))}, or DreamerPolicy or a subclass of it "
                f"(docs/extending.md), not {getattr(self.policy_class, '__name__', self.policy_class)}"
            )
        own_rate = {} if self.actor_learning_rate is None else {"actor_group": True}
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            **{"model_size": self.model_size, "planner": self.planner, **own_rate, **self.policy_kwargs},
        )
        self.policy = self.policy.to(self.device)
        self._planned_with = self.planner
        check_with_nets(self)
        steps = window_steps(self)
        if self.verbose >= 1 and self.batch_size * steps > 4 * PUBLISHED_STEPS:
            times = self.batch_size * steps / PUBLISHED_STEPS
            replayed = f"{self.batch_size} sequences of {steps} steps"
            print(f"An update replays {replayed}, {times:.0f} times the published 16x64")
        self._make_replay_buffer()
        self._convert_train_freq()
        check_processes(self)
        if self._penalty_waits is None:
            self._penalty_waits = self.penalty_start
        self._state = None  # the number of environments may have changed in load()
        self._renew_exploration(self.__dict__.pop("_noise_episodes", None))
        self.update_ratio = UpdateRatio(self.__dict__.pop("_update_credit", self.update_ratio.credit))
        self.learner = self.learner_class(self.policy, self._learner_config(), self.processes)
        if not self.processes.is_first:
            self.set_random_seed(self._own_seed(th.initial_seed() if self.seed is None else self.seed))

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As in SB3; a warning if ``env`` does not normalise observations as those that were learned from."""
        super().set_env(env, force_reset)
        self._left_at = None
        self._check_loaded()

    def _check_loaded(self) -> None:
        if self.env is not None and self.num_timesteps:
            warn_of_other_units(self._normalized, self.get_vec_normalize_env())

    def _check_resumed(self) -> None:
        if self.num_timesteps:
            check_same_units(self._normalized, self._rewards_normalized, self.get_vec_normalize_env())

    def _renew_exploration(self, episodes: Sequence[int] | None = None) -> None:
        """Make the noise that begins with the next episode of each environment.

        :param episodes: their numbers, as saved; where they are not known, all environments have had as many
        """
        self._explored_with = self.exploration_noise, self.exploration_share
        if not self.exploration_noise or self.policy.action_spec.nvec is not None:
            self._exploration = None
            return
        if episodes is None or len(episodes) != self.n_envs:
            first = self._episode_num // self.n_envs + self.processes.rank * self.n_envs  # processes take turns, too
            episodes = range(first, first + self.n_envs)
        size = self.policy.action_spec.size
        self._exploration = correlated_noise(self.exploration_noise, size, self.n_envs, self.exploration_share, episodes)

    def _follow_attributes(self) -> None:
        """Have the parts follow attributes that have changed since they were made.

        :raises ValueError: a value is not allowed, or cannot change any more
        """
        check_arguments(self)
        check_with_nets(self)
        if self.planner != self._planned_with:
            raise ValueError(
                f"planner={self.planner!r} has changed since the policy was made; allowed: as it was, or save the model and "
                "load(path, planner=...)"
            )
        self._setup_lr_schedule()
        self._convert_train_freq()
        check_processes(self)
        assert self.replay_buffer is not None
        if "batch_length" not in (self.replay_buffer_kwargs or {}):
            self.replay_buffer.batch_length = self.batch_length
        if self._explored_with != (self.exploration_noise, self.exploration_share):
            self._renew_exploration()
        warn_without_room(self)

    def _make_replay_buffer(self) -> None:
        if self.replay_buffer_class is None:
            self.replay_buffer_class = SequenceReplayBuffer
        if not (isinstance(self.replay_buffer_class, type) and issubclass(self.replay_buffer_class, SequenceReplayBuffer)):
            its: Any = self.replay_buffer_class
            raise ValueError(
                "replay_buffer_class must be SequenceReplayBuffer or a subclass of it, since DreamerGPLD learns from "
                f"sequences, not {getattr(its, '__name__', its)}"
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
                    "seed": None if self.seed is None else self._own_seed(self.seed),
                    **(self.replay_buffer_kwargs or {}),
                },
            )
            self.replay_buffer.process = (self.processes.rank, self.processes.size)

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
        if self._scheduled_for != self.learning_rate:  # else lr_schedule may be another one, which a callback has put there
            super()._setup_lr_schedule()
            self._scheduled_for = self.learning_rate
        rates = [] if self.actor_learning_rate is None else [self.actor_learning_rate]
        self._own_schedules = [FloatSchedule(rate) for rate in rates]  # of the optimiser's further groups

    def _convert_train_freq(self) -> None:
        super()._convert_train_freq()
        assert isinstance(self.train_freq, TrainFreq)
        check_int("train_freq", self.train_freq.frequency, 1)

    def _learner_config(self) -> LearnerConfig:
        """What updates have in common, from the present values of the attributes."""
        actions = self.policy.action_spec
        ent_coef, target_entropy = entropy_target(self.ent_coef, self.target_entropy, actions)
        share = dynamics_share(self.actor_gradient, actions)
        return LearnerConfig(
            objective=Objective(
                self.gamma,
                self.return_lambda,
                ent_coef,
                target_entropy,
                dynamics=share,
                starts=self.imagination_starts,
                policy_penalty=self.policy_penalty,
            ),
            penalty=self.penalty,
            imagination_horizon=self.imagination_horizon,
            learning_rate_warmup=self.learning_rate_warmup,
            precision=self.precision,
        )

    # ----------------------------------------------------------------------------------------- collecting

    @th.no_grad()  # not inference_mode, whose tensors a CUDA graph of the update could not share
    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Act on the last observations; the recurrent state follows every step, with the action really taken.

        There is no random warm-up: the untrained policy acts from the first step.
        """
        if self._state is None:
            self._state = self.policy.initial_state(n_envs)
        assert self._last_obs is not None and self._last_episode_starts is not None
        self.num_timesteps += n_envs * (self.processes.size - 1)  # those of the other processes; SB3 adds its own
        observation, _ = self.policy.obs_to_tensor(self._last_obs)
        is_first = to_device(np.asarray(self._last_episode_starts, dtype=bool), self.device)
        inputs = ActingInputs(observation, self._state, is_first)
        self._state, latent = self.learner.execution.run_whole(self._act, self._acting_key, inputs)
        if action_noise is not None and self.policy.action_spec.nvec is None:
            noise = np.asarray(action_noise(), dtype=np.float32)
            if noise.size != n_envs * self.policy.action_spec.size:  # SB3 broadcasts it, too
                noise = np.broadcast_to(noise, (n_envs, *self.policy.action_spec.shape))
            noisy = self._state.action + to_device(noise.reshape(n_envs, -1), self.device)  # (E, A)
            self._state = self._state._replace(action=noisy.clamp(-1.0, 1.0))
        # One wait for the device a step: for the action, and what is stored with it
        action, *self._latents = to_host(self._state.action, self._state.deter, latent).wait()
        taken = self.policy.to_env_action(th.from_numpy(action))
        return taken, action if self.policy.action_spec.nvec is None else taken

    def _act(self, inputs: ActingInputs) -> tuple[RecurrentState, th.Tensor]:
        """One step of acting, on the device.

        :return: state after it, and the class indices of its stochastic part, (E, K)
        """
        state = self.policy.act(*inputs, planned=self.plan_in_training)
        return state, state.stoch.argmax(-2)

    def _acting_key(self) -> object:
        """What a recorded :meth:`_act` takes for granted."""
        return self.plan_in_training, self.planner, addresses(self.policy)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        check_finite(self.num_timesteps, new_obs, reward, infos)
        assert isinstance(replay_buffer, SequenceReplayBuffer) and self._state is not None
        assert self._last_episode_starts is not None
        replay_buffer.stage(self._last_episode_starts, *self._latents)
        # As in SB3, whose integers would be those of the normalised last observations. They are trained on here
        normalize = self._vec_normalize_env
        original, original_reward = new_obs, reward
        if normalize is None:
            self._last_original_obs = self._last_obs
        else:
            original, original_reward = normalize.get_original_obs(), normalize.get_original_reward()
        following = with_last_observations(original, dones, infos, normalize)
        assert self._last_original_obs is not None
        replay_buffer.add(self._last_original_obs, following, buffer_action, original_reward, dones, infos)
        self._last_obs, self._last_original_obs = new_obs, original
        self._last_episode_starts = dones  # SB3's off-policy code never updates it
        self._steps_without_credit += len(dones)
        self.num_frames += sum(map(frames_of, infos)) * self.processes.size

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

        :param total_timesteps: environment steps, over all environments of all processes
        :param callback: called at every step; of several processes by the first one alone, but for those that all of them need
        :param log_interval: episodes between two logs; None: none
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: start counting afresh, and reset the environment; of no effect where no step was made yet
        :param progress_bar: show one
        :raises ValueError: an observation or reward has the wrong shape or is not finite; names the environment
        :raises ValueError: an attribute has changed to a value that is not allowed
        :raises RuntimeError: the process of an environment ended; names the environment and the exit code
        :raises FileNotFoundError: of several processes that go on, this one's share of the model is missing
        """
        of_all = callbacks_of_all(callback)
        if not self.processes.is_first:
            callback, progress_bar = of_all, False
        if not reset_num_timesteps and self._missing_share is not None:
            raise FileNotFoundError(
                f"{self._missing_share} is missing, the share of process {self.processes.rank} of {self.processes.size} "
                "in the model that it should go on from; allowed: as many processes as the run was saved with, and the "
                "files of all of them"
            )
        self._follow_attributes()
        self._saved = []  # what was saved between two runs, all processes have saved
        if self.processes.size > 1:
            check_environments(self)
            self.processes.copy_from_first([*self.policy.state_dict().values()])
        self._seed_environments_anew(not reset_num_timesteps)
        if not self._custom_logger and "_logger" in self.__dict__ and self._logger not in _HANDED_ON:
            self._logger.close()  # SB3 makes another one, and would leave this one's file and thread open
        self._was_stopped = False
        with naming_environments(self), self._first_observations():
            self._begin_anew_if_moved()
            begins = reset_num_timesteps or self.num_timesteps == 0  # SB3 would go on with the logs of another run
            total_timesteps, callback = self._setup_learn(total_timesteps, callback, begins, tb_log_name, progress_bar)
        self.num_frames = 0 if reset_num_timesteps else self.num_frames
        if reset_num_timesteps:
            self._renew_exploration()
        self._update_seconds, self._logged_at, self._logged_step = 0.0, time.perf_counter(), -1
        self._compile_if_it_pays(total_timesteps - self.num_timesteps)
        callback.on_training_start(locals(), globals())
        assert self.env is not None and isinstance(self.train_freq, TrainFreq) and self._last_obs is not None
        check_normalization(self._vec_normalize_env, self.observation_space)
        self._normalized = normalized_keys(self._vec_normalize_env)
        self._rewards_normalized = self._vec_normalize_env is not None and self._vec_normalize_env.norm_reward
        check_normalized_images(self._vec_normalize_env, self.policy.observation_spec, self.observation_space)
        check_finite(self.num_timesteps, self._last_obs)
        self._resume(reset_num_timesteps)
        warned = reset_num_timesteps and warn_before_updates(self, total_timesteps)  # one that goes on may be in short pieces
        self._left_at = None
        try:
            self._collect_and_update(total_timesteps, callback, log_interval)
        finally:
            with contextlib.suppress(Exception):  # of environments that are broken; whatever ended the run is raised
                self._left_at = None if self._last_obs is None else whereabouts(self.env)
        callback.on_training_end()
        if reset_num_timesteps and not warned and self.num_timesteps >= total_timesteps:
            warn_without_updates(self)
        self._all_go_on(True)  # the others save what the callbacks have saved
        return self

    def _collect_and_update(self, total_timesteps: int, callback: BaseCallback, log_interval: int | None) -> None:
        """The loop of :meth:`learn`, until the steps are made or a callback stops it."""
        assert self.env is not None and isinstance(self.train_freq, TrainFreq)
        pace = Pace(total_timesteps)
        while self.num_timesteps < total_timesteps:
            with naming_environments(self), self._beginning_anew_after_errors():
                rollout = self.collect_rollouts(
                    self.env,
                    train_freq=self.train_freq,
                    action_noise=self.action_noise or self._exploration,
                    callback=callback,
                    learning_starts=self.learning_starts,
                    replay_buffer=self.replay_buffer,
                    log_interval=log_interval,
                )
            show_steps_of_others(rollout.episode_timesteps * (self.processes.size - 1), callback)
            if not self._all_go_on(rollout.continue_training):
                if not rollout.continue_training:
                    self._keep_last_step(callback)
                self._keep_due_updates(rollout.episode_timesteps)
                self._was_stopped = True
                break
            updates = self._due_updates(rollout.episode_timesteps)
            if self.train_freq.unit == TrainFrequencyUnit.EPISODE:  # whose length is now known
                self._compile_if_it_pays(total_timesteps - self.num_timesteps)
            if updates > 0:
                start = time.perf_counter()
                self.train(gradient_steps=updates, batch_size=self.batch_size)
                self._update_seconds += time.perf_counter() - start
                tell(pace.after(updates, self.num_timesteps), callback, self.verbose)

    def _begin_anew_if_moved(self) -> None:
        """Have episodes begin anew if somebody else has moved the environments since the last :meth:`learn`."""
        if self._left_at is None or self.env is None or self._last_obs is None:
            return
        if self._left_at != whereabouts(self.env):
            self._last_obs = None
            if self._exploration is not None:
                self._exploration.reset()

    @contextlib.contextmanager
    def _beginning_anew_after_errors(self) -> Iterator[None]:
        """An error while collecting, Ctrl-C included, ends the episodes: environments and recurrent state may be a step ahead
        of the last observations and of the replay buffer. The updates that are due after what was stored come later."""
        try:
            yield
        except BaseException:
            self.update_ratio.credit += self._credit_of_steps()
            self._steps_without_credit = 0
            self._last_obs = None
            if self._exploration is not None:
                self._exploration.reset()
            raise

    def _all_go_on(self, continue_training: bool) -> bool:
        """Whether no process was stopped by its callbacks. What the first one has saved, the others save their share of."""
        if self.processes.size == 1:
            return continue_training
        saved, self._saved = self._saved, []
        stopped, n_saved = self.processes.sums([not continue_training, len(saved)])
        if n_saved:
            self._save_shares(self.processes.told_by_first(saved))
        return not stopped

    def _keep_last_step(self, callback: BaseCallback) -> None:
        """Store the step at which a callback stopped; SB3 drops it, though environment and recurrent state have moved on.

        Episodes that it ended are counted.

        :param callback: has the variables of the loop that it stopped
        """
        step = callback.locals
        self._update_info_buffer(step["infos"], step["dones"])
        self._store_transition(
            step["replay_buffer"], step["buffer_actions"], step["new_obs"], step["rewards"], step["dones"], step["infos"]
        )
        for index in np.flatnonzero(step["dones"]):
            self._episode_num += 1
            if step["action_noise"] is not None:
                step["action_noise"].reset(**({"indices": [index]} if self.n_envs > 1 else {}))

    def _keep_due_updates(self, steps: int) -> None:
        """The updates that are due after ``steps`` environment steps are made when the run goes on."""
        self._steps_without_credit = 0
        if self.gradient_steps is None and self._can_update():
            self.update_ratio.add(steps * self.processes.size, self.train_ratio)

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

    def _compile_if_it_pays(self, steps: int) -> None:
        """Compile the update if asked to, or with "auto" if the run of ``steps`` environment steps is long enough."""
        if self.compile == "auto":
            wanted = steps * updates_per_step(self) >= AUTO_COMPILE_UPDATES
        else:
            wanted = bool(self.compile)
        execution = self.learner.execution
        if wanted and not execution.compiled:
            if self.verbose >= 1:
                print("Compiling the update: the first one takes one to four minutes (compile=False turns this off)")
            # The exact norm's strips would be as many kernels, and its products are as fast uncompiled.
            execution.compile(leave_out=("penalty_losses",) if self.penalty_estimator == "exact" else ())

    def _credit_of_steps(self) -> float:
        """Replayed steps that are due after what a collection has stored so far."""
        # Several processes collect single steps only, and may not exchange anything where one of them failed
        counts = self._steps_without_credit and self.gradient_steps is None and self.processes.size == 1
        return self._steps_without_credit * self.train_ratio if counts and self._can_update() else 0.0

    def _can_update(self) -> bool:
        """Whether enough is stored to learn from, in all processes together."""
        assert self.replay_buffer is not None
        stored, ready = self.processes.sums([int(self.replay_buffer.stored_rows().sum()), self.replay_buffer.has_window()])
        if stored <= rows_before_updates(self):
            return False
        # Windows that still grow would be of different lengths in different processes
        if needs_whole_windows(self) and ready < self.processes.size:
            return False
        return self.gradient_steps is None or self.num_timesteps > self.learning_starts

    def _due_updates(self, steps: int) -> int:
        """Updates to make after ``steps`` environment steps."""
        self._steps_without_credit = 0
        if not self._can_update():
            return 0
        steps *= self.processes.size
        if self.gradient_steps is not None:
            return self.gradient_steps if self.gradient_steps >= 0 else steps
        self.update_ratio.add(steps, self.train_ratio)
        return self.update_ratio.take(self._replayed_steps)

    @property
    def _replayed_steps(self) -> int:
        """Steps that an update replays, B·T."""
        assert self.replay_buffer is not None
        return self.batch_size * self.replay_buffer.batch_length

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """Make updates from replayed windows.

        :param gradient_steps: updates
        :param batch_size: windows in each; None: as many as the argument of the constructor
        :raises FloatingPointError: a loss is not finite; the parameters are left as they are, by LaProp
        """
        assert self.replay_buffer is not None
        logger = self.logger  # first: without one there is an error
        self.policy.set_training_mode(True)
        self._move_penalty_start(gradient_steps)
        learner = self.learner
        learner.config = self._learner_config()
        learner.faults.clear()
        left = max(0.0, self._current_progress_remaining)  # the last episode may end behind the run's end
        rates = [self.lr_schedule(left), *(schedule(left) for schedule in self._own_schedules)]
        refresh = LatentRefresh(self.replay_buffer, late=self.device.type != "cpu")
        # With gradient_steps updates begin on windows that still grow: each length would be compiled by itself
        whole = self.replay_buffer.has_window()
        with contextlib.nullcontext() if whole else learner.execution.plain():
            self._update(gradient_steps, self.batch_size if batch_size is None else batch_size, rates, refresh)
        refresh.finish()
        learner.faults.raise_faults()
        for name, group in zip(("learning_rate", "actor_learning_rate"), self.policy.optimizer.param_groups, strict=False):
            logger.record(f"train/{name}", group["lr"])
        logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        record_all(logger, learner.metrics.means())

    def _move_penalty_start(self, updates: int) -> None:
        """Have the penalty start after ``updates`` more, as long as ``penalty_start`` is not reached; it counts once."""
        waiting = self._n_updates <= self._penalty_update or self.penalty_start != self._penalty_waits
        if waiting and self.num_timesteps < self.penalty_start:
            self._penalty_update = self._n_updates + updates
        self._penalty_waits = self.penalty_start

    def _update(self, updates: int, batch_size: int, rates: Sequence[float], refresh: LatentRefresh) -> None:
        """Make updates.

        :param updates: how many
        :param batch_size: windows in each
        :param rates: learning rates of the optimiser's groups
        :param refresh: takes the new latents of what was replayed
        """
        assert self.replay_buffer is not None
        for _ in range(updates):
            samples = self.replay_buffer.sample(self.processes.share("batch_size", batch_size), env=self._vec_normalize_env)
            states = self.learner.update(self.policy.to_batch(samples), None, self._n_updates, rates)
            self._n_updates += 1
            refresh.add(samples, states)

    # ------------------------------------------------------------------------------------------- acting

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: bool | Sequence[bool] | np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for one or more observations; hand the state back, and say where episodes start.

        :param observation: one observation, or those of E environments
        :param state: what the last call returned; None: nothing is remembered
        :param episode_start: bool (E,), where an episode starts, and what was before is forgotten; None: nowhere
        :param deterministic: take the most probable latent and action
        :return: actions, and the new state, see :meth:`sb3_dreamer_gpld.policies.DreamerPolicy.predict`
        :raises ValueError: ``state`` or ``episode_start`` belongs to another number of environments, or ``state`` to another
            policy or planner
        """
        return self.policy.predict(observation, state, episode_start, deterministic)

    # ------------------------------------------------------------------------------------------- logging

    def set_logger(self, logger: Logger) -> None:
        """As in SB3. A logger that another model has made stays open while this one has it.

        :param logger: is used from now on
        """
        super().set_logger(logger)
        _HANDED_ON.add(logger)

    def dump_logs(self) -> None:
        """Write the log: means of every metric over the updates since the last time, and the share of time they took."""
        record_all(self.logger, self.learner.metrics.take())
        if self.num_timesteps != self._logged_step:  # several environments may end at one step, and SB3 then logs again
            now = time.perf_counter()
            self.logger.record("time/update_share", self._update_seconds / max(now - self._logged_at, 1e-9))
            self._update_seconds, self._logged_at, self._logged_step = 0.0, now, self.num_timesteps
        if self.num_frames > self.num_timesteps:
            self.logger.record("time/frames", self.num_frames)
        if self.processes.is_first:
            super().dump_logs()

    def _excluded_save_params(self) -> list[str]:
        own = [
            "_state",
            "_left_at",
            "_was_stopped",
            "_latents",
            "_exploration",
            "_explored_with",
            "_planned_with",
            "_own_schedules",
            "_scheduled_for",
            "learner",
            "update_ratio",
            "_steps_without_credit",
            "_update_seconds",
            "_logged_at",
            "_logged_step",
        ]
        return [*super()._excluded_save_params(), *own]

    def _run_state(self) -> dict[str, Any]:
        credit = self.update_ratio.credit + self._credit_of_steps()
        own = {"_update_credit": credit, "_noise_episodes": episodes_of(self._exploration)}
        return {**super()._run_state(), **own}

    def _take_over(self, state: dict[str, Any]) -> None:
        super()._take_over(state)
        self._renew_exploration(state.get("_noise_episodes"))

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
