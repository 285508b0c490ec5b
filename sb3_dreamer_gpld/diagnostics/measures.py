"""How smooth a world model is, and how far its predictions carry.

Letters: B sequences, T steps, N states, H imagined steps, D deter, C classes, K rows, A action numbers.
The state of the model is s = [deter, stoch], D + C·K numbers, which is also what the heads read ("features").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch as th
from torch import Tensor

from sb3_dreamer_gpld.buffers import SequenceReplayBuffer
from sb3_dreamer_gpld.execution import plain_steps
from sb3_dreamer_gpld.nets.distributions import categorical_kl, decode_categories
from sb3_dreamer_gpld.nets.rssm import States
from sb3_dreamer_gpld.nets.world_model import Batch, head_penalty
from sb3_dreamer_gpld.observations import ONLY_KEY
from sb3_dreamer_gpld.policies import DreamerPolicy

if TYPE_CHECKING:
    from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0)  # standard deviations of the perturbations δ
RATIO_SCALE = 0.01  # that of the transition ratio: small, so that the ratio is a local one
CHUNK_STATES = 64  # states whose exact Jacobian norms are computed together: it needs K·C vectors for each


@contextmanager
def undisturbed(policy: DreamerPolicy, seed: int) -> Iterator[None]:
    """Measure without a trace: no gradient, random numbers of one's own, none of the training's compiled functions, and
    nothing that moves with each call in training (the vectors of spectral norms).

    :param policy: what is measured
    :param seed: of the random numbers inside the block; the generators go on afterwards as if it had not been
    """
    training = policy.training
    with plain_steps(policy), th.no_grad(), th.random.fork_rng(range(th.cuda.device_count())):
        th.manual_seed(seed)
        policy.set_training_mode(False)
        try:
            yield
        finally:
            policy.set_training_mode(training)


def replay_windows(model: DreamerGPLD, count: int, generator: np.random.Generator) -> Batch:
    """Windows of the replay buffer, drawn without touching its random generator or its queue of fresh windows.

    :param model: whose buffer it is
    :param count: windows, B
    :param generator: draws them
    :raises ValueError: nothing is stored
    """
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    return model.policy.to_batch(model.replay_buffer.peek(count, generator, model.get_vec_normalize_env()))


# --------------------------------------------------------------------------------------------------------------- states


def posterior_states(policy: DreamerPolicy, batch: Batch) -> tuple[States, Tensor]:
    """Posterior states along windows, with sampled latents.

    :param policy: the model
    :param batch: B windows of T steps
    :return: the states, and the tokens (B, T, tokens)
    """
    tokens = policy.world_model.encode(batch.observations, batch.rewards.shape)
    noise = th.rand(*batch.rewards.shape, policy.config.stoch, device=tokens.device)
    states = policy.world_model.rssm.observe(tokens, batch.actions, batch.is_first, batch.deter, batch.stoch, noise)
    return states, tokens


def posterior_probabilities(policy: DreamerPolicy, inputs: Tensor) -> Tensor:
    """The map that the penalty smooths.

    :param policy: the model
    :param inputs: u = [deter, tokens], (N, D + tokens)
    :return: class probabilities after the uniform mix, (N, C, K)
    """
    rssm = policy.world_model.rssm
    return rssm.probabilities(rssm.posterior_logits(inputs))


# ----------------------------------------------------------------------------------------------------------- smoothness


def posterior_sensitivity(policy: DreamerPolicy, inputs: Tensor, scale: float) -> Tensor:
    """KL(q(u) ‖ q(u + δ)) of the posterior, summed over its rows, for one δ ~ N(0, scale²·I) at each u.

    :param policy: the model
    :param inputs: u, (N, D + tokens)
    :param scale: standard deviation of each number of δ
    :return: nats, (N,)
    """
    moved = inputs + scale * th.randn_like(inputs)
    return categorical_kl(posterior_probabilities(policy, inputs), posterior_probabilities(policy, moved))


def jacobian_norms(policy: DreamerPolicy, deter: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Exact Frobenius norms of the Jacobians ∂q/∂u of all K·C probabilities, of the posterior and of the prior.

    Their squares are K times the penalty of a state, whose mean over the rows is divided by K.

    :param policy: the model
    :param deter, tokens: (N, D), (N, tokens)
    :return: (N,) each
    """
    rssm, config = policy.world_model.rssm, policy.config
    posterior: list[Tensor] = []
    prior: list[Tensor] = []
    for h, x in zip(deter.split(CHUNK_STATES), tokens.split(CHUNK_STATES), strict=True):
        for norms, net, inputs in ((posterior, rssm.posterior, th.cat([h, x], -1)), (prior, rssm.prior, h)):
            squares = head_penalty(net, inputs, config.classes, config.unimix, None, None)
            norms.append(squares.clamp_min(0.0))  # rounding can make a vanishing one negative
    return (config.stoch * th.cat(posterior)).sqrt(), (config.stoch * th.cat(prior)).sqrt()


