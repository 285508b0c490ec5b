"""Observations in units of their own running deviation: the statistics against numpy's, and what they do in an update."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from test_dreamer_gpld import BOX, RandomSpaces, tiny

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.nets.distributions import symexp, symlog
from sb3_dreamer_gpld.nets.normalizer import MIN_STD, RATE, Normalizer
from sb3_dreamer_gpld.nets.world_model import Batch

NORMALIZED = {"policy_kwargs": {"normalize_vectors": True}}
MIXED = spaces.Dict(
    {
        "choice": spaces.Discrete(3),
        "image": spaces.Box(0, 255, (3, 16, 16), np.uint8),
        "large": spaces.Box(-1000.0, 1000.0, (2, 2), np.float32),
        "small": spaces.Box(-0.01, 0.01, (), np.float32),
    }
)


OK, FAULT = th.tensor(False), th.tensor(True)


def test_statistics_are_those_of_all_numbers() -> None:
    """As long as an update's share is 1 / number of updates: numpy's mean and variance of everything that was seen."""
    rng = np.random.default_rng(0)
    batches = rng.normal([100.0, 0.0, -3.0], [0.5, 1.0, 20.0], (30, 64, 3)) + rng.normal(0.0, 2.0, (30, 1, 3))
    net = Normalizer(3).double()
    for number, batch in enumerate(batches, 1):
        net.update(th.as_tensor(batch), OK)
        seen = batches[:number].reshape(-1, 3)
        np.testing.assert_allclose(net.mean, seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(net.variance, seen.var(0), rtol=1e-10)
    assert net.updates == 30
    standard = net(th.as_tensor(batches)).reshape(-1, 3).numpy()
    np.testing.assert_allclose(standard.mean(0), 0.0, atol=1e-10)
    np.testing.assert_allclose(standard.std(0), 1.0, rtol=1e-10)


def test_old_numbers_are_forgotten_in_the_end() -> None:
    """After 1 / RATE updates a batch has the share RATE, whatever there were before: a mixture of two distributions."""
    net = Normalizer(1).double()
    net.mean.fill_(2.0), net.variance.fill_(9.0), net.updates.fill_(50 / RATE)
    net.update(th.tensor([[4.0], [6.0]], dtype=th.float64), OK)
    assert net.mean.item() == pytest.approx(2.0 + RATE * 3.0, rel=1e-12)
    second_moment = (1 - RATE) * (9.0 + 4.0) + RATE * (16.0 + 36.0) / 2
    assert net.variance.item() == pytest.approx(second_moment - net.mean.item() ** 2, rel=1e-10)


def test_a_number_that_hardly_varies_is_not_blown_up() -> None:
    net = Normalizer(2)
    x = th.stack([th.full((100,), 7.0), 7.0 + 1e-4 * th.randn(100)], -1)
    net.update(x, OK)
    assert th.equal(net(x)[:, 0], th.zeros(100))
    assert net(x + MIN_STD)[:, 0].mean().item() == pytest.approx(1.0, rel=1e-4)
    assert net(x)[:, 1].abs().max() < 0.1


def test_a_failed_update_leaves_everything() -> None:
    net = Normalizer(2)
    net.update(th.randn(8, 2), OK)
    before = [buffer.clone() for buffer in net.buffers()]
    net.update(th.full((8, 2), th.nan), FAULT)
    assert all(th.equal(one, two) for one, two in zip(before, net.buffers(), strict=True))


def test_one_huge_number_is_not_remembered() -> None:
    """Its square overflows; the others' statistics go on."""
    for first in (False, True):
        net = Normalizer(2)
        if not first:
            net.update(th.randn(8, 2), OK)
        x = th.randn(8, 2)
        x[3, 0] = 1e21
        net.update(x, OK)
        net.update(th.randn(8, 2), OK)
        assert all(buffer.isfinite().all() for buffer in net.buffers()) and net.updates == (2 if first else 3)
        assert (
            net(th.randn(8, 2)).abs().max() < 20
            and net.mean.abs().max() < 5
            and 0.1 < net.variance.min() <= net.variance.max() < 4.0
        )


def test_inverse() -> None:
    net, x = Normalizer(4), 5.0 * th.randn(50, 4) + 3.0
    net.update(x, OK)
    th.testing.assert_close(net.inverse(net(x)), x)


@pytest.fixture(scope="module")
def trained() -> DreamerGPLD:
    return tiny(RandomSpaces(MIXED, BOX), **NORMALIZED).learn(60, log_interval=None)


def sampled(model: DreamerGPLD) -> Batch:
    return model.policy.to_batch(model.replay_buffer.sample(4))


