"""
Replay buffer for sequence models: one ring of rows per environment, sampled as windows of consecutive rows.

Letters in shapes: B sequences, T steps per sequence, K rows (categoricals) of the stochastic state, C classes,
D size of the deterministic state, E environments. "Row" alone means one stored observation with what belongs to it.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

try:
    # Only needed to warn before the memory runs out
    import psutil  # type: ignore[import-untyped]
except ImportError:
    psutil = None

# Arrays that are allocated on first use; the names that SB3 knows keep SB3's meaning and layout (capacity, E, ...)
_ARRAYS = ("observations", "actions", "rewards", "dones", "timeouts", "is_first", "deter", "stoch")
# Rows of each ring that are allocated at first; the arrays double when they are full
FIRST_ROWS = 1024
# The key under which an observation that is not a dict is handled internally
_ONLY_KEY = ""


class SequenceSamples(NamedTuple):
    """
    A batch of windows. Step t of a window is one row: an observation, the reward received on arriving at it,
    and the action that led to it.
    """

    observations: th.Tensor | dict[str, th.Tensor]  # (B, T, *obs_shape)
    prev_actions: th.Tensor  # (B, T, action_dim), zeros where no row comes before
    rewards: th.Tensor  # (B, T) float32
    is_first: th.Tensor  # (B, T) bool
    is_last: th.Tensor  # (B, T) bool
    is_terminal: th.Tensor  # (B, T) bool
    deter: th.Tensor  # (B, D) float32, the state just before the first step; zeros if there is none
    stoch: th.Tensor  # (B, K) int64, class indices of that state; -1 if there is none
    envs: np.ndarray  # (B,) int64, the ring of each window
    starts: np.ndarray  # (B,) int64, absolute number of the row at t = 0


class _ObsSpec(NamedTuple):
    """Shape of one observation in the buffer, shape of one as the environment gives it, and type in the buffer."""

    stored_shape: tuple[int, ...]
    space_shape: tuple[int, ...]
    dtype: np.dtype


class _Latents(NamedTuple):
    """What ``stage()`` hands to the next ``add()``."""

    is_first: np.ndarray  # (E,) bool
    deter: np.ndarray  # (E, D)
    stoch: np.ndarray  # (E, K) in the type of the buffer


class SequenceReplayBuffer(ReplayBuffer):
    """
    Replay buffer of DreamerV3. Every environment has a ring of ``capacity = max(buffer_size // n_envs, 1)`` rows,
    and row number n of an environment (counted from 0, never reset by wrapping) lies at index ``n % capacity``.

    A row is one observation with the action taken after it, the reward received on arriving at it, its place in the
    episode (first, last, terminal) and the recurrent state of the agent after it. The last observation of an episode
    has a row of its own, with a zero action. Each observation is therefore stored once.

    The arrays ``observations`` (a dict of arrays for Dict spaces), ``actions``, ``rewards``, ``dones`` (1 on the last
    row of an episode), ``timeouts`` (1 if that row is not terminal), ``is_first``, ``deter`` and ``stoch`` have SB3's
    layout (rows, E, ...). They are allocated on first use and grow with what is stored, up to the capacity, so that a
    model which is loaded only to be evaluated does not take the memory.

    :param buffer_size: Max number of rows, over all environments
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device of the samples
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: Must be False: there is no second copy of the observations to save
    :param handle_timeout_termination: Treat episodes that end by a time limit as not terminal
    :param batch_length: Number of trained steps T in a window; one more row before them gives the initial state
    :param deter: Size D of the deterministic state
    :param stoch: Number of categoricals K of the stochastic state
    :param classes: Number of classes C of each categorical
    :param seed: Seed of the sampling. If None, it is drawn from NumPy's global generator, which SB3 seeds,
        so that the seed of the model is enough to repeat a run.
    :raises ValueError: If ``optimize_memory_usage`` is True or ``batch_length`` is smaller than 1
    """

    observations: np.ndarray | dict[str, np.ndarray]  # type: ignore[assignment]
    is_first: np.ndarray
    deter: np.ndarray
    stoch: np.ndarray
    rows_added: np.ndarray

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
    ):
        # Not ReplayBuffer's constructor: it would allocate observations and next observations at once
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if optimize_memory_usage:
            raise ValueError(
                "optimize_memory_usage=True is not needed by SequenceReplayBuffer, "
                "which stores each observation once already; allowed: False"
            )
        if batch_length < 1:
            raise ValueError(f"batch_length must be at least 1, got {batch_length}")
        self.buffer_size = max(buffer_size // n_envs, 1)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.batch_length = batch_length
        self.deter_size = deter
        self.stoch_size = stoch
        # The smallest type with a value to spare: its largest one marks rows without a latent
        self.stoch_dtype = np.min_scalar_type(classes + 1)
        self.no_latent = int(np.iinfo(self.stoch_dtype).max)
        self.rng = np.random.default_rng(np.random.randint(2**31 - 1) if seed is None else seed)

        obs_spaces = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {_ONLY_KEY: observation_space}
        self._obs_specs = {key: self._obs_spec(space, _entries(self.obs_shape)[key]) for key, space in obs_spaces.items()}
        # Scaled actions are fractions whatever the type of the space
        self._action_dtype = np.dtype(np.float32 if isinstance(action_space, spaces.Box) else action_space.dtype)
        self._envs = np.arange(n_envs)
        self.reset()

    def _obs_spec(self, space: spaces.Space, stored_shape: tuple[int, ...]) -> _ObsSpec:
        # float64 is stored as float32: the nets compute in float32 anyway, and it is half the memory
        dtype = np.dtype(self._maybe_cast_dtype(space.dtype))
        if isinstance(space, spaces.MultiDiscrete):
            stored_shape = space.shape  # SB3 counts the first dimension only
        return _ObsSpec(stored_shape, space.shape or (), dtype)

    def reset(self) -> None:
        """
        Forget all rows, unfinished transitions and queued windows, and free the arrays.
        """
        super().reset()
        for name in _ARRAYS:
            self.__dict__.pop(name, None)
        self.rows_added = np.zeros(self.n_envs, dtype=np.int64)
        # Windows not yet served: (environment, absolute number of the first trained row), oldest first
        self._queue: deque[tuple[int, int]] = deque()
        self._staged: _Latents | None = None
        # The newest transition of each environment waits here: its next observation becomes a row
        # when the following action is known, or when it turns out that the episode was cut
        self._pending = np.zeros(self.n_envs, dtype=bool)
        self._pending_rewards = np.zeros(self.n_envs, dtype=np.float32)
        self._pending_obs = {
            key: np.zeros((self.n_envs, *spec.stored_shape), dtype=spec.dtype) for key, spec in self._obs_specs.items()
        }

    def _like_space(self, entries: dict[str, Any]) -> Any:
        """Return entries of observations as a dict if the space is one, else the only entry."""
        return entries if isinstance(self.observation_space, spaces.Dict) else entries[_ONLY_KEY]

    # ------------------------------------------------------------------ memory

    def __getattr__(self, name: str) -> Any:
        # Called only for attributes that do not exist (yet)
        if name in _ARRAYS:
            self._allocate()
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _row_layout(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of one row of every array but the observations."""
        return {
            "actions": ((self.action_dim,), self._action_dtype),
            "rewards": ((), np.dtype(np.float32)),
            "dones": ((), np.dtype(np.float32)),
            "timeouts": ((), np.dtype(np.float32)),
            "is_first": ((), np.dtype(bool)),
            "deter": ((self.deter_size,), np.dtype(np.float32)),
            "stoch": ((self.stoch_size,), self.stoch_dtype),
        }

    def _allocate(self) -> None:
        """Allocate the first rows of all arrays, after a warning if the full capacity seems too large for this machine."""
        layout = self._row_layout()
        obs_layout = {key: (spec.stored_shape, spec.dtype) for key, spec in self._obs_specs.items()}
        row_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in [*layout.values(), *obs_layout.values()])
        self._warn_if_too_large(self.buffer_size * self.n_envs * row_bytes)
        rows = (min(FIRST_ROWS, self.buffer_size), self.n_envs)
        observations = {key: np.zeros((*rows, *shape), dtype=dtype) for key, (shape, dtype) in obs_layout.items()}
        self.observations = self._like_space(observations)
        self.__dict__.update({name: np.zeros((*rows, *shape), dtype=dtype) for name, (shape, dtype) in layout.items()})

    def _make_room(self, rows: int) -> None:
        """
        Lengthen the arrays, at least twofold, so that every ring can hold some rows.

        :param rows: Rows needed in the longest ring; beyond the capacity they overwrite the oldest ones
        :raises MemoryError: If the memory is full; the rows stored so far are kept
        """
        allocated = len(self.rewards)
        if min(rows, self.buffer_size) <= allocated:
            return
        wanted = min(max(rows, 2 * allocated), self.buffer_size)
        try:
            longer = {name: _map_entries(lambda array: _lengthened(array, wanted), getattr(self, name)) for name in _ARRAYS}
        except MemoryError as error:
            raise MemoryError(
                f"The replay buffer holds {allocated * self.n_envs:,} of {self.buffer_size * self.n_envs:,} rows, and there "
                "is no memory for more; use a smaller buffer_size"
            ) from error
        self.__dict__.update(longer)

    @staticmethod
    def _warn_if_too_large(needed: int) -> None:
        if psutil is None:
            return
        available = psutil.virtual_memory().available
        if needed > available:
            warnings.warn(
                "This system does not seem to have enough memory to store the complete replay buffer "
                f"{needed / 1e9:.2f}GB > {available / 1e9:.2f}GB",
                stacklevel=4,
            )

    def __getstate__(self) -> dict[str, Any]:
        """
        :return: The state to pickle: of the arrays, only what has been filled
        """
        state = self.__dict__.copy()
        filled = self.size()
        for name in _ARRAYS:
            array = state.pop(name, None)
            if filled > 0:
                state[name] = _map_entries(lambda rows: rows[:filled], array)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """
        :param state: What ``__getstate__`` returned; the arrays grow again when rows are added
        """
        self.__dict__.update(state)

    # ------------------------------------------------------------------ writing

    def stage(self, is_first: np.ndarray, deter: np.ndarray | th.Tensor, stoch: np.ndarray | th.Tensor) -> None:
        """
        Give what the agent knows about the observations of the next ``add()`` (and only of that one).

        :param is_first: Whether the observation starts an episode, (E,). This is how the buffer learns
            of an episode that was cut without ``done``.
        :param deter: Deterministic state after the observation, (E, D)
        :param stoch: Class indices of the stochastic state after the observation, (E, K); -1 where there is none
        :raises ValueError: If a shape is wrong
        """
        self._staged = _Latents(
            is_first=np.array(_shaped("is_first", is_first, (self.n_envs,)), dtype=bool),
            deter=np.array(_shaped("deter", _to_numpy(deter), (self.n_envs, self.deter_size)), dtype=np.float32),
            stoch=_shaped("stoch", _to_numpy(stoch), (self.n_envs, self.stoch_size)).astype(self.stoch_dtype),
        )

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        next_obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Add one transition of every environment. The arguments are copied, and never changed.

        :param obs: Observations acted on, (E, ...)
        :param next_obs: Observations after that, (E, ...): the last ones of the episode where ``done``
        :param action: Actions in the form that SB3 stores (scaled for Box spaces), (E, action_dim)
        :param reward: Rewards of the transitions, (E,)
        :param done: Whether the episodes ended, (E,)
        :param infos: Infos of the environments, of which ``TimeLimit.truncated`` is used
        :raises ValueError: If a shape is wrong; nothing is written then
        :raises MemoryError: If there is no room for more rows; nothing is written then
        """
        obs = self._shaped_obs("obs", obs)
        next_obs = self._shaped_obs("next_obs", next_obs)
        action_shape = (self.n_envs, *(self.action_space.shape or ()))
        action = _shaped("action", action, (self.n_envs, self.action_dim), action_shape)
        reward = _shaped("reward", reward, (self.n_envs,))
        done = _shaped("done", done, (self.n_envs,)).astype(bool)
        if len(infos) != self.n_envs:
            raise ValueError(f"infos: expected one per environment ({self.n_envs}), received {len(infos)}")

        # At most three rows come: one that closes a cut episode, the transition's own, one that ends its episode
        self._make_room(int(self.rows_added.max()) + 3)
        # Whatever was staged, a row that continues nothing is a first one
        is_first = ~self._pending if self._staged is None else self._staged.is_first | ~self._pending
        cut = is_first & self._pending
        if cut.any():
            self._append_last(np.flatnonzero(cut), self._pending_obs, self._pending_rewards, np.ones(self.n_envs))

        arrival_reward = np.where(is_first, 0, self._pending_rewards)
        self._append(self._envs, obs, action, arrival_reward, is_first=is_first, latents=self._staged)
        if done.any():
            truncated = [self._is_timeout(ended, info) for ended, info in zip(done, infos, strict=True)]
            self._append_last(np.flatnonzero(done), next_obs, reward, np.array(truncated))

        self._staged = None
        self._pending = ~done
        self._pending_rewards[:] = reward
        for key, array in self._pending_obs.items():
            array[:] = next_obs[key]
        fullest = int(self.rows_added.max())
        self.pos, self.full = fullest % self.buffer_size, fullest >= self.buffer_size

    def _is_timeout(self, done: bool, info: dict[str, Any]) -> bool:
        return bool(done) and self.handle_timeout_termination and bool(info.get("TimeLimit.truncated", False))

    def _shaped_obs(self, name: str, obs: np.ndarray | dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Check an observation and return its entries as (E, *stored_shape), in a dict of our own."""
        entries = _entries(obs)
        shaped = {}
        for key, spec in self._obs_specs.items():
            label = name if key == _ONLY_KEY else f"{name}[{key!r}]"
            expected = (self.n_envs, *spec.stored_shape)
            if key not in entries:
                raise ValueError(f"{label}: expected shape {expected}, received no such key, only {sorted(entries)}")
            # Discrete observations come without the axis of size 1 that they are stored with
            shaped[key] = _shaped(label, entries[key], expected, (self.n_envs, *spec.space_shape))
        return shaped

    def _append_last(self, envs: np.ndarray, obs: dict[str, np.ndarray], rewards: np.ndarray, timeouts: np.ndarray) -> None:
        """
        Append the row that ends an episode. No action follows it, and the agent never saw it: no latents either.

        :param envs: The environments concerned
        :param obs: Last observations, (E, ...)
        :param rewards: Rewards received on arriving there, (E,)
        :param timeouts: Whether the row is not terminal, (E,)
        """
        obs = {key: array[envs] for key, array in obs.items()}
        self._append(envs, obs, 0, rewards[envs], is_last=True, timeouts=timeouts[envs])

    def _append(
        self,
        envs: np.ndarray,
        obs: dict[str, np.ndarray],
        actions: np.ndarray | int,
        rewards: np.ndarray,
        is_first: np.ndarray | bool = False,
        is_last: bool = False,
        timeouts: np.ndarray | int = 0,
        latents: _Latents | None = None,
    ) -> None:
        """Write one row at the head of each of the given rings; the arguments hold one entry per ring given."""
        at = (self.rows_added[envs] % self.buffer_size, envs)
        for key, array in _entries(self.observations).items():
            array[at] = obs[key]
        self.actions[at] = actions
        self.rewards[at] = rewards
        self.dones[at] = is_last
        self.timeouts[at] = timeouts
        self.is_first[at] = is_first
        if latents is None:
            self.stoch[at] = self.no_latent
        else:
            self.deter[at] = latents.deter
            self.stoch[at] = latents.stoch
        self.rows_added[envs] += 1
        self._queue_finished(envs)

    def _queue_finished(self, envs: np.ndarray) -> None:
        """Queue the newest window of each ring in which a whole number of windows has been written."""
        window = self.batch_length + 1
        if window > self.buffer_size:
            return
        for env in envs[self.rows_added[envs] % window == 0]:
            self._queue.append((int(env), int(self.rows_added[env]) - self.batch_length))
            # Nothing may be sampled for long: do not let windows that are gone pile up
            while not self._is_stored(*self._queue[0]):
                self._queue.popleft()

    def update_latents(
        self,
        envs: np.ndarray,
        starts: np.ndarray,
        deter: np.ndarray | th.Tensor,
        stoch: np.ndarray | th.Tensor,
    ) -> None:
        """
        Replace the stored latents of trained rows by newer ones. Rows that have been overwritten since they were
        sampled are left alone; of two windows with the same row, the later one in the batch counts.

        :param envs: Environments of the windows, (B,), as sampled
        :param starts: First trained rows of the windows, (B,), as sampled
        :param deter: Deterministic states, (B, T, D)
        :param stoch: Class indices of the stochastic states, (B, T, K)
        :raises ValueError: If the shapes do not belong together
        """
        deter, stoch = _to_numpy(deter), _to_numpy(stoch)
        steps = deter.shape[1] if deter.ndim > 1 else 0
        _shaped("deter", deter, (len(starts), steps, self.deter_size))
        _shaped("stoch", stoch, (len(starts), steps, self.stoch_size))
        rows = starts[:, None] + np.arange(steps)  # (B, T)
        head = self.rows_added[envs][:, None]  # (B, 1)
        # The second condition only matters if the buffer was emptied in between
        kept = (rows >= head - self.buffer_size) & (rows < head)
        at = (rows[kept] % self.buffer_size, np.broadcast_to(envs[:, None], rows.shape)[kept])
        self.deter[at] = deter[kept]
        self.stoch[at] = stoch[kept].astype(self.stoch_dtype)

    # ------------------------------------------------------------------ sampling

    def has_window(self) -> bool:
        """
        :return: Whether a full window (batch_length rows and the one before them) is stored
        """
        return bool(self.stored_rows().max() > self.batch_length)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SequenceSamples:  # type: ignore[override]
        """
        Sample windows of consecutive rows: first those that have been finished since the last call and were never
        served, then uniformly among all that are stored. As long as no full window is stored, shorter ones are given.

        :param batch_size: Number of windows B
        :param env: VecNormalize to normalize observations and rewards with
        :return: The windows
        :raises ValueError: If the buffer is empty
        """
        return self._draw(self._pop_queue(batch_size), batch_size, self.rng, env)

    def peek(self, batch_size: int, rng: np.random.Generator, env: VecNormalize | None = None) -> SequenceSamples:
        """
        Sample windows uniformly and change nothing: neither the buffer's random numbers nor which windows count as new.

        :param batch_size: Number of windows B
        :param rng: Draws them
        :param env: VecNormalize to normalize observations and rewards with
        :return: The windows
        :raises ValueError: If the buffer is empty
        """
        return self._draw([], batch_size, rng, env)

    def _draw(
        self, fresh: list[tuple[int, int]], batch_size: int, rng: np.random.Generator, env: VecNormalize | None
    ) -> SequenceSamples:
        """Read the given windows, and as many uniformly drawn ones as make the batch full."""
        if self.size() == 0:
            raise ValueError("Cannot sample from an empty buffer: no transition has been added")
        steps, counts, oldest, has_context = self._windows()
        # Window i of all rings in a line belongs to the ring before whose end it lies
        ends = np.cumsum(counts)
        drawn = rng.integers(ends[-1], size=batch_size - len(fresh))
        envs = np.searchsorted(ends, drawn, side="right")
        starts = oldest[envs] + drawn - (ends - counts)[envs]
        envs = np.array([window[0] for window in fresh] + envs.tolist(), dtype=np.int64)
        starts = np.array([window[1] for window in fresh] + starts.tolist(), dtype=np.int64)
        return self._get_samples(envs, starts, steps, has_context, env)

    def stored_rows(self) -> np.ndarray:
        """Number of rows that each ring holds, (E,)."""
        return np.minimum(self.rows_added, self.buffer_size)

    def _windows(self) -> tuple[int, np.ndarray, np.ndarray, bool]:
        """
        List the windows that can be drawn.

        :return: Their number of steps, how many each ring has (E,), the first trained row of the oldest
            one of each ring (E,), and whether a row comes before it (else the window starts from nothing)
        """
        stored = self.stored_rows()
        oldest = self.rows_added - stored
        most = int(stored.max())
        if most > self.batch_length:
            return self.batch_length, np.maximum(stored - self.batch_length, 0), oldest + 1, True
        # Too short for a full window: the whole content of the rings that hold most, one window in each
        counts = (stored == most).astype(np.int64)
        wrapped = bool((self.rows_added > self.buffer_size).any())
        if wrapped and most > 1:
            # The oldest row has lost its predecessor, so it can only serve as context
            return most - 1, counts, oldest + 1, True
        return most, counts, oldest, False

    def _is_stored(self, env: int, start: int) -> bool:
        """Whether a window and its context have not been overwritten, even partly."""
        return bool(start - 1 >= self.rows_added[env] - self.buffer_size)

    def _pop_queue(self, most: int) -> list[tuple[int, int]]:
        """Take the oldest windows that were never served, at most the given number, from the queue."""
        windows: list[tuple[int, int]] = []
        while self._queue and len(windows) < most:
            window = self._queue.popleft()
            if self._is_stored(*window):
                windows.append(window)
        return windows

    def _get_samples(  # type: ignore[override]
        self, envs: np.ndarray, starts: np.ndarray, steps: int, has_context: bool, env: VecNormalize | None = None
    ) -> SequenceSamples:
        """
        Read windows.

        :param envs: Their environments, (B,)
        :param starts: Their first trained rows, (B,)
        :param steps: Number of trained steps T
        :param has_context: Whether the row before the first trained one is stored
        :param env: VecNormalize to normalize observations and rewards with
        :return: The windows
        """
        numbers = starts[:, None] + np.arange(-1, steps)  # (B, 1 + T), the context row first
        indices = np.maximum(numbers, 0) % self.buffer_size  # row 0 stands in for the missing one before it
        before, at = (indices[:, :-1], envs[:, None]), (indices[:, 1:], envs[:, None])
        observations = {key: array[at] for key, array in _entries(self.observations).items()}
        prev_actions = self.actions[before]  # (B, T, action_dim)
        is_first = self.is_first[at]
        is_last = self.dones[at] > 0
        deter, stoch = self._context(indices[:, 0], envs)
        if not has_context:
            prev_actions[:, 0], is_first[:, 0] = 0, True
            deter[:], stoch[:] = 0, -1

        return SequenceSamples(
            observations=self._obs_to_torch(observations, env),
            prev_actions=self.to_torch(prev_actions, copy=False),
            rewards=self.to_torch(self._normalize_reward(self.rewards[at], env), copy=False),
            is_first=self.to_torch(is_first, copy=False),
            is_last=self.to_torch(is_last, copy=False),
            is_terminal=self.to_torch(is_last & (self.timeouts[at] == 0), copy=False),
            deter=self.to_torch(deter, copy=False),
            stoch=self.to_torch(stoch, copy=False),
            envs=envs,
            starts=starts,
        )

    def to_torch(self, array: np.ndarray, copy: bool = True) -> th.Tensor:
        """
        Convert an array to a tensor on the device. A GPU fetches it from pinned memory while the host goes on.

        :param array: The array
        :param copy: On the CPU, whether the tensor has memory of its own
        :return: The tensor
        """
        if self.device.type == "cuda":
            return th.from_numpy(np.ascontiguousarray(array)).pin_memory().to(self.device, non_blocking=True)
        return super().to_torch(array, copy)

    def _context(self, indices: np.ndarray, envs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read the latents of one row per window: (B, D) and (B, K)."""
        deter, stoch = self.deter[indices, envs], self.stoch[indices, envs].astype(np.int64)
        missing = stoch == self.no_latent
        stoch[missing] = -1
        deter[missing.any(axis=1)] = 0
        return deter, stoch

    def _obs_to_torch(self, observations: dict[str, np.ndarray], env: VecNormalize | None) -> th.Tensor | dict[str, th.Tensor]:
        """Normalize the observations, (B, T, ...), and return them in the form of the space."""
        # VecNormalize wants a dict exactly if the space is one
        normalized = self._normalize_obs(self._like_space(observations), env)
        return _map_entries(lambda array: self.to_torch(array, copy=False), normalized)


def _entries(value: Any) -> dict[str, Any]:
    """Return a dict as it is, and anything else as a dict with one entry, so that both need only one code path."""
    return value if isinstance(value, dict) else {_ONLY_KEY: value}


def _map_entries(function: Callable[[np.ndarray], Any], value: Any) -> Any:
    """Apply a function to an array, or to each array of a dict."""
    return {key: function(array) for key, array in value.items()} if isinstance(value, dict) else function(value)


def _lengthened(array: np.ndarray, rows: int) -> np.ndarray:
    """Put an array (filled, E, ...) at the beginning of a new one (rows, E, ...)."""
    longer = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


def _to_numpy(value: np.ndarray | th.Tensor) -> np.ndarray:
    """Return a tensor or an array as an array; NumPy has no bfloat16, so floating tensors become float32."""
    if isinstance(value, th.Tensor):
        value = value.detach().float() if value.is_floating_point() else value.detach()
        return value.cpu().numpy()
    return np.asarray(value)


def _shaped(name: str, value: Any, expected: tuple[int, ...], also: tuple[int, ...] | None = None) -> np.ndarray:
    """
    Check a shape.

    :param name: What to call the value in the error
    :param value: The value
    :param expected: The shape to return
    :param also: Another shape that is accepted, and reshaped
    :return: The value as an array of the expected shape, not copied
    :raises ValueError: If the value has neither shape
    """
    array = np.asarray(value)
    if array.shape != expected and array.shape != also:
        raise ValueError(f"{name}: expected shape {expected}, received {array.shape}")
    return array.reshape(expected)
