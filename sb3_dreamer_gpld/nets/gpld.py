"""The GPLD penalty: row-wise Jacobian norms of a categorical's probabilities, in closed form, and λ.

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

from collections.abc import Sequence
from typing import Any

import torch as th
from torch import Tensor
from torch.autograd.function import once_differentiable

from sb3_dreamer_gpld.config import PenaltyConfig
from sb3_dreamer_gpld.nets.cotangents import Layer, Local, OneLayer, forward, of_all_rows, pulled_to_first
from sb3_dreamer_gpld.nets.gpld_exact import exact_squares
from sb3_dreamer_gpld.schedules import SCHEDULES


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
    x, local = _forward_all(layers, inputs)
    weight = output[0].view(classes, -1, x.shape[-1]).transpose(0, 1)  # (K, C, h)
    bias = output[1].view(classes, -1).T  # (K, C)
    if rows is not None:
        weight, bias = weight[rows], bias[rows]  # (R, C, h), (R, C)
    p = th.softmax(of_all_rows(x, weight) + bias.unsqueeze(1), -1)  # (R, n, C)

    if probes is None:
        squares = exact_squares(weight, p, layers, local)  # (R, n)
    else:
        v = p * (probes - (p * probes).sum(-1, keepdim=True))  # (R, n, C)
        squares = probed_squares(weight, v, layers, local)  # (R, n)
    return (1.0 - unimix) ** 2 * squares.mean(0)


def _forward_all(layers: Sequence[Layer], inputs: Tensor) -> tuple[Tensor, list[Local]]:
    """:return: the last layer's output (n, h), and what the transposed Jacobian of each needs"""
    x, local = inputs, []
    for layer in layers:
        x, at = forward(layer, x)
        local.append(at)
    return x, local


def probed_squares(weight: Tensor, v: Tensor, layers: Sequence[Layer], local: Sequence[Local]) -> Tensor:
    """‖J_iᵀε_i‖² of each row and state, before the share of the mix.

    :param weight: of the last linear, (R, C, h)
    :param v: the logits' cotangents, (R, n, C)
    :param layers: hidden layers
    :param local: of each
    :return: (R, n)
    """
    if len(layers) > 1:
        return _squared_norms(th.bmm(v, weight), layers, local)
    layer = OneLayer.of(weight, local[0], layers[0].weight)
    own = layer.mixed(v.unsqueeze(1))  # (R, n)
    return layer.rr.T * (own - 2.0 * (v * layer.along_z).sum(-1) * (v * layer.along_b).sum(-1))


def _squared_norms(d: Tensor, layers: Sequence[Layer], local: Sequence[Local]) -> Tensor:
    """Squared norms at the net's input of cotangents pulled back, one of each row and state at the last hidden layer's output.

    At the first layer, with y = d ⊙ slope and a = r²·⟨z, y⟩/h, the cotangent of the pre-activation is r·(y − a·z), and with
    G = W Wᵀ its squared norm, through W, is r²·(yᵀGy − 2a·yᵀGz + a²·zᵀGz): the y are the only large arrays.

    :param d: (R, n, h)
    :param layers: hidden layers
    :param local: of each
    :return: (R, n)
    """
    d = pulled_to_first(d.unsqueeze(2), layers, local).squeeze(2)  # (R, n, h)
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


def squared_gradient(layers: Sequence[Layer], weight: Tensor, inputs: Tensor, cotangents: Tensor) -> Tensor:
    """‖Jᵀv‖² of a net's outputs for one cotangent v at each state: the squared gradient in the input of any number whose
    gradient in the outputs is v.

    :param layers: hidden layers of the net, may be none
    :param weight: of the last linear, (O, h)
    :param inputs: (n, I)
    :param cotangents: v, (n, O)
    :return: (n,), differentiable once, in every parameter, in the inputs and in v; autocast must be off
    """
    _, local = _forward_all(layers, inputs)
    d = cotangents @ weight  # (n, h)
    if not layers:
        return d.square().sum(-1)
    return _squared_norms(d.unsqueeze(0), layers, local).squeeze(0)


def rademacher(shape: Sequence[int], device: th.device) -> Tensor:
    """Independent numbers −1 and +1, each with probability ½."""
    return th.empty(*shape, device=device).bernoulli_(0.5).mul_(2).sub_(1)


def penalty_weight(config: PenaltyConfig, initial: float, update: int) -> float:
    """λ at an optimiser update (authors' release, ``compute_decayed_lambda``): 0 before the start, then the schedule's.

    :param config: schedule, λ_min and start
    :param initial: λ₀; 0 gives 0 at every update
    :param update: optimiser updates made before this one
    """
    t = update - config.start
    if initial == 0 or t < 0:
        return 0.0
    return SCHEDULES[config.schedule_name](t, initial, config.minimum, **config.schedule_parameters)
