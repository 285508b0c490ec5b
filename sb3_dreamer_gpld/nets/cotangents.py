"""Cotangents pulled back through the layers of a net, of which the two estimators of the GPLD penalty are made.

Their mathematics and letters are in :mod:`~sb3_dreamer_gpld.nets.gpld`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch as th
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TOGETHER = 2**18  # about as many numbers of cotangents are made together on a processor, to stay in its cache


class Layer(NamedTuple):
    """A layer linear → RMSNorm → SiLU.

    :param weight: (out, in)
    :param bias: (out,)
    :param scale: scale of the norm, (out,)
    :param eps: constant inside the norm's root
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    eps: float


class Local(NamedTuple):
    """What the transposed Jacobian of one layer needs at each state: z (n, h), 1/RMS (n, 1) and g ⊙ silu' (n, h)."""

    z: Tensor
    rms_inverse: Tensor
    slope: Tensor


def forward(layer: Layer, x: Tensor) -> tuple[Tensor, Local]:
    """:return: the layer's output (n, h) and what its transposed Jacobian needs"""
    z = F.linear(x, layer.weight, layer.bias)  # (n, h)
    rms_inverse = th.rsqrt(z.square().mean(-1, keepdim=True) + layer.eps)  # (n, 1)
    n = z * rms_inverse * layer.scale  # (n, h)
    gate = th.sigmoid(n)
    return n * gate, Local(z, rms_inverse, layer.scale * gate * (1 + n * (1 - gate)))


def of_all_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Products of x (n, h) with every class of every row (R, C, h) as one matrix product, (R, n, C)."""
    return (x @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]).movedim(1, 0)


def through_norm(d: Tensor, at: Local) -> Tensor:
    """Cotangents (R, n or 1, q, h) of a layer's output as cotangents (R, n, q, h) of its pre-activation z."""
    y = d * at.slope.unsqueeze(1)  # (R, n, q, h)
    z, rms_inverse = at.z.unsqueeze(1), at.rms_inverse.unsqueeze(1)  # (n, 1, h), (n, 1, 1)
    along = (y * z).sum(-1, keepdim=True) * (rms_inverse.square() / z.shape[-1])  # (R, n, q, 1)
    return (y - z * along) * rms_inverse


def pulled_to_first(d: Tensor, layers: Sequence[Layer], local: Sequence[Local]) -> Tensor:
    """Cotangents of the last hidden layer's output as those of the first one's.

    :param d: (R, n or 1, q, h)
    :param layers: hidden layers
    :param local: of each
    :return: (R, n, q, h), or d itself where there is one layer
    """
    for layer, at in zip(reversed(layers[1:]), reversed(local[1:]), strict=True):
        d = through_norm(d, at) @ layer.weight
    return d


class OneLayer(NamedTuple):
    """What the inner products at the net's input of cotangents of its one hidden layer's output need.

    With S = diag(slope) and r = 1/RMS, ⟨d, d'⟩ = r²·dᵀ S(G − zbᵀ − bzᵀ)S d', where b = k·Gz − k²/2·(zᵀGz)·z and k = r²/h. A
    cotangent that mixes the classes' w_c has with z and b the products that are mixed of theirs, so its h numbers are needed
    for G alone, in :meth:`mixed`.

    :param weight: w_c less their mean, (R, C, h)
    :param gram: G, (h, h)
    :param slope: (n, h)
    :param rr: r², (n, 1)
    :param along_z, along_b: zᵀS w_c and bᵀS w_c, (R, n, C)
    """

    weight: Tensor
    gram: Tensor
    slope: Tensor
    rr: Tensor
    along_z: Tensor
    along_b: Tensor

    @classmethod
    def of(cls, weight: Tensor, at: Local, first: Tensor) -> OneLayer:
        """
        :param weight: of the last linear, (R, C, h)
        :param at: of the hidden layer
        :param first: its weight, (h, I)
        """
        # The shares of a probe, and of each row of J_i, sum to 0: what the w_c have in common only takes digits from the rest.
        weight = weight - weight.mean(1, keepdim=True)
        gram, z, rr = first @ first.T, at.z, at.rms_inverse.square()  # (h, h), (n, h), (n, 1)
        k = rr / z.shape[-1]
        gz = z @ gram  # (n, h)
        b = k * gz - 0.5 * k.square() * (gz * z).sum(-1, keepdim=True) * z  # (n, h)
        along_z, along_b = of_all_rows(at.slope * z, weight), of_all_rows(at.slope * b, weight)  # (R, n, C) each
        return cls(weight, gram, at.slope, rr, along_z, along_b)

    def mixed(self, mixtures: Tensor) -> Tensor:
        """aᵀ S G S b of cotangents a, b, or aᵀ S G S a, from the classes' shares (R, M, n, C) in each, (R, n)."""
        return _MixedProducts.apply(mixtures, self.weight, self.slope, self.gram)


