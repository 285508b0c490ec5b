"""Copies between the host and the device. No other file makes any while a run collects and learns.

On a GPU they go through pinned memory, on a stream of their own for those that come, so that neither side waits before a
value is looked at. On a processor there is nothing to copy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch as th
from torch import Tensor


class PendingArrays:
    """Values on their way to the host.

    :param tensors: in pinned memory, being filled, or those of the processor themselves
    :param done: when they are there; None: they are
    """

    def __init__(self, tensors: tuple[Tensor, ...], done: th.cuda.Event | None) -> None:
        self._tensors, self._done = tensors, done

    def wait(self) -> tuple[np.ndarray, ...]:
        """Wait for the values. On a processor they share the memory of the tensors."""
        if self._done is not None:
            self._done.synchronize()
        return tuple(tensor.numpy() for tensor in self._tensors)


def to_host(*tensors: Tensor) -> PendingArrays:
    """Begin to copy tensors, which may change afterwards; floating ones become float32, since NumPy has no bfloat16."""
    tensors = tuple(tensor.detach().float() if tensor.is_floating_point() else tensor.detach() for tensor in tensors)
    if not any(tensor.is_cuda for tensor in tensors):
        return PendingArrays(tuple(map(_copied_to_host, tensors)), None)
    copies = []
    for tensor in tensors:
        copy = th.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copies.append(copy.copy_(tensor, non_blocking=True))
    done = th.cuda.Event()
    done.record(th.cuda.current_stream(next(tensor.device for tensor in tensors if tensor.is_cuda)))
    return PendingArrays(tuple(copies), done)


def to_device(array: np.ndarray | Tensor, device: th.device | str) -> Tensor:
    """A tensor on the device; on a processor it shares the array's memory.

    :param array: any that PyTorch has a type for
    :param device: where the tensor is to be
    """
    device = th.device(device)
    tensor = array if isinstance(array, Tensor) else th.from_numpy(np.ascontiguousarray(array).reshape(np.shape(array)))
    if device.type != "cuda" or tensor.is_cuda:
        return _copied_to_device(tensor, device)
    pinned, stream = tensor.pin_memory(), _stream_to(th.cuda.current_device() if device.index is None else device.index)
    with th.cuda.stream(stream):
        moved = pinned.to(device, non_blocking=True)
    current = th.cuda.current_stream(device)
    current.wait_stream(stream)
    moved.record_stream(current)
    return moved


def together_to_device(arrays: Iterable[np.ndarray], device: th.device | str) -> list[Tensor]:
    """Tensors of several small arrays on the device, which all go there in one copy.

    :param arrays: any that PyTorch has types for; they may change afterwards
    :param device: where the tensors are to be
    :return: in the same order
    """
    arrays = list(arrays)
    packed, begins, end = np.empty(sum(array.nbytes for array in arrays), np.uint8), {}, 0
    # The widest types come first, so that each begins at a multiple of its width
    for i, array in sorted(enumerate(arrays), key=lambda entry: -entry[1].itemsize):
        begins[i], end = end, end + array.nbytes
        packed[begins[i] : end].view(array.dtype).reshape(array.shape)[...] = array
    moved = to_device(packed, device)
    return [
        moved[begins[i] : begins[i] + array.nbytes].view(dtype_of(array.dtype)).view(array.shape)
        for i, array in enumerate(arrays)
    ]


@functools.cache
def dtype_of(dtype: np.dtype) -> th.dtype:
    """:return: PyTorch's name of a NumPy type

    :raises TypeError: it has none
    """
    return th.from_numpy(np.empty(0, dtype)).dtype


def fetched(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor of any size, which is waited for. Unlike :func:`to_host` it takes no pinned memory."""
    copy = _copied_to_host(tensor.detach()).numpy()
    return copy if tensor.is_cuda else np.array(copy)  # of a tensor of the processor it is no copy yet


def _copied_to_host(tensor: Tensor) -> Tensor:
    return tensor.cpu()


def _copied_to_device(tensor: Tensor, device: th.device) -> Tensor:
    return tensor.to(device)


@functools.cache
def _stream_to(index: int) -> Any:
    """The stream of copies to a GPU."""
    return th.cuda.Stream(index)
