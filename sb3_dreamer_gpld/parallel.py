"""Several processes that learn one agent together, with PyTorch's own means: ``torchrun --nproc-per-node 2 train.py``.

Every process collects with environments and a replay buffer of its own, and makes each update from its share of the batch.
What the processes exchange is averaged gradients, returns for the percentiles, and after each collection a few numbers to
agree on what comes next, so that all copies of the nets stay equal to the last bit.

Gradients are averaged by one all-reduce of all of them in a row. DistributedDataParallel does not fit here: it hooks into the
forward pass of one module, and an update is no such pass, but losses of several nets, run in steps that are compiled one by
one.
"""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch as th
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=2)  # with a process that does not answer: the first one may be evaluating
SETTLING_SECONDS = 0.3  # between the last exchange and the end
SEED_STRIDE = 7919  # between the seeds of two processes, whose environments count on from there


class Processes:
    """The processes that learn together, of which this is one. The methods must be called by all of them in the same order.

    :param rank: number of this process, from 0
    :param size: how many there are
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that logs, evaluates and saves."""
        return self.rank == 0

    def share(self, name: str, total: int) -> int:
        """What each process has of a number that means the whole run's.

        :param name: of the number, for the error
        :raises ValueError: it cannot be divided
        """
        if total % self.size:
            raise ValueError(
                f"{name}={total} cannot be divided among {self.size} processes; allowed: multiples of {self.size}"
            )
        return total // self.size

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, in one all-reduce; a number that is not finite spreads to all."""
        if self.size == 1:
            return
        flat = th.cat([tensor.flatten() for tensor in tensors])  # (Σ numbers,)
        self._exchange(dist.all_reduce, flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        th._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def gather(self, x: Tensor) -> Tensor:
        """The processes' tensors (n, ...) in a row, (size · n, ...), without gradient."""
        if self.size == 1:
            return x
        parts = [th.empty_like(x) for _ in range(self.size)]
        self._exchange(dist.all_gather, parts, x.detach().contiguous())
        return th.cat(parts)

    def gather_with_gradient(self, x: Tensor) -> Tensor:
        """:meth:`gather` for a loss that is no mean over the processes: each computes the whole of it, with the gradient of
        its own rows alone, multiplied by the number of processes, so that the mean of :meth:`average_` is that of all rows.

        :param x: (n, ...)
        :return: (size · n, ...)
        """
        if self.size == 1:
            return x
        parts = list(self.gather(x).chunk(self.size))
        parts[self.rank] = x + (self.size - 1) * (x - x.detach())  # its value is x
        return th.cat(parts)

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                self._exchange(dist.broadcast, tensor, 0)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Sums of numbers over the processes."""
        if self.size == 1:
            return list(numbers)
        total = th.tensor(numbers, dtype=th.float64)  # on the processor, which waits for no GPU
        self._exchange(dist.all_reduce, total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait until all processes are here; GPUs need not be done."""
        self.sums([0.0])

    def told_by_first(self, thing: Any) -> Any:
        """What the first process has for ``thing``, which can be pickled."""
        if self.size == 1:
            return thing
        things = [thing]
        self._exchange(dist.broadcast_object_list, things, 0)
        return things[0]

    def _exchange(self, function: Any, *args: Any) -> None:
        """
        :raises RuntimeError: another process ended, does not answer, or has the same GPU
        """
        try:
            function(*args)
        except RuntimeError as error:
            if "Duplicate GPU" in str(error):
                raise RuntimeError(
                    f"Process {self.rank} of {self.size} has the same GPU as another one, which NCCL does not take; allowed: "
                    "at most as many processes as GPUs (torchrun --nproc-per-node), or device='cpu'"
                ) from error
            raise RuntimeError(
                f"Process {self.rank} of {self.size} lost another one: it ended, or does not answer. torchrun names the one "
                f"that ended first, below. ({str(error)[:200]})"
            ) from error


ALONE = Processes()


def current() -> Processes:
    """The processes that torchrun started, or that the program has joined by ``torch.distributed``; else this one alone.

    :raises ValueError: the program has joined them in a group that GPUs alone can talk in
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return ALONE
        _join()
    elif dist.get_world_size() > 1 and "cpu:" not in dist.get_backend_config():
        raise ValueError(
            f"The process group has the backends {dist.get_backend_config()}, and the processes also exchange numbers of the "
            "processor; allowed: init_process_group('cpu:gloo,cuda:nccl') or 'gloo', or none, with torchrun"
        )
    return Processes(dist.get_rank(), dist.get_world_size()) if dist.get_world_size() > 1 else ALONE


def _join() -> None:
    """Join the processes that torchrun started."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if th.cuda.is_available():
        th.cuda.set_device(local % th.cuda.device_count())
    if local and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # Two processes that compile the same function at once can read each other's half-written files.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{default_cache_dir()}_{local}"
    backend = "cpu:gloo,cuda:nccl" if th.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(_leave)


def _leave() -> None:
    """At the process's end: gloo's threads must be done with the last exchange, and must end before the interpreter does."""
    if dist.is_initialized():
        gc.collect()
        time.sleep(SETTLING_SECONDS)
        dist.destroy_process_group()
