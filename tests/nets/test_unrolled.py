"""Products repeated along a recurrence: values and gradients against plain automatic differentiation."""

from __future__ import annotations

import pytest
import torch as th
from torch import Tensor

from sb3_dreamer_gpld.config import ModelConfig
from sb3_dreamer_gpld.nets.rssm import RSSM, Products
from sb3_dreamer_gpld.nets.steps import Runner
from sb3_dreamer_gpld.nets.unrolled import Affine, StepProducts, Unrolled

STEPS, ROWS, BLOCKS, SIZE, OTHERS = 7, 3, 2, 4, 5


def parameters(blocks: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """What is added, two weights and a start of a recurrence in float64."""
    th.manual_seed(0)
    group = (BLOCKS,) if blocks else ()
    added = th.randn(STEPS, *group, ROWS, SIZE, dtype=th.float64)
    weights = [th.randn(*group, inputs, SIZE, dtype=th.float64) for inputs in (SIZE, OTHERS)]
    start = th.randn(*group, ROWS, SIZE, dtype=th.float64)
    return added.requires_grad_(), [weight.requires_grad_() for weight in weights], start.requires_grad_()


def drive(state: Tensor) -> Tensor:
    """The second input, (N, OTHERS): blocks see the same one."""
    total = state.sum(0) if state.dim() == 3 else state
    return th.cat([total, total[:, :1].square()], -1)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("blocks", [False, True])
def test_equals_plain_products(blocks: bool, together: int) -> None:
    added, weights, start = parameters(blocks)

    def run(unrolled: bool) -> Tensor:
        product = Unrolled(added, weights, together)
        state = start
        for part, its_added in enumerate(added.split(together)):
            running = StepProducts(product.at(part))
            for at_step in its_added:
                state = th.tanh((running if unrolled else Affine(at_step, weights))(state, drive(state)))
            if unrolled:
                product.note(running.inputs())
        return state

    leaves = [added, *weights, start]
    expected = run(False)
    th.testing.assert_close(run(True), expected, rtol=0, atol=1e-14)
    for ours, theirs in zip(
        th.autograd.grad(run(True).square().sum(), leaves), th.autograd.grad(expected.square().sum(), leaves), strict=True
    ):
        th.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_frozen_weights_get_no_gradient() -> None:
    added, weights, start = parameters(False)
    weights[0].requires_grad_(False)
    product = Unrolled(added, weights, together=1)
    inputs = (start, drive(start))
    total = th.zeros((), dtype=th.float64)
    for t in range(STEPS):
        running = StepProducts(product.at(t))
        total = total + running(*inputs).sum()
        product.note(running.inputs())
    total.backward()
    assert weights[0].grad is None
    assert weights[1].grad is not None


def test_bfloat16_products_have_float32_gradients() -> None:
    th.manual_seed(0)
    weight = th.randn(SIZE, SIZE, requires_grad=True)
    x = th.randn(STEPS, ROWS, SIZE)
    with th.autocast("cpu", th.bfloat16):
        product = Unrolled(th.zeros(STEPS, ROWS, SIZE, requires_grad=True), [weight], together=STEPS)
        running = StepProducts(product.at(0))
        outputs = [running(x[t]) for t in range(STEPS)]
        product.note(running.inputs())
    assert outputs[0].dtype == th.bfloat16
    th.stack(outputs).float().square().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == th.float32
    expected = 2 * x.flatten(0, 1).T @ x.flatten(0, 1) @ weight.detach()
    th.testing.assert_close(weight.grad, expected, rtol=0.05, atol=0.2)


def test_nothing_is_kept_without_gradient() -> None:
    with th.no_grad():
        product = Unrolled(th.zeros(STEPS, ROWS, SIZE), [th.zeros(SIZE, SIZE)], together=1)
        product.note((th.zeros(1, ROWS, SIZE),))
    assert product.inputs == [[]]


def test_running_product_keeps_what_it_was_called_with() -> None:
    th.manual_seed(0)
    running = StepProducts(Affine(th.randn(2, ROWS, SIZE), [th.randn(SIZE, SIZE), th.randn(OTHERS, SIZE)]))
    calls = [(th.randn(ROWS, SIZE).requires_grad_(), th.randn(ROWS, OTHERS)) for _ in range(2)]
    for t, inputs in enumerate(calls):
        assert th.equal(running(*inputs), Affine(running.added[t], running.weights)(*inputs))
    kept = running.inputs()
    assert [x.requires_grad for x in kept] == [False, False]
    assert all(th.equal(kept[i], th.stack([inputs[i] for inputs in calls])) for i in range(2))
    with pytest.raises(IndexError):
        running(*calls[0])  # a third step


def test_what_is_made_of_products_has_their_names() -> None:
    names = Products("deter_in", "stoch_in", "core", "gates", ("first", "last"))
    reversed_names = Products(**{name: names._asdict()[name] for name in reversed(Products._fields)})
    assert names.each(lambda a, b: (a, b), reversed_names) == names.each(lambda a: (a, a))
    with pytest.raises(ValueError, match="zip"):
        names.each(lambda a, b: a, names._replace(posterior=("first",)))


@pytest.mark.parametrize("layers", [1, 3])
def test_step_is_one_step_of_observe(layers: int) -> None:
    """Acting goes another way to the same numbers, resets included."""
    th.manual_seed(0)
    config = ModelConfig(deter=16, hidden=4, stoch=3, classes=4, blocks=4, units=4, posterior_layers=layers)
    rssm = RSSM(tokens=5, actions=2, config=config).double()
    steps = Runner().steps_together + 2
    tokens = th.randn(2, steps, 5, dtype=th.float64)
    actions = th.randn(2, steps, 2, dtype=th.float64)
    is_first = th.zeros(2, steps, dtype=th.bool)
    is_first[0, 3] = True
    noise = th.rand(2, steps, 3, dtype=th.float64)
    expected = rssm.observe(tokens, actions, is_first, *rssm.initial(2), noise)
    deter, stoch = rssm.initial(2)
    for t in range(steps):
        states = rssm.step(tokens[:, t], actions[:, t], is_first[:, t], deter, stoch.flatten(1), noise[:, t])
        for name, ours in states._asdict().items():
            th.testing.assert_close(ours, getattr(expected, name)[:, t], rtol=1e-12, atol=1e-12)
        deter, stoch = states.deter, states.stoch


def test_gradients_of_large_actions_are_those_of_the_scaled_ones() -> None:
    """The scale of an action beyond [−1, 1] is a constant; else its gradient would be 0."""
    th.manual_seed(0)
    rssm = RSSM(tokens=5, actions=2, config=ModelConfig(deter=16, hidden=4, stoch=3, classes=4, blocks=4, units=4)).double()
    large, scaled = (th.tensor([[[x, -0.5]]], dtype=th.float64, requires_grad=True) for x in (2.0, 1.0))
    found, expected = (th.autograd.grad(rssm._action_part(actions).sum(), actions)[0] for actions in (large, scaled))
    assert found.all()
    th.testing.assert_close(found, expected * th.tensor([0.5, 1.0], dtype=th.float64))


@pytest.mark.parametrize("layers", [1, 3])
def test_gradients_of_observe(layers: int) -> None:
    """Central differences along a random direction of all parameters, with fixed samples (no straight-through path)."""
    th.manual_seed(0)
    config = ModelConfig(deter=16, hidden=4, stoch=3, classes=4, blocks=4, units=4, posterior_layers=layers)
    rssm = RSSM(tokens=5, actions=2, config=config).double()
    tokens = th.randn(2, 6, 5, dtype=th.float64)
    actions = th.rand(2, 6, 2, dtype=th.float64) * 2 - 1
    is_first = th.zeros(2, 6, dtype=th.bool)
    is_first[0, 3] = True
    start = rssm.initial(2)
    target = th.randn(2, 6, 12, dtype=th.float64)

    def loss() -> Tensor:
        states = rssm.observe(tokens, actions, is_first, *start, None)
        return (states.logits.flatten(-2) * target).sum() + states.deter.square().sum()

    parts = list(rssm.parameters())
    value = loss()
    first = th.autograd.grad(value, parts, allow_unused=True, retain_graph=True)
    for again, gradient in zip(th.autograd.grad(value, parts, allow_unused=True), first, strict=True):
        assert (again is None and gradient is None) or th.equal(again, gradient)  # a second backward pass of one graph
    direction = [th.randn_like(part) for part in parts]

    # The mode's gradient is straight-through, which differences do not see: cut it for the comparison.
    original = rssm.probabilities
    rssm.probabilities = lambda logits: original(logits).detach()  # type: ignore[method-assign]
    gradients = th.autograd.grad(loss(), parts, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    values = []
    with th.no_grad():
        for sign in (1, -1):
            for part, d in zip(parts, direction, strict=True):
                part.add_(d, alpha=sign * 1e-7)
            values.append(loss())
            for part, d in zip(parts, direction, strict=True):
                part.add_(d, alpha=-sign * 1e-7)
    th.testing.assert_close(slope, (values[0] - values[1]) / 2e-7, rtol=1e-6, atol=1e-6)
