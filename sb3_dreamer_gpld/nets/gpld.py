"""The GPLD penalty: row-wise Jacobian norms of a categorical's probabilities, in closed form, and the schedules of λ.

Source: Sonigra & Kumar, "GPLD", 2026, arXiv 2605.23089, and the authors' release. This file knows tensors and layers,
nothing of reinforcement learning.

A net of L layers (linear → RMSNorm → SiLU) and a last linear gives C logits for each of K rows; the penalised map is the
probability vector q_i = (1 − m)·softmax(l_i) + m/C of each row i as a function of the net's input u. With
J_i = ∂q_i/∂u, the penalty at one state is the mean over the rows of ‖J_i‖²_F. For a probe ε with E[εεᵀ] = I,
E‖J_iᵀε‖² = ‖J_i‖²_F (Hutchinson). Every factor of J_iᵀ is known, so no automatic differentiation is needed to form it:

    softmax and mix   v = (1 − m)·p ⊙ (ε − ⟨p, ε⟩)
    linear            d = Wᵀ v
    SiLU, RMSNorm     y = d ⊙ silu'(n) ⊙ g,   d = r·(y − z·r²·⟨z, y⟩/h)   with n = g ⊙ z·r, r = (mean z² + eps)^−½
    first linear      ‖Wᵀ d‖² = dᵀ (W Wᵀ) d, where W Wᵀ has only h × h numbers

Letters: n states, R penalised rows, K rows, C classes, h hidden units, I inputs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch as th
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sb3_dreamer_gpld.config import PenaltyConfig

STRIP = 16  # units of a hidden layer whose products with the others are computed together in the exact form
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


class _Local(NamedTuple):
    """What the transposed Jacobian of one layer needs at each state: z (n, h), 1/RMS (n, 1) and g ⊙ silu' (n, h)."""

    z: Tensor
    rms_inverse: Tensor
    slope: Tensor


def row_penalty(
    layers: Sequence[Layer],
    output: tuple[Tensor, Tensor],
    inputs: Tensor,
    classes: int,
    unimix: float,
    probes: Tensor | None,
    rows: Tensor | None = None,
) -> Tensor:
    """Mean over the rows of ‖J_iᵀε_i‖², or of ‖J_i‖²_F itself if no probes are given.

    :param layers: hidden layers of the net, at least one
    :param output: weight (C·K, h) and bias (C·K,) of the last linear
    :param inputs: u, (n, I)
    :param classes: C
    :param unimix: m
    :param probes: one probe per row and state, (R, n, C); None: the exact norm
    :param rows: indices of the penalised rows, (R,); None: all, R = K
    :return: (n,), differentiable once, in every parameter and in the inputs; autocast must be off
    """
    x, local = inputs, []
    for layer in layers:
        x, at = _forward(layer, x)
        local.append(at)
    weight = output[0].view(classes, -1, x.shape[-1]).transpose(0, 1)  # (K, C, h)
    bias = output[1].view(classes, -1).T  # (K, C)
    if rows is not None:
        weight, bias = weight[rows], bias[rows]  # (R, C, h), (R, C)
    p = th.softmax(_of_all_rows(x, weight) + bias.unsqueeze(1), -1)  # (R, n, C)

    v = None if probes is None else p * (probes - (p * probes).sum(-1, keepdim=True))  # (R, n, C)
    if len(layers) == 1:
        squares = _of_one_layer(weight, p, v, local[0], layers[0].weight)  # (R, n)
    elif v is None:
        squares = _exact(weight, p, layers, local)  # (R, n)
    else:
        squares = _squared_norms(th.bmm(v, weight), layers, local)  # (R, n)
    return (1.0 - unimix) ** 2 * squares.mean(0)


def _forward(layer: Layer, x: Tensor) -> tuple[Tensor, _Local]:
    """:return: the layer's output (n, h) and what its transposed Jacobian needs"""
    z = F.linear(x, layer.weight, layer.bias)  # (n, h)
    rms_inverse = th.rsqrt(z.square().mean(-1, keepdim=True) + layer.eps)  # (n, 1)
    n = z * rms_inverse * layer.scale  # (n, h)
    gate = th.sigmoid(n)
    return n * gate, _Local(z, rms_inverse, layer.scale * gate * (1 + n * (1 - gate)))


