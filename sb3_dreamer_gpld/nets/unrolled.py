"""Matrix products that are repeated at every step of a recurrence, with the gradient of their weights made at the end.

Automatic differentiation gives each step's product a weight gradient of its own, of which a batch of 16 sequences makes a
product with an inner dimension of 16, and then adds them up: most of the backward pass's memory traffic. Here the gradient
is one product over all steps.

Letters: T steps, N states, G blocks; "steps" in a shape are those that are handed over together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th
from torch import Tensor
from torch.autograd.function import once_differentiable


class Affine(NamedTuple):
    """A sum of matrix products, ``added`` + Σ x·weight.

    :param added: (N, outputs), or (G, N, outputs) for G blocks; 1 may stand for all N, or nothing without blocks. It has a
        leading dimension of steps where several are handed over together, to be called one by one
    :param weights: one for each input, (inputs, outputs), or (G, inputs, outputs)
    """

    added: Tensor
    weights: Sequence[Tensor]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """:param inputs: (N, inputs) each, which blocks then share, or (G, N, inputs)
        :return: (N, outputs), or (G, N, outputs)
        """
        result = self.added
        for x, weight in zip(inputs, self.weights, strict=True):
            if weight.dim() == 2:
                result = th.addmm(result, x, weight)
            else:
                result = th.baddbmm(result, x.expand(len(weight), -1, -1), weight)
        return result


class Unrolled:
    """One :class:`Affine` at each of T steps. A :class:`StepProducts` calls some of them, and :meth:`note` takes what it kept.

    :param added: of each step, for all states: (T, N, outputs), or (T, G, N, outputs)
    :param weights: as in :class:`Affine`
    :param together: steps that :meth:`at` gives at once
    """

    def __init__(self, added: Tensor, weights: Sequence[Tensor], together: int) -> None:
        self.inputs: list[list[Tensor]] = [[] for _ in weights]
        if th.is_grad_enabled():
            for weight, inputs in zip(weights, self.inputs, strict=True):
                added = _WeightGradient.apply(added, weight, inputs)
        self.added = added.split(together)
        self.weights = [as_computed(weight.detach()) for weight in weights]

    def at(self, part: int) -> Affine:
        """The sums of products of some steps: what is added at each, (steps, ...), and the weights, detached."""
        return Affine(self.added[part], self.weights)

    def note(self, inputs: Sequence[Tensor]) -> None:
        """Keep the inputs of some steps, which the weights' gradients need.

        :param inputs: :meth:`StepProducts.inputs` of these steps, (steps, ...) each
        """
        if th.is_grad_enabled():
            for all_inputs, x in zip(self.inputs, inputs, strict=True):
                all_inputs.append(x.detach())


class StepProducts:
    """The products of some steps, of which each call makes the next one and keeps what it was called with.

    :param product: with what is added at each of the steps, (steps, ...)
    """

    def __init__(self, product: Affine) -> None:
        self.added = product.added.unbind(0)
        self.weights = product.weights
        self.called_with: list[tuple[Tensor, ...]] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As :class:`Affine`."""
        at_step = Affine(self.added[len(self.called_with)], self.weights)
        self.called_with.append(inputs)
        return at_step(*inputs)

    def inputs(self) -> list[Tensor]:
        """What each input was at the steps, (steps, ...) each, without gradient."""
        return [th.stack(x).detach() for x in zip(*self.called_with, strict=True)]


class _WeightGradient(th.autograd.Function):
    """Passes on what is added, and makes the gradient of a weight from that of what is added and the inputs noted later.

    The gradient of what is added is complete only after the backward pass of all steps, and it is that of the outputs.
    """

    @staticmethod
    def forward(ctx: Any, added: Tensor, weight: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs, ctx.dtype, ctx.computed = inputs, weight.dtype, computed_dtype(weight)
        return added.view_as(added)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """:param gradient: (T, N, outputs), or (T, G, N, outputs)"""
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        x = _all_states(th.cat(ctx.inputs).to(ctx.computed))  # (T·N, inputs), or (G, T·N, inputs)
        weight = x.mT @ _all_states(gradient.to(ctx.computed))  # (inputs, outputs), or (G, inputs, outputs)
        return gradient, weight.to(ctx.dtype), None


def _all_states(x: Tensor) -> Tensor:
    """(T, ..., N, size) → (..., T·N, size)"""
    return x.movedim(0, -3).flatten(-3, -2)


def computed_dtype(weight: Tensor) -> th.dtype:
    """The dtype of matrix products with a weight."""
    kind = weight.device.type
    return th.get_autocast_dtype(kind) if th.is_autocast_enabled(kind) else weight.dtype


def as_computed(weight: Tensor) -> Tensor:
    """The weight in the dtype of matrix products: autocast would convert anything but a parameter anew at each step."""
    return weight.to(computed_dtype(weight))
