"""CUDA graphs as far as a processor can show them: a function's operations are noted once, and done again on the same memory.

As in a CUDA graph, numbers of Python and shapes are those of the recording for good, results lie where they lay, nothing can
be read on the way, and the recording itself changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose result, or its shape, depends on values: on a GPU they wait for all that was launched before.
READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal", "aten.is_nonzero")


def _tensors(tree: Any) -> list[th.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, th.Tensor)]


class Noting(TorchDispatchMode):
    """Notes operations while they are done, and the memory that was there before and is changed by them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, list[th.Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[th.UntypedStorage, th.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if str(func).startswith(READS):
            raise RuntimeError(f"{func} reads a value while it is recorded")
        if th.is_inference_mode_enabled():  # operations that consist of others come here whole then
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        for tensor in self._written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = storage, storage.clone()
        result = func(*args, **kwargs)
        made = _tensors(result)
        if not func.is_view:
            self._made |= {tensor.untyped_storage().data_ptr() for tensor in made} - set(self._before)
            self.operations.append((func, args, kwargs, [] if func._schema.is_mutable else made))
        return result

    @staticmethod
    def _written(func: Any, args: tuple, kwargs: dict) -> Iterator[th.Tensor]:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                yield from _tensors(value)

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    @th.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            results = _tensors(func(*args, **kwargs))
            for tensor, result in zip(made, results, strict=True) if made else ():
                tensor.copy_(result)


class Tape:
    """Takes the place of :class:`~sb3_dreamer_gpld.execution.CudaGraphs`; counts what is asked of it."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def warm_up(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, str]:
        return function(inputs), ""

    def record(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, Callable[[], object]]:
        random_state, noting = th.get_rng_state(), Noting()
        with noting:
            outputs = function(inputs)
        noting.undo()
        th.set_rng_state(random_state)
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            noting.replay()

        return outputs, replay
