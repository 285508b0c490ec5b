"""Schedules of the penalty's weight λ (authors' release, ``compute_decayed_lambda``).

Each is a function of t, the optimiser updates since the penalty's start, of λ₀ and of λ_min; its own parameters have names
and defaults.
"""

from __future__ import annotations

import bisect
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any


def none(t: int, initial: float, minimum: float) -> float:
    """λ₀ at every update"""
    return initial


def linear(t: int, initial: float, minimum: float, *, decay_steps: float = 100_000) -> float:
    """λ_min + (λ₀ − λ_min)·(1 − p), with p = min(1, t/decay_steps)"""
    return minimum + (initial - minimum) * (1.0 - min(1.0, t / decay_steps))


def exponential(t: int, initial: float, minimum: float, *, decay_steps: float = 100_000) -> float:
    """λ_min + (λ₀ − λ_min)·e^(−5p), with p = min(1, t/decay_steps)"""
    return minimum + (initial - minimum) * math.exp(-5.0 * min(1.0, t / decay_steps))


def cosine(t: int, initial: float, minimum: float, *, decay_steps: float = 100_000) -> float:
    """λ_min + (λ₀ − λ_min)·½(1 + cos πp), with p = min(1, t/decay_steps)"""
    return minimum + (initial - minimum) * (0.5 * (1.0 + math.cos(math.pi * min(1.0, t / decay_steps))))


def step(t: int, initial: float, minimum: float, *, interval: float = 5000, factor: float = 0.9) -> float:
    """max(λ_min, λ₀·factor^⌊t/interval⌋)"""
    return max(minimum, initial * factor ** (t // interval))


def sqrt_time(t: int, initial: float, minimum: float, *, time_scale: float = 1000.0) -> float:
    """max(λ_min, λ₀/√(1 + t/time_scale)), with 1000 the paper's"""
    return max(minimum, initial / math.sqrt(1.0 + t / time_scale))


def custom(t: int, initial: float, minimum: float, *, steps: Sequence[float] = (), values: Sequence[float] = ()) -> float:
    """λ₀ before the first of ``steps``, then the value of the last step reached, at least λ_min"""
    reached = bisect.bisect_right(steps, t)
    return max(minimum, [initial, *values][reached])


SCHEDULES: dict[str, Callable[..., float]] = {
    schedule.__name__: schedule for schedule in (none, linear, exponential, cosine, step, sqrt_time, custom)
}


def default_parameters(name: str) -> dict[str, Any]:
    """The parameters of a schedule with their defaults."""
    accepted = inspect.signature(SCHEDULES[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in accepted if parameter.kind is parameter.KEYWORD_ONLY}
