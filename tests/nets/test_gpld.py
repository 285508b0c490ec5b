"""The GPLD penalty against automatic differentiation, the statistics of its estimator, and the schedules of λ.

Letters: n states, R penalised rows, K rows, C classes, I inputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.config import ModelConfig, ObservationSpec, PenaltyConfig
from sb3_dreamer_gpld.learner import Learner, Loss
from sb3_dreamer_gpld.nets import cotangents, gpld_exact
from sb3_dreamer_gpld.nets.cotangents import Layer
from sb3_dreamer_gpld.nets.gpld import penalty_weight, rademacher, row_penalty
from sb3_dreamer_gpld.nets.world_model import Batch, PenaltyWeights, WorldModel

CPU = th.device("cpu")
DEBUG = ModelConfig.make("debug")
B, T, ACTIONS = 3, 5, 2
NONE, ALL = PenaltyConfig(posterior=0, prior=0), PenaltyConfig(posterior=0.5, prior=0.5, fraction=1.0)
Map = Callable[[Tensor], Tensor]  # (..., I) → probabilities (..., C, K)


# ---------------------------------------------------------------- reference: only definitions and autograd


def estimate(q: Map, inputs: Tensor, probes: Tensor, rows: Tensor) -> Tensor:
    """Mean over the rows of ‖J_iᵀε_i‖², (n,), by one backward pass per row."""
    probabilities = q(inputs)  # (n, C, K)
    squares = []
    for row, probe in zip(rows, probes, strict=True):
        (product,) = th.autograd.grad((probabilities[..., row] * probe).sum(), inputs, create_graph=True)
        squares.append(product.square().sum(-1))
    return th.stack(squares).mean(0)


def frobenius(q: Map, inputs: Tensor, rows: Tensor) -> Tensor:
    """Mean over the rows of ‖J_i‖²_F, (n,), from the whole Jacobians."""
    jacobians = th.func.vmap(th.func.jacrev(q))(inputs)  # (n, C, K, I)
    return jacobians[:, :, rows].square().sum((1, 3)).mean(-1)


class Net(NamedTuple):
    layers: list[Layer]
    output: tuple[Tensor, Tensor]
    classes: int
    unimix: float

    @classmethod
    def random(cls, inputs: int, hidden: list[int], classes: int, rows: int, unimix: float = 0.01) -> "Net":
        def leaf(*shape: int) -> Tensor:
            return th.randn(*shape, dtype=th.float64).requires_grad_()

        sizes = [inputs, *hidden]
        layers = [Layer(leaf(b, a), leaf(b), leaf(b), 1e-4) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        return cls(layers, (leaf(classes * rows, sizes[-1]), leaf(classes * rows)), classes, unimix)

    def __call__(self, x: Tensor) -> Tensor:
        for weight, bias, scale, eps in self.layers:
            z = x @ weight.T + bias
            n = z / (z.square().mean(-1, keepdim=True) + eps).sqrt() * scale
            x = n * th.sigmoid(n)
        logits = (x @ self.output[0].T + self.output[1]).unflatten(-1, (self.classes, -1))
        return (1 - self.unimix) * th.softmax(logits, -2) + self.unimix / self.classes

    def penalty(self, inputs: Tensor, probes: Tensor | None, rows: Tensor | None) -> Tensor:
        return row_penalty(self.layers, self.output, inputs, self.classes, self.unimix, probes, rows)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for layer in self.layers for t in layer[:3]] + [*self.output]


def assert_same(ours: Tensor, reference: Tensor, leaves: list[Tensor]) -> None:
    """Values and all gradients of a random combination of them agree to 1e-9 of the largest entry."""
    weights = th.randn_like(ours)
    pairs = zip(
        [ours, *th.autograd.grad(ours @ weights, leaves)],
        [reference, *th.autograd.grad(reference @ weights, leaves)],
        strict=True,
    )
    for got, want in pairs:
        th.testing.assert_close(got, want, rtol=0, atol=1e-9 * want.abs().max().item())


# ---------------------------------------------------------------- closed and exact form


@st.composite
def problems(draw: st.DrawFn) -> tuple[Net, Tensor, Tensor | None, Tensor]:
    """A net, inputs (n, I), rows as they are given to the penalty and as indices."""
    th.manual_seed(draw(st.integers(0, 10**6)))
    hidden = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    classes, count = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    net = Net.random(draw(st.integers(1, 5)), hidden, classes, count, draw(st.sampled_from([0.0, 0.01, 0.3])))
    inputs = th.randn(draw(st.integers(1, 4)), net.layers[0].weight.shape[1], dtype=th.float64).requires_grad_()
    subset = draw(st.none() | st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    rows = None if subset is None else th.tensor(subset)
    return net, inputs, rows, th.arange(count) if rows is None else rows


@pytest.mark.parametrize("together", [1, 40, cotangents.TOGETHER])  # a row alone, a few, all
@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems())
def test_closed_form_equals_double_backward(together: int, problem: tuple[Net, Tensor, Tensor | None, Tensor]) -> None:
    net, inputs, rows, indices = problem
    probes = th.randn(len(indices), len(inputs), net.classes, dtype=th.float64)  # the identity holds for any vectors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cotangents, "TOGETHER", together)
        assert_same(net.penalty(inputs, probes, rows), estimate(net, inputs, probes, indices), [*net.leaves, inputs])


@pytest.mark.parametrize(("strip", "together"), [(1, 40), (2, 1), (gpld_exact.STRIP, cotangents.TOGETHER)])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(problem=problems())
def test_exact_form_equals_the_frobenius_norm(
    strip: int, together: int, problem: tuple[Net, Tensor, Tensor | None, Tensor]
) -> None:
    net, inputs, rows, indices = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpld_exact, "STRIP", strip)
        patch.setattr(cotangents, "TOGETHER", together)
        assert_same(net.penalty(inputs, None, rows), frobenius(net, inputs, indices), [*net.leaves, inputs])


@pytest.mark.parametrize("probed", [True, False])
def test_parts_of_several_rows(probed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows in parts of two, the last one smaller."""
    th.manual_seed(0)
    net = Net.random(4, [6], classes=3, rows=5)
    inputs = th.randn(7, 4, dtype=th.float64).requires_grad_()
    rows, sizes = th.arange(5), []
    mix = cotangents._mix

    def noted(shares: Tensor, weight: Tensor) -> Tensor:
        sizes.append(len(weight))
        return mix(shares, weight)

    monkeypatch.setattr(cotangents, "_mix", noted)
    monkeypatch.setattr(cotangents, "TOGETHER", 2 * 7 * 6 * (1 if probed else 2))
    probes = th.randn(5, 7, 3, dtype=th.float64) if probed else None
    reference = frobenius(net, inputs, rows) if probes is None else estimate(net, inputs, probes, rows)
    assert_same(net.penalty(inputs, probes, None), reference, [*net.leaves, inputs])
    assert sizes == [2, 2, 1] * 2  # forward and backward


