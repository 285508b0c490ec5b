"""Memory of the replay buffer on the device: batches are read from it, and latents written into it, without the host.

Which rows there are, and which of them a batch consists of, is known on the host all the same.

Letters: E environments.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch import Tensor

from sb3_dreamer_gpld.observations import called
from sb3_dreamer_gpld.replay.rows import Column, Entries, RowFormat, Rows, warn_if_too_large
from sb3_dreamer_gpld.transfer import dtype_of, fetched, to_device, together_to_device

# Types whose entries PyTorch can pick by their indices everywhere
ALLOWED = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
# In place of the others, for class indices
WIDER = {"uint16": "int32", "uint32": "int64"}
LOADED_AT_ONCE = 2**26  # bytes of saved rows that go to the device in one copy


class _Memory(NamedTuple):
    """Tensors on the device, (capacity · E, *shape); row n of environment e lies at ``n % capacity * E + e``.

    :param observations: by key
    :param arrays: all others by name
    """

    observations: dict[str, Tensor]
    arrays: dict[str, Tensor]


class DeviceRows(Rows):
    """:class:`Rows` on a device. All memory is allocated on first use, for the full capacity; a pickle holds host arrays of
    what is filled, which go to the device when they are used.

    :param capacity: of each ring
    :param n_envs: number of rings, E
    :param format: what a row holds
    :param device: where it lies
    :raises ValueError: PyTorch cannot index a type of observations or actions
    """

    def __init__(self, capacity: int, n_envs: int, format: RowFormat, device: th.device | str) -> None:
        _check_types(format)
        self._device = th.device(device)
        super().__init__(capacity, n_envs, format)

    def reset(self) -> None:
        """Forget all rows and free the memory."""
        super().reset()  # what it has on the host are saved rows, until they are used
        self._on_device: _Memory | None = None

    # ------------------------------------------------------------------ memory

    @property
    def device(self) -> th.device:
        """:return: where the rows lie; if it is changed, they go there when they are used next"""
        return self._device

    @device.setter
    def device(self, device: th.device | str) -> None:
        device = th.device(device)
        if device != self._device:
            self._observations, self._arrays = self.filled()
            self._on_device, self._device = None, device

    @property
    def allocated(self) -> bool:
        """:return: whether they take memory of the device"""
        return self._on_device is not None

    @property
    def observations(self) -> dict[str, np.ndarray]:
        """:return: copies on the host by key, (rows, E, *shape), as far as filled"""
        columns = self.format.observations
        if self._on_device is None:
            return {key: self._saved(self._observations, key, column) for key, column in columns.items()}
        return {key: self._fetched(self._on_device.observations[key], column) for key, column in columns.items()}

    def array(self, name: str) -> np.ndarray:
        """:return: copy of any but the observations on the host, (rows, E, *shape), as far as filled

        :param name: as in :meth:`RowFormat.columns`
        """
        column = self.format.columns()[name]
        if self._on_device is None:
            return self._saved(self._arrays, name, column)
        return self._fetched(self._on_device.arrays[name], column)

    def _saved(self, arrays: dict[str, np.ndarray] | None, name: str, column: Column) -> np.ndarray:
        """A copy of saved rows that have not been used yet."""
        return np.zeros((0, self.n_envs, *column.shape), column.dtype) if arrays is None else arrays[name].copy()

    def _fetched(self, tensor: Tensor, column: Column) -> np.ndarray:
        """A copy of the filled part of a tensor, (rows, E, *shape)."""
        rows = int(self.stored().max())
        return fetched(tensor[: rows * self.n_envs]).astype(column.dtype, copy=False).reshape(rows, self.n_envs, *column.shape)

    def filled(self) -> tuple[dict[str, np.ndarray] | None, dict[str, np.ndarray] | None]:
        """:return: as in :class:`Rows`, copies"""
        if self._on_device is None:
            return super().filled()
        if not self.stored().any():
            return None, None
        return self.observations, {name: self.array(name) for name in self.format.columns()}

    def __getstate__(self) -> dict[str, Any]:
        """:return: what to pickle or copy, host arrays of what is filled"""
        return {**super().__getstate__(), "_on_device": None}

    def restore(
        self, added: np.ndarray, observations: dict[str, np.ndarray] | None, arrays: dict[str, np.ndarray] | None
    ) -> None:
        """Take over rows that were saved, which go to the device when they are used; see :meth:`Rows.restore`."""
        super().restore(added, observations, arrays)
        self._on_device = None

    def make_room(self, more: int) -> None:
        """Allocate all memory, if that has not been done.

        :param more: of no account, since there is room for the full capacity
        :raises MemoryError: the device has too little memory; the rows stored so far are kept
        """
        self._use()

    def _use(self) -> _Memory:
        """The memory, allocated on first use, with the saved rows in it.

        :raises MemoryError: the device has too little
        """
        if self._on_device is None:
            memory = self._new_memory()
            if self._observations is not None and self._arrays is not None:
                for key, array in self._observations.items():
                    self._load(array, memory.observations[key])
                for name, array in self._arrays.items():
                    self._load(array, memory.arrays[name])
            self._on_device, self._observations, self._arrays = memory, None, None
        return self._on_device

    def _new_memory(self) -> _Memory:
        """Memory for the full capacity, zeros."""
        rows, columns, observations = self.capacity * self.n_envs, self.format.columns(), self.format.observations
        every = [*columns.values(), *observations.values()]
        needed = rows * sum(math.prod(column.shape) * _stored_as(column).itemsize for column in every)
        free = free_bytes(self._device)
        if free is None:
            warn_if_too_large(needed)
        failed: BaseException | None = None
        if free is None or needed <= free:
            try:
                with th.inference_mode(False):  # the first row may be added in that mode, and others outside
                    return _Memory(
                        {key: _zeros((rows, *c.shape), _stored_as(c), self._device) for key, c in observations.items()},
                        {name: _zeros((rows, *c.shape), _stored_as(c), self._device) for name, c in columns.items()},
                    )
            except (MemoryError, th.cuda.OutOfMemoryError) as error:
                failed = error
        known = "" if free is None else f", of which {free:,} are free"
        raise MemoryError(
            f"The replay buffer of {rows:,} rows needs {needed:,} bytes on {str(self._device)!r}{known}; allowed: a smaller "
            "buffer_size, or replay_buffer_kwargs=dict(storage='host')"
        ) from failed

    def _load(self, array: np.ndarray, tensor: Tensor) -> None:
        """Copy saved rows (rows, E, *shape) to the beginning of a tensor, a part at a time."""
        entry = array.shape[2:]
        array = array.reshape(math.prod(array.shape[:2]), *entry)
        step = max(1, LOADED_AT_ONCE // max(1, math.prod(entry) * array.itemsize))
        for begin in range(0, len(array), step):
            part = array[begin : begin + step]
            tensor[begin : begin + len(part)].copy_(to_device(part.astype(_wider(part.dtype), copy=False), self._device))

    # ------------------------------------------------------------------ rows

    def append(self, envs: np.ndarray, observations: dict[str, np.ndarray], **values: Any) -> None:
        """Write one row at the head of some rings; see :meth:`Rows.append`. All that is written goes over in one copy."""
        memory, columns = self._use(), self.format.columns()
        written = [(memory.observations[key], observations[key], column) for key, column in self.format.observations.items()]
        written += [(memory.arrays[name], value, columns[name]) for name, value in values.items()]
        rows = [
            np.broadcast_to(np.asarray(value).astype(column.dtype).astype(_stored_as(column)), (len(envs), *column.shape))
            for _, value, column in written
        ]
        at, *entries = together_to_device([np.asarray(super().locate(envs, self.added[envs])), *rows], self._device)
        for (tensor, _, _), entry in zip(written, entries, strict=True):
            tensor.index_copy_(0, at, entry)
        self.added[envs] += 1

    def replace(self, envs: np.ndarray, numbers: np.ndarray, **values: Entries) -> None:
        """Write new entries into rows; see :meth:`Rows.replace`. Those on the device stay there; nothing waits for them."""
        places = np.asarray(super().locate(envs, numbers)).ravel()
        held = np.flatnonzero(self.holds(envs, numbers))
        # A GPU writes in any order, so only the last entry for a row is written
        unique, from_end = np.unique(places[held][::-1], return_index=True)
        last = held[::-1][from_end]
        if not len(last):
            return
        memory, columns = self._use(), self.format.columns()
        at, chosen = to_device(np.stack([unique, last]), self._device)  # (rows,), (rows,)
        for name, value in values.items():
            tensor, column = memory.arrays[name], columns[name]
            value = value.detach() if isinstance(value, Tensor) else np.asarray(value)
            entries = to_device(value, self._device).reshape(numbers.size, *column.shape).index_select(0, chosen)
            if column.dtype.kind == "u":
                entries = entries.long() & int(np.iinfo(column.dtype).max)  # as NumPy makes it unsigned: −1 is the largest
            tensor.index_copy_(0, at, entries.to(tensor.dtype))

    def locate(self, envs: np.ndarray, numbers: np.ndarray) -> Entries:
        """:return: where rows lie, on the device; see :meth:`Rows.locate`"""
        return to_device(np.asarray(super().locate(envs, numbers)), self._device)

    def read(self, name: str, at: Any) -> Entries:
        """:return: copy of some rows of an array, on the device; see :meth:`Rows.read`"""
        return self._use().arrays[name][at]

    def read_stoch(self, at: Any) -> Entries:
        """:return: copy of "stoch" of some rows, int64, on the device; see :meth:`Rows.read`"""
        return self._use().arrays["stoch"][at].long()

    def read_observations(self, at: Any) -> dict[str, Any]:
        """:return: copies of the observations of some rows on the device, by key; see :meth:`Rows.read`"""
        return {key: tensor[at] for key, tensor in self._use().observations.items()}


def _check_types(format: RowFormat) -> None:
    """:raises ValueError: PyTorch cannot index a type of observations or actions"""
    named = [(called("observation", key), column) for key, column in format.observations.items()]
    for name, column in [*named, ("the action", format.action)]:
        if column.dtype.name not in ALLOWED:
            raise ValueError(
                f"storage='device' cannot keep {name}, whose type is {column.dtype}; allowed: {', '.join(ALLOWED)}, or "
                "replay_buffer_kwargs=dict(storage='host')"
            )


def _wider(dtype: np.dtype) -> np.dtype:
    """:return: the type on the device: the same, or one that can hold its numbers"""
    return np.dtype(WIDER.get(dtype.name, dtype))


def _stored_as(column: Column) -> np.dtype:
    """:return: the type of a column on the device"""
    return _wider(column.dtype)


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: th.device) -> Tensor:
    if device.type == "cpu":
        return th.from_numpy(np.zeros(shape, dtype))  # takes memory when it is written
    return th.zeros(shape, dtype=dtype_of(dtype), device=device)


def free_bytes(device: th.device) -> int | None:
    """:return: memory that a device has left, with what PyTorch holds in reserve; None: it is no GPU"""
    if device.type != "cuda":
        return None
    reserve = th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
    return th.cuda.mem_get_info(device)[0] + reserve
