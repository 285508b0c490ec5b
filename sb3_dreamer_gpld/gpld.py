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
from collections.abc import Sequence
from typing import NamedTuple

import torch as th
from torch import Tensor
from torch.nn import functional as F

from sb3_dreamer_gpld.config import PenaltyConfig


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
    :return: (n,), differentiable in every parameter and in the inputs
    """
    x, local = inputs, []
    for layer in layers:
        x, at = _forward(layer, x)
        local.append(at)
    weight = output[0].view(classes, -1, x.shape[-1]).transpose(0, 1)  # (K, C, h)
    bias = output[1].view(classes, 1, -1).permute(2, 1, 0)  # (K, 1, C)
    if rows is not None:
        weight, bias = weight[rows], bias[rows]  # (R, C, h), (R, 1, C)
    p = th.softmax(th.baddbmm(bias, x.expand(len(weight), -1, -1), weight.mT), -1)  # (R, n, C)

    if probes is not None:
        v = p * (probes - (p * probes).sum(-1, keepdim=True))  # (R, n, C)
        d = th.bmm(v, weight).unsqueeze(2)  # (R, n, 1, h): one cotangent for each row and state
    else:
        # The rows of diag(p) − ppᵀ sum to 0, so they act on the logits' differences to the last one alone.
        d = (weight[:, :-1] - weight[:, -1:]).unsqueeze(1)  # (R, 1, C − 1, h), the same for all states
    for layer, at in zip(reversed(layers[1:]), reversed(local[1:]), strict=True):
        d = _through_norm(d, at) @ layer.weight
    squares = _gram(d, local[0], layers[0].weight)  # (R, n, 1, 1), or (R, n, C − 1, C − 1)
    if probes is None:
        v = (th.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))[..., :-1]  # (R, n, C, C − 1)
        squares = (v @ squares * v).sum((-2, -1))  # trace of v·squares·vᵀ
    else:
        squares = squares[:, :, 0, 0]
    return (1.0 - unimix) ** 2 * squares.mean(0)


def _forward(layer: Layer, x: Tensor) -> tuple[Tensor, _Local]:
    """:return: the layer's output (n, h) and what its transposed Jacobian needs"""
    z = F.linear(x, layer.weight, layer.bias)  # (n, h)
    rms_inverse = th.rsqrt(z.square().mean(-1, keepdim=True) + layer.eps)  # (n, 1)
    n = z * rms_inverse * layer.scale  # (n, h)
    gate = th.sigmoid(n)
    return n * gate, _Local(z, rms_inverse, layer.scale * gate * (1 + n * (1 - gate)))


def _through_norm(d: Tensor, at: _Local) -> Tensor:
    """Cotangents (R, n or 1, q, h) of a layer's output as cotangents (R, n, q, h) of its pre-activation z."""
    y = d * at.slope.unsqueeze(1)  # (R, n, q, h)
    z, rms_inverse = at.z.unsqueeze(1), at.rms_inverse.unsqueeze(1)  # (n, 1, h), (n, 1, 1)
    along = (y * z).sum(-1, keepdim=True) * (rms_inverse.square() / z.shape[-1])  # (R, n, q, 1)
    return (y - z * along) * rms_inverse


def _gram(d: Tensor, at: _Local, weight: Tensor) -> Tensor:
    """Inner products of the cotangents of the net's input that belong to cotangents of the first layer's output.

    With y = d ⊙ slope and a = r²·⟨z, y⟩/h, the cotangent of the pre-activation is r·(y − a·z), and with G = W Wᵀ the
    inner product of two of them, through W, is r²·(yᵀGy' − a'·yᵀGz − a·y'ᵀGz + a·a'·zᵀGz): the y are the only large
    arrays.

    :param d: q cotangents of each row, (R, n or 1, q, h)
    :param at: of the first layer
    :param weight: of the first layer, (h, I)
    :return: (R, n, q, q)
    """
    gram = weight @ weight.T  # (h, h)
    y = d * at.slope.unsqueeze(1)  # (R, n, q, h)
    gy = y @ gram  # (R, n, q, h)
    z, rr = at.z.unsqueeze(1), at.rms_inverse.square().unsqueeze(1)  # (n, 1, h), (n, 1, 1)
    a = (y * z).sum(-1, keepdim=True) * (rr / z.shape[-1])  # (R, n, q, 1)
    across = (gy * z).sum(-1, keepdim=True) * a.mT  # (R, n, q, q): yᵀGz times a of the other
    own = a * a.mT * (z @ gram * z).sum(-1, keepdim=True)  # (R, n, q, q)
    inner = y @ gy.mT if y.shape[2] > 1 else (y * gy).sum(-1, keepdim=True)  # (R, n, q, q)
    return rr * (inner - across - across.mT + own)


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
