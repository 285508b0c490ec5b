"""The recurrent state-space model: one step of acting, a sequence of observations, one step or a rollout of the prior.

Letters: B sequences, T steps, N states, H imagined steps, D deter, C classes, K rows, G blocks, A action
numbers, h hidden units.

Source: Hafner et al., Nature 2025 (Methods, "World model learning") and the authors' release, ``rssm.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch as th
from torch import Tensor
from torch.nn import functional as F

from sb3_dreamer_gpld.config import ModelConfig
from sb3_dreamer_gpld.nets.distributions import mode_one_hot, sample_one_hot, straight_through, uniform_mix
from sb3_dreamer_gpld.nets.layers import BlockLinear, Head, NormedLinear, NormSiLU, at_least_float32, rms_norm_silu
from sb3_dreamer_gpld.nets.steps import SteppedModule, compilable
from sb3_dreamer_gpld.nets.unrolled import Affine, StepProducts, Unrolled, as_computed


class States(NamedTuple):
    """States after a sequence of observations.

    :param deter: (B, T, D)
    :param stoch: one-hot samples with straight-through gradient, (B, T, C, K)
    :param logits: of the posterior, (B, T, C, K)
    """

    deter: Tensor
    stoch: Tensor
    logits: Tensor

    def last(self, steps: int) -> States:
        """The last steps, (B, steps, ...)."""
        return States(*(x[:, -steps:] for x in self))

    @property
    def features(self) -> Tensor:
        """Input of the heads, [deter, stoch], (B, T, D + C·K)."""
        return th.cat([self.deter, self.stoch.flatten(-2)], -1)


class Products(NamedTuple):
    """One thing for each matrix product of a step: its weights, what is added, the product itself, or its inputs.

    Whatever is made of a product has its name, so that no code depends on the products' order. The things are:

    - lists of weights: :meth:`RSSM._core_weights`, :meth:`RSSM.imagination_weights`
    - what is added, biases and the action's part: :meth:`RSSM._core_added`
    - an :class:`Affine` for one step of acting or imagining: :meth:`RSSM._core_products`
    - an :class:`Unrolled` for all steps of sequences: :meth:`RSSM._unrolled_products`
    - :class:`StepProducts` for a few of these steps, and then the inputs that they were called with: ``RSSM._posterior_steps``

    :param deter_in, stoch_in: the hidden vectors of deter and stoch
    :param core: the core's pre-activation, of the hidden vectors and of each block's own part of deter
    :param gates: reset, candidate and update
    :param posterior: the layers of the posterior net and its last linear; only :meth:`RSSM.observe` has them one by one
    """

    deter_in: Any
    stoch_in: Any
    core: Any
    gates: Any
    posterior: tuple[Any, ...] = ()

    def each(self, function: Callable[..., Any], *others: Products) -> Products:
        """The function's result for each product, of the thing here and those in the others."""
        *single, posterior = zip(self, *others, strict=True)
        layers = tuple(function(*things) for things in zip(*posterior, strict=True))
        return Products._make([*(function(*things) for things in single), layers])