def transition_ratios(policy: DreamerPolicy, deter: Tensor, stoch: Tensor, actions: Tensor, scale: float) -> Tensor:
    """‖f(s + δ, a) − f(s, a)‖ / ‖δ‖ of the imagined transition f, for one δ ~ N(0, scale²·I) at each s.

    f(s, a) = [deter', q'], the next deter and the prior's probabilities there. The largest ratio is a lower bound of the
    Lipschitz constant of f, with which the error of an imagined trajectory can grow from step to step (Asadi, Misra &
    Littman, "Lipschitz Continuity in Model-based Reinforcement Learning", ICML 2018, arXiv 1804.07193, Theorem 1).

    :param policy: the model
    :param deter, stoch: s, (N, D), (N, C, K)
    :param actions: a, (N, A)
    :param scale: standard deviation of each number of δ
    :return: (N,)
    """
    rssm = policy.world_model.rssm

    def transition(deter: Tensor, stoch: Tensor) -> Tensor:
        _, after = rssm.imagine(deter, stoch, lambda features, step: actions, None, 1)
        deter = after[:, : deter.shape[-1]]
        return th.cat([deter, rssm.probabilities(rssm.prior_logits(deter)).flatten(1)], -1)  # (N, D + C·K)

    moves = scale * th.randn_like(deter), scale * th.randn_like(stoch)
    change = transition(deter + moves[0], stoch + moves[1]) - transition(deter, stoch)
    return change.norm(dim=-1) / th.cat([moves[0], moves[1].flatten(1)], -1).norm(dim=-1)


def imagined_ratios(policy: DreamerPolicy, deter: Tensor, stoch: Tensor, horizon: int, scale: float = RATIO_SCALE) -> Tensor:
    """:func:`transition_ratios` along rollouts that the policy imagines from N states.

    :param policy: the model
    :param deter, stoch: starts, (N, D), (N, C, K)
    :param horizon: transitions of each rollout, H
    :param scale: of the perturbations
    :return: (H·N,)
    """
    actions: list[Tensor] = []
    distribution, config = policy.actor_critic.distribution, policy.config

    def act(features: Tensor, step: int) -> Tensor:
        draws = distribution.draw((len(features),), features.device)
        actions.append(distribution.sample(policy.actor_critic.policy(features), draws))
        return actions[-1]

    noise = th.rand(horizon, len(deter), config.stoch, device=deter.device)
    features = policy.world_model.rssm.imagine(deter, stoch, act, noise, horizon)
    starts, stochs = th.cat(features[:-1]).split([config.deter, config.stoch_size], -1)  # (H·N, ·)
    stochs = stochs.unflatten(-1, (config.classes, config.stoch))
    return transition_ratios(policy, starts, stochs, th.cat(actions), scale)