@pytest.mark.parametrize("probed", [True, False])
def test_weights_that_classes_have_in_common_cost_no_digits(probed: bool) -> None:
    """The penalty depends on the differences of the classes' weights; a large common part must not drown them in float32."""
    th.manual_seed(0)
    net = Net.random(8, [16], classes=4, rows=3)
    with th.no_grad():
        net.output[0].add_(30.0 * th.randn(1, 3, 16, dtype=th.float64).expand(4, -1, -1).reshape(12, 16))
    inputs = th.randn(32, 8, dtype=th.float64)
    probes = th.randn(3, 32, 4, dtype=th.float64) if probed else None
    layers = [Layer(*(x.float() for x in net.layers[0][:3]), net.layers[0].eps)]
    output = net.output[0].float(), net.output[1].float()
    single = row_penalty(layers, output, inputs.float(), 4, net.unimix, None if probes is None else probes.float())
    th.testing.assert_close(single.double(), net.penalty(inputs, probes, None), rtol=1e-4, atol=0)


def test_exact_form_of_wide_layers() -> None:
    """Several strips of units, the last one narrower."""
    th.manual_seed(0)
    net = Net.random(5, [2 * gpld_exact.STRIP + 5], classes=3, rows=2)
    inputs = th.randn(3, 5, dtype=th.float64).requires_grad_()
    assert_same(net.penalty(inputs, None, None), frobenius(net, inputs, th.arange(2)), [*net.leaves, inputs])


