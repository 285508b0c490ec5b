"""Distributions against torch.distributions and against their definitions.

Letters: C classes, K rows, N states, A action numbers.
"""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from sb3_dreamer_gpld.nets.distributions import (
    BoundedNormal,
    MultiCategorical,
    categorical_kl,
    decode_categories,
    encode_categories,
    mode_one_hot,
    sample_one_hot,
    straight_through,
    symexp,
    symlog,
    two_hot_bins,
    two_hot_loss,
    two_hot_mean,
    uniform_mix,
)

CPU = th.device("cpu")
NVEC = (2, 5, 3)
LARGEST_NOISE = 1 - 2**-24  # of torch.rand in float32


def random_probs(*shape: int) -> Tensor:
    """Float32 probabilities (..., C, K), some of them tiny."""
    return th.softmax(4 * th.randn(*shape), -2)


def is_one_hot(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all() and (x.sum(-2) == 1).all())


def gradient(y: Tensor, x: Tensor) -> Tensor:
    (result,) = th.autograd.grad(y.sum(), x, retain_graph=True)
    return result


# ---------------------------------------------------------------- symlog


def test_symlog_values() -> None:
    x = th.tensor([-(math.e - 1), 0.0, 1.0, 1e6], dtype=th.float64)
    expected = th.tensor([-1.0, 0.0, math.log(2.0), math.log(1e6 + 1)], dtype=th.float64)
    th.testing.assert_close(symlog(x), expected, rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-1e8, 1e8), st.floats(-19, 19))
def test_symexp_is_the_inverse_of_symlog(x: float, y: float) -> None:
    assert symexp(symlog(th.tensor(x, dtype=th.float64))).item() == pytest.approx(x, rel=1e-12, abs=1e-300)
    assert symlog(symexp(th.tensor(y, dtype=th.float64))).item() == pytest.approx(y, rel=1e-12, abs=1e-300)


# ---------------------------------------------------------------- categorical


@pytest.mark.parametrize("mix", [0.0, 0.01, 0.5])
def test_uniform_mix(mix: float) -> None:
    th.manual_seed(0)
    logits = 50 * th.randn(6, 5, 3, dtype=th.float64)  # saturated: most softmax entries are about 0
    probs = uniform_mix(logits, mix)
    th.testing.assert_close(probs.sum(-2), th.ones(6, 3, dtype=th.float64))
    assert probs.min() >= mix / 5 and (mix == 0 or probs.min().item() == pytest.approx(mix / 5))
    th.testing.assert_close(probs, (1 - mix) * logits.exp() / logits.exp().sum(-2, keepdim=True) + mix / 5)


@pytest.mark.parametrize("classes", [2, 3, 16, 96])
def test_samples_are_one_hot(classes: int) -> None:
    th.manual_seed(0)
    probs = random_probs(500, classes, 7)
    noise = th.rand(500, 7)
    noise[:100], noise[100:200] = 0.0, LARGEST_NOISE
    samples = sample_one_hot(probs, noise)
    assert samples.shape == probs.shape and samples.dtype == probs.dtype and is_one_hot(samples)


def test_smallest_and_largest_noise_draw_the_first_and_the_last_possible_class() -> None:
    probs = th.tensor([[0.0, 0.5], [0.25, 0.5], [0.75, 0.0]])  # two rows of three classes
    assert sample_one_hot(probs, th.zeros(2)).argmax(-2).tolist() == [1, 0]
    assert sample_one_hot(probs, th.full((2,), LARGEST_NOISE)).argmax(-2).tolist() == [2, 1]
    assert sample_one_hot(probs, th.tensor([0.0, LARGEST_NOISE])).argmax(-2).tolist() == [1, 1]


