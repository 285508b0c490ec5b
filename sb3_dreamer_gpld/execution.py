"""How updates and steps of acting are executed: precision, compilation, and recording as CUDA graphs.

None of them changes what is computed beyond rounding.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch as th
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from sb3_dreamer_gpld.nets.steps import Runner, SteppedModule

# Compiling takes one to four minutes on two processor cores and saves a good part of each update of some hundred
# milliseconds, so it pays after about so many updates.
AUTO_COMPILE_UPDATES = 2000

# Calls of a function before it is recorded: kernels are made and chosen, and memory is laid out, at the first ones.
CALLS_BEFORE_RECORDING = 3

ALL_ROWS = 2**40  # more states than any update has


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
        capabilities = getattr(th.cpu, "get_capabilities", None)
        if capabilities is None:  # PyTorch 2.10 and older cannot tell
            return False
        has = capabilities()
        made_by_amd = has.get("sse4a", False)  # SSE4a is AMD's alone
        return has.get("amx_bf16", False) or (has.get("avx512_bf16", False) and made_by_amd)
    return False


def is_compiler_error(error: BaseException) -> bool:
    """Whether an exception comes from torch.compile and not from what it compiled."""
    module = type(error).__module__
    return module.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "triton"))


class Execution(Runner):
    """Runs the steps of one model's nets, compiled if :meth:`compile` was called. It is the runner of all of them.

    :param net: the policy, or any module with :class:`~sb3_dreamer_gpld.nets.steps.SteppedModule` in it
    :param device: of the net. A GPU computes all predictions together: it has no cache to fill, and each kernel costs
    """

    def __init__(self, net: nn.Module, device: th.device) -> None:
        super().__init__(**({} if device.type == "cpu" else {"chunk_rows": ALL_ROWS}))
        self.device = device
        self.recorder: Recorder | None = None  # None: functions run as they are, whole or not
        self._recorded: dict[str, Recorded] = {}
        self.compiled = False
        self.failed = False  # one failure is enough: the others would fail for the same reason
        self._left_out: Collection[str] = ()
        self._functions: dict[tuple[int, str], Callable[..., Any]] = {}
        self.nets = [module for module in net.modules() if isinstance(module, SteppedModule)]
        for module in self.nets:
            module.runner = self

    def __reduce__(self) -> tuple[type[Runner], tuple[int, int, int]]:
        """A copy of the nets runs their steps as they are: what was compiled and recorded is of these nets alone."""
        return Runner, (self.chunk_rows, self.steps_together, self.imagined_together)

    def compile(self, leave_out: Collection[str] = ()) -> None:
        """Compile every step at its first call from now on; on a GPU, record whole functions as CUDA graphs as well.

        :param leave_out: names of steps that stay as they are
        """
        self.compiled, self._left_out = True, leave_out
        if self.device.type == "cuda":
            self.recorder = CudaGraphs(self.device)

    def run_whole(self, function: Callable[[Any], Any], key: Callable[[], Any], inputs: Any) -> Any:
        """Run a function of tensors, as a CUDA graph where that is recorded.

        :param function: depends on nothing but its inputs, what ``key`` names, and the device's random numbers; reads no value
        :param key: gives what a recording takes for granted, to be compared by ==; None if there can be none
        :param inputs: tensors in named tuples and dicts
        :return: what the function returns; where it was recorded, in memory that the next call overwrites
        """
        if self.recorder is None:
            return function(inputs)
        recorded = self._recorded.setdefault(function.__name__, Recorded(self.recorder))
        return recorded(function, (key(), self.compiled, self.failed, self._left_out), inputs)

    def is_recorded(self, name: str) -> bool:
        """Whether the function of that name runs as a CUDA graph now."""
        return name in self._recorded and self._recorded[name].recording is not None

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
            self.give_up_compiling(error)
            return function(net, *args)

    def give_up_compiling(self, error: Exception) -> None:
        """Go on uncompiled after an error of the compiler, with a warning; any other error is raised again.

        :param error: which is being handled
        """
        if not self.compiled or self.failed or not is_compiler_error(error):
            raise error
        self.failed = True
        warnings.warn(f"torch.compile failed, so training goes on uncompiled: {str(error)[:500]}", stacklevel=4)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Run the steps as they are for a while, and record nothing.

        A compiled function that met shapes of another size would be compiled again, and given up after a few times.
        """
        before = self.compiled, self.recorder
        self.compiled, self.recorder = False, None
        try:
            yield
        finally:
            self.compiled, self.recorder = before


class Recorder(Protocol):
    """A way to run a function once and its operations again and again."""

    def warm_up(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, str]:
        """Run a function that is to be recorded later, where that will be done.

        :return: what it returned, and why it cannot be recorded, or ""
        """

    def record(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, Callable[[], object]]:
        """Note a function's operations without their effects.

        :return: where its results will lie, and what does the operations again
        """