class RSSM(SteppedModule):
    """Recurrent state-space model with a block-diagonal GRU core and a categorical stochastic state.

    :param tokens: size of the encoder's output
    :param actions: numbers in an action, A
    :param config: sizes
    """

    def __init__(self, tokens: int, actions: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        deter, hidden, blocks = config.deter, config.hidden, config.blocks
        self.deter_in = NormedLinear(deter, hidden)
        self.stoch_in = NormedLinear(config.stoch_size, hidden)
        self.action_in = NormedLinear(actions, hidden)
        self.core = BlockLinear(deter + blocks * 3 * hidden, deter, blocks)
        self.core_norm = NormSiLU(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks)
        self.posterior = Head(deter + tokens, [hidden] * config.posterior_layers, [config.stoch_size])
        self.prior = Head(deter, [hidden] * config.prior_layers, [config.stoch_size])

    def initial(self, batch: int) -> tuple[Tensor, Tensor]:
        """:return: zeros for deter (batch, D) and stoch (batch, C, K)"""
        weight = self.core.weight
        shape = (batch, self.config.classes, self.config.stoch)
        return weight.new_zeros(batch, self.config.deter), weight.new_zeros(shape)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities after the uniform mix, (..., C, K)."""
        return uniform_mix(logits, self.config.unimix)

    def prior_logits(self, deter: Tensor) -> Tensor:
        """:param deter: (..., D)
        :return: (..., C, K)
        """
        return self._rows(self.prior(deter))

    def posterior_logits(self, inputs: Tensor) -> Tensor:
        """:param inputs: [deter, tokens], (..., D + tokens)
        :return: (..., C, K)
        """
        return self._rows(self.posterior(inputs))

    def observe(
        self, tokens: Tensor, actions: Tensor, is_first: Tensor, deter: Tensor, stoch: Tensor, noise: Tensor | None
    ) -> States:
        """Posterior states along sequences; state and action before a first step are zeroed.

        :param tokens: (B, T, tokens)
        :param actions: action before each observation, (B, T, A)
        :param is_first: the observation starts an episode, (B, T)
        :param deter: state before the first step, (B, D)
        :param stoch: state before the first step, (B, C, K)
        :param noise: uniform numbers, (B, T, K); None: the most probable classes
        """
        keep = (~is_first).to(tokens.dtype).unsqueeze(-1)  # (B, T, 1)
        products, together = self._unrolled_products(tokens, actions * keep), self.runner.steps_together
        draws = None if noise is None else noise.split(together, 1)
        stoch = stoch.flatten(1)  # (B, C·K)
        parts = []
        for i, kept in enumerate(keep.split(together, 1)):
            at_steps = products.each(lambda product, i=i: product.at(i))
            deter, stoch, states, inputs = self._posterior_steps(deter, stoch, kept, draws and draws[i], at_steps)
            products.each(Unrolled.note, inputs)
            parts.append(states)
        return States(*(th.cat(part, 1) for part in zip(*parts, strict=True)))

    def step(
        self, tokens: Tensor, action: Tensor, is_first: Tensor, deter: Tensor, stoch: Tensor, noise: Tensor | None
    ) -> States:
        """One step of :meth:`observe`, for acting: without what makes many steps cheap.

        :param tokens: (N, tokens)
        :param action: before the observation, (N, A)
        :param is_first: the observation starts an episode, (N,)
        :param deter, stoch: previous state, (N, D), (N, C·K)
        :param noise: uniform numbers, (N, K); None: the most probable classes
        :return: the state, without the dimension of steps: (N, D), (N, C, K), (N, C, K)
        """
        keep = (~is_first).to(tokens.dtype).unsqueeze(-1)  # (N, 1)
        products = self._core_products(action * keep, self._core_weights())

        def logits_of(deter: Tensor) -> Tensor:
            return self.posterior_logits(th.cat([deter, tokens], -1))  # (N, C, K)

        return self._next(deter * keep, stoch * keep, noise, products, logits_of)

    def _unrolled_products(self, tokens: Tensor, actions: Tensor) -> Products:
        """The products of :meth:`_posterior_steps` along sequences, each an :class:`Unrolled`.

        Whatever does not depend on the state is computed for all steps at once and added.

        :param tokens: (B, T, tokens)
        :param actions: (B, T, A)
        """
        steps = tokens.shape[1::-1]  # T, B
        blocks = (steps[0], self.config.blocks, steps[1])  # T, G, B
        first, *others = [layer.linear for layer in self.posterior.layers] + [self.posterior.output.parts[0]]
        deter_weight, token_weight = first.weight.split([self.config.deter, tokens.shape[-1]], -1)
        token_part = F.linear(tokens.transpose(0, 1), token_weight, first.bias)  # (T, B, h)

        of_core = self._core_added(actions)
        added = Products(
            deter_in=of_core.deter_in.expand(*steps, -1),  # (T, B, h)
            stoch_in=of_core.stoch_in.expand(*steps, -1),  # (T, B, h)
            core=of_core.core.movedim(2, 0),  # (T, G, B, D/G)
            gates=of_core.gates.expand(*blocks, -1),  # (T, G, B, 3·D/G)
            posterior=(token_part, *(layer.bias.expand(*steps, -1) for layer in others)),
        )
        weights = self._core_weights()._replace(posterior=([deter_weight.T], *([layer.weight.T] for layer in others)))
        return added.each(partial(Unrolled, together=self.runner.steps_together), weights)

    def imagine(
        self, deter: Tensor, stoch: Tensor, act: Callable[[Tensor, int], Tensor], noise: Tensor | None, horizon: int
    ) -> list[Tensor]:
        """Rollouts of the prior, for measurements. Training's are made in ``ActorCritic.imagined_steps``.

        Where gradients are on, those of actions go on through straight-through samples.

        :param deter: start, (N, D)
        :param stoch: start, (N, C, K)
        :param act: gives actions (N, A) for features (N, D + C·K) and the number of the step
        :param noise: uniform numbers, (H, N, K); None: the most probable classes
        :param horizon: H
        :return: features of the start and of H imagined states, H + 1 tensors (N, D + C·K)
        """
        stoch = stoch.flatten(1)  # (N, C·K)
        features = [th.cat([deter, stoch], -1)]
        weights = self.imagination_weights()
        for h in range(horizon):
            draws = None if noise is None else noise[h]
            deter, stoch = self.prior_step(deter, stoch, act(features[h], h), draws, weights)  # (N, D), (N, C·K)
            features.append(th.cat([deter, stoch], -1))
        return features

    @compilable
    def _posterior_steps(
        self, deter: Tensor, stoch: Tensor, keep: Tensor, noise: Tensor | None, products: Products
    ) -> tuple[Tensor, Tensor, States, Products]:
        """A few steps of :meth:`observe`, which are compiled together.

        :param deter, stoch: before the first of the steps, (B, D), (B, C·K)
        :param keep: 0 where the state is zeroed before the step, else 1, (B, steps, 1)
        :param noise: (B, steps, K), or None
        :param products: see :meth:`_unrolled_products`, with what is added at each of the steps
        :return: deter (B, D) and stoch (B, C·K) after the last step; the states; the inputs of the products at all steps
        """
        running = products.each(StepProducts)
        logits_of = partial(self._logits_of_products, running)
        steps: list[States] = []
        for t, kept in enumerate(keep.unbind(1)):
            draws = None if noise is None else noise[:, t]
            steps.append(self._next(deter * kept, stoch * kept, draws, running, logits_of))
            deter, stoch = steps[-1].deter, steps[-1].stoch.flatten(1)  # (B, D), (B, C·K)
        states = States(*(th.stack(parts, 1) for parts in zip(*steps, strict=True)))
        return deter, stoch, states, running.each(StepProducts.inputs)

    def _logits_of_products(self, products: Products, deter: Tensor) -> Tensor:
        """The posterior net of deter (B, D), with the products of :meth:`_unrolled_products`, (B, C, K)."""
        *layers, last = products.posterior
        x = deter
        for layer, product in zip(self.posterior.layers, layers, strict=True):
            x = layer.norm(product(x))  # (B, h)
        return self._rows(last(x))

    def imagination_weights(self) -> Products:
        """Weights of the core in the dtype that they are used in, for all steps of a rollout."""
        return self._core_weights().each(lambda its_weights: [as_computed(weight) for weight in its_weights])

    def prior_step(
        self, deter: Tensor, stoch: Tensor, action: Tensor, noise: Tensor | None, weights: Products
    ) -> tuple[Tensor, Tensor]:
        """One step of a rollout: (N, D), (N, C·K), (N, A) → (N, D), (N, C·K), with :meth:`imagination_weights`."""
        following = self._next(deter, stoch, noise, self._core_products(action, weights), self.prior_logits)
        return following.deter, following.stoch.flatten(1)

    def _next(
        self,
        deter: Tensor,
        stoch: Tensor,
        noise: Tensor | None,
        products: Products,
        logits_of: Callable[[Tensor], Tensor],
    ) -> States:
        """One step of the recurrence, the same in acting, observing and imagining.

        :param deter, stoch: before the step, (N, D), (N, C·K)
        :param noise: uniform numbers, (N, K); None: the most probable classes
        :param products: of :meth:`_core`, for this step
        :param logits_of: gives the logits (N, C, K) of the posterior or the prior for the next deter (N, D)
        :return: without the dimension of steps: (N, D), (N, C, K), (N, C, K)
        """
        deter = self._core(deter, stoch, products)  # (N, D)
        logits = logits_of(deter)  # (N, C, K)
        probs = self.probabilities(logits)  # (N, C, K)
        sample = mode_one_hot(probs) if noise is None else sample_one_hot(probs, noise)  # (N, C, K)
        return States(deter, straight_through(sample, probs), logits)

    def _rows(self, x: Tensor) -> Tensor:
        """(..., C·K) → (..., C, K)"""
        return at_least_float32(x).unflatten(-1, (self.config.classes, self.config.stoch))

    def _core_weights(self) -> Products:
        """Weights of the products of :meth:`_core`; the action's part is in :meth:`_action_part`.

        Every block of the core sees the same hidden vectors beside its own slice of deter.

        :return: deter_in (D, h); stoch_in (C·K, h); core: of the shared inputs (G, 2h, D/G) and of the own ones
            (G, D/G, D/G); gates (G, D/G, 3·D/G)
        """
        own, hidden = self.config.deter // self.config.blocks, self.config.hidden
        return Products(
            deter_in=[self.deter_in.linear.weight.T],
            stoch_in=[self.stoch_in.linear.weight.T],
            core=[self.core.weight[:, own : own + 2 * hidden], self.core.weight[:, :own]],
            gates=[self.gates.weight],
        )

    def _core_added(self, actions: Tensor) -> Products:
        """What is added to the products of :meth:`_core` after actions (B, T, A).

        :return: deter_in (h,), stoch_in (h,), core (G, B, T, D/G), gates (G, 1, 3·D/G)
        """
        return Products(
            deter_in=self.deter_in.linear.bias,
            stoch_in=self.stoch_in.linear.bias,
            core=self._action_part(actions),
            gates=self.gates.block_bias,
        )

    def _core_products(self, action: Tensor, weights: Products) -> Products:
        """The products of one step of :meth:`_core` after an action (N, A), with :meth:`_core_weights`."""
        added = self._core_added(action.unsqueeze(1))
        return added._replace(core=added.core.squeeze(2)).each(Affine, weights)  # core: (G, N, D/G)

    def _action_part(self, actions: Tensor) -> Tensor:
        """What the actions (B, T, A) add to the core's pre-activation, its bias included, (G, B, T, D/G)."""
        actions = actions / actions.detach().abs().clamp_min(1.0)
        x = self.action_in(actions).flatten(0, 1)  # (B·T, h)
        weight = self.core.weight[:, -self.config.hidden :]  # (G, h, D/G)
        part = th.baddbmm(self.core.block_bias, x.expand(len(weight), -1, -1), weight)  # (G, B·T, D/G)
        return part.unflatten(1, actions.shape[:2])

    def _core(self, deter: Tensor, stoch: Tensor, products: Products) -> Tensor:
        """The recurrence without its samples, each product called once.

        :param deter: (N, D)
        :param stoch: (N, C·K)
        :param products: deter_in, stoch_in, core and gates: an :class:`Affine` or :class:`StepProducts` each
        :return: next deter, (N, D)
        """
        blocks = self.config.blocks
        own = deter.unflatten(-1, (blocks, -1)).transpose(0, 1)  # (G, N, D/G)
        hidden = [self.deter_in.norm(products.deter_in(deter)), self.stoch_in.norm(products.stoch_in(stoch))]  # (N, h) each
        x = products.core(th.cat(hidden, -1), own)  # (G, N, D/G)
        x = rms_norm_silu(x, self.core_norm.weight.view(blocks, 1, -1), (0, 2))
        reset, candidate, update = at_least_float32(products.gates(x)).chunk(3, -1)  # (G, N, D/G) each
        # tanh by way of the sigmoid, whose vectorised kernel is three times faster
        candidate = 2.0 * th.sigmoid(2.0 * th.sigmoid(reset) * candidate) - 1.0
        following = th.lerp(own, candidate, th.sigmoid(update - 1.0))  # (G, N, D/G)
        return following.transpose(0, 1).flatten(1)
