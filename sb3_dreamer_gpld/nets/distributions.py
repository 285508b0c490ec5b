"""Probability distributions of the world model and the actor-critic, as functions of tensors.

Letters: C classes, K rows, A action numbers, N states; ``...`` stands for any batch dimensions.

Sources: Hafner et al., "Mastering diverse control tasks through world models", Nature 2025 (symlog, two-hot,
uniform mix, bounded normal) and the authors' JAX release for the constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch as th
from torch import Tensor
from torch.nn import functional as F


def symlog(x: Tensor) -> Tensor:
    """Symmetric logarithm, sign(x)·ln(1 + |x|) (Nature 2025, Methods, "Symlog")."""
    return th.sign(x) * th.log1p(th.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Inverse of :func:`symlog`, sign(x)·(exp(|x|) − 1)."""
    return th.sign(x) * th.expm1(th.abs(x))


# ---------------------------------------------------------------------------------------------- categorical
# Classes are the last dimension but one: sums over them then run along contiguous rows, which is several times faster
# than along a last dimension of a few classes.


def uniform_mix(logits: Tensor, mix: float) -> Tensor:
    """Probabilities of a categorical mixed with the uniform one (1 % in the papers).

    :param logits: (..., C, K)
    :param mix: share of the uniform distribution, in [0, 1)
    :return: (1 − mix)·softmax(logits) + mix/C, (..., C, K)
    """
    return (1.0 - mix) * th.softmax(logits, -2) + mix / logits.shape[-2]


def sample_one_hot(probs: Tensor, noise: Tensor) -> Tensor:
    """One-hot samples by inversion of the cumulative distribution: one random number per categorical.

    :param probs: (..., C, K)
    :param noise: independent numbers, uniform in [0, 1), (..., K)
    :return: one-hot samples without gradient, (..., C, K)
    """
    bounds = probs.detach().cumsum(-2)[..., :-1, :]  # (..., C − 1, K)
    reached = (bounds <= noise.unsqueeze(-2)).to(probs.dtype)
    # Class c is drawn if the noise is beyond the bounds of all classes before it and of no other.
    return F.pad(reached, (0, 0, 1, 0), value=1.0) - F.pad(reached, (0, 0, 0, 1))


def mode_one_hot(probs: Tensor) -> Tensor:
    """One-hot vectors of the most probable classes, (..., C, K)."""
    return th.zeros_like(probs).scatter_(-2, probs.argmax(-2, keepdim=True), 1.0)


