"""Replay buffer for sequence models: one ring of rows per environment, sampled as windows of consecutive rows.

A "row" alone is one stored observation with what belongs to it. ``replay/rows.py`` keeps the rows on the host,
``replay/device_rows.py`` on the device, ``replay/writing.py`` makes rows of transitions and ``replay/windows.py`` chooses
windows.

Letters: B sequences, T steps, D deter, K categoricals of the stochastic state, C classes, E environments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dreamer_gpld.checks import check_int, check_range
from sb3_dreamer_gpld.observations import by_key, like_space, spaces_by_key
from sb3_dreamer_gpld.replay.device_rows import DeviceRows
from sb3_dreamer_gpld.replay.normalizing import normalized_observations, normalized_rewards
from sb3_dreamer_gpld.replay.rows import Column, Entries, RowFormat, Rows
from sb3_dreamer_gpld.replay.windows import Windows, WindowSampler
from sb3_dreamer_gpld.replay.writing import EpisodeWriter, Latents, check_shape
from sb3_dreamer_gpld.transfer import to_device

# Buffers that were saved when this was one class: names in them, and the arrays that they have as attributes
_ObsSpec, _Latents = Column, Latents
_COLUMNS = ("actions", "rewards", "dones", "timeouts", "is_first", "deter", "stoch")

STORAGES = ("host", "device")


class SequenceSamples(NamedTuple):
    """A batch of windows as they are stored; :meth:`DreamerPolicy.to_batch` makes them what the nets see.

    Step t of a window is one row: an observation, the reward received on arriving at it, and the action that led to it.

    :param observations: as the space has them, (B, T, *obs_shape)
    :param prev_actions: (B, T, action_dim), zeros where no row comes before
    :param rewards: float32 (B, T)
    :param is_first: the observation starts an episode, bool (B, T)
    :param is_last: the observation ends an episode, bool (B, T)
    :param is_terminal: it ends it for good, not by a time limit, bool (B, T)
    :param deter: state just before the first step, float32 (B, D); zeros if there is none
    :param stoch: class indices of that state, int64 (B, K); −1 if there is none
    :param envs: the ring of each window, int64 (B,)
    :param starts: number of the row at t = 0, int64 (B,)
    """

    observations: th.Tensor | dict[str, th.Tensor]
    prev_actions: th.Tensor
    rewards: th.Tensor
    is_first: th.Tensor
    is_last: th.Tensor
    is_terminal: th.Tensor
    deter: th.Tensor
    stoch: th.Tensor
    envs: np.ndarray
    starts: np.ndarray


class SequenceReplayBuffer(ReplayBuffer):
    """Replay buffer of DreamerV3.

    Every environment has a ring of ``capacity = max(buffer_size // n_envs, 1)`` rows, and row number n of an environment
    (counted from 0, never reset by wrapping) lies at index ``n % capacity``.

    A row is one observation with the action taken after it, the reward received on arriving at it, its place in the episode
    (first, last, terminal) and the recurrent state of the agent after it. The last observation of an episode has a row of its
    own, with a zero action. Each observation is therefore stored once.

    The arrays ``observations`` (a dict of arrays for Dict spaces), ``actions``, ``rewards``, ``dones`` (1 on the last row of
    an episode), ``timeouts`` (1 if that row is not terminal), ``is_first``, ``deter`` and ``stoch`` have SB3's layout
    (rows, E, ...). They are allocated on first use and grow with what is stored, up to the capacity, so that a model which is
    loaded only to be evaluated does not take the memory.

    With ``storage="device"`` the rows lie on the device of the nets: batches are read there, and no update copies one to it or
    waits for latents. All memory is allocated when the first transition is added, or when a loaded buffer is first used. A row
    takes 13 + 4 D + K bytes (4 K in place of K from 255 classes on) and those of its observation and action: for dm_control's
    walker 2213 at size 1m, which is 2.2 GB for a million rows, and 8357 at size 12m (D = 2048, K = 32), 8.4 GB. The arrays
    named above are then copies on the host of what is filled, made each time that they are asked for; writing into them
    changes nothing. Pickles hold arrays of the host with either storage.

    :param buffer_size: most rows, over all environments
    :param observation_space: of the environments
    :param action_space: of the environments
    :param device: of the samples, and with ``storage="device"`` of the rows
    :param n_envs: number of parallel environments, E
    :param optimize_memory_usage: must be False: there is no second copy of the observations to save
    :param handle_timeout_termination: treat episodes that end by a time limit as not terminal
    :param batch_length: trained steps T of a window; one more row before them gives the initial state
    :param deter: numbers in the deterministic state, D
    :param stoch: categoricals of the stochastic state, K
    :param classes: of each categorical, C
    :param seed: of the sampling; None: drawn from NumPy's global generator, which SB3 seeds, so that the seed of the model is
        enough to repeat a run
    :param storage: where the rows lie, "host" or "device"
    :param recency: share of the drawn windows that are drawn with a probability of about 1 / age, so that what the agent
        does now is replayed more often, in [0, 1] (after the authors' release, ``replay.fracs.recency``, which is 0 there, and
        whose ages are stretched to the capacity as long as it is not full); the others are drawn uniformly
    :raises ValueError: ``optimize_memory_usage`` is True, ``batch_length`` is no whole number of at least 1, ``storage`` is
        another word, or "device" with observations or actions of a type that PyTorch cannot index, ``recency`` is not in
        [0, 1]
    """

    process = (0, 1)  # number of the process that fills it, and of how many
    classes: int | None = None  # of buffers that were saved before they knew it

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        batch_length: int = 64,
        deter: int = 1,
        stoch: int = 1,
        classes: int = 2,
        seed: int | None = None,
        storage: str = "host",
        recency: float = 0.0,
    ) -> None:
        # Not ReplayBuffer's constructor: it would allocate observations and next observations at once
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if optimize_memory_usage:
            raise ValueError(
                "optimize_memory_usage=True is not needed by SequenceReplayBuffer, "
                "which stores each observation once already; allowed: False"
            )
        check_int("batch_length", batch_length, 1)
        self._storage = _checked_storage(storage)
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.deter_size = deter
        self.stoch_size = stoch
        self.classes = classes
        # The smallest type with a value to spare: its largest one marks rows without a latent
        self.stoch_dtype = np.min_scalar_type(classes + 1)
        self.rng = np.random.default_rng(np.random.randint(2**31 - 1) if seed is None else seed)
        self._make_parts(batch_length)
        self.recency = recency

    def _make_parts(self, batch_length: int) -> None:
        """Make the parts, empty, from the attributes of the constructor.

        :param batch_length: as in the constructor
        """
        row = RowFormat(self._obs_columns(), self._action_column(), self.deter_size, self.stoch_size, self.stoch_dtype)
        self.rows = self._make_rows(row)
        self.windows = WindowSampler(self.rows, batch_length)
        self.writer = EpisodeWriter(self.rows, self.windows)

    def _make_rows(self, row: RowFormat) -> Rows:
        if self._storage == "device":
            return DeviceRows(self.buffer_size, self.n_envs, row, self.device)
        return Rows(self.buffer_size, self.n_envs, row)

    def _obs_columns(self) -> dict[str, Column]:
        shapes, columns = by_key(self.obs_shape), {}
        for key, part in spaces_by_key(self.observation_space).items():
            # SB3 counts the first dimension of MultiDiscrete only
            shape = part.shape if isinstance(part, spaces.MultiDiscrete) else shapes[key]
            # float64 is stored as float32: the nets compute in float32 anyway, and it is half the memory
            columns[key] = Column(shape, part.shape or (), np.dtype(self._maybe_cast_dtype(part.dtype)))
        return columns

    def _action_column(self) -> Column:
        space = self.action_space
        # Scaled actions are fractions whatever the type of the space
        dtype = np.dtype(np.float32 if isinstance(space, spaces.Box) else space.dtype)
        return Column((self.action_dim,), space.shape or (), dtype)

    def reset(self) -> None:
        """Forget all rows, unfinished transitions and queued windows, and free the arrays."""
        super().reset()
        self.rows.reset()
        self.windows.reset()
        self.writer.reset()

    # ------------------------------------------------------------------ memory

    @property
    def device(self) -> th.device:
        """:return: of the samples; with ``storage="device"`` the rows follow it"""
        return self._device

    @device.setter
    def device(self, device: th.device | str) -> None:
        self._device = th.device(device)
        rows = self.__dict__.get("rows")  # the constructor of SB3 sets it first
        if isinstance(rows, DeviceRows):
            rows.device = self._device

    @property
    def storage(self) -> str:
        """:return: where the rows lie, "host" or "device"; if it is changed, they move

        :raises ValueError: it is set to another word, or to "device" with a type that PyTorch cannot index
        """
        return self._storage

    @storage.setter
    def storage(self, storage: str) -> None:
        if _checked_storage(storage) == self._storage:
            return
        before, present = self._storage, self.rows
        try:
            self._storage = storage
            rows = self._make_rows(present.format)
        except ValueError:
            self._storage = before
            raise
        rows.restore(present.added.copy(), *present.filled())
        self.rows = self.windows.rows = self.writer.rows = rows

    @property
    def batch_length(self) -> int:
        """:return: trained steps T of a window. It can change, and the queued windows are then forgotten;
            ``load_replay_buffer`` sets it to that of the model

        :raises ValueError: it is set to what is no whole number of at least 1
        """
        return self.windows.batch_length

    @batch_length.setter
    def batch_length(self, batch_length: int) -> None:
        check_int("batch_length", batch_length, 1)
        if batch_length != self.windows.batch_length:
            self.windows.batch_length = batch_length
            self.windows.reset()

    @property
    def recency(self) -> float:
        """:return: share of the drawn windows that are drawn by their age. It can change; ``load_replay_buffer`` sets it to
            that of the model's ``replay_buffer_kwargs``

        :raises ValueError: it is set to what is no number in [0, 1]
        """
        return self.windows.recency

    @recency.setter
    def recency(self, recency: float) -> None:
        check_range("recency", recency, 0.0, 1.0)
        self.windows.recency = recency

    @property
    def observations(self) -> np.ndarray | dict[str, np.ndarray]:  # type: ignore[override]
        """:return: (rows, E, *obs_shape), by key if the space is a Dict"""
        return like_space(self.rows.observations, self.observation_space)

    @property
    def actions(self) -> np.ndarray:  # type: ignore[override]
        """:return: taken after the observations, (rows, E, action_dim)"""
        return self.rows.array("actions")

    @property
    def rewards(self) -> np.ndarray:  # type: ignore[override]
        """:return: received on arriving at the observations, (rows, E)"""
        return self.rows.array("rewards")

    @property
    def dones(self) -> np.ndarray:  # type: ignore[override]
        """:return: 1 on the last row of an episode, (rows, E)"""
        return self.rows.array("dones")

    @property
    def timeouts(self) -> np.ndarray:  # type: ignore[override]
        """:return: 1 if the last row is not terminal, (rows, E)"""
        return self.rows.array("timeouts")

    @property
    def is_first(self) -> np.ndarray:
        """:return: the row starts an episode, bool (rows, E)"""
        return self.rows.array("is_first")

    @property
    def deter(self) -> np.ndarray:
        """:return: deterministic state after the observations, (rows, E, D)"""
        return self.rows.array("deter")

    @property
    def stoch(self) -> np.ndarray:
        """:return: class indices of the stochastic state, (rows, E, K); ``no_latent`` where there is none"""
        return self.rows.array("stoch")

    @property
    def no_latent(self) -> int:
        """:return: what ``stoch`` holds in rows without a latent"""
        return self.rows.format.no_latent

    @property
    def rows_added(self) -> np.ndarray:
        """:return: rows ever added to each ring, (E,)"""
        return self.rows.added

    def stored_rows(self) -> np.ndarray:
        """:return: rows that each ring holds, (E,)"""
        return self.rows.stored()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """:param state: of a buffer that was pickled or copied, or of one that was saved when this was one class"""
        saved = dict(state)
        saved.setdefault("_storage", "host")  # buffers saved before there was another
        device = get_device(saved.pop("device", None) or saved["_device"])  # the processor if the GPU is not there
        saved["_device"] = device
        batch_length = saved.pop("batch_length", None)  # the windows have it now
        if "rows" in saved:
            self.__dict__.update(saved)
            self.device = device
            return
        names = ("rows_added", "observations", *_COLUMNS, "_queue", "_staged", "_pending", "_pending_rewards", "_pending_obs")
        old = {name: saved.pop(name) for name in names if name in saved}
        for name in ("no_latent", "_obs_specs", "_action_dtype", "_envs"):  # follow from what is left
            del saved[name]
        self.__dict__.update(saved)
        self._make_parts(batch_length)
        if self.size() > 0:
            self.rows.restore(old["rows_added"], by_key(old["observations"]), {name: old[name] for name in _COLUMNS})
        self.windows.queue = old["_queue"]
        self.writer.staged, self.writer.pending = old["_staged"], old["_pending"]
        self.writer.pending_rewards, self.writer.pending_obs = old["_pending_rewards"], old["_pending_obs"]

    # ------------------------------------------------------------------ writing

    def stage(self, is_first: np.ndarray, deter: np.ndarray | th.Tensor, stoch: np.ndarray | th.Tensor) -> None:
        """Give what the agent knows about the observations of the next :meth:`add` (and only of that one).

        :param is_first: the observation starts an episode, (E,); this is how the buffer learns of an episode that was cut
            without ``done``
        :param deter: deterministic state after the observation, (E, D)
        :param stoch: class indices of the stochastic state after the observation, (E, K); −1 where there is none
        :raises ValueError: a shape is wrong
        """
        self.writer.stage(is_first, deter, stoch)

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        next_obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Add one transition of every environment. The arguments are copied, and never changed.

        A transition continues the one that was added before for its environment, if that was not done. If its observation is
        not the next one of that, the episode before is cut there, with a warning. With one environment E may be left out,
        and the list of infos.

        :param obs: observations acted on, (E, *obs_shape)
        :param next_obs: observations after that, (E, *obs_shape): the last ones of the episode where ``done``
        :param action: in the form that SB3 stores (scaled for Box spaces), (E, action_dim)
        :param reward: of the transitions, (E,)
        :param done: the episodes ended, (E,)
        :param infos: of the environments, of which ``TimeLimit.truncated`` is used
        :raises ValueError: a shape is wrong; nothing is written then
        :raises MemoryError: there is no room for more rows, with ``storage="device"`` for all of them; nothing is written then
        """
        if isinstance(infos, dict) and self.n_envs == 1:
            infos = [infos]
        if len(infos) != self.n_envs:
            raise ValueError(f"infos: expected one per environment ({self.n_envs}), received {len(infos)}")
        timeouts = [self.handle_timeout_termination and bool(info.get("TimeLimit.truncated", False)) for info in infos]
        self.writer.add(by_key(obs), by_key(next_obs), action, reward, done, np.array(timeouts))
        fullest = int(self.rows.added.max())
        self.pos, self.full = fullest % self.buffer_size, fullest >= self.buffer_size

    def update_latents(
        self,
        envs: np.ndarray,
        starts: np.ndarray,
        deter: Entries,
        stoch: Entries,
    ) -> None:
        """Replace the stored latents of trained rows by newer ones.

        Rows that have been overwritten since they were sampled are left alone; of two windows with the same row, the later one
        in the batch counts. With ``storage="device"`` tensors of the device stay there, and nothing is waited for.

        :param envs: environments of the windows, (B,), as sampled
        :param starts: first trained rows of the windows, (B,), as sampled
        :param deter: deterministic states, (B, T, D)
        :param stoch: class indices of the stochastic states, (B, T, K); −1: the row has no latent from then on
        :raises ValueError: the shapes do not belong together
        """
        steps = deter.shape[1] if deter.ndim > 1 else 0
        check_shape("deter", deter, (len(starts), steps, self.deter_size))
        check_shape("stoch", stoch, (len(starts), steps, self.stoch_size))
        numbers = starts[:, None] + np.arange(steps)  # (B, T)
        envs = np.broadcast_to(envs[:, None], numbers.shape)
        self.rows.replace(envs, numbers, deter=deter, stoch=stoch)

    # ------------------------------------------------------------------ sampling

    def has_window(self) -> bool:
        """:return: whether a full window (``batch_length`` rows and the one before them) is stored"""
        return self.windows.has_window()

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SequenceSamples:  # type: ignore[override]
        """Sample windows of consecutive rows: first those that have been finished since the last call and were never served,
        then uniformly among all that are stored, and a share of ``recency`` by their age. As long as no full window is stored,
        shorter ones are given.

        :param batch_size: number of windows, B
        :param env: normalises observations and rewards
        :return: the windows
        :raises ValueError: the buffer is empty; or ``env`` is a subclass of VecNormalize that computes something else, with
            ``storage="device"``
        """
        return self._get_samples(self.windows.newest_first(batch_size, self.rng), env)

    def peek(self, batch_size: int, rng: np.random.Generator, env: VecNormalize | None = None) -> SequenceSamples:
        """Sample windows uniformly and change nothing: neither the buffer's random numbers nor which windows count as new.

        :param batch_size: number of windows, B
        :param rng: draws them
        :param env: normalises observations and rewards
        :return: the windows
        :raises ValueError: the buffer is empty; or ``env`` is a subclass of VecNormalize that computes something else, with
            ``storage="device"``
        """
        return self._get_samples(self.windows.uniform(batch_size, rng), env)

    def _get_samples(self, windows: Windows, env: VecNormalize | None = None) -> SequenceSamples:  # type: ignore[override]
        """Read windows.

        :param windows: which
        :param env: normalises observations and rewards
        """
        rows = self.rows
        numbers = windows.starts[:, None] + np.arange(-1, windows.steps)  # (B, 1 + T), the context row first
        # Row 0 stands in for the missing one before it
        place = rows.locate(windows.envs[:, None], np.maximum(numbers, 0))  # (B, 1 + T)
        before, at = place[:, :-1], place[:, 1:]
        observations = self._normalized(rows.read_observations(at), env)
        tensors = {key: self.to_torch(entries, copy=False) for key, entries in observations.items()}  # (B, T, ...)
        prev_actions = self._read("actions", before)  # (B, T, action_dim)
        rewards = self._normalized_rewards(rows.read("rewards", at), env)
        is_first, is_last = self._read("is_first", at), self._read("dones", at) > 0  # (B, T), (B, T)
        is_terminal = is_last & (self._read("timeouts", at) == 0)  # (B, T)
        deter, stoch = self._latents(place[:, 0])
        if not windows.has_context:
            prev_actions[:, 0].zero_()
            is_first[:, 0].fill_(True)
            deter.zero_()
            stoch.fill_(-1)
        return SequenceSamples(
            observations=like_space(tensors, self.observation_space),
            prev_actions=prev_actions,
            rewards=self.to_torch(rewards, copy=False),
            is_first=is_first,
            is_last=is_last,
            is_terminal=is_terminal,
            deter=deter,
            stoch=stoch,
            envs=windows.envs,
            starts=windows.starts,
        )

    def _read(self, name: str, at: Entries) -> th.Tensor:
        """Read some rows of an array, on the device and with memory of their own."""
        return self.to_torch(self.rows.read(name, at), copy=False)

    def _latents(self, at: Entries) -> tuple[th.Tensor, th.Tensor]:
        """Read the latents of one row per window: (B, D) and (B, K)."""
        deter, stoch = self._read("deter", at), self.to_torch(self.rows.read_stoch(at), copy=False)
        missing = stoch == self.no_latent  # (B, K)
        return deter.masked_fill(missing.any(1, keepdim=True), 0.0), stoch.masked_fill(missing, -1)

    def _normalized(self, observations: dict[str, Any], env: VecNormalize | None) -> dict[str, Any]:
        """Normalise observations by key, (B, T, ...), where they lie."""
        if self._storage == "device":
            return normalized_observations(observations, env)
        # VecNormalize wants a dict exactly if the space is one
        return by_key(self._normalize_obs(like_space(observations, self.observation_space), env))

    def _normalized_rewards(self, rewards: Any, env: VecNormalize | None) -> Entries:
        """Normalise rewards (B, T) where they lie."""
        return normalized_rewards(rewards, env) if self._storage == "device" else self._normalize_reward(rewards, env)

    def to_torch(self, array: Entries, copy: bool = True) -> th.Tensor:
        """Convert an array to a tensor on the device. A GPU fetches it from pinned memory while the host goes on.

        :param array: any
        :param copy: on the CPU, whether the tensor has memory of its own
        :return: the tensor
        """
        if self.device.type != "cpu":
            return to_device(array, self.device)
        return super().to_torch(array, copy)  # type: ignore[arg-type]  # PyTorch takes both


def _checked_storage(storage: str) -> str:
    """:raises ValueError: it is no name of a storage"""
    if storage not in STORAGES:
        raise ValueError(f"storage must be 'host' or 'device', not {storage!r}")
    return storage
