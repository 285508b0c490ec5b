"""Memory of the replay buffer: one ring of rows per environment.

Rows are named by their numbers, counted from 0 in each environment and never reset by wrapping; where a row lies is known here
only.

Letters: E environments.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_dreamer_gpld.transfer import to_host

try:
    # Only needed to warn before the memory runs out
    import psutil  # type: ignore[import-untyped]
except ImportError:
    psutil = None

# What rows are read as: arrays from the host's memory, tensors from the device's
Entries = np.ndarray | th.Tensor

# Rows of each ring that are allocated at first; the arrays double when they are full
FIRST_ROWS = 1024


class Column(NamedTuple):
    """One array of the memory.

    :param shape: of one row's entry
    :param given_shape: of the entry as the environment gives it
    :param dtype: of the array
    """

    shape: tuple[int, ...]
    given_shape: tuple[int, ...]
    dtype: np.dtype


class RowFormat(NamedTuple):
    """What a row holds.

    :param observations: by key
    :param action: in the form that SB3 stores
    :param deter: numbers in the deterministic state, D
    :param stoch: categoricals of the stochastic state, K
    :param stoch_dtype: unsigned type of their class indices
    """

    observations: dict[str, Column]
    action: Column
    deter: int
    stoch: int
    stoch_dtype: np.dtype

    @property
    def no_latent(self) -> int:
        """:return: the class index that marks a row without a latent"""
        return int(np.iinfo(self.stoch_dtype).max)

    def columns(self) -> dict[str, Column]:
        """:return: all but the observations"""
        scalar = Column((), (), np.dtype(np.float32))
        return {
            "actions": self.action,
            "rewards": scalar,
            "dones": scalar,
            "timeouts": scalar,
            "is_first": scalar._replace(dtype=np.dtype(bool)),
            "deter": Column((self.deter,), (self.deter,), np.dtype(np.float32)),
            "stoch": Column((self.stoch,), (self.stoch,), self.stoch_dtype),
        }


class Rows:
    """A ring of ``capacity`` rows per environment in the host's memory; row ``n`` lies at index ``n % capacity``.

    The arrays are allocated on first use and grow with what is stored, up to the capacity, so that a model which is loaded
    only to be evaluated does not take the memory. A pickle holds what is filled.

    :param capacity: of each ring
    :param n_envs: number of rings, E
    :param format: what a row holds
    """

    def __init__(self, capacity: int, n_envs: int, format: RowFormat) -> None:
        self.capacity, self.n_envs, self.format = capacity, n_envs, format
        self.reset()

    def reset(self) -> None:
        """Forget all rows and free the arrays."""
        self.added = np.zeros(self.n_envs, dtype=np.int64)  # (E,) rows ever added to each ring
        self._observations: dict[str, np.ndarray] | None = None
        self._arrays: dict[str, np.ndarray] | None = None

    # ------------------------------------------------------------------ memory

    @property
    def allocated(self) -> bool:
        """:return: whether the arrays take memory"""
        return self._arrays is not None

    @property
    def observations(self) -> dict[str, np.ndarray]:
        """:return: by key, (rows, E, *shape)"""
        return self._memory()[0]

    def array(self, name: str) -> np.ndarray:
        """:return: any but the observations, (rows, E, *shape)

        :param name: as in :meth:`RowFormat.columns`
        """
        return self._memory()[1][name]

    def _memory(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """:return: observations by key, and all other arrays by name, allocated on first use"""
        self._allocate()
        assert self._observations is not None and self._arrays is not None
        return self._observations, self._arrays

    def _allocate(self) -> None:
        """Allocate the first rows of all arrays, after a warning if the full capacity seems too large for this machine."""
        if self.allocated:
            return
        columns = self.format.columns()
        every = [*columns.values(), *self.format.observations.values()]
        warn_if_too_large(self.capacity * self.n_envs * sum(math.prod(c.shape) * c.dtype.itemsize for c in every))
        rows = (min(FIRST_ROWS, self.capacity), self.n_envs)
        self._observations = {key: np.zeros((*rows, *c.shape), dtype=c.dtype) for key, c in self.format.observations.items()}
        self._arrays = {name: np.zeros((*rows, *c.shape), dtype=c.dtype) for name, c in columns.items()}

    def make_room(self, more: int) -> None:
        """Lengthen the arrays, at least twofold, so that every ring can take some more rows.

        :param more: rows to come in each ring; beyond the capacity they overwrite the oldest ones
        :raises MemoryError: the memory is full; the rows stored so far are kept
        """
        observations, arrays = self._memory()
        # After one that failed, the arrays are of different lengths
        allocated, rows = min(map(len, [*observations.values(), *arrays.values()])), int(self.added.max()) + more
        if min(rows, self.capacity) <= allocated:
            return
        wanted = min(max(rows, 2 * allocated), self.capacity)
        try:
            for group in (observations, arrays):
                for name in group:  # one at a time, so that only one is there twice
                    group[name] = _lengthened(group[name], wanted)
        except MemoryError as error:
            raise MemoryError(
                f"The replay buffer holds {allocated * self.n_envs:,} of {self.capacity * self.n_envs:,} rows, and there "
                "is no memory for more; use a smaller buffer_size"
            ) from error

    def filled(self) -> tuple[dict[str, np.ndarray] | None, dict[str, np.ndarray] | None]:
        """:return: observations by key, and all other arrays by name, (rows, E, *shape), as far as filled; None: nothing is"""
        rows = int(self.stored().max())
        if self._observations is None or self._arrays is None or not rows:
            return None, None
        observations = {key: array[:rows] for key, array in self._observations.items()}
        return observations, {name: array[:rows] for name, array in self._arrays.items()}

    def __getstate__(self) -> dict[str, Any]:
        """:return: what to pickle or copy; of the arrays, what has been filled"""
        observations, arrays = self.filled()
        return {**self.__dict__, "_observations": observations, "_arrays": arrays}

    def restore(
        self, added: np.ndarray, observations: dict[str, np.ndarray] | None, arrays: dict[str, np.ndarray] | None
    ) -> None:
        """Take over rows that were saved; the arrays grow again when rows are added.

        :param added: rows ever added to each ring, (E,)
        :param observations: by key, (rows, E, *shape), as far as filled; None: none
        :param arrays: likewise, all but the observations
        """
        self.added, self._observations, self._arrays = added, observations, arrays

    # ------------------------------------------------------------------ rows

    def stored(self) -> np.ndarray:
        """:return: rows that each ring holds, (E,)"""
        return np.minimum(self.added, self.capacity)

    def holds(self, envs: np.ndarray | int, numbers: np.ndarray | int) -> np.ndarray:
        """:return: whether rows are stored, neither overwritten nor yet to come; bool, of the shape of both together

        :param envs: their environments
        :param numbers: their numbers
        """
        added = self.added[envs]
        return (numbers >= added - self.capacity) & (numbers < added)

    def append(self, envs: np.ndarray, observations: dict[str, np.ndarray], **values: Any) -> None:
        """Write one row at the head of some rings; :meth:`make_room` comes before it.

        :param envs: the rings, (number of rows,)
        :param observations: of the rows, by key, (number of rows, *shape)
        :param values: entries for other arrays by name, likewise; an array that is not named keeps what it held
        """
        at, (ours, arrays) = (self.added[envs] % self.capacity, envs), self._memory()
        for key, array in ours.items():
            array[at] = observations[key]
        for name, value in values.items():
            arrays[name][at] = value
        self.added[envs] += 1

    def replace(self, envs: np.ndarray, numbers: np.ndarray, **values: Entries) -> None:
        """Write new entries into rows; those that are not stored are left out. Of two for the same row, the later one counts.

        :param envs: environments of the rows, of the shape of ``numbers``
        :param numbers: of the rows
        :param values: entries by the array's name, (*shape of ``numbers``, *shape of an entry)
        """
        held = self.holds(envs, numbers)
        at = (numbers[held] % self.capacity, envs[held])
        for name, value in values.items():
            self.array(name)[at] = to_numpy(value)[held]

    def locate(self, envs: np.ndarray, numbers: np.ndarray) -> Entries:
        """Where rows lie, to read them; parts of it say it of parts of the rows.

        :param envs: environments of the rows
        :param numbers: of the rows
        :return: int64, of the shape of both together
        """
        return numbers % self.capacity * self.n_envs + envs

    def read(self, name: str, at: Any) -> Entries:
        """:return: copy of some rows of an array, (*shape of ``at``, *shape of an entry)

        :param name: of the array
        :param at: where they lie, as :meth:`locate` says it
        """
        return _flat(self.array(name))[at]

    def read_stoch(self, at: Any) -> Entries:
        """:return: copy of "stoch" of some rows, int64; see :meth:`read`"""
        return _flat(self.array("stoch"))[at].astype(np.int64)

    def read_observations(self, at: Any) -> dict[str, Any]:
        """:return: copies of the observations of some rows, by key; see :meth:`read`"""
        return {key: _flat(array)[at] for key, array in self.observations.items()}


def to_numpy(value: Entries) -> np.ndarray:
    """:return: a tensor or an array as an array; floating tensors become float32"""
    return to_host(value).wait()[0] if isinstance(value, th.Tensor) else np.asarray(value)


def _flat(array: np.ndarray) -> np.ndarray:
    """View (rows, E, *shape) as (rows · E, *shape)."""
    return array.reshape(math.prod(array.shape[:2]), *array.shape[2:])


def _lengthened(array: np.ndarray, rows: int) -> np.ndarray:
    """Put an array (filled, E, ...) at the beginning of a new one (rows, E, ...), if it is shorter than that."""
    if len(array) >= rows:
        return array
    longer = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


def warn_if_too_large(needed: int) -> None:
    if psutil is None:
        return
    available = psutil.virtual_memory().available
    if needed > available:
        warnings.warn(
            "This system does not seem to have enough memory to store the complete replay buffer "
            f"{needed / 1e9:.2f}GB > {available / 1e9:.2f}GB",
            stacklevel=4,
        )
