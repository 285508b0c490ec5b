"""How the update is executed: precision and compilation. Neither changes what is computed beyond rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th

from sb3_dreamer_gpld.policies import DreamerPolicy

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


class CompiledStep:
    """A compiled function that falls back to the plain one if it cannot be compiled.

    :param function: the plain function
    """

    failed = False  # one failure is enough: the others would fail for the same reason

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = function
        self.compiled = th.compile(function, fullgraph=True, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if CompiledStep.failed:
            return self.plain(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except Exception as error:
            if not is_compiler_error(error):
                raise
            CompiledStep.failed = True
            warnings.warn(f"torch.compile failed, so training goes on uncompiled: {str(error)[:500]}", stacklevel=2)
            return self.plain(*args, **kwargs)


def is_compiler_error(error: BaseException) -> bool:
    """Whether an exception comes from torch.compile and not from what it compiled."""
    module = type(error).__module__
    return module.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))


STEPS = {
    "world_model": ("encode_targets", "replay_losses", "penalty_losses"),
    "world_model.rssm": ("_posterior_steps", "_prior_step"),
    "actor_critic": ("policy_outputs", "value_step", "prediction_step", "value_loss_step"),
}


def compile_steps(policy: DreamerPolicy, leave_out: Collection[str] = ()) -> None:
    """Replace the functions that an update is made of by compiled ones. Calling it again changes nothing.

    :param policy: owner of the functions in :data:`STEPS`
    :param leave_out: names of functions that stay as they are
    """
    for path, names in STEPS.items():
        owner = policy.get_submodule(path)
        for name in names:
            if name not in owner.__dict__ and name not in leave_out:
                owner.__dict__[name] = CompiledStep(getattr(owner, name))


def is_compiled(policy: DreamerPolicy) -> bool:
    """Whether :func:`compile_steps` was called on the policy."""
    return "_posterior_steps" in policy.world_model.rssm.__dict__


@contextmanager
def plain_steps(policy: DreamerPolicy) -> Iterator[None]:
    """Undo :func:`compile_steps` for a while.

    A compiled function that met shapes of another size would be compiled again, and given up after a few times.
    """
    compiled = []
    for path, names in STEPS.items():
        owner = policy.get_submodule(path)
        compiled += [(owner, name, owner.__dict__.pop(name)) for name in names if name in owner.__dict__]
    try:
        yield
    finally:
        for owner, name, function in compiled:
            owner.__dict__[name] = function