def _of_all_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Products of x (n, h) with every class of every row (R, C, h) as one matrix product, (R, n, C)."""
    return (x @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]).movedim(1, 0)


def _through_norm(d: Tensor, at: _Local) -> Tensor:
    """Cotangents (R, n or 1, q, h) of a layer's output as cotangents (R, n, q, h) of its pre-activation z."""
    y = d * at.slope.unsqueeze(1)  # (R, n, q, h)
    z, rms_inverse = at.z.unsqueeze(1), at.rms_inverse.unsqueeze(1)  # (n, 1, h), (n, 1, 1)
    along = (y * z).sum(-1, keepdim=True) * (rms_inverse.square() / z.shape[-1])  # (R, n, q, 1)
    return (y - z * along) * rms_inverse


def _squared_norms(d: Tensor, layers: Sequence[Layer], local: Sequence[_Local]) -> Tensor:
    """Squared norms at the net's input of cotangents pulled back, one of each row and state at the last hidden layer's output.

    At the first layer, with y = d ⊙ slope and a = r²·⟨z, y⟩/h, the cotangent of the pre-activation is r·(y − a·z), and with
    G = W Wᵀ its squared norm, through W, is r²·(yᵀGy − 2a·yᵀGz + a²·zᵀGz): the y are the only large arrays.

    :param d: (R, n, h)
    :param layers: hidden layers
    :param local: of each
    :return: (R, n)
    """
    for layer, at in zip(reversed(layers[1:]), reversed(local[1:]), strict=True):
        d = _through_norm(d.unsqueeze(2), at).squeeze(2) @ layer.weight
    at, gram = local[0], layers[0].weight @ layers[0].weight.T  # (h, h)
    y, gz, rr = d * at.slope, at.z @ gram, at.rms_inverse.square()  # (R, n, h), (n, h), (n, 1)
    along = th.stack([at.z, gz], -1)  # (n, h, 2)
    along_z, along_gz = th.bmm(y.transpose(0, 1), along).unbind(-1)  # (n, R) each
    a = along_z * (rr / y.shape[-1])  # (n, R)
    rest = a * (a * (gz * at.z).sum(-1, keepdim=True) - 2.0 * along_gz)  # (n, R)
    return rr.T * (_QuadraticForm.apply(y, gram) + rest.T)


