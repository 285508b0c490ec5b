"""The pictures of ``dreamer-gpld diagnose``: they draw what was measured, and measure nothing."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sb3_dreamer_gpld.diagnostics import Smoothness

Errors = Mapping[str, Tensor]  # by name, (H + 1,) each


def draw_smoothness(found: Mapping[str, Smoothness]) -> Figure:
    """KL against the size of the perturbation, Jacobian norms, and transition ratios.

    :param found: what was measured, by label
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    kl, posterior, prior, ratio = figure.subplots(1, 4, width_ratios=[1.6, 1, 1, 1])
    for label, x in found.items():
        kl.plot(list(x.kl), [value.mean().item() for value in x.kl.values()], marker=".", label=label)
    kl.set_xscale("log")
    kl.set_yscale("log")
    kl.set_xlabel("standard deviation of δ")
    kl.set_title("KL(q(u) ‖ q(u + δ)) of the posterior, nats")
    _boxes(posterior, {label: x.posterior_jacobian for label, x in found.items()}, "‖∂q/∂u‖ of the posterior")
    _boxes(prior, {label: x.prior_jacobian for label, x in found.items()}, "‖∂q/∂u‖ of the prior")
    _boxes(ratio, {label: x.transition_ratio for label, x in found.items()}, "‖f(s+δ) − f(s)‖ / ‖δ‖, imagined")
    kl.grid(alpha=0.3)
    kl.legend()
    return figure


def _boxes(axes: Axes, values: dict[str, Tensor], title: str) -> None:
    axes.boxplot([x.cpu().numpy() for x in values.values()], showfliers=False)
    axes.set_xticklabels(list(values))
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)


def draw_open_loop(found: Mapping[str, tuple[Errors, Errors]]) -> Figure:
    """Errors of observations, reward and continuation against the number of imagined steps.

    :param found: by label, open-loop and teacher-forced errors; those of observations may be missing
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    titles = {
        "observation": "observation: squared error",
        "reward": "reward: absolute error",
        "continue": "continue: absolute error",
    }
    titles = {name: title for name, title in titles.items() if any(name in errors for errors, _ in found.values())}
    for axes, (name, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for number, (label, (errors, seeing)) in enumerate(found.items()):
            if name not in errors:
                continue
            axes.plot(errors[name].cpu().numpy(), color=f"C{number}", label=label)
            axes.plot(seeing[name].cpu().numpy(), color=f"C{number}", ls=":", label=f"{label}, seeing every step")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("imagined steps k")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    axes.legend()
    return figure