@pytest.mark.parametrize("hidden", [[gpld_exact.STRIP + 3], [5, gpld_exact.STRIP + 3]])
@pytest.mark.parametrize("probed", [True, False])
def test_it_is_captured_whole(probed: bool, hidden: list[int]) -> None:
    """As one graph, values and gradients are the same."""
    th.manual_seed(0)
    net = Net.random(4, hidden, classes=3, rows=2)
    inputs = th.randn(3, 4, dtype=th.float64).requires_grad_()
    probes = th.randn(2, 3, 3, dtype=th.float64) if probed else None
    captured = th.compile(net.penalty, fullgraph=True, backend="aot_eager")
    assert_same(captured(inputs, probes, None), net.penalty(inputs, probes, None), [*net.leaves, inputs])


@pytest.fixture(scope="module")
def estimates() -> tuple[Tensor, float]:
    """65,536 estimates of the penalty at one state, and its exact value."""
    th.manual_seed(0)
    net, inputs = Net.random(6, [8], classes=5, rows=4), th.randn(1, 6, dtype=th.float64)
    probes = rademacher((4, 2**16, 5), CPU).double()
    return net.penalty(inputs.expand(2**16, -1), probes, None).detach(), net.penalty(inputs, None, None).item()


def test_estimates_have_the_exact_value_as_mean(estimates: tuple[Tensor, float]) -> None:
    values, exact = estimates
    standard_error = values.std().item() / len(values) ** 0.5
    assert 0 < standard_error < 0.01 * exact  # so the next line is a sharp test
    assert abs(values.mean().item() - exact) < 4 * standard_error


@pytest.mark.parametrize("count", [4, 16, 64, 256])
def test_standard_error_shrinks_with_the_root_of_the_number_of_estimates(count: int, estimates: tuple[Tensor, float]) -> None:
    values, _ = estimates
    spread = values.view(-1, count).mean(1).std()
    assert spread.item() * count**0.5 == pytest.approx(values.std().item(), rel=0.15)


def test_rademacher_numbers() -> None:
    th.manual_seed(3)
    first = rademacher((100, 1000), CPU)
    assert first.shape == (100, 1000) and set(first.unique().tolist()) == {-1.0, 1.0}
    assert abs(first.mean().item()) < 4 / first.numel() ** 0.5
    assert not th.equal(rademacher((100, 1000), CPU), first)
    th.manual_seed(3)
    assert th.equal(rademacher((100, 1000), CPU), first)


# ---------------------------------------------------------------- schedules

E25, E5 = 0.0820849986238988, 0.006737946999085467  # e^−2.5 and e^−5
EXPECTED = [  # schedule, {update: λ}, for λ₀ = 0.5 and λ_min = 0.1
    ("none", {0: 0.5, 10**9: 0.5}),
    ({"name": "linear", "decay_steps": 100}, {0: 0.5, 25: 0.4, 75: 0.2, 100: 0.1, 1000: 0.1}),
    ({"name": "exponential", "decay_steps": 100}, {0: 0.5, 50: 0.1 + 0.4 * E25, 100: 0.1 + 0.4 * E5, 1000: 0.1 + 0.4 * E5}),
    ({"name": "cosine", "decay_steps": 100}, {0: 0.5, 25: 0.4414213562373095, 50: 0.3, 100: 0.1, 1000: 0.1}),
    ({"name": "step", "interval": 10, "factor": 0.5}, {0: 0.5, 9: 0.5, 10: 0.25, 19: 0.25, 20: 0.125, 30: 0.1}),
    ("sqrt_time", {0: 0.5, 3000: 0.25, 8000: 0.5 / 3, 24000: 0.1, 99000: 0.1}),
    ({"name": "custom", "steps": [10, 20, 30], "values": [0.3, 0.05, 0.7]}, {9: 0.5, 10: 0.3, 19: 0.3, 20: 0.1, 30: 0.7}),
]
DEFAULTS = [  # the same for the parameters' defaults
    ("linear", {50_000: 0.3, 100_000: 0.1}),
    ("exponential", {50_000: 0.1 + 0.4 * E25}),
    ("cosine", {50_000: 0.3}),
    ("step", {4999: 0.5, 5000: 0.45, 10_000: 0.405}),
]