class _QuadraticForm(th.autograd.Function):
    """yᵀ G y of many vectors with a symmetric G, by one matrix product for the value and one for the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gram: Tensor) -> Tensor:
        """
        :param y: (R, n, h)
        :param gram: G, (h, h)
        :return: (R, n)
        """
        gy = y @ gram  # (R, n, h)
        ctx.save_for_backward(y, gy)
        return (y * gy).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """:param gradient: (R, n)"""
        y, gy = ctx.saved_tensors
        weighted = gradient.unsqueeze(-1) * y  # (R, n, h)
        return 2.0 * gradient.unsqueeze(-1) * gy, weighted.flatten(0, 1).T @ y.flatten(0, 1)


def _inner_products(d: Tensor, layers: Sequence[Layer], local: Sequence[_Local]) -> Tensor:
    """What :func:`_squared_norms` gives for one cotangent of each row, for several: their inner products with each other.

    The exact form needs them for nets of more than one layer. With y, y' and a, a' of two of them they are
    r²·(yᵀGy' − a'·yᵀGz − a·y'ᵀGz + a·a'·zᵀGz).

    :param d: q cotangents of each row, (R, n or 1, q, h)
    :param layers: hidden layers
    :param local: of each
    :return: (R, n, q, q)
    """
    for layer, at in zip(reversed(layers[1:]), reversed(local[1:]), strict=True):
        d = _through_norm(d, at) @ layer.weight
    at, gram = local[0], layers[0].weight @ layers[0].weight.T  # (h, h)
    y = d * at.slope.unsqueeze(1)  # (R, n, q, h)
    gy = y @ gram  # (R, n, q, h)
    z, rr = at.z.unsqueeze(1), at.rms_inverse.square().unsqueeze(1)  # (n, 1, h), (n, 1, 1)
    a = (y * z).sum(-1, keepdim=True) * (rr / z.shape[-1])  # (R, n, q, 1)
    across = (gy * z).sum(-1, keepdim=True) * a.mT  # (R, n, q, q): yᵀGz times a of the other
    own = a * a.mT * (z @ gram * z).sum(-1, keepdim=True)  # (R, n, q, q)
    return rr * (y @ gy.mT - across - across.mT + own)


def _exact(weight: Tensor, p: Tensor, layers: Sequence[Layer], local: Sequence[_Local]) -> Tensor:
    """‖J_i‖²_F by one cotangent for each class, for any number of layers.

    :param weight: (R, C, h)
    :param p: probabilities before the mix, (R, n, C)
    :return: (R, n)
    """
    # The rows of v = diag(p) − ppᵀ sum to 0, so they act on the logits' differences to the last one alone.
    d = (weight[:, :-1] - weight[:, -1:]).unsqueeze(1)  # (R, 1, C − 1, h), the same for all states
    v = (th.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))[..., :-1]  # (R, n, C, C − 1)
    return (v @ _inner_products(d, layers, local) * v).sum((-2, -1))  # trace of v·products·vᵀ


def _of_one_layer(weight: Tensor, p: Tensor, v: Tensor | None, at: _Local, first: Tensor) -> Tensor:
    """‖Dᵀ Σ_c v_c w_c‖² for one hidden layer with Jacobian D, or ‖J_i‖²_F.

    With S = diag(slope) and r = 1/RMS, ⟨d, d'⟩ = r²·dᵀ S(G − zbᵀ − bzᵀ)S d' is the inner product of cotangents d, d' of the
    layer's output at the net's input, where b = k·Gz − k²/2·(zᵀGz)·z and k = r²/h. A cotangent that mixes the classes' w_c
    has with z and b the products that are mixed of theirs, so its h numbers are needed for G alone.

    The exact norm takes two cotangents for each row instead of one for each class: row c of J_i is p_c·(w_c − μ)ᵀ D with
    μ = Σ_c p_c w_c, so ‖J_i‖² = Σ_c p_c²⟨w_c, w_c⟩ + ⟨τ, μ⟩, where τ = Σ_c (p_c·Σp² − 2p_c²)·w_c.

    :param weight: (R, C, h)
    :param p: probabilities before the mix, (R, n, C)
    :param v: the logits' cotangents (R, n, C), or None
    :param at: of the hidden layer
    :param first: its weight, (h, I)
    :return: (R, n)
    """
    # The shares of v, and of each row of J_i, sum to 0: what the w_c have in common only takes digits from the rest.
    weight = weight - weight.mean(1, keepdim=True)
    gram, z, rr = first @ first.T, at.z, at.rms_inverse.square()  # (h, h), (n, h), (n, 1)
    k = rr / z.shape[-1]
    gz = z @ gram  # (n, h)
    b = k * gz - 0.5 * k.square() * (gz * z).sum(-1, keepdim=True) * z  # (n, h)
    along_z, along_b = _of_all_rows(at.slope * z, weight), _of_all_rows(at.slope * b, weight)  # (R, n, C): zᵀS w_c, bᵀS w_c
    if v is not None:
        own = _MixedProducts.apply(v.unsqueeze(1), weight, at.slope, gram)  # (R, n)
        return rr.T * (own - 2.0 * (v * along_z).sum(-1) * (v * along_b).sum(-1))

    own = _OwnProducts.apply(at.slope, weight.flatten(0, 1), gram)  # (n, R·C)
    own = own.unflatten(1, weight.shape[:2]).movedim(1, 0)  # (R, n, C)
    norms = own - 2.0 * along_z * along_b  # (R, n, C)
    squares = p.square()  # (R, n, C)
    shares = p * squares.sum(-1, keepdim=True) - 2.0 * squares  # (R, n, C), of the classes in τ
    mixed = _MixedProducts.apply(th.stack([p, shares], 1), weight, at.slope, gram)  # (R, n)
    mu_z, mu_b = (p * along_z).sum(-1), (p * along_b).sum(-1)  # (R, n)
    tau_z, tau_b = (shares * along_z).sum(-1), (shares * along_b).sum(-1)  # (R, n)
    return rr.T * ((squares * norms).sum(-1) + mixed - tau_z * mu_b - tau_b * mu_z)


class _OwnProducts(th.autograd.Function):
    """w_cᵀ S G S w_c for every state and class: a product of (slope ⊗ slope) with (w_c ⊗ w_c ⊙ G).

    Both are symmetric, so of each pair of units one side is computed, in strips of :data:`STRIP` units. These are the
    largest arrays of the exact form: the backward pass makes each strip anew, while it is in the processor's cache,
    instead of keeping them all. Of G the entries from a strip's first unit on are read, and those right of the strip's square
    stand for both sides.

    Letters: M = R·C classes of all rows, s units of a strip, e = h − start units from its first one on.
    """

    @staticmethod
    def forward(ctx: Any, slope: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
        """
        :param slope: diagonal of S, (n, h)
        :param weight: w, (M, h)
        :param gram: G, (h, h)
        :return: (n, M)
        """
        ctx.save_for_backward(slope, weight, gram)
        total = slope.new_zeros(len(slope), len(weight))
        for start in range(0, len(gram), STRIP):
            outer = _pairs(weight, start).mul_(_doubled(gram, start))  # (M, s, e)
            total.addmm_(_pairs(slope, start).flatten(1), outer.flatten(1).T)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:param gradient: (n, M)"""
        slope, weight, gram = ctx.saved_tensors
        of_slope, of_weight, of_gram = th.zeros_like(slope), th.zeros_like(weight), th.zeros_like(gram)
        for start in range(0, len(gram), STRIP):
            factors, pairs = _doubled(gram, start), _pairs(weight, start)  # (s, e), (M, s, e)
            of_slopes = (gradient @ pairs.flatten(1)).view(len(slope), *factors.shape).mul_(factors)  # (n, s, e)
            of_outer = (gradient.T @ _pairs(slope, start).flatten(1)).view_as(pairs)  # (M, s, e)
            of_gram[start : start + STRIP, start:] = pairs.mul_(of_outer).sum(0)
            _add_gradient_of_pairs(of_slope, slope, of_slopes, start)
            _add_gradient_of_pairs(of_weight, weight, of_outer.mul_(factors), start)
        for start in range(0, len(gram), STRIP):
            of_gram[start : start + STRIP, start:] = _doubled(of_gram, start)
        return of_slope, of_weight, of_gram


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