class _MixedProducts(th.autograd.Function):
    """aᵀ S G S b for cotangents a, b of every row and state that mix its classes' w_c, or aᵀ S G S a.

    A few rows at a time, see :func:`_parts`, and the backward pass makes the cotangents anew: kept for all rows they would
    be most of the penalty's memory.

    Letters: M = 1 or 2 mixtures; P rows of a part.
    """

    @staticmethod
    def forward(ctx: Any, mixtures: Tensor, weight: Tensor, slope: Tensor, gram: Tensor) -> Tensor:
        """
        :param mixtures: shares of the classes in a, or in a and b, (R, M, n, C)
        :param weight: w, (R, C, h)
        :param slope: diagonal of S, (n, h)
        :param gram: G, symmetric, (h, h)
        :return: (R, n)
        """
        ctx.save_for_backward(mixtures, weight, slope, gram)
        products = []
        for shares, its_weight in _parts(mixtures.shape[1] * slope.numel(), mixtures, weight):
            sides = _mix(shares, its_weight).mul_(slope)  # (P, M, n, h)
            products.append((sides[:, 0] @ gram).mul_(sides[:, -1]).sum(-1))  # (P, n)
        return th.cat(products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:param gradient: (R, n)"""
        mixtures, weight, slope, gram = ctx.saved_tensors
        of_slope, of_gram = th.zeros_like(slope), th.zeros_like(gram)
        of_mixtures, of_weight = [], []
        for shares, its_weight, its_gradient in _parts(mixtures.shape[1] * slope.numel(), mixtures, weight, gradient):
            mixed = _mix(shares, its_weight)  # (P, M, n, h)
            sides = mixed * slope
            weighted = sides * its_gradient[:, None, :, None]
            of_gram.addmm_(weighted[:, 0].flatten(0, 1).T, sides[:, -1].flatten(0, 1))
            other = weighted if shares.shape[1] == 1 else weighted.flip(1)
            of_sides = (other @ gram).mul_(2 // shares.shape[1])  # (P, M, n, h); a single a is on both sides
            of_slope += mixed.mul_(of_sides).sum((0, 1))
            of_mixed = of_sides.mul_(slope).flatten(1, 2)  # (P, M·n, h)
            of_mixtures.append((of_mixed @ its_weight.mT).view_as(shares))
            of_weight.append(shares.flatten(1, 2).mT @ of_mixed)  # (P, C, h)
        return th.cat(of_mixtures), th.cat(of_weight), of_slope, of_gram


def _parts(numbers: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of each tensor (R, ...) at a time, if a row takes so many numbers.

    All of them on a GPU, and where a compiler would make kernels for each part.
    """
    split = tensors[0].is_cpu and not th.compiler.is_compiling()
    rows = max(1, TOGETHER // numbers) if split else len(tensors[0])
    return zip(*(x.split(rows) for x in tensors), strict=True)


def _mix(shares: Tensor, weight: Tensor) -> Tensor:
    """Mixtures of classes, from their shares (P, M, n, C) and weights (P, C, h), (P, M, n, h)."""
    return (shares.flatten(1, 2) @ weight).unflatten(1, shares.shape[1:3])