@pytest.mark.parametrize(("schedule", "expected"), EXPECTED + DEFAULTS)
@pytest.mark.parametrize("start", [0, 7])
def test_schedule(schedule: str | dict, expected: dict[int, float], start: int) -> None:
    config = PenaltyConfig(schedule=schedule, minimum=0.1, start=start)
    for update, weight in expected.items():
        assert penalty_weight(config, 0.5, start + update) == pytest.approx(weight, rel=1e-12)
    assert start == 0 or penalty_weight(config, 0.5, start - 1) == 0


@pytest.mark.parametrize(("schedule", "expected"), EXPECTED)
def test_a_penalty_that_is_off_stays_off(schedule: str | dict, expected: dict[int, float]) -> None:
    config = PenaltyConfig(schedule=schedule, minimum=0.1)
    assert [penalty_weight(config, 0.0, update) for update in expected] == [0.0] * len(expected)


# ---------------------------------------------------------------- in the world model


@pytest.fixture
def model() -> WorldModel:
    th.manual_seed(0)
    return WorldModel(ObservationSpec.from_space(spaces.Box(-np.inf, np.inf, (3,))), ACTIONS, DEBUG).double()


def lambdas(penalty: PenaltyConfig) -> PenaltyWeights:
    return PenaltyWeights(penalty.posterior or None, penalty.prior or None)


def random_batch(steps: int = T, dtype: th.dtype = th.float64) -> Batch:
    ends = th.zeros(B, steps, dtype=th.bool)
    is_first = ends.clone()
    is_first[1, -1] = True
    return Batch(
        observations={"": th.randn(B, steps, 3, dtype=dtype)},
        actions=th.randn(B, steps, ACTIONS, dtype=dtype),
        rewards=th.randn(B, steps, dtype=dtype),
        is_first=is_first,
        is_last=ends,
        is_terminal=ends,
        deter=th.randn(B, DEBUG.deter, dtype=dtype),
        stoch=th.zeros(B, DEBUG.classes, DEBUG.stoch, dtype=dtype),
    )


@pytest.mark.parametrize("estimator", ["hutchinson", "exact"])
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("kind", ["posterior", "prior", "both"])
def test_penalty_at_the_drawn_states_and_zeros_elsewhere(
    kind: str, rows: int | None, estimator: str, model: WorldModel
) -> None:
    """The penalised maps are the model's own nets, called as a user would call them."""
    weights = {"posterior": float(kind != "prior"), "prior": float(kind != "posterior")}
    penalty = PenaltyConfig(**weights, fraction=0.5, rows=rows, random_rows=True, estimator=estimator)
    batch, draws = random_batch(), model.draw(B, T, penalty)
    terms, states = model.loss(batch, draws, lambdas(penalty), 0.99)
    losses = {name: term.value for name, term in terms.items()}
    assert {name for name in losses if name.endswith("_penalty")} == {f"{name}_penalty" for name, on in weights.items() if on}

    tokens, rssm = model.encode(batch.observations, (B, T)), model.rssm
    maps = {
        "posterior": (lambda u: rssm.probabilities(rssm.posterior(u).unflatten(-1, (DEBUG.classes, DEBUG.stoch)))),
        "prior": (lambda u: rssm.probabilities(rssm.prior_logits(u))),
    }
    inputs = {"posterior": th.cat([states.deter, tokens], -1), "prior": states.deter}
    probes = {"posterior": draws.posterior_probes, "prior": draws.prior_probes}
    drawn = {"posterior": draws.posterior_rows, "prior": draws.prior_rows}
    for name in (name for name, on in weights.items() if on):
        indices = th.arange(DEBUG.stoch) if drawn[name] is None else drawn[name]
        assert len(indices) == (rows or DEBUG.stoch)
        u = inputs[name].flatten(0, 1)[draws.states].detach().requires_grad_()
        if estimator == "exact":
            at_states = frobenius(maps[name], u, indices)
        else:
            at_states = estimate(maps[name], u, probes[name].double(), indices)
        expected = th.zeros(B * T, dtype=th.float64)
        expected[draws.states] = at_states.detach()
        th.testing.assert_close(losses[f"{name}_penalty"].detach(), expected.view(B, T), rtol=1e-9, atol=0)
        assert losses[f"{name}_penalty"].count_nonzero() == 7  # ⌊0.5·15⌋


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 15), (0.5, 7), (0.3, 4), (0.01, 1)])
def test_states_are_drawn_without_replacement(fraction: float, count: int, model: WorldModel) -> None:
    penalty = PenaltyConfig(fraction=fraction)
    draws = [model.draw(B, T, penalty).states for _ in range(200)]
    assert all(len(states) == len(states.unique()) == count for states in draws)
    assert th.cat(draws).unique().tolist() == list(range(B * T))


