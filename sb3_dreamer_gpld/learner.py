"""One update of all nets: losses, backward pass, optimiser, slow value, percentiles, faults and metrics.

Knows nets, batches and random numbers, and nothing of environments, callbacks or Stable-Baselines3's loop.

Letters: B sequences, T steps.

Source: Hafner et al., Nature 2025 (Methods), and the authors' release, ``agent.py``; Sonigra & Kumar 2026 for the penalty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch import Tensor

from sb3_dreamer_gpld.config import PenaltyConfig
from sb3_dreamer_gpld.execution import Execution, addresses, resolve_precision
from sb3_dreamer_gpld.nets.actor_critic import ImaginationDraws, Objective, RunningStatistics
from sb3_dreamer_gpld.nets.gpld import penalty_weight
from sb3_dreamer_gpld.nets.rssm import States
from sb3_dreamer_gpld.nets.world_model import Batch, PenaltyWeights, Term, WorldModelDraws
from sb3_dreamer_gpld.optim import LaProp
from sb3_dreamer_gpld.parallel import ALONE, Processes
from sb3_dreamer_gpld.policies import DreamerPolicy
from sb3_dreamer_gpld.transfer import to_device, to_host


@dataclass(frozen=True)
class LearnerConfig:
    """What every update of a run has in common.

    :param objective: what actor and critic are trained for
    :param penalty: the GPLD penalty and its schedule
    :param imagination_horizon: imagined steps, H
    :param learning_rate_warmup: updates over which the learning rates rise from 0
    :param precision: "float32", "bfloat16" or "auto"
    """

    objective: Objective
    penalty: PenaltyConfig
    imagination_horizon: int
    learning_rate_warmup: int
    precision: str


class Draws(NamedTuple):
    """Every random number that an update needs."""

    world_model: WorldModelDraws
    imagination: ImaginationDraws


class Loss(NamedTuple):
    """Result of :meth:`Learner.loss`.

    :param total: weighted sum of the losses, a scalar with gradient
    :param terms: every loss by name, with its weight; the values are (B, T), or shorter in their second dimension, or scalars
    :param states: posterior states of the batch
    :param metrics: further scalars to log
    :param running: what actor and critic remember after this batch
    """

    total: Tensor
    terms: Mapping[str, Term]
    states: States
    metrics: dict[str, Tensor]
    running: RunningStatistics

    @property
    def losses(self) -> dict[str, Tensor]:
        """Every loss by name, before its weight."""
        return {name: term.value for name, term in self.terms.items()}


class Inputs(NamedTuple):
    """All that differs between two updates, on the device.

    :param batch: replayed sequences
    :param draws: random numbers; None: they are drawn where they are needed
    :param rates: learning rates of the optimiser's groups, (groups,)
    :param weights: λ of the penalties, scalars
    """

    batch: Batch
    draws: Draws | None
    rates: Tensor
    weights: PenaltyWeights


class Outcome(NamedTuple):
    """What an update leaves beside the changed parameters, on the device.

    :param states: posterior states of the batch, without gradient
    :param names: of the metrics
    :param metrics: to log, (metrics,)
    :param checked: names of what must be finite
    :param not_finite: whether it is not, bool (checked,)
    """

    states: States
    names: tuple[str, ...]
    metrics: Tensor
    checked: tuple[str, ...]
    not_finite: Tensor


class Learner:
    """Updates the nets of a policy.

    :param policy: nets and optimiser
    :param config: what its updates have in common; may be replaced between two updates
    :param processes: that each make an update of their own batch, and take the mean of all
    """

    def __init__(self, policy: DreamerPolicy, config: LearnerConfig, processes: Processes = ALONE) -> None:
        self.policy, self.config, self.processes = policy, config, processes
        policy.actor_critic.gather = processes.gather
        policy.world_model.gather = processes.gather_with_gradient
        self.execution = Execution(policy, policy.device)
        self.metrics = MetricMeans()
        self.faults = FiniteGuard(isinstance(policy.optimizer, LaProp))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "execution"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """:param state: of a learner that was copied or pickled; the copy's steps are neither compiled nor recorded yet"""
        self.__dict__.update(state)
        self.execution = Execution(self.policy, self.policy.device)

    def draw(self, sequences: int, steps: int) -> Draws:
        """Random numbers for an update on that many sequences of that many steps."""
        starts = sequences * self.config.objective.starts_of(steps)
        return Draws(
            self.policy.world_model.draw(sequences, steps, self.config.penalty),
            self.policy.actor_critic.draw(starts, self.config.imagination_horizon),
        )

    def update(self, batch: Batch, draws: Draws | None, number: int, learning_rates: Sequence[float]) -> States:
        """One update of all parameters, without waiting for the device anywhere.

        A loss or gradient that is not finite leaves the parameters as they are; :attr:`faults` tells.

        :param batch: replayed sequences
        :param draws: random numbers; None: those of :meth:`draw`
        :param number: updates made before this one
        :param learning_rates: of the optimiser's groups, before the warm-up
        :return: posterior states of the batch without gradient, with which the stored ones are refreshed; they may be
            overwritten by the next update
        """
        inputs = self.inputs(batch, draws, number, learning_rates)
        try:
            outcome: Outcome = self.execution.run_whole(self.step, self._key, inputs)
        except Exception as error:  # the backward pass is compiled when it is first needed; nothing has changed before
            if self.processes.size > 1:
                raise  # the others are in the middle of it
            self.execution.give_up_compiling(error)
            outcome = self.execution.run_whole(self.step, self._key, inputs)
        self.faults.note(number, outcome.checked, outcome.not_finite)
        self.metrics.add(outcome.names, outcome.metrics)
        return outcome.states

    def inputs(self, batch: Batch, draws: Draws | None, number: int, learning_rates: Sequence[float]) -> Inputs:
        """What an update depends on; arguments as in :meth:`update`. The optimiser is told its learning rates, too."""
        warmup, groups = self.config.learning_rate_warmup, self.policy.optimizer.param_groups
        for group, rate in zip(groups, learning_rates, strict=True):
            group["lr"] = rate * (min(1.0, number / warmup) if warmup else 1.0)
        rates, weights = [group["lr"] for group in groups], self._penalty_weights(number)
        # (groups + 2,), in one copy
        numbers = to_device(np.array([*rates, *(weight or 0.0 for weight in weights)], dtype=np.float32), self.policy.device)
        used = (None if weight is None else value for weight, value in zip(weights, numbers[-2:], strict=True))
        return Inputs(batch, draws, numbers[: len(rates)], PenaltyWeights(*used))

    def _penalty_weights(self, number: int) -> PenaltyWeights:
        """λ of the penalties after ``number`` updates, on the host."""
        penalty = self.config.penalty
        starts = penalty.posterior, penalty.prior
        return PenaltyWeights(*(penalty_weight(penalty, start, number) if start else None for start in starts))

    def step(self, inputs: Inputs) -> Outcome:
        """One update, all of it on the device: it may be recorded, and run again with other numbers in the same inputs."""
        policy, batch = self.policy, inputs.batch
        draws = self.draw(*batch.rewards.shape) if inputs.draws is None else inputs.draws
        dtype = resolve_precision(self.config.precision, policy.device)
        policy.optimizer.zero_grad(set_to_none=True)  # before the loss, whose memory those of before would add to
        with th.autocast(policy.device.type, dtype, enabled=dtype != th.float32):
            result = self.weighted_loss(batch, draws, inputs.weights)
        result.total.backward()
        grads = [p.grad for p in policy.parameters() if p.grad is not None]
        means = {name: mean(term.value.detach()) for name, term in result.terms.items()}
        self.processes.average_([*grads, *means.values(), *result.metrics.values(), result.total.detach()])
        grad_norm = th.linalg.vector_norm(th.stack(th._foreach_norm(grads)))
        checked = {**means, "the gradient": grad_norm}
        not_finite = ~th.isfinite(th.stack(list(checked.values())))  # (checked,)
        fault = not_finite.any()
        for grad in grads:
            grad.masked_fill_(fault, 0.0)
        if isinstance(policy.optimizer, LaProp):  # any other goes on with its momentum alone
            policy.optimizer.found_inf, policy.optimizer.rates = fault.float(), inputs.rates
        policy.optimizer.step()
        if isinstance(policy.optimizer, LaProp):
            policy.optimizer.found_inf = policy.optimizer.rates = None
        policy.actor_critic.update_slow_value(1.0 - fault.float())
        policy.actor_critic.keep(result.running, fault)
        policy.world_model.update_normalizer(batch.observations, fault)
        metrics = self._logged(result, means, grad_norm)
        states = States(*(state.detach() for state in result.states))  # without the graph, which keeps memory
        logged = th.stack([metric.float() for metric in metrics.values()])  # (metrics,)
        return Outcome(states, tuple(metrics), logged, tuple(checked), not_finite)

    def _key(self) -> object:
        """What a recorded :meth:`step` takes for granted: settings, and where all that it changes lies.

        :return: None: it cannot be recorded
        """
        policy = self.policy
        if not isinstance(policy.optimizer, LaProp) or self.processes.size > 1:
            return None  # others have Python numbers in their steps
        config = replace(self.config, penalty=replace(self.config.penalty, start=0), learning_rate_warmup=0)
        groups = [
            {name: x for name, x in group.items() if name not in ("params", "lr")} for group in policy.optimizer.param_groups
        ]
        trained = [parameter.requires_grad for parameter in policy.parameters()]
        states = policy.optimizer.state.values()
        return config, groups, trained, addresses(policy), [x.data_ptr() for state in states for x in state.values()]

    def loss(self, batch: Batch, draws: Draws, number: int) -> Loss:
        """All losses of one update, with the λ of that update; arguments as in :meth:`update`. Changes nothing.

        Training calls :meth:`weighted_loss`: a loss of your own goes there.
        """
        return self.weighted_loss(batch, draws, self._penalty_weights(number))

    def weighted_loss(self, batch: Batch, draws: Draws, weights: PenaltyWeights) -> Loss:
        """All losses of one update.

        :param batch: replayed sequences
        :param draws: random numbers, as :meth:`draw` makes them
        :param weights: λ of the penalties, numbers or scalars on the device
        :return: their weighted sum, which is minimised, and the terms by name, which are logged as ``loss/NAME``
        """
        world_model, actor_critic, objective = self.policy.world_model, self.policy.actor_critic, self.config.objective
        terms, states = world_model.loss(batch, draws.world_model, weights, objective.gamma)
        more, metrics, running = actor_critic.loss(world_model, batch, states, draws.imagination, objective)
        terms = {**terms, **more}
        total = sum((term.weight * mean(term.value) for term in terms.values()), th.zeros((), device=self.policy.device))
        return Loss(total, terms, states, metrics, running)

    @staticmethod
    def _logged(result: Loss, means: Mapping[str, Tensor], grad_norm: Tensor) -> dict[str, Tensor]:
        """What is logged of an update, by its name in the log."""
        values = {"loss/total": result.total.detach(), "train/grad_norm": grad_norm}
        for name, term in result.terms.items():
            values[term.logged_as or f"loss/{name}"] = means[name]
            if term.weight_logged_as and isinstance(term.weight, Tensor):
                values[term.weight_logged_as] = term.weight
        values.update({f"actor_critic/{name}": metric for name, metric in result.metrics.items()})
        return values