class Smoothness(NamedTuple):
    """What :func:`smoothness` measures at N states.

    :param kl: :func:`posterior_sensitivity` by scale, (N,) each
    :param posterior_jacobian, prior_jacobian: :func:`jacobian_norms`, (N,) each
    :param transition_ratio: :func:`imagined_ratios`, (H·min(N, rollouts),)
    :param input_rms: root mean square of the numbers in u, (N,): inputs that are only spread out more make the
        other numbers smaller, too
    """

    kl: dict[float, Tensor]
    posterior_jacobian: Tensor
    prior_jacobian: Tensor
    transition_ratio: Tensor
    input_rms: Tensor


def smoothness(
    policy: DreamerPolicy,
    deter: Tensor,
    stoch: Tensor,
    tokens: Tensor,
    scales: Sequence[float] = SCALES,
    horizon: int = 15,
    rollouts: int = 64,
) -> Smoothness:
    """Measure the smoothness of the model at posterior states.

    :param policy: the model
    :param deter, stoch, tokens: (N, D), (N, C, K), (N, tokens)
    :param scales: standard deviations of δ
    :param horizon: steps of the imagined rollouts
    :param rollouts: how many of the states they start from, the first ones
    """
    inputs = th.cat([deter, tokens], -1)
    return Smoothness(
        {scale: posterior_sensitivity(policy, inputs, scale) for scale in scales},
        *jacobian_norms(policy, deter, tokens),
        imagined_ratios(policy, deter[:rollouts], stoch[:rollouts], horizon),
        inputs.square().mean(-1).sqrt(),
    )


class ActionSmoothness(NamedTuple):
    """What :func:`action_smoothness` measures; NaN where there is nothing to measure.

    :param change: mean of |a_t − a_{t−1}| over steps and numbers of an action, which lie in [−1, 1]
    :param high_frequencies: share of the amplitude spectrum of the actions, their mean left out, that lies in the upper half
        of the frequencies: 0 for slow actions, about 0.5 for white noise
    """

    change: float
    high_frequencies: float