def test_what_encoder_and_decoder_see(trained: DreamerGPLD) -> None:
    """Box numbers by the statistics of their own, in the order of the keys; one-hots and images as without."""
    batch, plain = sampled(trained), tiny(RandomSpaces(MIXED, BOX))
    world_model, size = trained.policy.world_model, batch.rewards.shape
    vectors, images, tokens = world_model.encode_targets(batch.observations, size)
    raw, raw_images, _ = plain.policy.world_model.encode_targets(batch.observations, size)
    th.testing.assert_close(tokens, world_model.encode(batch.observations, size))
    names = [key.name for key in world_model.spec.vectors]
    assert names == ["choice", "large", "small"]
    assert th.equal(vectors[0], raw[0]) and th.equal(images[0], raw_images[0])
    net = world_model.normalizer
    assert net is not None and net.mean.shape == (5,) and net.updates == trained._n_updates
    for name, found, numbers in (("large", vectors[1], slice(4)), ("small", vectors[2], slice(4, 5))):
        x = batch.observations[name].reshape(*size, -1)
        scale = net.variance[numbers].clamp_min(MIN_STD**2).sqrt()
        th.testing.assert_close(found, symlog((x - net.mean[numbers]) / scale))
    assert 0.4 < vectors[1].std() < 0.8 and 0.2 < vectors[2].std() < 0.8  # ±0.01 is near the smallest deviation


def test_predicted_observations_are_not_normalised(trained: DreamerGPLD) -> None:
    """:meth:`WorldModel.decode` speaks of the observations as they are, so that errors of two models can be compared."""
    world_model = trained.policy.world_model
    features = th.randn(2, 5, world_model.config.feature_size)
    decoded, net = world_model.decode(features)[0], world_model.normalizer
    assert net is not None and world_model.vector_decoder is not None
    outputs = world_model.vector_decoder(features).split([3, 4, 1], -1)
    scale = net.variance.clamp_min(MIN_STD**2).sqrt()
    assert th.equal(decoded[0], outputs[0])
    th.testing.assert_close(decoded[1], symlog(symexp(outputs[1]) * scale[:4] + net.mean[:4]))
    th.testing.assert_close(decoded[2], symlog(symexp(outputs[2]) * scale[4:] + net.mean[4:]))
    # A decoder that gives what it should would predict the observations.
    batch = sampled(trained)
    size = batch.rewards.shape
    wanted = world_model.encode_targets(batch.observations, size)[0]
    with mock.patch.object(world_model.vector_decoder, "forward", lambda _: th.cat(wanted, -1)):
        predicted = world_model.decode(th.zeros(*size, world_model.config.feature_size))[0]
    for found, truth in zip(predicted, world_model.targets(batch.observations, size)[0], strict=True):
        th.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_statistics_are_of_the_replayed_observations() -> None:
    """Of those of each update, and of no other."""
    model = tiny(RandomSpaces(MIXED, BOX), train_ratio=0.0, **NORMALIZED).learn(60, log_interval=None)
    net = model.policy.world_model.normalizer
    assert net is not None and net.updates == 0
    batches = [sampled(model) for _ in range(3)]
    for number, batch in enumerate(batches):
        model.learner.update(batch, None, number, [1e-4])
    seen = np.concatenate([np.asarray(batch.observations["large"]).reshape(-1, 4) for batch in batches])
    np.testing.assert_allclose(net.mean[:4], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(net.variance[:4], seen.var(0), rtol=1e-4)


def test_observations_that_are_not_finite_leave_them(trained: DreamerGPLD) -> None:
    model = tiny(RandomSpaces(MIXED, BOX), **NORMALIZED).learn(60, log_interval=None)
    batch, net = sampled(model), model.policy.world_model.normalizer
    assert net is not None
    before = [buffer.clone() for buffer in net.buffers()]
    broken = batch._replace(observations={**batch.observations, "large": batch.observations["large"] * th.nan})
    model.learner.update(broken, None, 100, [1e-4])
    with pytest.raises(FloatingPointError, match="became not finite"):
        model.learner.faults.raise_faults()
    assert all(th.equal(one, two) for one, two in zip(before, net.buffers(), strict=True))
    model.learner.update(batch, None, 100, [1e-4])
    model.learner.faults.raise_faults()
    assert net.updates == before[2] + 1


def test_they_are_saved(trained: DreamerGPLD, tmp_path: Path) -> None:
    trained.save(tmp_path / "model")
    loaded = DreamerGPLD.load(tmp_path / "model")
    for name, value in trained.policy.world_model.normalizer.state_dict().items():
        assert th.equal(value, loaded.policy.world_model.normalizer.state_dict()[name]), name
    observation = trained.env.observation_space.sample()
    assert np.array_equal(*(model.predict(observation, deterministic=True)[0] for model in (trained, loaded)))


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(0, 255, (3, 16, 16), np.uint8)], ids=["one-hot", "image"])
def test_without_numbers_there_is_nothing_to_normalise(space: Any) -> None:
    model = tiny(RandomSpaces(space, BOX), **NORMALIZED).learn(40, log_interval=None)
    assert model.policy.world_model.normalizer is None
