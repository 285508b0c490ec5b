"""LaProp with adaptive gradient clipping, the optimiser of DreamerV3.

Sources: Ziyin et al., "LaProp: Separating momentum and adaptivity in Adam" (2020); Brock et al., "High-performance
large-scale image recognition without normalization" (2021) for adaptive clipping, here per tensor as in Hafner et al.,
Nature 2025 (Methods, "Optimizer").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch as th
from torch import Tensor


class LaProp(th.optim.Optimizer):
    """Clip each tensor's gradient to a share of its weights' norm, divide by its RMS, then apply momentum.

    For every tensor w with gradient g at step t = 1, 2, ...::

        g ← g / max(1, ‖g‖ / (clip·max(1e-3, ‖w‖)))
        v ← β₂·v + (1 − β₂)·g²            u = g / (√(v / (1 − β₂ᵗ)) + eps)
        m ← β₁·m + (1 − β₁)·u             w ← w − lr · m / (1 − β₁ᵗ)

    :param params: parameters or parameter groups
    :param lr: learning rate
    :param betas: β₁ of the momentum, β₂ of the squared gradients
    :param eps: added to the RMS
    :param clip: largest norm of a gradient relative to its weights' norm; 0 turns clipping off
    :raises ValueError: a hyperparameter is out of range

    As torch's gradient scaler does it, ``found_inf`` may be set to a scalar tensor before a step: 1 makes the step leave the
    weights as they are, without the host having to know. So may ``rates``, a tensor (groups,), which takes the place of the
    groups' learning rates: a step that is recorded as a CUDA graph reads them anew each time.
    """

    found_inf: Tensor | None = None
    rates: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        clip: float = 0.3,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr must be at least 0, not {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), not {betas}")
        if eps <= 0:
            raise ValueError(f"eps must be above 0, not {eps}")
        if clip < 0:
            raise ValueError(f"clip must be at least 0 (0 turns it off), not {clip}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "clip": clip})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in every torch optimiser, which leaves the steps where they are; here they lie beside their parameters."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            state["step"] = state["step"].to(parameter.device, th.float32)

    @th.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; the gradients are overwritten by the normalised ones.

        :param closure: re-evaluates the loss, as in every torch optimiser
        """
        loss = None
        if closure is not None:
            with th.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params, group["lr"] if self.rates is None else self.rates[index])
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor], rate: float | Tensor) -> None:
        for p in params:
            if not self.state[p]:
                # The step is a float tensor beside its parameter, so that no device has to wait for another.
                self.state[p]["step"] = th.zeros((), device=p.device)
                self.state[p]["exp_avg_sq"] = th.zeros_like(p)
                self.state[p]["exp_avg"] = th.zeros_like(p)
        grads = [p.grad for p in params if p.grad is not None]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        first = [self.state[p]["exp_avg"] for p in params]
        steps = [self.state[p]["step"] for p in params]
        beta1, beta2 = group["betas"]
        th._foreach_add_(steps, 1.0)
        stacked = th.stack(steps)  # (parameters,), since a parameter without a gradient is left out of a step

        def bias_corrections(beta: float) -> Tensor:
            return -th.expm1(stacked * math.log(beta)) if beta > 0 else th.ones_like(stacked)  # 1 − βᵗ without cancellation

        if group["clip"]:
            self._clip(params, grads, group["clip"])
        th._foreach_mul_(second, beta2)
        th._foreach_addcmul_(second, grads, grads, 1 - beta2)
        rms = th._foreach_sqrt(second)
        th._foreach_mul_(rms, list(bias_corrections(beta2).rsqrt().unbind()))
        th._foreach_add_(rms, group["eps"])
        th._foreach_div_(grads, rms)
        th._foreach_lerp_(first, grads, 1 - beta1)
        sizes = -rate / bias_corrections(beta1)  # (parameters,)
        if self.found_inf is not None:
            sizes = sizes * (1.0 - self.found_inf)
        th._foreach_add_(params, th._foreach_mul(first, list(sizes.unbind())))

    @staticmethod
    def _clip(params: list[Tensor], grads: list[Tensor], clip: float) -> None:
        limits = th._foreach_norm(params)
        th._foreach_clamp_min_(limits, 1e-3)
        th._foreach_mul_(limits, clip)
        ratios = th._foreach_norm(grads)
        th._foreach_div_(ratios, limits)
        th._foreach_clamp_min_(ratios, 1.0)
        th._foreach_div_(grads, ratios)
