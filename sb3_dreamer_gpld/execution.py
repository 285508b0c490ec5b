"""How the update is executed: precision and compilation. Neither changes what is computed beyond rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch as th
from torch import nn

from sb3_dreamer_gpld.nets.steps import Runner, SteppedModule

# Compiling takes one to four minutes on two processor cores and saves a good part of each update of some hundred
# milliseconds, so it pays after about so many updates.
AUTO_COMPILE_UPDATES = 2000


def resolve_precision(precision: str, device: th.device) -> th.dtype:
    """The dtype of matrix products.

    :param precision: "float32", "bfloat16", or "auto": bfloat16 where the hardware multiplies it faster than float32
    :param device: where the nets are
    """
    if precision == "auto":
        return th.bfloat16 if has_fast_bfloat16(device) else th.float32
    return {"float32": th.float32, "bfloat16": th.bfloat16}[precision]


def has_fast_bfloat16(device: th.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32; asks the hardware, measures nothing.

    Of processors, those with AMX do, and AMD's with AVX512-BF16 (Zen 4 and later). Intel's with AVX512-BF16 alone, which is
    what a virtual machine may leave of AMX, take twice as long as in float32 (docs/performance.md).
    """
    if device.type == "cuda":
        return th.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        has = th.cpu.get_capabilities()
        made_by_amd = has.get("sse4a", False)  # SSE4a is AMD's alone
        return has.get("amx_bf16", False) or (has.get("avx512_bf16", False) and made_by_amd)
    return False


def is_compiler_error(error: BaseException) -> bool:
    """Whether an exception comes from torch.compile and not from what it compiled."""
    module = type(error).__module__
    return module.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))


class Execution(Runner):
    """Runs the steps of one model's nets, compiled if :meth:`compile` was called. It is the runner of all of them.

    :param net: the policy, or any module with :class:`~sb3_dreamer_gpld.nets.steps.SteppedModule` in it
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.compiled = False
        self.failed = False  # one failure is enough: the others would fail for the same reason
        self._left_out: Collection[str] = ()
        self._functions: dict[tuple[int, str], Callable[..., Any]] = {}
        self.nets = [module for module in net.modules() if isinstance(module, SteppedModule)]
        for module in self.nets:
            module.runner = self

    def compile(self, leave_out: Collection[str] = ()) -> None:
        """Compile every step at its first call from now on.

        :param leave_out: names of steps that stay as they are
        """
        self.compiled, self._left_out = True, leave_out

    def __call__(self, function: Callable[..., Any], net: nn.Module, *args: Any) -> Any:
        name = function.__name__
        if not self.compiled or self.failed or name in self._left_out:
            return function(net, *args)
        compiled = self._functions.get((id(net), name))
        if compiled is None:
            compiled = self._functions[id(net), name] = th.compile(function.__get__(net), fullgraph=True, dynamic=False)
        try:
            return compiled(*args)
        except Exception as error:
            if not is_compiler_error(error):
                raise
            self.failed = True
            warnings.warn(f"torch.compile failed, so training goes on uncompiled: {str(error)[:500]}", stacklevel=3)
            return function(net, *args)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Run the steps as they are for a while.

        A compiled function that met shapes of another size would be compiled again, and given up after a few times.
        """
        before, self.compiled = self.compiled, False
        try:
            yield
        finally:
            self.compiled = before


@contextmanager
def plain_steps(net: nn.Module) -> Iterator[None]:
    """:meth:`Execution.plain` of the runner of a net, if it has one."""
    runners = {module.runner for module in net.modules() if isinstance(module, SteppedModule)}
    with ExitStack() as stack:
        for runner in runners:
            if isinstance(runner, Execution):
                stack.enter_context(runner.plain())
        yield
