"""How the steps that an update is made of are run: as they are, or as :mod:`sb3_dreamer_gpld.execution` has compiled them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


class Runner:
    """Runs steps as they are.

    :param chunk_rows: states whose predictions are computed together: enough for a good matrix product, few enough for a
        processor's cache
    :param steps_together: steps of ``observe`` that make one step here: more cost less to call, and take longer to compile
    :param imagined_together: the same of imagined steps
    """

    def __init__(self, chunk_rows: int = 1024, steps_together: int = 4, imagined_together: int = 5) -> None:
        self.chunk_rows, self.steps_together, self.imagined_together = chunk_rows, steps_together, imagined_together

    def __call__(self, function: Callable[..., Any], net: nn.Module, *args: Any) -> Any:
        """The step ``function`` of a net."""
        return function(net, *args)


class SteppedModule(nn.Module):
    """A net with functions marked by :func:`compilable`."""

    runner: Runner = Runner()
    steps: ClassVar[tuple[str, ...]] = ()  # names of the marked functions

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        marked = [name for name, value in vars(cls).items() if hasattr(value, "is_step")]
        cls.steps = tuple(dict.fromkeys([*cls.steps, *marked]))


def compilable(function: Function) -> Function:
    """Mark a function of a :class:`SteppedModule` as one that is compiled on its own. It takes positional arguments only."""

    @functools.wraps(function)
    def run(self: SteppedModule, *args: Any) -> Any:
        return self.runner(function, self, *args)

    run.is_step = True  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]
