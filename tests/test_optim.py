"""LaProp against its definition, written out for one parameter at a time."""

import io
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_dreamer_gpld.optim import LaProp

SHAPES = [(4, 3), (5,), ()]
Gradients = list[list[np.ndarray | None]]  # by step, then by parameter


def reference(
    weight: np.ndarray,
    gradients: list[np.ndarray | None],
    lr: float = 4e-5,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-20,
    clip: float = 0.3,
) -> np.ndarray:
    """One parameter after all steps; where there is no gradient, nothing happens."""
    second, first, step = np.zeros_like(weight), np.zeros_like(weight), 0
    for gradient in gradients:
        if gradient is None:
            continue
        step += 1
        if clip:
            limit = clip * max(1e-3, np.sqrt(np.sum(weight**2)))
            gradient = gradient / max(1.0, np.sqrt(np.sum(gradient**2)) / limit)
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        scaled = gradient / (np.sqrt(second / (1 - betas[1] ** step)) + eps)
        first = betas[0] * first + (1 - betas[0]) * scaled
        weight = weight - lr * first / (1 - betas[0] ** step)
    return weight


def random_problem(steps: int, scale: float = 1.0) -> tuple[list[np.ndarray], Gradients]:
    """Weights of about ``scale``, and gradients that are sometimes far larger and sometimes far smaller than these."""
    rng = np.random.default_rng(0)
    weights = [scale * np.asarray(rng.standard_normal(shape)) for shape in SHAPES]
    sizes = 10.0 ** rng.uniform(-3, 2, steps)
    return weights, [[scale * size * np.asarray(rng.standard_normal(shape)) for shape in SHAPES] for size in sizes]


def parameters(weights: list[np.ndarray], dtype: th.dtype = th.float64) -> list[th.Tensor]:
    return [th.nn.Parameter(th.tensor(w, dtype=dtype)) for w in weights]


def run(optimizer: LaProp, params: list[th.Tensor], gradients: Gradients) -> None:
    for at_step in gradients:
        for p, gradient in zip(params, at_step, strict=True):
            p.grad = None if gradient is None else th.tensor(gradient, dtype=p.dtype)
        optimizer.step()


def assert_follows(params: list[th.Tensor], weights: list[np.ndarray], gradients: Gradients, **kwargs: Any) -> None:
    """The parameters are where the reference is, to a millionth of how far it has come."""
    for i, p in enumerate(params):
        expected = reference(weights[i], [at_step[i] for at_step in gradients], **kwargs)
        tolerance = (1e-6 if p.dtype == th.float64 else 1e-4) * np.abs(expected - weights[i]).max()
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"clip": 0.0},
        {"clip": 0.01},
        {"clip": 1e6},  # never reached
        {"betas": (0.0, 0.9)},
        {"betas": (0.5, 0.0)},
        {"eps": 0.1},
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # the smaller weights have a norm below the floor of the clipping
def test_several_steps(scale: float, kwargs: dict[str, Any]) -> None:
    weights, gradients = random_problem(12, scale)
    params = parameters(weights)
    run(LaProp(params, lr=1e-3 * scale, **kwargs), params, gradients)
    assert_follows(params, weights, gradients, lr=1e-3 * scale, **kwargs)


def test_default_hyperparameters_and_float32() -> None:
    weights, gradients = random_problem(12)
    weights = [100 * 4e-5 * w for w in weights]  # small enough for float32 to see every step
    params = parameters(weights, th.float32)
    run(LaProp(params), params, gradients)
    assert_follows(params, weights, gradients)
    assert all(p.dtype == th.float32 for p in params)


def test_clipping_makes_a_difference_in_the_reference() -> None:
    """Guards the tests above: their gradients are clipped at some steps and not at others."""
    weights, gradients = random_problem(12)
    norms = [np.linalg.norm(at_step[0]) / np.linalg.norm(weights[0]) for at_step in gradients]
    assert min(norms) < 0.3 < max(norms)
    of_first = [at_step[0] for at_step in gradients]
    clipped, free = (reference(weights[0], of_first, lr=1e-3, clip=clip) for clip in (0.3, 0.0))
    assert np.abs(clipped - free).max() > 1e-4


@pytest.mark.parametrize(
    ("weight", "gradient", "clipped"),
    [
        ([3.0, 4.0], [0.0, 10.0], 1.5),  # 0.3·5
        ([3.0, 4.0], [0.0, 1.4], 1.4),
        ([3e-5, 4e-5], [0.0, 10.0], 3e-4),  # 0.3·1e-3
        ([0.0, 0.0], [0.0, 2e-4], 2e-4),
    ],
)
def test_norm_of_the_clipped_gradient(weight: list[float], gradient: list[float], clipped: float) -> None:
    params = parameters([np.array(weight)])
    optimizer = LaProp(params)
    run(optimizer, params, [[np.array(gradient)]])
    second = optimizer.state[params[0]]["exp_avg_sq"]  # (1 − β₂)·g² after one step
    assert (second.sum() / 1e-3).sqrt().item() == pytest.approx(clipped, rel=1e-6)


