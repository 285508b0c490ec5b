"""What takes the decoder's place with ``reconstruction="redundancy"``: states must tell each number of the encoder's output,
and no observation.

Letters: N states, F features of a state, M tokens.

Sources: Morihira et al., "R2-Dreamer: Redundancy-Reduced World Models without Decoders or Augmentation" (ICLR 2026), and its
release; the loss is that of Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (ICML 2021),
there between two views of one image.
"""

from __future__ import annotations

import torch as th
from torch import Tensor, nn

from sb3_dreamer_gpld.nets.layers import at_least_float32, initialize_

STD_EPS = 1e-8  # added to standard deviations, as in the release of R2-Dreamer


class Projector(nn.Linear):
    """Features of a state → as many numbers as there are tokens: one linear layer without a bias.

    :param features: F
    :param tokens: M
    """

    def __init__(self, features: int, tokens: int) -> None:
        super().__init__(features, tokens, bias=False)

    def reset_parameters(self) -> None:
        initialize_(self.weight, self.in_features)


def redundancy_loss(projected: Tensor, tokens: Tensor, off_diagonal: float) -> Tensor:
    """Σ_i (C_ii − 1)² + λ Σ_{i≠j} C_ij² of the correlations C of projected states and tokens over a batch.

    As in the release, both are standardised with the standard deviation that divides by N − 1, and C is the mean of their
    products, so that C_ii is at most 1 − 1/N. A token that is the same in all states counts as uncorrelated.

    :param projected: (N, M), with N ≥ 2
    :param tokens: (N, M), without gradient, as in the release
    :param off_diagonal: λ
    :return: scalar, in float32 at least
    """
    products = _standardised(projected).mT @ _standardised(tokens)  # (M, M), in half precision under autocast
    correlations = at_least_float32(products) / len(tokens)
    errors = (correlations - th.eye(len(correlations), device=tokens.device, dtype=correlations.dtype)).square()
    diagonal = errors.diagonal().sum()
    return diagonal + off_diagonal * (errors.sum() - diagonal)


def _standardised(x: Tensor) -> Tensor:
    """(N, M) with mean 0 and standard deviation 1 of each column."""
    x = at_least_float32(x)
    std, mean = th.std_mean(x, 0)
    return (x - mean) / (std + STD_EPS)