def test_first_rows_are_fixed_and_random_rows_are_drawn_afresh(model: WorldModel) -> None:
    fixed, drawn = PenaltyConfig(rows=2), PenaltyConfig(rows=2, random_rows=True)
    assert {tuple(model.draw(B, T, fixed).posterior_rows.tolist()) for _ in range(20)} == {(0, 1)}
    rows = [model.draw(B, T, drawn).posterior_rows.tolist() for _ in range(50)]
    assert all(len(set(pair)) == 2 for pair in rows)
    assert {row for pair in rows for row in pair} == set(range(DEBUG.stoch))
    assert model.draw(B, T, PenaltyConfig(rows=DEBUG.stoch, random_rows=True)).posterior_rows is None


def test_each_net_has_rows_of_its_own(model: WorldModel) -> None:
    """With both penalties, as the authors' release draws them; one that is off draws none."""
    both = PenaltyConfig(posterior=1.0, prior=1.0, rows=2, random_rows=True)
    draws = [model.draw(B, T, both) for _ in range(50)]
    assert any(set(each.posterior_rows.tolist()) != set(each.prior_rows.tolist()) for each in draws)
    assert model.draw(B, T, PenaltyConfig(rows=2, random_rows=True)).prior_rows is None


def test_every_row_and_state_has_its_own_probe(model: WorldModel) -> None:
    draws = model.draw(20, 20, PenaltyConfig(posterior=1.0, prior=1.0, fraction=0.5, rows=3))
    vectors = {"posterior": draws.posterior_probes, "prior": draws.prior_probes}
    for probes in vectors.values():
        assert probes.shape == (3, 200, DEBUG.classes)
    stacked = th.cat([probes.permute(1, 0, 2).flatten(1) for probes in vectors.values()], -1)  # (200, 2·3·C)
    correlation = stacked.T @ stacked / 200
    assert (correlation - th.eye(len(correlation))).abs().max() < 5 / 200**0.5


def test_only_what_is_needed_is_drawn(model: WorldModel) -> None:
    assert model.draw(B, T, NONE)[1:] == (None,) * 5
    posterior, prior = model.draw(B, T, PenaltyConfig()), model.draw(B, T, PenaltyConfig(posterior=0, prior=1.0))
    assert posterior.posterior_probes is not None and posterior.prior_probes is None
    assert prior.posterior_probes is None and prior.prior_probes is not None
    exact = model.draw(B, T, PenaltyConfig(prior=1.0, estimator="exact"))
    assert exact.posterior_probes is None and exact.prior_probes is None and exact.states is not None


@pytest.mark.parametrize(("kind", "groups"), [("posterior", ["encoder", "core", "posterior"]), ("prior", ["core", "prior"])])
def test_gradient_goes_on_into_recurrence_and_encoder(kind: str, groups: list[str], model: WorldModel) -> None:
    # One step, so that nothing comes by way of later states.
    terms, _ = model.loss(random_batch(1), model.draw(B, 1, ALL), lambdas(ALL), 0.99)
    terms[f"{kind}_penalty"].value.mean().backward()
    rssm = model.rssm
    modules = {"encoder": model.encoder, "core": rssm.core, "posterior": rssm.posterior, "prior": rssm.prior}
    for group in groups:
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in modules[group].parameters()), group