def action_smoothness(batch: Batch) -> ActionSmoothness:
    """How smooth actions in a Box are, as they were taken, after Mysore et al., "Regularizing Action Policies for Smooth
    Control with Reinforcement Learning" (ICRA 2021, who weigh the amplitudes of a Fourier transform).

    :param batch: B windows of T steps, whose actions are those before each observation
    """
    taken = ~batch.is_first  # (B, T): what stands before an episode's first observation is no action
    pairs = taken[:, 1:] & taken[:, :-1]  # (B, T − 1)
    changes = (batch.actions[:, 1:] - batch.actions[:, :-1]).abs()[pairs]  # (pairs, A)
    whole = batch.actions[taken[:, 1:].all(1), 1:]  # (windows without an episode's start, T − 1, A)
    share = math.nan
    if len(whole) and whole.shape[1] >= 4:  # two frequencies
        amplitudes = th.fft.rfft(whole - whole.mean(1, keepdim=True), dim=1).abs()[:, 1:]  # (windows, frequencies, A)
        high, every = amplitudes[:, amplitudes.shape[1] // 2 :].sum(), amplitudes.sum()
        share = float(high / every) if every > 0 else math.nan
    return ActionSmoothness(float(changes.mean()), share)


# ------------------------------------------------------------------------------------------------------------ open loop


class OpenLoop(NamedTuple):
    """Predictions without seeing, against what happened. Step k = 0 is the last one that was seen, k = H the last imagined.

    :param errors: by name, (B, H + 1); see :func:`prediction_errors`
    :param teacher_forced: the same for the posterior states, which see every step
    :param valid: the episode has not ended between the window's start and step k, bool (B, H + 1)
    :param features: posterior states up to k = 0, imagined ones after it, (B, T, D + C·K)
    """

    errors: dict[str, Tensor]
    teacher_forced: dict[str, Tensor]
    valid: Tensor
    features: Tensor

    def means(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """:return: means over the valid windows (NaN where there is none), (H + 1,) by name: open loop and teacher-forced;
        and the number of these windows, (H + 1,)
        """
        count = self.valid.sum(0)

        def mean(errors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.where(self.valid, x.new_zeros(())).sum(0) / count for name, x in errors.items()}

        return mean(self.errors), mean(self.teacher_forced), count


def open_loop(policy: DreamerPolicy, batch: Batch, context: int, gamma: float) -> OpenLoop:
    """See ``context`` steps of each window, then imagine the others with the actions that were really taken.

    :param policy: the model
    :param batch: B windows of T steps
    :param context: steps seen, from 1 to T; H = T − context
    :param gamma: discount that the continue head learns
    :raises ValueError: there are not that many steps
    """
    steps = batch.rewards.shape[1]
    if not 1 <= context <= steps:
        raise ValueError(f"context must be from 1 to {steps}, the steps of a window, not {context}")
    states, _ = posterior_states(policy, batch)
    noise = th.rand(steps - context, len(batch.rewards), policy.config.stoch, device=batch.rewards.device)
    last = context - 1
    imagined = policy.world_model.rssm.imagine(
        states.deter[:, last],
        states.stoch[:, last],
        lambda features, step: batch.actions[:, context + step],
        noise,
        steps - context,
    )
    seen = states.features  # (B, T, D + C·K)
    features = th.cat([seen[:, :last], th.stack(imagined, 1)], 1)  # (B, T, D + C·K)
    future = batch.steps(slice(last, None))
    ended = batch.is_first.clone()
    ended[:, 0] = False
    return OpenLoop(
        prediction_errors(policy, features[:, last:], future, gamma),
        prediction_errors(policy, seen[:, last:], future, gamma),
        ended.cumsum(1)[:, last:] == 0,
        features,
    )


def prediction_errors(policy: DreamerPolicy, features: Tensor, batch: Batch, gamma: float) -> dict[str, Tensor]:
    """Errors of what the heads predict from features.

    :param policy: the model
    :param features: (B, T, D + C·K)
    :param batch: what happened at the same steps
    :param gamma: discount that the continue head learns
    :return: by name, (B, T) each: "reward" and "continue" (absolute errors; the truth of the latter is γ, or 0 at a terminal
        step), "observation/<key>" (mean squared error of symlog numbers or of pixels in [0, 1]; for categories the share that
        is wrong), and "observation", the mean over the keys; without a decoder the first two only
    """
    world_model = policy.world_model
    reward = world_model.predict_reward(world_model.reward(features))
    cont = th.sigmoid(world_model.cont(features).squeeze(-1))
    lives = gamma * (1.0 - batch.is_terminal.to(cont.dtype))
    return {
        **(_observation_errors(policy, features, batch) if world_model.has_decoder else {}),
        "reward": (reward - batch.rewards).abs(),
        "continue": (cont - lives).abs(),
    }


def _observation_errors(policy: DreamerPolicy, features: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Errors of the decoder's predictions, see :func:`prediction_errors`."""
    world_model = policy.world_model
    targets = world_model.targets(batch.observations, features.shape[:2])
    predictions = world_model.decode(features)
    by_key: dict[str, Tensor] = {}
    for key, prediction, target in zip(world_model.spec.vectors, predictions[0], targets[0], strict=True):
        if key.nvec is None:
            by_key[key.name] = (prediction - target).square().mean(-1)
        else:
            wrong = decode_categories(prediction, key.nvec) != decode_categories(target, key.nvec)
            by_key[key.name] = wrong.to(prediction.dtype).mean(-1)
    for group, image, target in zip(world_model.spec.image_groups.values(), predictions[1], targets[1], strict=True):
        squares = (image - target).square().split([key.channels for key in group], -1)
        by_key.update({key.name: square.mean((-3, -2, -1)) for key, square in zip(group, squares, strict=True)})
    return {
        "observation": th.stack(list(by_key.values())).mean(0),
        **({} if ONLY_KEY in by_key else {f"observation/{name}": by_key[name] for name in sorted(by_key)}),
    }
