"""The actor and the critic: imagined returns, policy loss, value losses, percentile scale, slow value.

Letters: B sequences, T steps, S last ones of each, from which rollouts start, N = B·S states, H imagined steps, D deter,
C classes, K rows, A action numbers.

Sources: Hafner et al., Nature 2025 (Methods, "Critic learning" and "Actor learning", Eqs. 7 to 12) and the authors'
release, ``imag_loss`` and ``repl_loss``; for gradients through the dynamics Hafner et al., "Dream to Control" (ICLR 2020), and
the release of 2023, ``actor_grad_cont: backprop``; for the entropy's coefficient Haarnoja et al., "Soft Actor-Critic
Algorithms and Applications" (2018, Sec. 5), of which it takes the idea.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch as th
from torch import Tensor, nn

from sb3_dreamer_gpld.config import ActionSpec, ModelConfig
from sb3_dreamer_gpld.nets.distributions import BoundedNormal, MultiCategorical, two_hot_bins, two_hot_loss, two_hot_mean
from sb3_dreamer_gpld.nets.gpld import squared_gradient
from sb3_dreamer_gpld.nets.layers import Head, apply_heads, at_least_float32
from sb3_dreamer_gpld.nets.rssm import RSSM, Products, States
from sb3_dreamer_gpld.nets.steps import SteppedModule, compilable
from sb3_dreamer_gpld.nets.world_model import Batch, Term, WorldModel

ENT_COEF_RATE = 0.01  # largest change of the logarithm of the entropy's coefficient in an update
MAX_ENT_COEF_RISE = math.log(1e6)  # largest rise of that logarithm, which a policy that cannot follow would drive to infinity


class ImaginationDraws(NamedTuple):
    """Every random number of imagination.

    :param stoch: uniform numbers for the prior samples, (H, N, K)
    :param action: numbers for the actions, (H, N, ·); see the ``draw`` of the action's distribution
    """

    stoch: Tensor
    action: Tensor


class Objective(NamedTuple):
    """What actor and critic are trained for.

    :param gamma: discount of the replayed returns; the imagined ones are discounted by the continue head
    :param return_lambda: λ of the returns
    :param ent_coef: weight of the policy's entropy; with a target entropy the smallest one
    :param target_entropy: in nats, below which the weight of the entropy rises; None: it is fixed
    :param dynamics: share of the actor's gradient that comes through the imagined dynamics, in [0, 1]; REINFORCE has the rest
    :param starts: rollouts start from that many of the last states of each sequence; None: from all
    :param policy_penalty: weight of the squared gradient of the policy's log-density in its input; 0: none
    """

    gamma: float
    return_lambda: float
    ent_coef: float
    target_entropy: float | None = None
    dynamics: float = 0.0
    starts: int | None = None
    policy_penalty: float = 0.0

    def starts_of(self, steps: int) -> int:
        """States of a sequence of that many steps from which rollouts start, S."""
        return steps if self.starts is None else min(steps, self.starts)


class RunningStatistics(NamedTuple):
    """What actor and critic remember from update to update beside their parameters.

    :param percentiles: low and high percentile of the returns, (2,)
    :param ent_coef_rise: logarithm of the entropy's coefficient over its smallest value, scalar
    """

    percentiles: Tensor
    ent_coef_rise: Tensor


class Rollouts(NamedTuple):
    """Imagined rollouts. With gradients through the dynamics, predictions have that of the actions, but not of their nets.

    :param outputs: of the policy, with its gradient, (H, N, ·)
    :param actions: taken, without gradient, (H, N, A)
    :param reward, cont, value, slow_value: at each state, (H + 1, N)
    :param value_logits: of the value at all states but the last, a few steps at a time, with its gradient, (≤ group, N, bins)
    """

    outputs: Tensor
    actions: Tensor
    reward: Tensor
    cont: Tensor
    value: Tensor
    slow_value: Tensor
    value_logits: Sequence[Tensor]


class ActorCritic(SteppedModule):
    """Policy, value and slow value, and what is remembered beside them, see :class:`RunningStatistics`.

    :param actions: what actions look like
    :param config: sizes and constants
    """

    bins: Tensor
    percentiles: Tensor
    ent_coef_rise: Tensor
    # The numbers (n, ...) of all processes that learn together, (P·n, ...)
    gather: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)

    def __init__(self, actions: ActionSpec, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.distribution: BoundedNormal | MultiCategorical
        if actions.nvec is None:
            self.distribution = BoundedNormal(actions.size, config.min_std, config.max_std)
        else:
            self.distribution = MultiCategorical(actions.nvec)
        three = (config.units,) * 3
        policy = three if config.policy_arch is None else config.policy_arch
        value = three if config.value_arch is None else config.value_arch
        self.policy = Head(config.feature_size, policy, self.distribution.outputs, scale=0.01)
        self.value = Head(config.feature_size, value, [config.bins], scale=0.0)
        self.start_slow_value()
        self.register_buffer("bins", two_hot_bins(config.bins), persistent=False)
        self.register_buffer("percentiles", th.zeros(2))
        self.register_buffer("ent_coef_rise", th.zeros(()))
        self.register_load_state_dict_pre_hook(_complete_state)

    def start_slow_value(self) -> None:
        """Make the slow value a copy of the value, as at the beginning."""
        self.slow_value = copy.deepcopy(self.value).requires_grad_(False)

    def draw(self, starts: int, horizon: int) -> ImaginationDraws:
        """Random numbers for rollouts of ``horizon`` steps from ``starts`` states."""
        config, device = self.config, self.bins.device
        stoch = th.rand(horizon, starts, config.stoch, device=device)
        return ImaginationDraws(stoch, self.distribution.draw((horizon, starts), device))

    def loss(
        self, world_model: WorldModel, batch: Batch, states: States, draws: ImaginationDraws, objective: Objective
    ) -> tuple[dict[str, Term], dict[str, Tensor], RunningStatistics]:
        """Losses of policy and value.

        :param world_model: imagines, and predicts rewards and continuation
        :param batch: replayed sequences
        :param states: their posterior states
        :param draws: random numbers for B·S rollouts
        :param objective: what is trained for
        :return: losses by name, with values (B, S) but for replay_value's (B, S − 1); metrics by name, scalars without
            gradient; what is remembered after this batch, which the caller keeps if the update succeeds
        """
        starts = objective.starts_of(batch.rewards.shape[1])
        batch, states = batch.steps(slice(-starts, None)), states.last(starts)
        size = batch.rewards.shape  # B, S
        rollouts = self._imagine(world_model, states, draws, objective)
        reward, cont, value, slow_value = rollouts.reward, rollouts.cont, rollouts.value, rollouts.slow_value
        returns = imagined_returns(reward, cont, value, objective.return_lambda)  # (H, N)
        weight = cont.detach().cumprod(0)[:-1]  # (H, N), the start's own continuation included
        percentiles = self.updated_percentiles(self.gather(returns.detach()))  # (2,)
        scale = (percentiles[1] - percentiles[0]).clamp_min(1.0)  # scalar
        advantage = (returns - value[:-1]) / scale  # (H, N)

        log_prob, entropy = self.distribution.log_prob_and_entropy(rollouts.outputs, rollouts.actions)  # (H, N)
        gain = objective.dynamics * advantage + (1.0 - objective.dynamics) * log_prob * advantage.detach()  # (H, N)
        ent_coef, rise = self._entropy_coefficient(self.gather(entropy.detach()), objective)
        policy_loss = -weight * (gain + ent_coef * entropy)  # (H, N)
        returns, slow_value, advantage = returns.detach(), slow_value.detach(), advantage.detach()
        group = len(rollouts.value_logits[0])
        targets = zip(rollouts.value_logits, returns.split(group), slow_value[:-1].split(group), strict=True)
        value_loss = weight * th.cat([self.value_losses(*chunk) for chunk in targets])  # (H, N)
        # A rollout starts at each replayed state, so its first slow value and return serve the replay loss too.
        replay_value_loss = self._replay_value_loss(
            batch, states, returns[0].view(size), slow_value[0].view(size), objective.gamma, objective.return_lambda
        )
        losses = {
            "policy": Term(policy_loss.mean(0).view(size), self.config.policy_weight),
            "value": Term(value_loss.mean(0).view(size), self.config.value_weight),
            "replay_value": Term(replay_value_loss, self.config.replay_value_weight),
        }
        if objective.policy_penalty:
            features = States(*(x.detach() for x in states)).features.flatten(0, 1)  # (N, D + C·K)
            sensitivity = self.policy_sensitivity(features, rollouts.outputs[0], rollouts.actions[0])  # (N,)
            losses["policy_penalty"] = Term(sensitivity.view(size), objective.policy_penalty)
        metrics = {
            "entropy": entropy.mean(),
            "ent_coef": ent_coef,
            "advantage": advantage.mean(),
            "advantage_std": (advantage - advantage.mean()).square().mean().sqrt(),
            "imagined_reward": reward.mean(),
            "imagined_continue": cont.mean(),
            "imagined_return": returns.mean(),
            "value": value.mean(),
            "return_scale": scale,
        }
        detached = {name: metric.detach() for name, metric in metrics.items()}
        return losses, detached, RunningStatistics(percentiles, rise)

    def _imagine(self, world_model: WorldModel, states: States, draws: ImaginationDraws, objective: Objective) -> Rollouts:
        """Rollouts from posterior states (B, S, ...), and what is predicted along them."""
        differentiable = objective.dynamics > 0
        horizon, rows = len(draws.action), states.deter.shape[:2].numel()
        with gradient_of_inputs(world_model, self.value) if differentiable else th.no_grad():
            features, outputs, actions = self._roll_out(world_model.rssm, states, draws, differentiable)
            # A few steps at a time, see Runner.
            group = max(1, self.runner.chunk_rows // rows)
            # A single step is taken as it is, which saves a copy.
            groups = [features[i : min(i + group, horizon)] for i in range(0, horizon, group)]
            chunks = [th.stack(x) if len(x) > 1 else x[0].unsqueeze(0) for x in groups]  # (≤ group, N, D + C·K) each
            last = features[-1].unsqueeze(0)  # (1, N, D + C·K)
            predictions = [self.predictions_of(world_model, x) for x in [*chunks, last]]
            reward, cont, slow_value = (th.cat(parts) for parts in zip(*predictions, strict=True))  # (H + 1, N)
        # (≤ group, N, bins), (≤ group, N)
        logits, values = zip(*[self.logits_and_value(x.detach()) for x in chunks], strict=True)
        if differentiable:  # in the features, where the logits' gradient is that of the parameters
            with gradient_of_inputs(world_model, self.value):
                value = th.cat([self.value_of(x) for x in [*chunks, last]])  # (H + 1, N)
        else:
            with th.no_grad():
                value = th.cat([*values, self.logits_and_value(last)[1]])  # (H + 1, N)
        # The density is that of a given action, whose gradient would cancel the score's.
        taken = th.stack(actions).detach()  # (H, N, A)
        return Rollouts(th.stack(outputs), taken, reward, cont, value, slow_value, logits)

    def _roll_out(
        self, rssm: RSSM, states: States, draws: ImaginationDraws, differentiable: bool
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Features of the starts and of all imagined states, H + 1 tensors (N, D + C·K); the policy's outputs; the actions."""
        deter, stoch = states.deter.detach().flatten(0, 1), states.stoch.detach().flatten(0, 1).flatten(1)  # (N, D), (N, C·K)
        features: list[Tensor] = [th.cat([deter, stoch], -1)]
        outputs: list[Tensor] = []
        actions: list[Tensor] = []
        weights, together = rssm.imagination_weights(), self.runner.imagined_together
        with th.enable_grad():
            for noise, action_noise in zip(draws.stoch.split(together), draws.action.split(together), strict=True):
                deter, stoch, *steps = self.imagined_steps(rssm, deter, stoch, noise, action_noise, weights, differentiable)
                for every, its_own in zip((features, outputs, actions), steps, strict=True):
                    every.extend(its_own)
        return features, outputs, actions

    @compilable
    def imagined_steps(
        self,
        rssm: RSSM,
        deter: Tensor,
        stoch: Tensor,
        noise: Tensor,
        action_noise: Tensor,
        weights: Products,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """A few imagined steps.

        The policy's outputs have a graph, which is what the policy loss needs, so that they are not computed again.

        :param deter, stoch: before the first of the h steps, (N, D), (N, C·K)
        :param noise, action_noise: (h, N, K), (h, N, ·)
        :param weights: of the recurrence
        :param differentiable: actions pass gradients on to the states that follow
        :return: deter and stoch after the last step; at each step the features of the state that it leads to
            (N, D + C·K), the policy's outputs (N, ·), and the action (N, A)
        """
        features, outputs, actions = [th.cat([deter, stoch], -1)], [], []
        for uniform, normal in zip(noise.unbind(0), action_noise.unbind(0), strict=True):
            outputs.append(self.policy(features[-1].detach()))
            if differentiable:
                assert isinstance(self.distribution, BoundedNormal)
                actions.append(self.distribution.sample_with_gradient(outputs[-1], normal))
            else:
                actions.append(self.distribution.sample(outputs[-1], normal))
            with th.set_grad_enabled(differentiable):
                deter, stoch = rssm.prior_step(deter, stoch, actions[-1], uniform, weights)
                features.append(th.cat([deter, stoch], -1))
        return deter, stoch, features[1:], outputs, actions

    @compilable
    def policy_sensitivity(self, features: Tensor, outputs: Tensor, actions: Tensor) -> Tensor:
        """‖∇ log π(a | s)‖² in the policy's input, of given actions (Chen et al., "Learning Smooth Humanoid Locomotion through
        Lipschitz-Constrained Policies", 2024, Eq. 4).

        :param features: s, (N, D + C·K)
        :param outputs: of the policy there, (N, ·)
        :param actions: a, (N, A)
        :return: (N,), with the gradient of the policy's parameters
        """
        with th.autocast(features.device.type, enabled=False):
            layers = [layer.as_layer() for layer in self.policy.layers]
            weight = th.cat([part.weight for part in self.policy.output.parts])  # (O, h)
            score = self.distribution.score(at_least_float32(outputs), at_least_float32(actions))  # (N, O)
            return squared_gradient(layers, weight, at_least_float32(features), score)

    @compilable
    def logits_and_value(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Value of features (..., D + C·K): logits (..., bins), and their mean without gradient (...)."""
        logits = self.value(features)
        return logits, two_hot_mean(logits.detach(), self.bins)

    @compilable
    def value_of(self, features: Tensor) -> Tensor:
        """Value of features (..., D + C·K), with their gradient, (...)."""
        return two_hot_mean(self.value(features), self.bins)

    @compilable
    def value_losses(self, logits: Tensor, returns: Tensor, slow_value: Tensor) -> Tensor:
        """Cross-entropies of the value (..., bins) to the returns (...) and to the slow value (...), (...)."""
        return two_hot_loss(logits, [returns, slow_value], self.bins)

    @compilable
    def predictions_of(self, world_model: WorldModel, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reward, continuation and slow value of features (..., D + C·K), each (...)."""
        reward, cont, slow = apply_heads([world_model.reward, world_model.cont, self.slow_value], features)
        return world_model.predict_reward(reward), th.sigmoid(cont.squeeze(-1)), two_hot_mean(slow, self.bins)

    def _replay_value_loss(
        self, batch: Batch, states: States, bootstrap: Tensor, slow_value: Tensor, gamma: float, return_lambda: float
    ) -> Tensor:
        """Value loss on the replayed states; its gradient enters the world model.

        :param batch, states: the last S steps
        :param bootstrap: imagined return of each state, (B, S)
        :param slow_value: slow value of each state, (B, S)
        :return: (B, S − 1)
        """
        returns = replayed_returns(
            batch.rewards, batch.is_last, batch.is_terminal, bootstrap, gamma, return_lambda
        )  # (B, S − 1)
        logits = self.value(states.features[:, :-1])  # (B, S − 1, bins)
        weight = 1.0 - batch.is_last[:, :-1].to(logits.dtype)  # (B, S − 1)
        return weight * two_hot_loss(logits, [returns, slow_value[:, :-1]], self.bins)

    @th.no_grad()
    def updated_percentiles(self, returns: Tensor) -> Tensor:
        """Moving average of the low and the high percentile of the returns, without bias correction, (2,)."""
        config = self.config
        ordered = returns.flatten().sort().values
        now = th.stack([percentile(ordered, level) for level in (config.percentile_low, config.percentile_high)])  # (2,)
        return self.percentiles.lerp(now, config.percentile_rate)

    def _entropy_coefficient(self, entropy: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """The entropy's coefficient, and its rise after this update, which the next one has.

        It rises while the entropy is below its target, and sinks again, but never below where it started. One that may sink
        first comes too late: with gradients through the dynamics the entropy falls within hundreds of updates.

        :param entropy: of the policy along the rollouts, (H, N)
        :param objective: with the target, without which the coefficient is fixed
        :return: the coefficient, scalar; the logarithm of its rise over the smallest one, scalar
        """
        before = self.ent_coef_rise
        if objective.target_entropy is None:
            return th.full_like(before, objective.ent_coef), th.zeros_like(before)
        shortfall = (objective.target_entropy - entropy.mean()).clamp(-1.0, 1.0)
        rise = (before + ENT_COEF_RATE * shortfall).clamp(0.0, MAX_ENT_COEF_RISE)
        return objective.ent_coef * before.exp(), rise

    @th.no_grad()
    def keep(self, running: RunningStatistics, fault: Tensor) -> None:
        """Remember what :meth:`loss` gave, unless the update failed.

        :param running: of this update
        :param fault: bool scalar, whether it failed
        """
        for name, value in running._asdict().items():
            buffer = getattr(self, name)
            buffer.copy_(th.where(fault, buffer, value))

    @th.no_grad()
    def update_slow_value(self, share: Tensor | float = 1.0) -> None:
        """Moving average of the value's parameters; call it after the optimiser step.

        :param share: multiplies the rate; 0 leaves the slow value as it is
        """
        slow: list[Tensor] = list(self.slow_value.parameters())
        steps = list(th._foreach_sub(list(self.value.parameters()), slow))
        th._foreach_mul_(steps, self.config.slow_value_rate * share)
        th._foreach_add_(slow, steps)


@contextmanager
def gradient_of_inputs(*modules: nn.Module) -> Iterator[None]:
    """Within, the nets pass gradients on to their inputs and get none themselves."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        with th.enable_grad():
            yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _complete_state(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Files of before the entropy had a target have no coefficient that rose."""
    state.setdefault(f"{prefix}ent_coef_rise", th.zeros(()))


def percentile(ordered: Tensor, level: float) -> Tensor:
    """A percentile, linear between two numbers (``torch.quantile`` makes the host wait to check its levels).

    :param ordered: increasing numbers, (n,)
    :param level: 0 to 100
    :return: scalar
    """
    below, share = divmod(level / 100.0 * (len(ordered) - 1), 1.0)
    above = min(int(below) + 1, len(ordered) - 1)
    return ordered[int(below)].lerp(ordered[above], share)


def imagined_returns(reward: Tensor, cont: Tensor, value: Tensor, return_lambda: float) -> Tensor:
    """λ-returns of rollouts: ret_t = r_{t+1} + c_{t+1}·[(1 − λ)·v_{t+1} + λ·ret_{t+1}], with ret_H = v_H.

    The discount is inside the continuation.

    :param reward, cont, value: (H + 1, N)
    :param return_lambda: λ
    :return: (H, N)
    """
    target = reward[1:] + cont[1:] * (1.0 - return_lambda) * value[1:]  # (H, N)
    discount = return_lambda * cont[1:]
    returns = [value[-1]]
    for t in reversed(range(len(target))):
        returns.append(target[t] + discount[t] * returns[-1])
    return th.stack(returns[:0:-1])


def replayed_returns(
    reward: Tensor, is_last: Tensor, is_terminal: Tensor, bootstrap: Tensor, gamma: float, return_lambda: float
) -> Tensor:
    """λ-returns along replayed sequences; at the end of an episode they stop and bootstrap, at a terminal one with 0.

    :param reward: (B, T)
    :param is_last, is_terminal: bool (B, T)
    :param bootstrap: imagined return of each state, (B, T)
    :param gamma: discount
    :param return_lambda: λ
    :return: (B, T − 1)
    """
    live = (1.0 - is_terminal[:, 1:].to(reward.dtype)) * gamma  # (B, T − 1)
    go_on = (1.0 - is_last[:, 1:].to(reward.dtype)) * return_lambda
    target = reward[:, 1:] + (1.0 - go_on) * live * bootstrap[:, 1:]
    discount = live * go_on
    returns = [bootstrap[:, -1]]
    for t in reversed(range(target.shape[1])):
        returns.append(target[:, t] + discount[:, t] * returns[-1])
    if len(returns) == 1:  # a single step has no transition
        return target
    return th.stack(returns[:0:-1], 1)