class CudaGraphs:
    """Records CUDA graphs. Random numbers of the device's own generator are drawn anew by each replay.

    :param device: a GPU
    """

    def __init__(self, device: th.device) -> None:
        self.device = device
        # By the function's name. A graph that is dropped gives back the memory that libraries work in on its stream, which
        # another one that was recorded there would still use
        self._streams: dict[str, th.cuda.Stream] = {}

    def _stream_of(self, function: Callable[[Any], Any]) -> th.cuda.Stream:
        name = function.__name__
        if name not in self._streams:
            self._streams[name] = th.cuda.Stream(self.device)
        return self._streams[name]

    def warm_up(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, str]:
        current, mode = th.cuda.current_stream(self.device), th.cuda.get_sync_debug_mode()
        stream = self._stream_of(function)
        stream.wait_stream(current)
        with warnings.catch_warnings(record=True) as told, th.cuda.stream(stream):
            warnings.simplefilter("always")
            th.cuda.set_sync_debug_mode("warn")
            try:
                outputs = function(inputs)
            finally:
                th.cuda.set_sync_debug_mode(mode)
        current.wait_stream(stream)
        # An operation that waits would break a recording, and leave the allocator and the random numbers in one
        waits = [each for each in told if "synchronizing CUDA operation" in str(each.message)]
        for each in told:  # PyTorch tells of its debug mode itself
            if each not in waits and not str(each.message).startswith("Synchronization debug mode"):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return outputs, str(waits[0].message) if waits else ""

    def record(self, function: Callable[[Any], Any], inputs: Any) -> tuple[Any, Callable[[], object]]:
        current, graph, stream = th.cuda.current_stream(self.device), th.cuda.CUDAGraph(), self._stream_of(function)
        gc.collect()  # what is freed during a recording would break it
        th.clear_autocast_cache()
        # The outer context goes back to the streams of before, which a recording that fails does not
        # Other threads may go on meanwhile
        with th.cuda.stream(current), th.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = function(inputs)
        return outputs, graph.replay


class Recording(NamedTuple):
    """A function that was recorded.

    :param inputs: its input tensors, to be filled
    :param outputs: what it returned, overwritten by each replay
    :param replay: runs it on what the inputs hold
    """

    inputs: list[Tensor]
    outputs: Any
    replay: Callable[[], object]


class Recorded:
    """One function, recorded once it has been called a few times with the same key and the same shapes.

    With others it is recorded anew; if that fails once, it runs as it is from then on.

    :param recorder: makes the recordings
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.recording: Recording | None = None
        self._made_for: Any = None
        self._calls, self._failed = 0, False

    def __call__(self, function: Callable[[Any], Any], key: Any, inputs: Any) -> Any:
        """Arguments as in :meth:`Execution.run_whole`; ``key`` as it is now, its first part None where there is none."""
        if self._failed or key[0] is None:
            return function(inputs)
        leaves, structure = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        form = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if (key, structure, form) != self._made_for:
            self._made_for, self._calls, self.recording = (key, structure, form), 0, None
        if self.recording is None:
            self._calls += 1
            if self._calls <= CALLS_BEFORE_RECORDING:
                outputs, problem = self.recorder.warm_up(function, inputs)
                if problem and self._calls == CALLS_BEFORE_RECORDING:
                    self._give_up(function, problem)
                return outputs
            if problem := self._record(function, inputs):
                self._give_up(function, problem)
                return function(inputs)
            assert self.recording is not None
        th._foreach_copy_(self.recording.inputs, tensors)
        self.recording.replay()
        return self.recording.outputs

    def _record(self, function: Callable[[Any], Any], inputs: Any) -> str:
        """Record a function.

        :return: why that failed, or "". Tensors of a failed one are free by then: its frames end with the error.
            PyTorch may keep the memory that they lay in
        """
        own = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
        try:
            outputs, replay = self.recorder.record(function, own)
        except Exception as error:
            return str(error) or type(error).__name__
        self.recording = Recording([leaf for leaf in tree_flatten(own)[0] if isinstance(leaf, Tensor)], outputs, replay)
        return ""

    def _give_up(self, function: Callable[[Any], Any], problem: str) -> None:
        self._failed = True
        name = function.__name__.strip("_")
        text = f"Recording {name!r} as a CUDA graph failed, so training goes on without: {problem[:500]}"
        warnings.warn(text, stacklevel=5)


def addresses(*modules: nn.Module) -> tuple[int, ...]:
    """Where the parameters and buffers of some nets lie."""
    return tuple(x.data_ptr() for module in modules for part in (module.parameters(), module.buffers()) for x in part)


@contextmanager
def plain_steps(net: nn.Module) -> Iterator[None]:
    """:meth:`Execution.plain` of the runner of a net, if it has one."""
    runners = {module.runner for module in net.modules() if isinstance(module, SteppedModule)}
    with ExitStack() as stack:
        for runner in runners:
            if isinstance(runner, Execution):
                stack.enter_context(runner.plain())
        yield
