"""What each constant of the nets and of the objective does: weights, bounds, discounts, and how parameters begin."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from test_dreamer_gpld import BOX, RandomSpaces, tiny
from torch.nn import functional as F

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.config import ModelConfig
from sb3_dreamer_gpld.learner import Loss
from sb3_dreamer_gpld.nets import actor_critic
from sb3_dreamer_gpld.nets.world_model import Batch, vector_loss

OBSERVATION = spaces.Dict({"x": BOX, "choice": spaces.Discrete(3), "image": spaces.Box(0, 255, (3, 16, 16), np.uint8)})
LOSSES = {  # that a weight is of
    "reconstruction_weight": {"reconstruction/x", "reconstruction/choice", "reconstruction/image"},
    "reward_weight": {"reward"},
    "continue_weight": {"continue"},
    "dyn_weight": {"dyn"},
    "rep_weight": {"rep"},
    "policy_weight": {"policy"},
    "value_weight": {"value"},
    "replay_value_weight": {"replay_value"},
    "redundancy_weight": {"redundancy"},
}


def losses(space: spaces.Space = BOX, **kwargs: Any) -> tuple[DreamerGPLD, Batch, Loss]:
    """A model whose nets are as they began, a batch of what it has collected, and its losses."""
    model = tiny(RandomSpaces(space, BOX, terminates=True), train_ratio=0.0, **kwargs).learn(60)
    assert model.replay_buffer is not None
    batch = model.policy.to_batch(model.replay_buffer.sample(8))
    return model, batch, model.learner.loss(batch, model.learner.draw(*batch.rewards.shape), 0)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig) if f.name.endswith("_weight")])
def test_a_weight_is_that_of_its_losses(name: str) -> None:
    kind = "redundancy" if name == "redundancy_weight" else "decoder"
    _, _, result = losses(OBSERVATION, policy_kwargs={name: 7.0, "reconstruction": kind})
    assert {loss for loss, term in result.terms.items() if term.weight == 7.0} == LOSSES[name]
    total = sum(float(term.weight) * term.value.mean().item() for term in result.terms.values())
    assert result.total.item() == pytest.approx(total, rel=1e-5)


def test_free_nats_are_the_smallest_divergence() -> None:
    """Nets that have not learned anything diverge by less than three nats."""
    for nats in (0.0, 3.0):
        for name in ("dyn", "rep"):
            value = losses(policy_kwargs={"free_nats": nats})[2].losses[name]
            assert (value == 3.0).all() if nats else 0 < value.min() <= value.max() < 3


def test_percentiles_of_the_returns() -> None:
    config = {"percentile_low": 20.0, "percentile_high": 60.0, "percentile_rate": 0.1}
    critic = tiny("Pendulum-v1", policy_kwargs=config).policy.actor_critic
    assert critic.updated_percentiles(th.arange(101.0).flip(0)).tolist() == pytest.approx([2.0, 6.0])


def test_rate_of_the_slow_value() -> None:
    critic = tiny("Pendulum-v1", policy_kwargs={"slow_value_rate": 0.25}).policy.actor_critic
    for one, slow in zip(critic.value.parameters(), critic.slow_value.parameters(), strict=True):
        one.data.fill_(4.0)
        slow.data.fill_(0.0)
    critic.update_slow_value()
    assert all((slow == 1.0).all() for slow in critic.slow_value.parameters())


def test_unimix_is_the_least_probability_times_the_classes() -> None:
    rssm = tiny("Pendulum-v1", policy_kwargs={"unimix": 0.2}).policy.world_model.rssm
    logits = th.full((2, 4, 4), -1e3)
    logits[:, 1] = 1e3
    probs = rssm.probabilities(logits)
    assert probs.min().item() == pytest.approx(0.2 / 4) and probs.max().item() == pytest.approx(0.8 + 0.2 / 4)


def test_bounds_of_the_standard_deviation() -> None:
    policy = tiny("Pendulum-v1", policy_kwargs={"min_std": 0.2, "max_std": 0.5}).policy
    outputs = th.tensor([[0.0, -50.0], [0.0, 50.0]])
    std = policy.actor_critic.distribution.parameters(outputs)[1]  # type: ignore[union-attr]
    assert std.flatten().tolist() == pytest.approx([0.2, 0.5])


def test_discount_and_lambda_reach_the_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[float, ...]] = {}
    imagined, replayed = actor_critic.imagined_returns, actor_critic.replayed_returns

    def note_imagined(*args: Any) -> th.Tensor:
        seen["imagined"] = args[3:]
        return imagined(*args)

    def note_replayed(*args: Any) -> th.Tensor:
        seen["replayed"] = args[4:]
        return replayed(*args)

    monkeypatch.setattr(actor_critic, "imagined_returns", note_imagined)
    monkeypatch.setattr(actor_critic, "replayed_returns", note_replayed)
    model, batch, result = losses(gamma=0.8, return_lambda=0.3)
    assert seen == {"imagined": (0.3,), "replayed": (0.8, 0.3)}
    assert batch.is_terminal.any() and not batch.is_terminal.all()
    logits = model.policy.world_model.cont(result.states.features).squeeze(-1)  # (B, T)
    target = 0.8 * (1.0 - batch.is_terminal.float())
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    th.testing.assert_close(result.losses["continue"], expected)


def test_categories_have_a_cross_entropy_each() -> None:
    outputs, index = th.randn(7, 5), th.stack([th.randint(3, (7,)), th.randint(2, (7,))], -1)
    one_hots = th.cat([F.one_hot(index[:, 0], 3), F.one_hot(index[:, 1], 2)], -1)
    parts = zip(outputs.split([3, 2], -1), index.unbind(-1), strict=True)
    expected = sum(F.cross_entropy(part, i, reduction="none") for part, i in parts)
    th.testing.assert_close(vector_loss(outputs, one_hots, (3, 2)), expected)


def test_parameters_begin_as_published() -> None:
    """A variance of 1 / fan-in, that of the full input where it is cut in blocks; no bias. The policy's last weights are a
    hundredth of that, those of reward and value 0 (authors' release, ``outscale``)."""
    policy = tiny(RandomSpaces(OBSERVATION, BOX), model_size="1m").policy
    scales = {"actor_critic.policy.output": 0.01}
    scales |= dict.fromkeys(("world_model.reward.output", "actor_critic.value.output", "actor_critic.slow_value.output"), 0.0)
    for name, parameter in policy.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:  # of a norm
            assert (parameter == 1).all(), name
        else:
            # (outputs, inputs), (blocks, inputs of each, outputs of each), (outputs, inputs, height, width)
            inputs = math.prod(parameter.shape[:2] if parameter.ndim == 3 else parameter.shape[1:])
            scale = next((scale for part, scale in scales.items() if name.startswith(part)), 1.0)
            std = parameter.square().mean().sqrt().item() * math.sqrt(inputs)
            assert std == pytest.approx(scale, rel=4 / math.sqrt(2 * parameter.numel()), abs=0), name