def test_each_class_is_drawn_in_the_interval_of_its_probability() -> None:
    probs = th.tensor([0.25, 0.5, 0.125, 0.125]).unsqueeze(-1)
    noise = th.tensor([0.0, 0.249, 0.25, 0.749, 0.75, 0.874, 0.875, 0.999]).unsqueeze(-1)
    assert sample_one_hot(probs.expand(8, -1, -1), noise).argmax(-2).flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_frequencies_match_the_probabilities() -> None:
    th.manual_seed(0)
    count, probs = 20_000, random_probs(5, 3)
    samples = sample_one_hot(probs.expand(count, -1, -1), th.rand(count, 3))
    error = (samples.mean(0) - probs).abs()
    assert (error <= 4 * (probs * (1 - probs) / count).sqrt() + 1e-6).all()
    joint = th.einsum("nci,ndj->cdij", samples, samples)[:, :, 0, 1] / count  # two rows are independent
    assert (joint - th.outer(probs[:, 0], probs[:, 1])).abs().max() < 4 * 0.5 / count**0.5


def test_mode_is_the_most_probable_class() -> None:
    th.manual_seed(0)
    probs = random_probs(20, 5, 3)
    mode = mode_one_hot(probs)
    assert is_one_hot(mode) and th.equal((mode * probs).sum(-2), probs.amax(-2))


def test_straight_through_has_the_samples_value_and_the_probabilities_gradient() -> None:
    logits = th.randn(5, 3, dtype=th.float64, requires_grad=True)
    probs, weights = uniform_mix(logits, 0.01), th.randn(5, 3, dtype=th.float64)
    sample = sample_one_hot(probs, th.rand(3))
    assert not sample.requires_grad
    result = straight_through(sample, probs)
    assert th.equal(result, sample)
    assert th.equal(gradient(result * weights, logits), gradient(probs * weights, logits))


def test_kl_is_the_sum_over_the_rows() -> None:
    th.manual_seed(0)
    p, q = uniform_mix(th.randn(4, 5, 3, dtype=th.float64), 0.01), uniform_mix(th.randn(4, 5, 3, dtype=th.float64), 0.01)
    expected = kl_divergence(Categorical(p.mT), Categorical(q.mT)).sum(-1)
    th.testing.assert_close(categorical_kl(p, q), expected, rtol=1e-12, atol=0)
    assert not th.allclose(categorical_kl(p, q), categorical_kl(q, p))


# ---------------------------------------------------------------- two-hot

BINS = two_hot_bins(255)


def two_hot(target: float, bins: list[float]) -> list[float]:
    """Weights of all bins for a target: on the two around it, in inverse proportion to the distances."""
    target = min(max(target, bins[0]), bins[-1])
    weights = [0.0] * len(bins)
    below = max(i for i, b in enumerate(bins) if b <= target)
    if bins[below] == target:
        weights[below] = 1.0
        return weights
    width = bins[below + 1] - bins[below]
    weights[below], weights[below + 1] = (bins[below + 1] - target) / width, (target - bins[below]) / width
    return weights


def targets_of_every_kind() -> dict[str, float]:
    return {
        "lowest bin": BINS[0].item(),
        "a bin": BINS[100].item(),
        "zero": 0.0,
        "next to zero": BINS[128].item(),
        "highest bin": BINS[-1].item(),
        "between": 3.7,
        "between, negative": -0.01,
        "in the last interval": 4.5e8,
        "in the first interval": -4.5e8,
        "below all": -1e12,
        "above all": 1e12,
    }


def test_bins() -> None:
    assert BINS.shape == (255,) and BINS.dtype == th.float32
    assert th.equal(BINS, -BINS.flip(0)) and BINS[127] == 0
    assert (BINS.diff() > 0).all()
    expected = symexp(20 * th.linspace(-1, 1, 255, dtype=th.float64))
    np.testing.assert_allclose(BINS.numpy(), expected.numpy(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 1e4])
def test_mean_is_exactly_zero_for_equal_logits(value: float) -> None:
    assert two_hot_mean(th.full((2, 3, 255), value), BINS).tolist() == [[0.0] * 3] * 2