def test_first_step_moves_every_number_by_the_learning_rate() -> None:
    """Both moving averages are corrected for their start at 0."""
    params = parameters([np.array([1.0, -2.0, 3.0])])
    run(LaProp(params, lr=0.01), params, [[np.array([1e-7, -5.0, 0.2])]])
    np.testing.assert_allclose(params[0].detach().numpy(), [0.99, -1.99, 2.99], rtol=1e-6)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_zero_gradients_change_nothing(dtype: th.dtype) -> None:
    params = parameters([np.array([1.0, 0.0])], dtype)
    run(LaProp(params, lr=0.1), params, [[np.zeros(2)]] * 3)
    assert params[0].tolist() == [1.0, 0.0]


def test_learning_rate_zero_only_gathers_statistics() -> None:
    """The first update of the warm-up has the learning rate 0."""
    weights, gradients = random_problem(1)
    params = parameters(weights)
    optimizer = LaProp(params, lr=0.0)
    run(optimizer, params, gradients)
    for p, weight in zip(params, weights, strict=True):
        assert np.array_equal(p.detach().numpy(), weight)
        assert optimizer.state[p]["step"] == 1
        assert optimizer.state[p]["exp_avg"].all() and optimizer.state[p]["exp_avg_sq"].all()


def test_parameters_without_gradient_are_left_alone() -> None:
    weights, gradients = random_problem(5)
    gradients = [[None, *at_step[1:]] for at_step in gradients]
    params = parameters(weights)
    optimizer = LaProp(params, lr=1e-3)
    run(optimizer, params, gradients)
    assert_follows(params, weights, gradients, lr=1e-3)
    assert np.array_equal(params[0].detach().numpy(), weights[0]) and params[0] not in optimizer.state
    run(optimizer, params, [[None, None, None]])
    assert_follows(params, weights, gradients, lr=1e-3)


def test_parameters_whose_gradients_come_at_different_steps() -> None:
    weights, gradients = random_problem(6)
    gradients = [[g if (step + i) % 3 else None for i, g in enumerate(row)] for step, row in enumerate(gradients)]
    params = parameters(weights)
    run(LaProp(params, lr=1e-3), params, gradients)
    assert_follows(params, weights, gradients, lr=1e-3)


def test_parameter_groups_keep_their_own_hyperparameters() -> None:
    weights, gradients = random_problem(8)
    settings = [{"lr": 1e-2, "clip": 0.0}, {"betas": (0.5, 0.9)}, {"eps": 0.3, "clip": 0.05}]
    params = parameters(weights)
    groups = [{"params": [p], **kwargs} for p, kwargs in zip(params, settings, strict=True)]
    run(LaProp(groups, lr=1e-3), params, gradients)
    for i, kwargs in enumerate(settings):
        assert_follows([params[i]], [weights[i]], [[at_step[i]] for at_step in gradients], **{"lr": 1e-3, **kwargs})


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_saved_and_loaded_state_continues_identically(dtype: th.dtype) -> None:
    weights, gradients = random_problem(8)
    params = parameters(weights, dtype)
    optimizer = LaProp(params, lr=1e-3, clip=0.1)
    run(optimizer, params, gradients[:4])

    file = io.BytesIO()
    th.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = th.load(file, weights_only=True)
    restored = [th.nn.Parameter(p.clone()) for p in saved["params"]]
    again = LaProp(restored)
    again.load_state_dict(saved["optimizer"])
    assert again.param_groups[0]["lr"] == 1e-3 and again.param_groups[0]["clip"] == 0.1

    run(optimizer, params, gradients[4:])
    run(again, restored, gradients[4:])
    assert all(th.equal(a, b) and a.dtype == dtype for a, b in zip(restored, params, strict=True))


def test_loaded_steps_lie_beside_their_parameters() -> None:
    """PyTorch moves the other tensors only: a model of a GPU, loaded on the processor, had its steps there."""
    params = parameters([np.array([2.0, -1.0])])
    optimizer = LaProp(params)
    run(optimizer, params, [[np.array([1.0, 1.0])]])
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = saved["state"][0]["step"].double()
    optimizer.load_state_dict(saved)
    step = optimizer.state[params[0]]["step"]
    assert step == 1.0 and step.dtype == th.float32 and step.device == params[0].device


def test_closure_is_evaluated_with_gradients() -> None:
    params = parameters([np.array([2.0, -1.0])])
    optimizer = LaProp(params, lr=0.01)

    def closure() -> th.Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    np.testing.assert_allclose(params[0].detach().numpy(), [1.99, -0.99])


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"lr": -1e-3}, "lr"),
        ({"betas": (1.0, 0.999)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"clip": -0.3}, "clip"),
    ],
)
def test_wrong_hyperparameters(kwargs: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        LaProp(parameters([np.ones(2)]), **kwargs)
