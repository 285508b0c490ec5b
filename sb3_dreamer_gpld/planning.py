"""Planning at decision time: model-predictive path integral control in the latent space.

At each step, sequences of actions are imagined from the present state, the best of them shape the distribution that the next
ones are drawn from, and the first action of what comes out is taken. Policy and value are those that were learned: some of the
sequences follow the policy, and the value counts what lies behind the last imagined step.

Letters: E environments, S candidates, P of which follow the policy, M elites, I iterations, H steps, N = E·S states, D deter,
C classes, K rows, A action numbers.

Source: Hansen et al., "TD-MPC2: Scalable, Robust World Models for Continuous Control", ICLR 2024 (Sec. 3, "Planning", and its
table of hyperparameters), after Williams et al., "Model Predictive Path Integral Control" (2015).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th
from torch import Tensor

from sb3_dreamer_gpld.checks import check_int, check_range, unknown_name
from sb3_dreamer_gpld.config import ActionSpec
from sb3_dreamer_gpld.nets.actor_critic import ActorCritic
from sb3_dreamer_gpld.nets.distributions import BoundedNormal, two_hot_mean
from sb3_dreamer_gpld.nets.layers import apply_heads
from sb3_dreamer_gpld.nets.world_model import WorldModel

PLANNERS = ("mppi",)


@dataclass(frozen=True)
class PlannerConfig:
    """How plans are made; the defaults are those of TD-MPC2.

    :param horizon: steps of the agent that a plan looks ahead, H
    :param samples: sequences of actions that are compared in each iteration, S
    :param policy_samples: how many of them follow the policy, P
    :param elites: best ones, of which the next mean and standard deviation are made, M
    :param iterations: rounds of sampling, I
    :param temperature: the weight of an elite is exp(temperature · (its return − the best one's)), per unit of return
    :param min_std, max_std: bounds of the standard deviation, of actions in [−1, 1]; each plan starts with the largest
    :raises ValueError: a value is not allowed; the text names it
    """

    horizon: int = 3
    samples: int = 512
    policy_samples: int = 24
    elites: int = 64
    iterations: int = 6
    temperature: float = 0.5
    min_std: float = 0.05
    max_std: float = 2.0

    def __post_init__(self) -> None:
        for name, minimum in (("horizon", 1), ("samples", 2), ("policy_samples", 0), ("elites", 1), ("iterations", 1)):
            check_int(f"planner's {name}", getattr(self, name), minimum)
        check_range("planner's temperature", self.temperature, 0.0, math.inf)
        check_range("planner's min_std", self.min_std, 0.0, math.inf)
        check_range("planner's max_std", self.max_std, self.min_std, math.inf, low_open=self.min_std == 0.0)
        if self.policy_samples >= self.samples:
            raise ValueError(
                f"planner's policy_samples must be fewer than its samples={self.samples}, not {self.policy_samples}: the "
                "others are drawn around the plan"
            )
        if self.elites > self.samples:
            raise ValueError(f"planner's elites must be at most its samples={self.samples}, not {self.elites}")

    @classmethod
    def make(cls, planner: str | Mapping[str, Any] | PlannerConfig | None, actions: ActionSpec) -> PlannerConfig | None:
        """The setting that an argument ``planner`` stands for.

        :param planner: "mppi"; a dict with fields of this class that differ from the defaults; such a setting; or None
        :param actions: what actions look like
        :return: None: actions are the policy's own
        :raises ValueError: another name or value, or actions that are no Box
        """
        if planner is None:
            return None
        if actions.nvec is not None:
            raise ValueError(
                f"planner={planner!r} needs actions in a Box, since plans are drawn from normal distributions; allowed for "
                "this action space: None"
            )
        if isinstance(planner, PlannerConfig):
            return planner
        if not isinstance(planner, (str, Mapping)):
            raise ValueError(f"planner must be None, 'mppi', a dict of its settings or a PlannerConfig, not {planner!r}")
        given = {"name": planner} if isinstance(planner, str) else dict(planner)
        name = given.pop("name", "mppi")
        if name not in PLANNERS:
            raise ValueError(unknown_name("planner", name, PLANNERS))
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in fields:
                raise ValueError(unknown_name("planner's setting", key, fields))
        return cls(**given)


class PlannerDraws(NamedTuple):
    """Every random number of a plan; a dimension E of 1 serves all environments alike.

    :param policy_actions: normal, (H, E, P, A)
    :param policy_stoch: uniform, (H, E, P, K)
    :param actions: normal, (I, E, S − P, H, A)
    :param stoch: uniform, the same for all candidates, so that none is better for its luck, (I, H, E, 1, K)
    """

    policy_actions: Tensor
    policy_stoch: Tensor
    actions: Tensor
    stoch: Tensor


class Planner:
    """Plans for any number of environments at once. It has no parameters: the nets are handed over.

    :param config: how plans are made
    """

    def __init__(self, config: PlannerConfig) -> None:
        self.config = config
        self._fixed: PlannerDraws | None = None  # what deterministic plans are made with

    def draw(
        self, n_envs: int, actions: int, rows: int, device: th.device, generator: th.Generator | None = None
    ) -> PlannerDraws:
        """Random numbers for one plan of each environment.

        :param n_envs: E
        :param actions: A
        :param rows: K
        :param device: where they shall be
        :param generator: on the processor, that they are drawn with; None: the device's global one
        """
        config = self.config
        place: dict[str, Any] = {"device": device} if generator is None else {"generator": generator}
        horizon, proposed = config.horizon, config.policy_samples
        shape = (config.iterations, n_envs, config.samples - proposed, horizon, actions)
        return PlannerDraws(
            th.randn(horizon, n_envs, proposed, actions, **place).to(device),
            th.rand(horizon, n_envs, proposed, rows, **place).to(device),
            th.randn(shape, **place).to(device),
            th.rand(config.iterations, horizon, n_envs, 1, rows, **place).to(device),
        )

    def initial(self, like: Tensor) -> Tensor:
        """:return: plans before a first step, zeros like the actions (E, A): (E, H, A)"""
        return like.new_zeros(len(like), self.config.horizon, like.shape[-1])

    def plan(
        self,
        world_model: WorldModel,
        actor_critic: ActorCritic,
        deter: Tensor,
        stoch: Tensor,
        last_plan: Tensor,
        is_first: Tensor,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        """One decision.

        :param world_model, actor_critic: nets
        :param deter, stoch: posterior state of each environment, (E, D), (E, C·K)
        :param last_plan: mean of the plan one step before, (E, H, A)
        :param is_first: the last plan is none of this episode's, (E,)
        :param deterministic: take the plan's mean, made with the same random numbers at each call; no generator is touched
        :return: actions (E, A), within [−1, 1], and the plan's mean, (E, H, A)
        """
        rows = world_model.config.stoch
        if deterministic:
            if self._fixed is None or self._fixed.actions.device != deter.device:
                self._fixed = self.draw(1, last_plan.shape[-1], rows, deter.device, th.Generator().manual_seed(0))
            draws = self._fixed
        else:
            draws = self.draw(len(deter), last_plan.shape[-1], rows, deter.device)
        proposals = self.proposals(world_model, actor_critic, deter, stoch, draws.policy_actions, draws.policy_stoch)

        def returns(candidates: Tensor, iteration: int) -> Tensor:
            n_envs, samples = candidates.shape[:2]
            noise = draws.stoch[iteration].expand(-1, n_envs, samples, -1).flatten(1, 2)  # (H, N, K)
            start, one_hots = (x.repeat_interleave(samples, 0) for x in (deter, stoch))  # (N, D), (N, C·K)
            found = self.returns(world_model, actor_critic, start, one_hots, candidates.flatten(0, 1), noise)  # (N,)
            return found.view(n_envs, samples)

        mean = th.cat([last_plan[:, 1:], th.zeros_like(last_plan[:, :1])], 1)  # (E, H, A): it goes on
        mean = mean.masked_fill(is_first.view(-1, 1, 1), 0.0)
        mean, std, elites, weights = self.improve(returns, proposals, mean, draws.actions)
        if deterministic:
            return mean[:, 0], mean
        chosen = th.multinomial(weights, 1).view(-1, 1, 1).expand(-1, 1, elites.shape[-1])  # (E, 1, A)
        action = elites[:, :, 0].gather(1, chosen).squeeze(1)  # (E, A)
        return (action + std[:, 0] * th.randn_like(action)).clamp(-1.0, 1.0), mean

    def proposals(
        self, world_model: WorldModel, actor_critic: ActorCritic, deter: Tensor, stoch: Tensor, actions: Tensor, noise: Tensor
    ) -> Tensor:
        """Sequences of actions that follow the policy.

        :param deter, stoch: where they start, (E, D), (E, C·K)
        :param actions, noise: ``policy_actions`` and ``policy_stoch`` of the draws
        :return: (E, P, H, A)
        """
        distribution, shape = actor_critic.distribution, (len(deter), self.config.policy_samples)
        assert isinstance(distribution, BoundedNormal)
        deter, stoch = (x.repeat_interleave(shape[1], 0) for x in (deter, stoch))  # (E·P, D), (E·P, C·K)
        weights, taken = world_model.rssm.imagination_weights(), []
        for h in range(self.config.horizon):
            normal, uniform = (x[h].expand(*shape, -1).flatten(0, 1) for x in (actions, noise))  # (E·P, A), (E·P, K)
            outputs = actor_critic.policy(th.cat([deter, stoch], -1))  # (E·P, 2·A)
            taken.append(distribution.sample(outputs, normal).clamp(-1.0, 1.0))
            if h + 1 < self.config.horizon:  # nobody looks at what the last one leads to
                deter, stoch = world_model.rssm.prior_step(deter, stoch, taken[-1], uniform, weights)
        return th.stack(taken, 1).unflatten(0, shape)

    def returns(
        self, world_model: WorldModel, actor_critic: ActorCritic, deter: Tensor, stoch: Tensor, actions: Tensor, noise: Tensor
    ) -> Tensor:
        """Imagined return of sequences of actions: r₁ + c₁·(r₂ + c₂·(… + c_H·v_H)); the discount is inside c.

        :param deter, stoch: where they start, (N, D), (N, C·K)
        :param actions: (N, H, A)
        :param noise: uniform numbers, (H, N, K)
        :return: (N,)
        """
        rssm, total, weight = world_model.rssm, deter.new_zeros(len(deter)), deter.new_ones(len(deter))
        weights, features = rssm.imagination_weights(), deter
        for action, uniform in zip(actions.unbind(1), noise.unbind(0), strict=True):
            deter, stoch = rssm.prior_step(deter, stoch, action, uniform, weights)
            features = th.cat([deter, stoch], -1)  # (N, D + C·K)
            reward, cont = apply_heads([world_model.reward, world_model.cont], features)
            total = total + weight * world_model.predict_reward(reward)
            weight = weight * th.sigmoid(cont.squeeze(-1))
        return total + weight * two_hot_mean(actor_critic.value(features), actor_critic.bins)

    def improve(
        self, returns: Callable[[Tensor, int], Tensor], proposals: Tensor, mean: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The iterations of a plan.

        :param returns: return (E, S) of sequences (E, S, H, A), and the iteration's number
        :param proposals: sequences that are compared in every iteration, (E, P, H, A)
        :param mean: of the first sequences, (E, H, A)
        :param noise: normal numbers, (I, E, S − P, H, A)
        :return: mean and standard deviation after the last iteration, (E, H, A) each; its elites (E, M, H, A), and their
            weights, whose sum is 1, (E, M)
        """
        config = self.config
        std = th.full_like(mean, config.max_std)
        elites, weights = proposals, proposals
        for i, normal in enumerate(noise.unbind(0)):
            drawn = (mean.unsqueeze(1) + std.unsqueeze(1) * normal).clamp(-1.0, 1.0)  # (E, S − P, H, A)
            candidates = th.cat([proposals, drawn], 1)  # (E, S, H, A)
            best, index = returns(candidates, i).topk(config.elites, 1)  # (E, M), descending
            elites = candidates.gather(1, index[..., None, None].expand(-1, -1, *mean.shape[1:]))  # (E, M, H, A)
            weights = th.softmax(config.temperature * (best - best[:, :1]), 1)  # (E, M)
            share = weights[..., None, None]
            mean = (share * elites).sum(1)  # (E, H, A)
            variance = (share * (elites - mean.unsqueeze(1)).square()).sum(1)
            std = variance.sqrt().clamp(config.min_std, config.max_std)
        return mean, std, elites, weights
