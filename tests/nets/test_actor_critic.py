"""The actor's objective beside the published one: gradients through the dynamics, the entropy's target, fewer starts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from test_dreamer_gpld import tiny
from torch import Tensor

from sb3_dreamer_gpld.arguments import dynamics_share, entropy_target, largest_entropy
from sb3_dreamer_gpld.config import ActionSpec, ModelConfig, ObservationSpec
from sb3_dreamer_gpld.nets.actor_critic import ENT_COEF_RATE, ActorCritic, Objective
from sb3_dreamer_gpld.nets.distributions import BoundedNormal, MultiCategorical
from sb3_dreamer_gpld.nets.layers import Head
from sb3_dreamer_gpld.nets.rssm import States
from sb3_dreamer_gpld.nets.steps import Runner
from sb3_dreamer_gpld.nets.world_model import Batch, WorldModel
from sb3_dreamer_gpld.policies import MlpPolicy

BOX, CHOICE = ActionSpec.from_space(spaces.Box(-1, 1, (2,))), ActionSpec.from_space(spaces.Discrete(3))
B, T, HORIZON = 3, 5, 4
PUBLISHED = Objective(gamma=0.9, return_lambda=0.95, ent_coef=3e-4)


class Case:
    """Nets in float64 whose heads are not flat, and a batch with its posterior states."""

    def __init__(self, actions: ActionSpec = BOX, **config: Any) -> None:
        th.manual_seed(0)
        sizes = ModelConfig.make("debug", bins=31, **config)
        self.actions = actions
        spec = ObservationSpec.from_space(spaces.Box(-1, 1, (3,)))
        self.world_model = WorldModel(spec, actions.size, sizes).double()
        self.actor_critic = ActorCritic(actions, sizes).double()
        for head in (self.world_model.reward, self.actor_critic.value, self.actor_critic.slow_value, self.actor_critic.policy):
            for part in head.output.parts:
                th.nn.init.normal_(part.weight, std=0.1)
        last = th.zeros(B, T, dtype=th.bool)
        last[1, 2] = True
        self.batch = Batch(
            {"": th.randn(B, T, 3).double()},
            th.randn(B, T, actions.size).double(),
            th.randn(B, T).double(),
            th.zeros(B, T, dtype=th.bool),
            last,
            last,
            th.zeros(B, sizes.deter).double(),
            th.zeros(B, sizes.classes, sizes.stoch).double(),
        )
        self.states = States(
            th.randn(B, T, sizes.deter).double().requires_grad_(),
            th.randn(B, T, sizes.classes, sizes.stoch).double().softmax(-2).requires_grad_(),
            th.randn(B, T, sizes.classes, sizes.stoch).double(),
        )
        self.draws = self.actor_critic.draw(B * T, HORIZON)
        self.draws = self.draws._replace(stoch=self.draws.stoch.double(), action=self.draws.action.double())

    def loss(self, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
        objective = PUBLISHED._replace(**changes)
        terms, metrics, running = self.actor_critic.loss(self.world_model, self.batch, self.states, self.draws, objective)
        return {name: term.value for name, term in terms.items()}, metrics, running

    def policy_gradient(self, **changes: Any) -> list[Tensor]:
        losses, _, _ = self.loss(**changes)
        return list(th.autograd.grad(losses["policy"].mean(), list(self.actor_critic.policy.parameters())))


def reference_gradient(case: Case, ent_coef: float) -> list[Tensor]:
    """The gradient through the dynamics, written again: one step after the other, and the whole return by its definition."""
    world_model, critic = copy.deepcopy(case.world_model).requires_grad_(False), copy.deepcopy(case.actor_critic)
    rssm, policy = world_model.rssm, critic.policy
    critic.value.requires_grad_(False)
    deter, stoch = case.states.deter.detach().flatten(0, 1), case.states.stoch.detach().flatten(0, 1)  # (N, D), (N, C, K)
    features, entropies = [th.cat([deter, stoch.flatten(1)], -1)], []
    for h in range(HORIZON):
        mean, std = policy(features[-1].detach()).chunk(2, -1)
        mean, std = th.tanh(mean), 0.9 * th.sigmoid(std + 2.0) + 0.1
        entropies.append((th.log(std) + 0.5 * math.log(2 * math.pi * math.e)).sum(-1))
        action = mean + std * case.draws.action[h]
        products = rssm._core_products(action, rssm._core_weights())
        deter = rssm._core(deter, stoch.flatten(1), products)
        probs = rssm.probabilities(rssm.prior_logits(deter))
        index = (probs.detach().cumsum(-2) <= case.draws.stoch[h].unsqueeze(-2)).sum(-2)  # (N, K)
        one_hot = th.nn.functional.one_hot(index, probs.shape[-2]).movedim(-1, -2).double()
        stoch = one_hot + probs - probs.detach()
        features.append(th.cat([deter, stoch.flatten(1)], -1))
    bins = critic.bins
    reward, value = ([(net(x).softmax(-1) * bins).sum(-1) for x in features] for net in (world_model.reward, critic.value))
    cont = [th.sigmoid(world_model.cont(x)).squeeze(-1) for x in features]
    total = th.zeros(())
    low, high = 0.0, 0.0
    returns = []
    for t in range(HORIZON):  # Σ over n of the n-step returns, weighted by (1 − λ)·λⁿ⁻¹, the last one by λⁿ⁻¹
        result, discount, collected = th.zeros(()), th.ones(()), th.zeros(())
        for n in range(1, HORIZON - t + 1):
            collected = collected + discount * reward[t + n]
            discount = discount * cont[t + n]
            share = 0.95 ** (n - 1) * (1.0 if n == HORIZON - t else 0.05)
            result = result + share * (collected + discount * value[t + n])
        returns.append(result)
    flat = th.stack(returns).detach().flatten()
    low, high = (0.01 * th.quantile(flat, q) for q in (0.05, 0.95))
    scale = max(1.0, float(high - low))
    weight = th.ones(())
    for t in range(HORIZON):
        weight = weight * cont[t].detach()
        total = total - (weight * ((returns[t] - value[t]) / scale + ent_coef * entropies[t])).mean() / HORIZON
    return list(th.autograd.grad(total, list(policy.parameters())))


def test_gradient_through_the_dynamics_is_that_of_the_return() -> None:
    case = Case()
    for found, expected in zip(case.policy_gradient(dynamics=1.0), reference_gradient(case, 3e-4), strict=True):
        th.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_a_share_mixes_both_gradients() -> None:
    case = Case()
    dynamics, reinforce, mixed = (case.policy_gradient(dynamics=share, ent_coef=0.0) for share in (1.0, 0.0, 0.3))
    assert any(not th.allclose(a, b) for a, b in zip(dynamics, reinforce, strict=True))
    for found, a, b in zip(mixed, dynamics, reinforce, strict=True):
        th.testing.assert_close(found, 0.3 * a + 0.7 * b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_actor_alone_learns_from_its_loss(share: float) -> None:
    """Neither the world model, the critic nor the replayed states get a gradient of it, and all take gradients afterwards."""
    case = Case()
    case.loss(dynamics=share)[0]["policy"].sum().backward()
    others = [*case.world_model.parameters(), *case.actor_critic.value.parameters(), case.states.deter, case.states.stoch]
    assert all(p.grad is None for p in others)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in case.actor_critic.policy.parameters())
    assert all(p.requires_grad for p in others)
    case.loss(dynamics=share)[0]["value"].sum().backward()
    assert all(p.grad is not None for p in case.actor_critic.value.parameters())
    assert all(p.grad is None for p in case.world_model.parameters())


def test_gradients_are_on_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(case.actor_critic, "predictions_of", fail)
    with pytest.raises(RuntimeError, match="no"):
        case.loss(dynamics=1.0)
    assert all(p.requires_grad for p in case.world_model.parameters())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_losses_of_the_values_do_not_depend_on_the_actors_gradient(share: float) -> None:
    case = Case()
    found, expected = case.loss(dynamics=share)[0], case.loss()[0]
    for name in ("value", "replay_value"):
        th.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("rows, together", [(1, 1), (2 * B * T, 3)])
def test_rollouts_in_parts_are_those_in_one(share: float, rows: int, together: int) -> None:
    """As they are imagined and predicted with batches of the usual size: a few steps, or one, at a time."""
    case = Case()
    whole, gradient = case.loss(dynamics=share)[0], case.policy_gradient(dynamics=share)
    case.actor_critic.runner = Runner(chunk_rows=rows, imagined_together=together)
    for name, loss in case.loss(dynamics=share)[0].items():
        th.testing.assert_close(loss, whole[name], rtol=1e-10, atol=1e-12)
    for found, expected in zip(case.policy_gradient(dynamics=share), gradient, strict=True):
        th.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("actions", [BOX, CHOICE])
def test_fewer_starts_are_the_last_states_of_each_sequence(actions: ActionSpec) -> None:
    """With the same numbers drawn, and the same scale of returns, their losses are those that all starts give there."""
    case = Case(actions, percentile_rate=0.0)
    every = case.loss()[0]
    stoch, action = (x.unflatten(1, (B, T))[:, :, -2:].flatten(1, 2) for x in case.draws)
    case.draws = case.draws._replace(stoch=stoch, action=action)
    few = case.loss(starts=2)[0]
    assert few["policy"].shape == few["value"].shape == (B, 2)
    for name in ("policy", "value"):
        th.testing.assert_close(few[name], every[name][:, -2:], rtol=1e-10, atol=1e-12)
    # What is after a state alone makes its return, so that the replayed losses are the last ones too.
    assert few["replay_value"].shape == (B, 1)
    th.testing.assert_close(few["replay_value"], every["replay_value"][:, -1:], rtol=1e-10, atol=1e-12)


def test_coefficient_of_the_entropy_rises_below_the_target_and_never_sinks_below_its_start() -> None:
    case = Case()
    _, metrics, running = case.loss(target_entropy=None)
    assert running.ent_coef_rise.item() == 0.0 and metrics["ent_coef"].item() == pytest.approx(3e-4)
    entropy = metrics["entropy"].item()
    critic = case.actor_critic
    for shortfall, expected in ((0.5, 0.5), (40.0, 1.0), (-0.25, 0.0)):  # nats, and what of it counts
        _, _, running = case.loss(target_entropy=entropy + shortfall)
        assert running.ent_coef_rise.item() == pytest.approx(ENT_COEF_RATE * expected, abs=1e-9)
    _, _, running = case.loss(target_entropy=entropy + 2.0)
    critic.keep(running, th.tensor(True))
    assert critic.ent_coef_rise.item() == 0.0  # a failed update leaves it
    for _ in range(3):
        critic.keep(case.loss(target_entropy=entropy + 2.0)[2], th.tensor(False))
    assert critic.ent_coef_rise.item() == pytest.approx(3 * ENT_COEF_RATE)
    metrics = case.loss(target_entropy=entropy - 0.5)[1]
    assert metrics["ent_coef"].item() == pytest.approx(3e-4 * math.exp(0.03))
    critic.keep(case.loss(target_entropy=entropy - 0.5)[2], th.tensor(False))
    assert critic.ent_coef_rise.item() == pytest.approx(0.025)


def test_coefficient_weighs_the_entropy() -> None:
    case = Case()
    expected = case.loss(ent_coef=3e-3)[0]["policy"]
    case.actor_critic.ent_coef_rise.fill_(math.log(10.0))
    losses, metrics, _ = case.loss(ent_coef=3e-4, target_entropy=0.0)
    assert metrics["ent_coef"].item() == pytest.approx(3e-3)
    th.testing.assert_close(losses["policy"], expected)


def test_a_fixed_coefficient_is_not_what_auto_has_left() -> None:
    case = Case()
    expected = case.loss(ent_coef=3e-3)[0]["policy"]
    case.actor_critic.ent_coef_rise.fill_(math.log(50.0))
    losses, metrics, running = case.loss(ent_coef=3e-3)
    assert metrics["ent_coef"].item() == pytest.approx(3e-3) and running.ent_coef_rise.item() == 0.0
    th.testing.assert_close(losses["policy"], expected)


def test_the_coefficient_has_an_end() -> None:
    """Of a policy that cannot follow."""
    case = Case()
    case.actor_critic.ent_coef_rise.fill_(math.log(1e6))
    assert case.loss(target_entropy=99.0)[2].ent_coef_rise.item() == pytest.approx(math.log(1e6))


@pytest.mark.parametrize("actions", [BOX, CHOICE])
def test_no_policy_exceeds_the_largest_entropy(actions: ActionSpec) -> None:
    distribution = BoundedNormal(actions.size, 0.1, 0.5) if actions.nvec is None else MultiCategorical(actions.nvec)
    outputs = th.zeros(1, sum(distribution.outputs))
    if actions.nvec is None:
        outputs[:, actions.size :] = 50.0  # the standard deviation as large as it goes
    action = distribution.sample(outputs, distribution.draw((1,), outputs.device))
    entropy = distribution.log_prob_and_entropy(outputs, action)[1]
    assert entropy.item() == pytest.approx(largest_entropy(actions, 0.5), rel=1e-5)


class WideValue(ActorCritic):
    def __init__(self, actions: ActionSpec, config: ModelConfig) -> None:
        super().__init__(actions, config)
        self.value = Head(config.feature_size, [4 * config.units], [config.bins], scale=0.1)


class WideValuePolicy(MlpPolicy):
    actor_critic_class = WideValue


def test_the_slow_value_is_a_copy_of_a_value_of_ones_own() -> None:
    model = tiny("Pendulum-v1", WideValuePolicy)
    critic = model.policy.actor_critic
    for one, other in zip(critic.value.parameters(), critic.slow_value.parameters(), strict=True):
        assert th.equal(one, other) and not other.requires_grad
    assert model.learn(60)._n_updates > 0


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "given, actions, share",
    [
        ("reinforce", BOX, 0.0),
        ("dynamics", BOX, 1.0),
        ("auto", BOX, 1.0),
        ("auto", CHOICE, 0.0),
        ("reinforce", CHOICE, 0.0),
        (0.25, BOX, 0.25),
        (0, CHOICE, 0.0),
    ],
)
def test_share_of_the_dynamics(given: float | str, actions: ActionSpec, share: float) -> None:
    assert dynamics_share(given, actions) == share


@pytest.mark.parametrize(
    "given, actions, message",
    [
        ("backprop", BOX, "actor_gradient 'backprop' does not exist.*Allowed: reinforce, dynamics, auto, a share"),
        (1.5, BOX, r"actor_gradient.* must be a number in \[0.0, 1.0\], not 1.5"),
        (-0.1, BOX, "actor_gradient"),
        (float("nan"), BOX, "actor_gradient"),
        (True, BOX, "actor_gradient"),
        (None, BOX, "actor_gradient"),
        ("dynamics", CHOICE, "needs actions in a Box.*allowed for this action space: 'reinforce', 'auto' or 0"),
        (0.5, CHOICE, "needs actions in a Box"),
    ],
)
def test_wrong_gradients_are_refused(given: Any, actions: ActionSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dynamics_share(given, actions)


def test_entropy_targets() -> None:
    assert entropy_target(0.1, "auto", BOX) == (0.1, None)
    assert entropy_target("auto_0.001", -1.5, BOX) == (0.001, -1.5)
    start, target = entropy_target("auto", "auto", BOX)
    normal = th.distributions.Normal(0.0, th.full((2,), 0.242))
    assert start == 3e-4 and target == pytest.approx(normal.entropy().sum().item(), abs=1e-3)  # a deviation of 0.242
    assert entropy_target("auto", "auto", CHOICE) == (3e-4, 0.0)


@pytest.mark.parametrize(
    "wrong", ["Auto", "auto_", "auto_x", "auto_-1", "auto_0", "auto_inf", "auto_nan", "0.1", -1.0, None, True]
)
def test_wrong_coefficients_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="ent_coef.*auto"):
        entropy_target(wrong, "auto", BOX)


@pytest.mark.parametrize("wrong", ["none", float("nan"), float("inf"), None, [1.0]])
def test_wrong_targets_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="target_entropy.*'auto'"):
        entropy_target("auto", wrong, BOX)


# ------------------------------------------------------------------------------------------------- the policy's penalty


@pytest.mark.parametrize("actions", [BOX, CHOICE])
@pytest.mark.parametrize("layers", [(), (7,), (7, 9, 5)])
def test_policy_penalty_is_the_squared_gradient_of_the_log_density(actions: ActionSpec, layers: tuple[int, ...]) -> None:
    """Value and gradient, against automatic differentiation twice over, in float64."""
    case = Case(actions, policy_arch=layers)
    critic, before = case.actor_critic, case.loss()[0]
    losses, _, _ = case.loss(policy_penalty=0.1)
    assert set(losses) - set(before) == {"policy_penalty"}
    for name, value in before.items():
        assert th.equal(value, losses[name]), name
    features = case.states.features.detach().flatten(0, 1).requires_grad_()
    outputs = critic.policy(features)
    taken = critic.distribution.sample(outputs, case.draws.action[0])
    log_prob, _ = critic.distribution.log_prob_and_entropy(outputs, taken)
    (gradient,) = th.autograd.grad(log_prob.sum(), features, create_graph=True)
    reference = gradient.square().sum(-1)
    assert losses["policy_penalty"].shape == (B, T) and reference.min() > 0
    th.testing.assert_close(losses["policy_penalty"].flatten(), reference, rtol=1e-9, atol=0)
    parameters = list(critic.policy.parameters())
    ours = th.autograd.grad(losses["policy_penalty"].mean(), parameters, allow_unused=True)
    expected = th.autograd.grad(reference.mean(), parameters, allow_unused=True)
    for a, b in zip(ours, expected, strict=True):
        zero = th.zeros(())
        th.testing.assert_close(zero if a is None else a, zero if b is None else b, rtol=1e-8, atol=1e-12)


def test_policy_penalty_is_of_the_starts_alone() -> None:
    case = Case()
    case.draws = case.draws._replace(stoch=case.draws.stoch[:, : B * 2], action=case.draws.action[:, : B * 2])
    penalty = case.loss(policy_penalty=0.1, starts=2)[0]["policy_penalty"]
    assert penalty.shape == (B, 2)
    (of_states,) = th.autograd.grad(penalty.sum(), [case.states.deter], allow_unused=True)
    assert of_states is None  # the world model is not moved by it


def test_policy_penalty_is_never_in_half_precision() -> None:
    case = Case()
    critic, features = case.actor_critic.float(), case.states.features.detach().flatten(0, 1).float()
    outputs = critic.policy(features)
    inputs = features, outputs, critic.distribution.sample(outputs, case.draws.action[0].float())
    with th.autocast("cpu", th.bfloat16):
        found = critic.policy_sensitivity(*inputs)
    assert th.equal(found, critic.policy_sensitivity(*inputs))