def test_mean_is_the_expected_value() -> None:
    th.manual_seed(0)
    logits = 3 * th.randn(10, 255, dtype=th.float64)
    expected = (th.softmax(logits, -1) * BINS).sum(-1)
    th.testing.assert_close(two_hot_mean(logits, BINS), expected, rtol=1e-9, atol=0)
    assert two_hot_mean(logits.float(), BINS).dtype == th.float32


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_loss_is_the_dense_cross_entropy(dtype: th.dtype) -> None:
    th.manual_seed(0)
    values = list(targets_of_every_kind().values())
    logits = th.randn(len(values), 255, dtype=dtype)
    target, bins = th.tensor(values, dtype=dtype), BINS.to(dtype)
    dense = th.tensor([two_hot(v, bins.tolist()) for v in target.tolist()], dtype=dtype)
    expected = -(dense * th.log_softmax(logits, -1)).sum(-1)
    th.testing.assert_close(two_hot_loss(logits, [target], bins), expected)


def test_loss_of_several_targets_is_the_sum() -> None:
    th.manual_seed(0)
    logits, (a, b) = th.randn(4, 6, 255), 10 * th.randn(2, 4, 6)
    total = two_hot_loss(logits, [a, b], BINS)
    assert total.shape == (4, 6)
    th.testing.assert_close(total, two_hot_loss(logits, [a], BINS) + two_hot_loss(logits, [b], BINS))


def test_targets_take_no_gradient() -> None:
    logits, target = th.zeros(3, 255, requires_grad=True), th.ones(3, requires_grad=True)
    two_hot_loss(logits, [target], BINS).sum().backward()
    assert target.grad is None and logits.grad is not None


@pytest.mark.parametrize("kind", targets_of_every_kind())
def test_mean_of_a_two_hot_distribution_is_its_target(kind: str) -> None:
    target = targets_of_every_kind()[kind]
    logits = th.tensor(two_hot(target, BINS.tolist()), dtype=th.float64).log()
    expected = min(max(target, BINS[0].item()), BINS[-1].item())
    assert two_hot_mean(logits, BINS).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bins", [3, 41])
def test_other_numbers_of_bins(bins: int) -> None:
    centres = two_hot_bins(bins)
    assert len(centres) == bins and th.equal(centres, -centres.flip(0))
    assert centres[-1].item() == pytest.approx(math.expm1(20), rel=1e-5)


# ---------------------------------------------------------------- continuous actions


def test_standard_deviation_stays_in_its_bounds() -> None:
    outputs = th.tensor([[0.0, 0.0, -1e4, 1e4], [5.0, -1e4, 0.0, -2.0]])
    mean, std = BoundedNormal(2).parameters(outputs)
    th.testing.assert_close(mean, th.tensor([[0.0, 0.0], [math.tanh(5), -1.0]]))
    half = 0.9 / (1 + math.exp(-2)) + 0.1
    th.testing.assert_close(std, th.tensor([[0.1, 1.0], [half, 0.55]]))
    _, std = BoundedNormal(2, min_std=0.3, max_std=0.7).parameters(outputs)
    th.testing.assert_close(std[0], th.tensor([0.3, 0.7]))


def test_normal_log_prob_and_entropy() -> None:
    th.manual_seed(0)
    distribution, outputs = BoundedNormal(3), th.randn(4, 5, 6, dtype=th.float64, requires_grad=True)
    action = 2 * th.randn(4, 5, 3, dtype=th.float64)
    mean, std = outputs[..., :3].tanh(), 0.9 * th.sigmoid(outputs[..., 3:] + 2) + 0.1
    expected = Normal(mean, std).log_prob(action).sum(-1), Normal(mean, std).entropy().sum(-1)
    for ours, theirs in zip(distribution.log_prob_and_entropy(outputs, action), expected, strict=True):
        th.testing.assert_close(ours, theirs)
        th.testing.assert_close(gradient(ours, outputs), gradient(theirs, outputs))


