"""The GPLD penalty's exact estimator: ‖J_i‖²_F of each row, without probes.

Its mathematics and letters are in :mod:`~sb3_dreamer_gpld.nets.gpld`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th
from torch import Tensor
from torch.autograd.function import once_differentiable

from sb3_dreamer_gpld.nets.cotangents import Layer, Local, OneLayer, pulled_to_first

STRIP = 16  # units of a hidden layer whose products with the others are computed together


def exact_squares(weight: Tensor, p: Tensor, layers: Sequence[Layer], local: Sequence[Local]) -> Tensor:
    """‖J_i‖²_F of each row and state, before the share of the mix.

    :param weight: of the last linear, (R, C, h)
    :param p: probabilities before the mix, (R, n, C)
    :param layers: hidden layers
    :param local: of each
    :return: (R, n)
    """
    if len(layers) == 1:
        return _squares_of_one_layer(p, OneLayer.of(weight, local[0], layers[0].weight))
    return _squares_of_layers(weight, p, layers, local)


def _squares_of_one_layer(p: Tensor, layer: OneLayer) -> Tensor:
    """Two cotangents for each row instead of one for each class.

    Before the share of the mix, row c of J_i is p_c·(w_c − μ)ᵀ D with the layer's Jacobian D and μ = Σ_c p_c w_c, so
    ‖J_i‖² = Σ_c p_c²⟨w_c, w_c⟩ + ⟨τ, μ⟩, where τ = Σ_c (p_c·Σp² − 2p_c²)·w_c.

    :param p: probabilities before the mix, (R, n, C)
    :return: (R, n)
    """
    weight, along_z, along_b = layer.weight, layer.along_z, layer.along_b
    own = _OwnProducts.apply(layer.slope, weight.flatten(0, 1), layer.gram)  # (n, R·C)
    own = own.unflatten(1, weight.shape[:2]).movedim(1, 0)  # (R, n, C)
    norms = own - 2.0 * along_z * along_b  # (R, n, C)
    squares = p.square()  # (R, n, C)
    shares = p * squares.sum(-1, keepdim=True) - 2.0 * squares  # (R, n, C), of the classes in τ
    mixed = layer.mixed(th.stack([p, shares], 1))  # (R, n)
    mu_z, mu_b = (p * along_z).sum(-1), (p * along_b).sum(-1)  # (R, n)
    tau_z, tau_b = (shares * along_z).sum(-1), (shares * along_b).sum(-1)  # (R, n)
    return layer.rr.T * ((squares * norms).sum(-1) + mixed - tau_z * mu_b - tau_b * mu_z)


def _squares_of_layers(weight: Tensor, p: Tensor, layers: Sequence[Layer], local: Sequence[Local]) -> Tensor:
    """One cotangent for each class, for any number of layers.

    :param weight: (R, C, h)
    :param p: probabilities before the mix, (R, n, C)
    :return: (R, n)
    """
    # The rows of v = diag(p) − ppᵀ sum to 0, so they act on the logits' differences to the last one alone.
    d = (weight[:, :-1] - weight[:, -1:]).unsqueeze(1)  # (R, 1, C − 1, h), the same for all states
    v = (th.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))[..., :-1]  # (R, n, C, C − 1)
    return (v @ _inner_products(d, layers, local) * v).sum((-2, -1))  # trace of v·products·vᵀ


def _inner_products(d: Tensor, layers: Sequence[Layer], local: Sequence[Local]) -> Tensor:
    """Inner products at the net's input of cotangents of the last hidden layer's output with each other.

    At the first layer, with y = d ⊙ slope and a = r²·⟨z, y⟩/h, and y' and a' of the other one, they are
    r²·(yᵀGy' − a'·yᵀGz − a·y'ᵀGz + a·a'·zᵀGz).

    :param d: q cotangents of each row, (R, n or 1, q, h)
    :param layers: hidden layers
    :param local: of each
    :return: (R, n, q, q)
    """
    d = pulled_to_first(d, layers, local)  # (R, n or 1, q, h)
    at, gram = local[0], layers[0].weight @ layers[0].weight.T  # (h, h)
    y = d * at.slope.unsqueeze(1)  # (R, n, q, h)
    gy = y @ gram  # (R, n, q, h)
    z, rr = at.z.unsqueeze(1), at.rms_inverse.square().unsqueeze(1)  # (n, 1, h), (n, 1, 1)
    a = (y * z).sum(-1, keepdim=True) * (rr / z.shape[-1])  # (R, n, q, 1)
    across = (gy * z).sum(-1, keepdim=True) * a.mT  # (R, n, q, q): yᵀGz times a of the other
    own = a * a.mT * (z @ gram * z).sum(-1, keepdim=True)  # (R, n, q, q)
    return rr * (y @ gy.mT - across - across.mT + own)


class _OwnProducts(th.autograd.Function):
    """w_cᵀ S G S w_c for every state and class: a product of (slope ⊗ slope) with (w_c ⊗ w_c ⊙ G).

    Both are symmetric, so of each pair of units one side is computed, in strips of :data:`STRIP` units. These are the
    largest arrays of the exact form: the backward pass makes each strip anew, while it is in the processor's cache,
    instead of keeping them all. Of G the entries from a strip's first unit on are read, and those right of the strip's square
    stand for both sides.

    Letters: s units of a strip, e = h − start units from its first one on.
    """

    @staticmethod
    def forward(ctx: Any, slope: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
        """
        :param slope: diagonal of S, (n, h)
        :param weight: w of all rows, (R·C, h)
        :param gram: G, (h, h)
        :return: (n, R·C)
        """
        ctx.save_for_backward(slope, weight, gram)
        total = slope.new_zeros(len(slope), len(weight))
        for start in range(0, len(gram), STRIP):
            outer = _pairs(weight, start).mul_(_doubled(gram, start))  # (R·C, s, e)
            total.addmm_(_pairs(slope, start).flatten(1), outer.flatten(1).T)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:param gradient: (n, R·C)"""
        slope, weight, gram = ctx.saved_tensors
        of_slope, of_weight, of_gram = th.zeros_like(slope), th.zeros_like(weight), th.zeros_like(gram)
        for start in range(0, len(gram), STRIP):
            factors, pairs = _doubled(gram, start), _pairs(weight, start)  # (s, e), (R·C, s, e)
            of_slopes = (gradient @ pairs.flatten(1)).view(len(slope), *factors.shape).mul_(factors)  # (n, s, e)
            of_outer = (gradient.T @ _pairs(slope, start).flatten(1)).view_as(pairs)  # (R·C, s, e)
            of_gram[start : start + STRIP, start:] = pairs.mul_(of_outer).sum(0)
            _add_gradient_of_pairs(of_slope, slope, of_slopes, start)
            _add_gradient_of_pairs(of_weight, weight, of_outer.mul_(factors), start)
        for start in range(0, len(gram), STRIP):
            of_gram[start : start + STRIP, start:] = _doubled(of_gram, start)
        return of_slope, of_weight, of_gram


def _pairs(x: Tensor, start: int) -> Tensor:
    """Products of the numbers of a strip with those from its first one on, (·, h) → (·, s, e)."""
    return x[:, start : start + STRIP].unsqueeze(-1) * x[:, start:].unsqueeze(-2)


def _add_gradient_of_pairs(total: Tensor, x: Tensor, gradient: Tensor, start: int) -> None:
    """Add the gradient of x (·, h) to ``total``, from that of its :func:`_pairs`, (·, s, e)."""
    total[:, start : start + STRIP] += th.bmm(gradient, x[:, start:].unsqueeze(-1)).squeeze(-1)
    total[:, start:] += th.bmm(x[:, start : start + STRIP].unsqueeze(-2), gradient).squeeze(-2)


def _doubled(x: Tensor, start: int) -> Tensor:
    """A strip of an array (h, h) from its diagonal on, (s, e).

    The square at its beginning has both sides of each pair, the columns right of it have one, and are doubled.
    """
    rows = x[start : start + STRIP, start:]
    return th.cat([rows[:, :STRIP], 2.0 * rows[:, STRIP:]], -1)
