"""A yardstick of the machine's speed: float32 products of 1024×1024 matrices."""

from __future__ import annotations

import time

import torch as th

SIZE = 1024
FLOP = 31e9  # about what one update needs at size 1m, 16 sequences of 64 steps, horizon 15


class Yardstick:
    """Times 31 GFLOP of float32 matrix products on a device.

    :param device: where
    """

    def __init__(self, device: th.device) -> None:
        self.device = device
        self.a, self.b = th.randn(2, SIZE, SIZE, device=device)
        self.out = th.empty(SIZE, SIZE, device=device)
        self.products = 14  # some 30 GFLOP: long enough to time, short enough to interleave
        self()

    def __call__(self) -> float:
        """:return: seconds for FLOP floating point operations"""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.products):
            th.mm(self.a, self.b, out=self.out)
        synchronize(self.device)
        return (time.perf_counter() - start) * FLOP / (self.products * 2 * SIZE**3)


def synchronize(device: th.device) -> None:
    """Wait for the work that was handed to a GPU."""
    if device.type == "cuda":
        th.cuda.synchronize(device)