def straight_through(sample: Tensor, probs: Tensor) -> Tensor:
    """The sample's value with the gradient of the probabilities."""
    return sample + (probs - probs.detach()) if probs.requires_grad else sample


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of K categoricals, summed over them.

    :param p: probabilities (..., C, K), none of them 0
    :param q: probabilities (..., C, K), none of them 0
    :return: nats, (...)
    """
    return (p * (th.log(p) - th.log(q))).sum((-2, -1))


# ------------------------------------------------------------------------------------------------- two-hot


def two_hot_bins(bins: int) -> Tensor:
    """Centres of the two-hot bins: symexp of ``bins`` equal steps from −20 to 20.

    The upper half mirrors the lower one to the last bit. The steps are rounded as in the authors' release: at 20 the
    symexp magnifies the last bit of its argument twenty-fold.

    :param bins: odd number of bins (255 in the paper)
    :return: (bins,), increasing
    """
    half = (bins - 1) // 2
    lower = symexp(-20.0 * (1.0 - th.arange(half) * (th.ones(()) / half)))
    return th.cat([lower, th.zeros(1), -lower.flip(0)])


def two_hot_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """Expected value of a two-hot distribution, summed in mirrored pairs.

    The bins are antisymmetric, so pairing them makes equal logits give exactly 0: an untrained head predicts 0. The sum
    is made in float64: the outer bins reach ±4.8e8, and while a young head still gives them weight, rounding to float32
    alone would move the mean by about 1.

    :param logits: (..., bins)
    :param bins: bin centres (bins,)
    :return: (...)
    """
    half = bins.shape[0] // 2
    probs = th.softmax(logits, -1, dtype=th.float64)
    return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) @ bins[half + 1 :].double()).to(logits.dtype)


def two_hot_loss(logits: Tensor, targets: Sequence[Tensor], bins: Tensor) -> Tensor:
    """Sum of the cross-entropies of a two-hot distribution to several targets.

    A target between two bins puts its weight on both, in inverse proportion to the distances.

    :param logits: (..., bins)
    :param targets: raw values, each (...); they take no gradient
    :param bins: bin centres (bins,)
    :return: Σ over the targets of −log p(target), (...)
    """
    log_probs = th.log_softmax(logits, -1)  # (..., bins)
    loss = th.zeros_like(log_probs[..., 0])
    for target in targets:
        target = target.detach().clamp(bins[0], bins[-1])
        above = th.searchsorted(bins, target.contiguous()).clamp(1, bins.shape[0] - 1)  # (...)
        below = above - 1
        share = (target - bins[below]) / (bins[above] - bins[below])  # weight of the upper bin
        picked = log_probs.gather(-1, th.stack([below, above], -1))  # (..., 2)
        loss = loss - (1 - share) * picked[..., 0] - share * picked[..., 1]
    return loss


# ------------------------------------------------------------------------------------------------- actions


class BoundedNormal:
    """Independent normals for actions scaled to [−1, 1]; samples are not squashed, the environment clips.

    Network outputs are (..., 2·A): means before tanh, then standard deviations before the sigmoid.
    Nature 2025 (Methods, "Actor") and the authors' release, ``bounded_normal``.

    :param size: numbers in an action, A
    :param min_std: smallest standard deviation
    :param max_std: largest standard deviation
    """

    def __init__(self, size: int, min_std: float = 0.1, max_std: float = 1.0) -> None:
        self.size = size
        self.outputs = (size, size)
        self.min_std, self.max_std = min_std, max_std

    def parameters(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """:return: mean and standard deviation, each (..., A)"""
        mean, std = outputs.split(self.size, -1)
        return th.tanh(mean), (self.max_std - self.min_std) * th.sigmoid(std + 2.0) + self.min_std

    def draw(self, shape: Sequence[int], device: th.device) -> Tensor:
        """:return: the random numbers that :meth:`sample` needs for actions of that batch shape, (*shape, A)"""
        return th.randn(*shape, self.size, device=device)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """:param outputs: (N, 2·A)
        :param noise: (N, A)
        :return: actions without gradient, (N, A)
        """
        return self.sample_with_gradient(outputs.detach(), noise)

    def sample_with_gradient(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """As :meth:`sample`, reparametrised: with the gradient of mean and standard deviation."""
        mean, std = self.parameters(outputs)
        return mean + std * noise

    def mode(self, outputs: Tensor) -> Tensor:
        """:return: most probable actions, (..., A)"""
        return self.parameters(outputs.detach())[0]

    def log_prob_and_entropy(self, outputs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """:return: log-density of the actions and entropy, in nats, summed over A, each (...)"""
        mean, std = self.parameters(outputs)
        log_std = th.log(std)
        log_prob = -0.5 * ((action - mean) / std).square() - log_std - 0.5 * math.log(2 * math.pi)
        entropy = log_std + 0.5 * math.log(2 * math.pi) + 0.5
        return log_prob.sum(-1), entropy.sum(-1)

    def score(self, outputs: Tensor, action: Tensor) -> Tensor:
        """:return: gradient of the log-density of given actions (..., A) in the outputs, (..., 2·A)"""
        mean, std = self.parameters(outputs)
        gate, error = th.sigmoid(outputs[..., self.size :] + 2.0), (action - mean) / std
        of_mean = error / std * (1.0 - mean.square())
        of_std = (error.square() - 1.0) / std * (self.max_std - self.min_std) * gate * (1.0 - gate)
        return th.cat([of_mean, of_std], -1)


class MultiCategorical:
    """Independent categoricals for Discrete, MultiDiscrete and MultiBinary actions, as concatenated one-hots.

    :param nvec: classes of each categorical; A is their sum
    """

    def __init__(self, nvec: Sequence[int]) -> None:
        self.nvec = tuple(int(n) for n in nvec)
        self.size = sum(self.nvec)
        self.outputs = self.nvec

    def draw(self, shape: Sequence[int], device: th.device) -> Tensor:
        """:return: the random numbers that :meth:`sample` needs for actions of that batch shape, (*shape, len(nvec))"""
        return th.rand(*shape, len(self.nvec), device=device)

    def sample(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """:param outputs: (N, A)
        :param noise: (N, len(nvec))
        :return: concatenated one-hots without gradient, (N, A)
        """
        logits = outputs.detach().T.split(self.nvec)  # (n, N) each
        samples = [sample_one_hot(th.softmax(x, 0), u) for x, u in zip(logits, noise.unbind(-1), strict=True)]
        return th.cat(samples).T.contiguous()

    def mode(self, outputs: Tensor) -> Tensor:
        """:return: concatenated one-hots of the most probable classes, (N, A)"""
        return th.cat([mode_one_hot(x) for x in outputs.detach().T.split(self.nvec)]).T.contiguous()

    def log_prob_and_entropy(self, outputs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """:return: log-probability of the actions and entropy, in nats, summed over the categoricals, each (...)"""
        log_probs = [th.log_softmax(x, -1) for x in outputs.split(self.nvec, -1)]
        log_prob = (th.cat(log_probs, -1) * action).sum(-1)
        entropy = -th.stack([(x.exp() * x).sum(-1) for x in log_probs]).sum(0)
        return log_prob, entropy

    def score(self, outputs: Tensor, action: Tensor) -> Tensor:
        """:return: gradient of the log-probability of given actions (..., A) in the outputs, (..., A)"""
        return action - th.cat([th.softmax(x, -1) for x in outputs.split(self.nvec, -1)], -1)


def encode_categories(index: Tensor, nvec: Sequence[int]) -> Tensor:
    """Concatenated one-hots of several categories.

    :param index: (..., len(nvec)), any number dtype
    :param nvec: classes of each category
    :return: float32 (..., Σ nvec)
    """
    parts = [F.one_hot(i.long(), n) for i, n in zip(index.unbind(-1), nvec, strict=True)]
    return th.cat(parts, -1).float()


def decode_categories(one_hots: Tensor, nvec: Sequence[int]) -> Tensor:
    """Inverse of :func:`encode_categories`: class indices, int64 (..., len(nvec))."""
    return th.stack([x.argmax(-1) for x in one_hots.split(tuple(nvec), -1)], -1)
