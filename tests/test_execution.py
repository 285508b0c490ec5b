"""Precision and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from test_parity import RECORDINGS, Recording, assert_tensor
from torch.profiler import ProfilerActivity, profile

from sb3_dreamer_gpld import DreamerGPLD, dreamer_gpld, execution

TINY: dict[str, Any] = dict(
    model_size="debug", batch_size=4, batch_length=8, learning_starts=32, train_ratio=8, imagination_horizon=3, device="cpu"
)


class CompilerFailed(Exception):
    """Stands in for an error of the compiler."""


CompilerFailed.__module__ = "torch._inductor.exc"


def test_training_goes_on_if_the_compiler_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(function: Any, **kwargs: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise CompilerFailed("no g++")

        return call

    monkeypatch.setattr(th, "compile", failing)
    monkeypatch.setattr(execution.CompiledStep, "failed", False)
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", compile=True, **TINY)
    with pytest.warns(UserWarning, match="torch.compile failed, so training goes on uncompiled: no g") as warned:
        model.learn(60)
    assert model._n_updates > 0 and len([w for w in warned if "torch.compile" in str(w.message)]) == 1


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th, "compile", lambda function, **kwargs: function)

    def wrong() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        execution.CompiledStep(wrong)()


@pytest.mark.parametrize(
    "setting, steps, compiled",
    [("auto", 2000, False), ("auto", 100_000, True), (False, 100_000, False), (True, 10, True)],
)
def test_when_it_compiles(setting: bool | str, steps: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(dreamer_gpld, "compile_steps", lambda policy, leave_out: calls.append(policy))
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", compile=setting, device="cpu", model_size="debug")
    model._compile_if_it_pays(steps)
    assert bool(calls) == compiled


@pytest.mark.parametrize("estimator", ["hutchinson", "exact"])
def test_the_exact_penalty_is_left_out(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th, "compile", lambda function, **kwargs: function)
    model = DreamerGPLD("MlpPolicy", "Pendulum-v1", compile=True, penalty_estimator=estimator, **TINY)
    model._compile_if_it_pays(10)
    assert execution.is_compiled(model.policy)
    assert ("penalty_losses" in model.policy.world_model.__dict__) == (estimator == "hutchinson")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, th.bfloat16),  # Intel, Sapphire Rapids and later
        ({"avx512_bf16": True, "sse4a": True}, th.bfloat16),  # AMD, Zen 4 and later
        ({"avx512_bf16": True, "amx_bf16": False, "sse4a": False}, th.float32),  # Intel, AMX hidden: bfloat16 is slower
        ({"avx2": True, "sse4a": True}, th.float32),  # AMD, before Zen 4
        ({}, th.float32),  # not x86
    ],
)
def test_precision(capabilities: dict[str, bool], dtype: th.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.cpu, "get_capabilities", lambda: capabilities)
    cpu = th.device("cpu")
    assert execution.resolve_precision("auto", cpu) == dtype
    assert execution.resolve_precision("float32", cpu) == th.float32
    assert execution.resolve_precision("bfloat16", cpu) == th.bfloat16


def test_update_never_waits_for_the_device() -> None:
    """No number is read on the host inside an update: on a GPU, each one would stop the stream of work."""
    recording = Recording(RECORDINGS["cont0"])
    model = recording.model()
    arguments = recording.batch(model), recording.world_draws(model), recording.imagination_draws(model)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model.update(*arguments)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::addmm" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}


def test_steps_are_captured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every compiled function is one graph without a break; run as captured, the losses are those of the recording."""
    compile_, graphs = th.compile, []

    def capture(function: Any, **kwargs: Any) -> Any:
        assert kwargs["fullgraph"]
        graphs.append(function.__name__)
        return compile_(function, backend="aot_eager", **kwargs)  # the graph, without the C++ compiler's minutes

    monkeypatch.setattr(th, "compile", capture)
    monkeypatch.setattr(execution.CompiledStep, "failed", False)
    recording = Recording(RECORDINGS["cont0"])
    model = recording.model()
    arguments = recording.batch(model), recording.world_draws(model), recording.imagination_draws(model)
    execution.compile_steps(model.policy)
    result = model.loss(*arguments)
    result.total.backward()
    assert not execution.CompiledStep.failed and len(graphs) == sum(map(len, execution.STEPS.values()))
    th.testing.assert_close(result.total.detach(), recording.tensor("loss_total"), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", sorted(RECORDINGS))
def test_bfloat16_losses_and_gradients(name: str) -> None:
    """In bfloat16 each loss is within 1 % of that in float32, and the gradient has its direction and length.

    That of the recurrence is looked at by itself too, since it is a small part of the whole.
    """
    recording = Recording(RECORDINGS[name])
    model = recording.model()
    arguments = recording.batch(model), recording.world_draws(model), recording.imagination_draws(model)

    def gradient(precision: th.dtype | None) -> tuple[dict[str, th.Tensor], th.Tensor, th.Tensor]:
        with th.autocast("cpu", precision, enabled=precision is not None):
            result = model.loss(*arguments)
        model.policy.zero_grad()
        result.total.backward()

        def all_of(module: th.nn.Module) -> th.Tensor:
            return th.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

        return result.losses, all_of(model.policy), all_of(model.policy.world_model.rssm)

    (losses, exact, exact_rssm), (low_losses, low, low_rssm) = gradient(None), gradient(th.bfloat16)
    assert not th.equal(exact, low)
    assert th.cosine_similarity(exact_rssm, low_rssm, dim=0) > 0.99
    means, low_means = ({name: loss.mean() for name, loss in each.items()} for each in (losses, low_losses))
    th.testing.assert_close(low_means, means, rtol=1e-2, atol=0.0)
    assert th.cosine_similarity(exact, low, dim=0) > 0.999
    th.testing.assert_close(low.norm(), exact.norm(), rtol=1e-2, atol=0.0)


@pytest.mark.long
@pytest.mark.parametrize("name", ["cont0", "disc0"])
def test_compiled_losses_and_gradients(name: str) -> None:
    """The compiled update (no graph break) gives what the recordings hold, up to the rounding of fused operations."""
    recording = Recording(RECORDINGS[name])
    model = recording.model()
    batch, draws = recording.batch(model), recording.world_draws(model)
    imagination_draws = recording.imagination_draws(model)
    execution.compile_steps(model.policy)
    result = model.loss(batch, draws, imagination_draws)
    assert not execution.CompiledStep.failed
    th.testing.assert_close(result.total.detach(), recording.tensor("loss_total"), rtol=1e-5, atol=0.0)
    result.total.backward()
    gradients = recording.parameters("grad/")
    for parameter, p in model.policy.named_parameters():
        if parameter in gradients and not parameter.startswith("actor_critic.value"):
            assert p.grad is not None
            assert_tensor(parameter, p.grad, gradients[parameter])
