"""Seconds spent in methods of living objects."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th

from benchmarks.yardstick import synchronize


@contextmanager
def timers(targets: Sequence[tuple[str, Any, str]], device: th.device) -> Iterator[dict[str, list[float]]]:
    """Time every call of some methods while the context lasts.

    :param targets: name of the phase, object, and name of its method
    :param device: whose work is waited for before and after each call
    :return: seconds of each call by phase
    """
    seconds = defaultdict[str, list[float]](list)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            return result

        return call

    before = [owner.__dict__.get(attribute) for _, owner, attribute in targets]  # a compiled function, or nothing
    for name, owner, attribute in targets:
        owner.__dict__[attribute] = timed(name, getattr(owner, attribute))
    try:
        yield seconds
    finally:
        for (_, owner, attribute), function in zip(targets, before, strict=True):
            if function is None:
                del owner.__dict__[attribute]
            else:
                owner.__dict__[attribute] = function