class MetricMeans:
    """Means of metrics over updates; nothing is read from the device before they are taken."""

    def __init__(self) -> None:
        # Of updates with the same metrics: their sums, (metrics,), and how many updates there were
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}

    def add(self, names: tuple[str, ...], values: Tensor) -> None:
        """The metrics of an update.

        :param names: of the metrics
        :param values: (metrics,); may be overwritten later
        """
        total, count = self._sums.get(names, (0.0, 0))
        self._sums[names] = total + values, count + 1

    def take(self) -> dict[str, float]:
        """:meth:`means`, which begin anew."""
        means = self.means()
        self._sums = {}
        return means

    def means(self) -> dict[str, float]:
        """Means over the updates that had them since the last :meth:`take`."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for names, (total, count) in self._sums.items():
            for name, value in zip(names, to_host(total).wait()[0].tolist(), strict=True):
                sums[name], counts[name] = sums.get(name, 0.0) + value, counts.get(name, 0) + count
        return {name: value / counts[name] for name, value in sums.items()}


class FiniteGuard:
    """Finds updates whose losses or gradient are not finite, without waiting for the device.

    :param kept: whether the optimiser leaves the parameters as they were then
    """

    def __init__(self, kept: bool = True) -> None:
        self.kept = kept
        # Of each update since the last look: its number, what was looked at, and flags of what was not finite
        self._seen: list[tuple[int, tuple[str, ...], Tensor]] = []

    def note(self, number: int, checked: tuple[str, ...], not_finite: Tensor) -> None:
        """Remember what is not finite in an update.

        :param number: of the update
        :param checked: names of what was looked at, the gradient the last
        :param not_finite: bool (checked,); may be overwritten later
        """
        self._seen.append((number, checked, not_finite.clone()))

    def clear(self) -> None:
        self._seen = []

    def raise_faults(self) -> None:
        """Look at the updates made since the last time.

        :raises FloatingPointError: names the first update with a loss or gradient that was not finite, and the losses
        """
        seen, self._seen = self._seen, []
        if not seen:
            return
        found = to_host(*(flags for _, _, flags in seen)).wait()
        for (number, names, _), flags in zip(seen, found, strict=True):
            if flags.any():
                *losses, gradient = names
                bad = [name for name, flag in zip(losses, flags.tolist(), strict=False) if flag]
                what = f"the losses {', '.join(bad)}" if bad else gradient
                left = "the parameters were not changed" if self.kept else "the optimiser went on with its momentum alone"
                raise FloatingPointError(
                    f"Update {number}: {what} became not finite; {left}. "
                    "Look for extreme rewards or observations, or lower the learning rate"
                )


def mean(loss: Tensor) -> Tensor:
    """Mean over all entries; 0 for an empty tensor (windows of a single step have no transition)."""
    return loss.sum() / max(1, loss.numel())