def _pairs(x: Tensor, start: int) -> Tensor:
    """Products of the numbers of a strip with those from its first one on, (N, h) → (N, s, e)."""
    return x[:, start : start + STRIP].unsqueeze(-1) * x[:, start:].unsqueeze(-2)


def _add_gradient_of_pairs(total: Tensor, x: Tensor, gradient: Tensor, start: int) -> None:
    """Add the gradient of x (N, h) to ``total``, from that of its :func:`_pairs`, (N, s, e)."""
    total[:, start : start + STRIP] += th.bmm(gradient, x[:, start:].unsqueeze(-1)).squeeze(-1)
    total[:, start:] += th.bmm(x[:, start : start + STRIP].unsqueeze(-2), gradient).squeeze(-2)


def _doubled(x: Tensor, start: int) -> Tensor:
    """A strip of an array (h, h) from its diagonal on, (s, e).

    The square at its beginning has both sides of each pair, the columns right of it have one, and are doubled.
    """
    rows = x[start : start + STRIP, start:]
    return th.cat([rows[:, :STRIP], 2.0 * rows[:, STRIP:]], -1)


def rademacher(shape: Sequence[int], device: th.device) -> Tensor:
    """Independent numbers −1 and +1, each with probability ½."""
    return th.empty(*shape, device=device).bernoulli_(0.5).mul_(2).sub_(1)


def penalty_weight(config: PenaltyConfig, initial: float, update: int) -> float:
    """λ at an optimiser update (authors' release, ``compute_decayed_lambda``).

    With t = update − start and p = min(1, t/decay_steps), λ is 0 for t < 0 and then

    ============= ==========================================================================
    none          λ₀
    linear        λ_min + (λ₀ − λ_min)·(1 − p)
    exponential   λ_min + (λ₀ − λ_min)·e^(−5p)
    cosine        λ_min + (λ₀ − λ_min)·½(1 + cos πp)
    step          max(λ_min, λ₀·factor^⌊t/interval⌋)
    sqrt_time     max(λ_min, λ₀/√(1 + t/time_scale)), time_scale 1000: the paper's
    custom        λ₀ before the first of ``steps``, then the value of the last step reached, at least λ_min
    ============= ==========================================================================

    :param config: schedule, λ_min and start
    :param initial: λ₀; 0 gives 0 at every update
    :param update: optimiser updates made before this one
    """
    t = update - config.start
    if initial == 0 or t < 0:
        return 0.0
    name, parameters, floor = config.schedule_name, config.schedule_parameters, config.minimum
    if name == "none":
        return initial
    if name == "step":
        return max(floor, initial * parameters["factor"] ** (t // parameters["interval"]))
    if name == "sqrt_time":
        return max(floor, initial / math.sqrt(1.0 + t / parameters["time_scale"]))
    if name == "custom":
        reached = bisect.bisect_right(list(parameters["steps"]), t)
        return max(floor, [initial, *parameters["values"]][reached])
    progress = min(1.0, t / parameters["decay_steps"])
    share = {
        "linear": 1.0 - progress,
        "exponential": math.exp(-5.0 * progress),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[name]
    return floor + (initial - floor) * share