# ---------------------------------------------------------------- in the algorithm


class RandomWalk(gym.Env):
    observation_space, action_space = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1, 1, (ACTIONS,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = np.zeros(3, np.float32)
        return self.position, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position = self.position + self.np_random.normal(size=3).astype(np.float32)
        return self.position, 1.0, False, False, {}


def algorithm(kind: type[DreamerGPLD] = DreamerGPLD, **kwargs: object) -> DreamerGPLD:
    return kind("MlpPolicy", RandomWalk(), model_size="debug", buffer_size=100, device="cpu", seed=0, **kwargs)


def test_more_rows_than_the_state_has() -> None:
    assert algorithm(penalty_rows=DEBUG.stoch).penalty.rows == DEBUG.stoch
    with pytest.raises(ValueError, match="penalty_rows must be at most 4"):
        algorithm(penalty_rows=DEBUG.stoch + 1)


@pytest.mark.parametrize("value", [-1e-9, np.nan, np.inf, "1", None, True])
def test_wrong_start(value: Any) -> None:
    with pytest.raises(ValueError, match="penalty_start must be a number"):
        algorithm(penalty_start=value)


class RecordingLearner(Learner):
    """Keeps λ of every update."""

    weights: list[float]

    def weighted_loss(self, *args: Any) -> Loss:
        result = super().weighted_loss(*args)
        self.weights.append(float(result.terms["posterior_penalty"].weight))
        return result


class WeightRecorder(DreamerGPLD):
    """Keeps λ of every update, and the environment step at which it was made."""

    learner_class = RecordingLearner
    weights: list[tuple[int, float]]

    def train(self, gradient_steps: int, batch_size: int) -> None:
        assert isinstance(self.learner, RecordingLearner)
        self.learner.weights = []
        super().train(gradient_steps, batch_size)
        self.weights += [(self.num_timesteps, weight) for weight in self.learner.weights]


@pytest.mark.parametrize(
    "updates", [dict(train_ratio=4), dict(gradient_steps=2, train_freq=4)], ids=["ratio", "gradient steps"]
)
def test_penalty_starts_at_an_environment_step(updates: dict[str, Any]) -> None:
    """Whatever the number of updates for a step, and with the schedule's time counted from there; once on, it stays on."""
    penalty = dict(penalty_start=20, penalty_min=0.0, penalty_schedule={"name": "linear", "decay_steps": 100})
    sizes = dict(batch_size=2, batch_length=4, imagination_horizon=2, learning_starts=6)
    model = algorithm(WeightRecorder, **penalty, **sizes, **updates)
    model.weights = []
    model.learn(30)
    before, after = ([weight for step, weight in model.weights if (step < 20) == early] for early in (True, False))
    assert before and not any(before)
    assert after == pytest.approx([0.5 * (1 - t / 100) for t in range(len(after))])
    model.weights.clear()
    model.learn(30)  # counts its steps from 0 again
    assert model.weights[0][0] < 20 and all(weight > 0 for _, weight in model.weights)


def test_weights_of_the_penalties_in_the_total_loss() -> None:
    settings = dict(posterior_penalty=0.5, prior_penalty=0.25, penalty_schedule={"name": "step", "interval": 3, "factor": 0.5})
    model = algorithm(**settings, batch_size=1, batch_length=10, imagination_horizon=2)
    model._penalty_update = 1
    learner = model.learner
    learner.config = model._learner_config()
    batch, draws = random_batch(dtype=th.float32), learner.draw(B, T)
    for updates, posterior, prior in [(0, 0.0, 0.0), (1, 0.5, 0.25), (3, 0.5, 0.25), (4, 0.25, 0.125)]:
        result = learner.loss(batch, draws, updates)
        terms = result.terms
        assert (terms["posterior_penalty"].weight, terms["prior_penalty"].weight) == (posterior, prior)
        total = sum(term.weight * term.value.mean() for term in terms.values())
        th.testing.assert_close(result.total, total)
