"""Numbers of the observations in units of their own deviation, if that is above a smallest one.

A squared error weighs a number by its scale: an angle of ±0.1 beside a velocity of ±5 is worth less than it costs to keep it
in the latents, and is lost. The published agent has no such thing; Stable-Baselines3's VecNormalize is the same idea on the
side of the environment, where the statistics are those of all steps.
"""

from __future__ import annotations

import torch as th
from torch import Tensor, nn

RATE = 0.001  # least share of an update in the statistics: before as many updates as this makes, they are plain means
MIN_STD = 0.01  # numbers that vary less are taken for constants with a little noise


class Normalizer(nn.Module):
    """(x − mean) / standard deviation, both followed while training.

    :param size: numbers, n
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(size))
        self.register_buffer("variance", th.ones(size))
        self.register_buffer("updates", th.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (..., n)
        :return: (..., n)
        """
        return (x - self.mean) / self._std()

    def inverse(self, x: Tensor) -> Tensor:
        """The numbers (..., n) that are normalised to ``x`` (..., n)."""
        return x * self._std() + self.mean

    def _std(self) -> Tensor:
        return self.variance.clamp_min(MIN_STD**2).sqrt()  # (n,)

    @th.no_grad()
    def update(self, x: Tensor, fault: Tensor) -> None:
        """Take numbers into the statistics.

        The variance is that of the mixture of what was there before and these numbers: the distance of the means counts.

        :param x: (N, n)
        :param fault: bool scalar; if it is true, everything stays, as do the statistics of a number that would not be finite
        """
        variance, mean = th.var_mean(x, 0, correction=0)  # (n,) each
        share = (1.0 / (self.updates + 1.0)).clamp_min(RATE)
        spread = self.variance.lerp(variance, share) + share * (1.0 - share) * (mean - self.mean).square()
        stays = fault | ~spread.isfinite()  # (n,): squares of huge numbers are infinite
        self.mean.copy_(th.where(stays, self.mean, self.mean.lerp(mean, share)))
        self.variance.copy_(th.where(stays, self.variance, spread))
        self.updates.copy_(th.where(fault, self.updates, self.updates + 1.0))