def test_normal_samples() -> None:
    th.manual_seed(0)
    distribution, count = BoundedNormal(2), 20_000
    outputs = th.tensor([0.5, -2.0, -3.0, 4.0], requires_grad=True).expand(count, -1)
    noise = distribution.draw((count,), CPU)
    samples = distribution.sample(outputs, noise)
    assert noise.shape == samples.shape == (count, 2) and not samples.requires_grad
    mean, std = distribution.parameters(outputs[0].detach())
    assert ((samples.mean(0) - mean).abs() < 4 * std / count**0.5).all()
    assert ((samples.std(0) / std - 1).abs() < 4 / (2 * count) ** 0.5).all()
    assert samples.abs().max() > 1  # not squashed
    assert th.equal(distribution.mode(outputs)[0], mean)
    assert distribution.draw((3, 4), CPU).shape == (3, 4, 2)


# ---------------------------------------------------------------- discrete actions


def test_categorical_log_prob_and_entropy() -> None:
    th.manual_seed(0)
    distribution, outputs = MultiCategorical(NVEC), 3 * th.randn(4, 6, 10, dtype=th.float64)
    outputs.requires_grad_()
    index = th.stack([th.randint(n, (4, 6)) for n in NVEC], -1)
    parts = [Categorical(logits=x) for x in outputs.split(NVEC, -1)]
    expected = (
        sum(part.log_prob(i) for part, i in zip(parts, index.unbind(-1), strict=True)),
        sum(part.entropy() for part in parts),
    )
    ours = distribution.log_prob_and_entropy(outputs, encode_categories(index, NVEC).double())
    for got, want in zip(ours, expected, strict=True):
        th.testing.assert_close(got, want)
        th.testing.assert_close(gradient(got, outputs), gradient(want, outputs))


def test_categorical_samples() -> None:
    th.manual_seed(0)
    distribution, count = MultiCategorical(NVEC), 20_000
    assert distribution.size == 10 and distribution.outputs == NVEC
    outputs = th.randn(10, requires_grad=True)
    noise = distribution.draw((count,), CPU)
    samples = distribution.sample(outputs.expand(count, -1), noise)
    assert noise.shape == (count, 3) and samples.shape == (count, 10) and not samples.requires_grad
    assert th.equal(encode_categories(decode_categories(samples, NVEC), NVEC), samples)
    probs = th.cat([th.softmax(x, -1) for x in outputs.detach().split(NVEC)])  # no uniform mix
    assert ((samples.mean(0) - probs).abs() < 4 * (probs * (1 - probs) / count).sqrt()).all()
    covariance = th.cov(samples.T)[:2, 2:]  # of the first and the other categoricals, which are independent
    assert covariance.abs().max() < 4 * 0.25 / count**0.5
    assert distribution.draw((3, 4), CPU).shape == (3, 4, 3)


def test_categorical_mode() -> None:
    outputs = th.tensor([[1.0, 2, 0, 0, 9, 0, 0, 3, 2, 1], [2.0, 1, 9, 0, 0, 0, 0, 1, 2, 3]])
    mode = MultiCategorical(NVEC).mode(outputs)
    assert decode_categories(mode, NVEC).tolist() == [[1, 2, 0], [0, 0, 2]]
    assert th.equal(mode.sum(-1), th.full((2,), 3.0))


def test_layout_of_encoded_categories() -> None:
    encoded = encode_categories(th.tensor([[1.0, 4.0, 0.0]]), NVEC)
    assert encoded.tolist() == [[0, 1, 0, 0, 0, 0, 1, 1, 0, 0]] and encoded.dtype == th.float32


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_decoding_is_the_inverse_of_encoding(data: st.DataObject) -> None:
    nvec = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    index = th.tensor([[data.draw(st.integers(0, n - 1)) for n in nvec] for _ in range(3)])
    encoded = encode_categories(index, nvec)
    assert encoded.shape == (3, sum(nvec)) and th.equal(encoded.sum(-1), th.full((3,), float(len(nvec))))
    assert th.equal(decode_categories(encoded, nvec), index)
