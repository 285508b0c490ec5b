"""The world model: encoder, RSSM, decoder (or projector), reward and continue heads, and their losses.

Letters: B sequences, T steps, D deter, K rows, C classes, A action numbers, n penalised states, R penalised rows.

Sources: Hafner et al., Nature 2025 (Methods, "World model learning", Eqs. 4 to 6); Sonigra & Kumar 2026,
arXiv 2605.23089, for the penalty; Morihira et al., ICLR 2026, for what takes the decoder's place if it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch as th
from torch import Tensor, nn
from torch.nn import functional as F

from sb3_dreamer_gpld.config import ImageKey, ModelConfig, ObservationSpec, PenaltyConfig, VectorKey
from sb3_dreamer_gpld.nets.distributions import categorical_kl, symexp, symlog, two_hot_bins, two_hot_loss, two_hot_mean
from sb3_dreamer_gpld.nets.gpld import rademacher, row_penalty
from sb3_dreamer_gpld.nets.layers import (
    Encoder,
    Head,
    ImageDecoder,
    apply_heads,
    at_least_float32,
    image_targets,
    vector_targets,
)
from sb3_dreamer_gpld.nets.normalizer import Normalizer
from sb3_dreamer_gpld.nets.redundancy import Projector, redundancy_loss
from sb3_dreamer_gpld.nets.rssm import RSSM, States
from sb3_dreamer_gpld.nets.steps import SteppedModule, compilable

NO_DECODER = (
    "This model has no decoder, since it learned with reconstruction='redundancy': it cannot predict observations. Allowed: a "
    "model with policy_kwargs=dict(reconstruction='decoder')"
)


class Batch(NamedTuple):
    """Sequences as the nets see them; :class:`SequenceSamples` has them as they are stored.

    :param observations: by key (``ONLY_KEY`` if the space is no Dict), (B, T, *shape)
    :param actions: action before each observation, (B, T, A)
    :param rewards: received on arriving at each observation, (B, T)
    :param is_first: the observation starts an episode, bool (B, T)
    :param is_last: the observation ends an episode, bool (B, T)
    :param is_terminal: it ends it for good, not by a time limit, bool (B, T)
    :param deter: recurrent state before the first step, (B, D)
    :param stoch: likewise, (B, C, K)
    """

    observations: Mapping[str, Tensor]
    actions: Tensor
    rewards: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    deter: Tensor
    stoch: Tensor

    def steps(self, steps: slice | Tensor) -> Batch:
        """:return: some steps of each sequence, with the state before the first of all"""
        return Batch(
            {key: x[:, steps] for key, x in self.observations.items()},
            self.actions[:, steps],
            self.rewards[:, steps],
            self.is_first[:, steps],
            self.is_last[:, steps],
            self.is_terminal[:, steps],
            self.deter,
            self.stoch,
        )

    def select(self, sequences: slice | Tensor) -> Batch:
        """:return: some of the sequences"""
        observations, *others = self
        return Batch({key: x[sequences] for key, x in observations.items()}, *(x[sequences] for x in others))

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """:return: the sequences of batches with equal steps, one after the other"""
        observations, *others = zip(*batches, strict=True)
        return cls(
            {key: th.cat([part[key] for part in observations]) for key in observations[0]},
            *(th.cat(parts) for parts in others),
        )


class Term(NamedTuple):
    """A term of the loss that is minimised.

    :param value: before its weight, (B, T) or fewer steps, or a scalar; its mean counts
    :param weight: of the mean, a number or a scalar on the device
    :param logged_as: name in the log; "": as a loss
    :param weight_logged_as: name of the weight in the log, where it is a scalar on the device; "": it is not logged
    """

    value: Tensor
    weight: float | Tensor
    logged_as: str = ""
    weight_logged_as: str = ""


class PenaltyWeights(NamedTuple):
    """λ of the penalties in an update, numbers or scalars on the device; None: the penalty is not computed."""

    posterior: float | Tensor | None
    prior: float | Tensor | None


class WorldModelDraws(NamedTuple):
    """Every random number of the world model's losses.

    :param stoch: uniform numbers for the posterior samples, (B, T, K)
    :param states: indices of the penalised states among the B·T flattened ones, (n,)
    :param posterior_rows, prior_rows: indices of the penalised rows of each net, (R,); None: all
    :param posterior_probes, prior_probes: Rademacher numbers, (R, n, C); None where no probe is needed
    """

    stoch: Tensor
    states: Tensor | None = None
    posterior_rows: Tensor | None = None
    prior_rows: Tensor | None = None
    posterior_probes: Tensor | None = None
    prior_probes: Tensor | None = None


class WorldModel(SteppedModule):
    """Encoder, RSSM, decoder, reward and continue heads; with ``reconstruction="redundancy"`` a projector, and no decoder.

    :param spec: keys of the observation space
    :param actions: numbers in an action, A
    :param config: sizes and constants
    """

    bins: Tensor
    # The states (n, ...) of all processes that learn together, (P·n, ...), with the gradient of this one's
    gather: Callable[[Tensor], Tensor] = staticmethod(lambda x: x)

    def __init__(self, spec: ObservationSpec, actions: int, config: ModelConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        features, units = config.feature_size, config.units
        self._box_sizes = {key.name: key.size for key in spec.vectors if key.nvec is None}  # one-hots are not normalised
        normalize = config.normalize_vectors and len(self._box_sizes) > 0
        self.normalizer = Normalizer(sum(self._box_sizes.values())) if normalize else None
        self.encoder = Encoder(spec, config)
        self.rssm = RSSM(self.encoder.size, actions, config)
        self.vector_decoder: Head | None = None
        self.image_decoders = nn.ModuleList()
        self.projector: Projector | None = None
        if config.reconstruction == "redundancy":
            self.projector = Projector(features, self.encoder.size)
        else:
            if spec.vectors:
                sizes = [key.size for key in spec.vectors]
                self.vector_decoder = Head(features, [units] * config.decoder_layers, sizes)
            self.image_decoders.extend(
                ImageDecoder(sum(key.channels for key in keys), *size, config) for size, keys in spec.image_groups.items()
            )
        self.reward = Head(features, [units] * config.reward_layers, [config.bins], scale=0.0)
        self.cont = Head(features, [units] * config.continue_layers, [1])
        # Not in the state_dict: the bins are a constant, no parameter.
        self.register_buffer("bins", two_hot_bins(config.bins), persistent=False)

    # ------------------------------------------------------------------------------------ observations

    def targets(self, observations: Mapping[str, Tensor], batch: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Observations as encoder input and decoder target.

        :param observations: by key, (*batch, *shape)
        :param batch: batch dimensions
        :return: vectors (*batch, size) per vector key, images (*batch, height, width, channels) per image size
        """
        dtype = self.bins.dtype
        images = [image_targets(keys, observations, batch, dtype) for keys in self.spec.image_groups.values()]
        return vector_targets(self.spec, observations, batch, dtype), images

    def _numbers(self, vectors: Mapping[str, Tensor], batch: Sequence[int]) -> Tensor:
        """All that is normalised of vectors by key, (*batch, numbers)."""
        return th.cat([vectors[name].reshape(*batch, -1).to(self.bins.dtype) for name in self._box_sizes], -1)

    def _split_numbers(self, numbers: Tensor) -> dict[str, Tensor]:
        """:meth:`_numbers` (*batch, numbers) as vectors (*batch, size)."""
        return dict(zip(self._box_sizes, numbers.split(list(self._box_sizes.values()), -1), strict=True))

    def _normalized(self, observations: Mapping[str, Tensor], batch: Sequence[int]) -> Mapping[str, Tensor]:
        """Observations whose :meth:`targets` encoder and decoder have."""
        if self.normalizer is None:
            return observations
        return {**observations, **self._split_numbers(self.normalizer(self._numbers(observations, batch)))}

    def _in_own_units(self, vectors: list[Tensor]) -> list[Tensor]:
        """Vectors (*batch, size) that the decoder gave, in the form of :meth:`targets`."""
        if self.normalizer is None:
            return vectors
        decoded = {key.name: x for key, x in zip(self.spec.vectors, vectors, strict=True)}
        numbers = self.normalizer.inverse(symexp(self._numbers(decoded, vectors[0].shape[:-1])))
        return list({**decoded, **self._split_numbers(symlog(numbers))}.values())

    @th.no_grad()
    def update_normalizer(self, observations: Mapping[str, Tensor], fault: Tensor) -> None:
        """Take replayed observations into the normaliser's statistics; call it after the update.

        :param observations: by key, (B, T, *shape)
        :param fault: bool scalar, whether the update failed: then the statistics stay
        """
        if self.normalizer is not None:
            size = next(iter(observations.values())).shape[:2]
            numbers = self._numbers(observations, size).flatten(0, 1)  # (B·T, numbers)
            self.normalizer.update(self.gather(numbers), fault)

    def encode(self, observations: Mapping[str, Tensor], batch: Sequence[int]) -> Tensor:
        """:return: tokens (*batch, tokens)"""
        return self.encoder(*self.targets(self._normalized(observations, batch), batch))

    def _split_vectors(self, outputs: Tensor) -> list[Tensor]:
        return list(outputs.split([key.size for key in self.spec.vectors], -1))

    def _decode_images(self, deter: Tensor, stoch: Tensor) -> list[Tensor]:
        batch = deter.shape[:-1]
        return [net(deter.flatten(0, -2), stoch.flatten(0, -2)).unflatten(0, batch) for net in self.image_decoders]

    # -------------------------------------------------------------------------------------- predictions

    @property
    def has_decoder(self) -> bool:
        """Whether observations can be predicted."""
        return self.vector_decoder is not None or len(self.image_decoders) > 0

    def decode(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Predicted observations of features (*batch, D + C·K), in the form of :meth:`targets`.

        :raises ValueError: there is no decoder
        """
        if not self.has_decoder:
            raise ValueError(NO_DECODER)
        deter, stoch = features.split([self.config.deter, self.config.stoch_size], -1)
        vectors = [] if self.vector_decoder is None else self._split_vectors(self.vector_decoder(features))
        return self._in_own_units(vectors), self._decode_images(deter, stoch)

    def predict_reward(self, outputs: Tensor) -> Tensor:
        """Expected reward of the reward head's outputs (..., bins), (...)."""
        return two_hot_mean(outputs, self.bins)

    # ------------------------------------------------------------------------------------------- losses

    def draw(self, batch: int, steps: int, penalty: PenaltyConfig) -> WorldModelDraws:
        """Random numbers for one update on ``batch`` sequences of ``steps`` steps."""
        config, device = self.config, self.bins.device
        stoch = th.rand(batch, steps, config.stoch, device=device)
        if not (penalty.posterior or penalty.prior):
            return WorldModelDraws(stoch)
        states = th.randperm(batch * steps, device=device)[: penalty.states(batch * steps)]
        rows: list[Tensor | None] = [None, None]  # of the posterior and the prior, which the release draws apart
        if penalty.rows is not None and penalty.rows < config.stoch:
            draw, penalised = th.randperm if penalty.random_rows else th.arange, (penalty.posterior, penalty.prior)
            rows = [draw(config.stoch, device=device)[: penalty.rows] if on else None for on in penalised]
        shape = (min(config.stoch, penalty.rows or config.stoch), len(states), config.classes)
        probed = penalty.estimator == "hutchinson"
        return WorldModelDraws(
            stoch,
            states,
            rows[0],
            rows[1],
            rademacher(shape, device) if probed and penalty.posterior else None,
            rademacher(shape, device) if probed and penalty.prior else None,
        )

    def loss(
        self, batch: Batch, draws: WorldModelDraws, weights: PenaltyWeights, gamma: float
    ) -> tuple[dict[str, Term], States]:
        """Losses of the world model.

        :param batch: replayed sequences
        :param draws: random numbers
        :param weights: λ of the penalties
        :param gamma: discount that the continue head learns
        :return: losses by name, with values (B, T) each or scalars, and the posterior states
        """
        vectors, images, tokens = self.encode_targets(batch.observations, batch.rewards.shape)
        states = self.rssm.observe(tokens, batch.actions, batch.is_first, batch.deter, batch.stoch, draws.stoch)
        losses = self.replay_losses(states, vectors, images, batch.rewards, batch.is_terminal, gamma)
        if self.projector is not None:
            losses["redundancy"] = Term(self.redundancy(states.features, tokens), self.config.redundancy_weight)
        if draws.states is not None:
            wanted = [weight is not None for weight in weights]
            penalties = self.penalty_losses(states.deter, tokens, draws, *wanted)
            for kind, weight in weights._asdict().items():
                if weight is not None:
                    name = f"{kind}_penalty"
                    losses[name] = Term(penalties[name], weight, f"gpld/{name}", f"gpld/{kind}_lambda")
        return losses, states

    @compilable
    def encode_targets(
        self, observations: Mapping[str, Tensor], batch: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """:meth:`targets`, the vectors normalised if the config says so, and the tokens (*batch, tokens) that the encoder
        makes of them."""
        vectors, images = self.targets(self._normalized(observations, batch), batch)
        return vectors, images, self.encoder(vectors, images)

    @compilable
    def replay_losses(
        self,
        states: States,
        vectors: Sequence[Tensor],
        images: Sequence[Tensor],
        rewards: Tensor,
        is_terminal: Tensor,
        gamma: float,
    ) -> dict[str, Term]:
        """Divergences, reward, continue and, with a decoder, reconstruction losses.

        :param states: posterior states
        :param vectors, images: of :meth:`encode_targets`
        :param rewards, is_terminal: (B, T)
        :param gamma: discount that the continue head learns
        :return: by name, with values (B, T)
        """
        config = self.config
        losses = self._divergences(states)
        features = states.features  # (B, T, D + C·K)
        heads = [self.reward, self.cont] + ([] if self.vector_decoder is None else [self.vector_decoder])
        reward, cont, *decoded = apply_heads(heads, features)  # (B, T, bins), (B, T, 1), (B, T, numbers of all vectors)
        losses["reward"] = Term(two_hot_loss(reward, [rewards], self.bins), config.reward_weight)
        cont_target = (1.0 - is_terminal.to(features.dtype)) * gamma  # (B, T)
        cont_loss = F.binary_cross_entropy_with_logits(cont.squeeze(-1), cont_target, reduction="none")
        losses["continue"] = Term(cont_loss, config.continue_weight)
        if decoded:
            for key, prediction, target in zip(self.spec.vectors, self._split_vectors(decoded[0]), vectors, strict=True):
                error = vector_loss(prediction, target, key.nvec)
                losses[reconstruction_of(key)] = Term(error, config.reconstruction_weight)
        if self.image_decoders:
            decoded_images = self._decode_images(states.deter, states.stoch.flatten(-2))
            for group, prediction, target in zip(self.spec.image_groups.values(), decoded_images, images, strict=True):
                # Of each image (B, T, height, width, its channels)
                errors = (prediction - target).square().split([image.channels for image in group], -1)
                for image, error in zip(group, errors, strict=True):
                    losses[reconstruction_of(image)] = Term(error.sum((-3, -2, -1)), config.reconstruction_weight)
        return losses

    def redundancy(self, features: Tensor, tokens: Tensor) -> Tensor:
        """:func:`~sb3_dreamer_gpld.nets.redundancy.redundancy_loss` of all states of the batch, those of other processes too.

        :param features: (B, T, D + C·K)
        :param tokens: of the encoder, which gets no gradient by them, (B, T, tokens)
        :return: scalar
        """
        assert self.projector is not None
        with th.autocast(features.device.type, enabled=False):  # rounding would count where a mean is far above its deviation
            projected = self.projector(at_least_float32(features.flatten(0, 1)))  # (B·T, tokens)
        return self.correlations(self.gather(projected), self.gather(tokens.detach().flatten(0, 1)))

    @compilable
    def correlations(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """The loss of :meth:`redundancy` from projected states and tokens, (N, tokens) each."""
        return redundancy_loss(projected, tokens, self.config.redundancy_lambda)

    @compilable
    def penalty_losses(
        self, deter: Tensor, tokens: Tensor, draws: WorldModelDraws, posterior: bool, prior: bool
    ) -> dict[str, Tensor]:
        """GPLD penalties at the drawn states.

        The other states count as zeros, as published: their mean, the loss, has the effective weight ρ·λ.

        :param deter, tokens: (B, T, D), (B, T, tokens)
        :param draws: random numbers
        :param posterior, prior: which nets are penalised
        :return: "posterior_penalty" and "prior_penalty" as far as they are, (B, T)
        """
        assert draws.states is not None
        losses = {}
        posterior_inputs = th.cat([deter, tokens], -1)  # (B, T, D + tokens)
        for name, wanted, net, inputs, probes, rows in (
            ("posterior", posterior, self.rssm.posterior, posterior_inputs, draws.posterior_probes, draws.posterior_rows),
            ("prior", prior, self.rssm.prior, deter, draws.prior_probes, draws.prior_rows),
        ):
            if wanted:
                at_states = head_penalty(
                    net, inputs.flatten(0, 1)[draws.states], self.config.classes, self.config.unimix, probes, rows
                )  # (n,)
                zeros = at_states.new_zeros(deter.shape[:2].numel())  # (B·T,)
                losses[f"{name}_penalty"] = zeros.index_put((draws.states,), at_states).view(deter.shape[:2])
        return losses

    def _divergences(self, states: States) -> dict[str, Term]:
        """KL losses, each summed over the rows, then clipped from below at the free nats."""
        posterior = self.rssm.probabilities(states.logits)  # (B, T, C, K)
        prior = self.rssm.probabilities(self.rssm.prior_logits(states.deter))  # (B, T, C, K)
        dyn = categorical_kl(posterior.detach(), prior)  # (B, T)
        rep = categorical_kl(posterior, prior.detach())  # (B, T)
        nats, config = self.config.free_nats, self.config
        return {"dyn": Term(dyn.clamp_min(nats), config.dyn_weight), "rep": Term(rep.clamp_min(nats), config.rep_weight)}


def reconstruction_of(key: VectorKey | ImageKey) -> str:
    """Name of an observation's reconstruction loss: that of a Box alone has no key."""
    return f"reconstruction/{key.name}".rstrip("/")


def head_penalty(
    head: Head, inputs: Tensor, classes: int, unimix: float, probes: Tensor | None, rows: Tensor | None
) -> Tensor:
    """:func:`~sb3_dreamer_gpld.nets.gpld.row_penalty` of the posterior or the prior net, in float32 at least, (n,)."""
    output = head.output.parts[0]
    with th.autocast(inputs.device.type, enabled=False):
        return row_penalty(
            [layer.as_layer() for layer in head.layers],
            (output.weight, output.bias),
            at_least_float32(inputs),
            classes,
            unimix,
            probes,
            rows,
        )


def vector_loss(prediction: Tensor, target: Tensor, nvec: tuple[int, ...] | None) -> Tensor:
    """Reconstruction loss of one vector observation.

    :param prediction: (..., size)
    :param target: symlog values, or one-hots, (..., size)
    :param nvec: classes of each number, None for a Box
    :return: squared error summed over the numbers, or cross-entropy summed over the categories, (...)
    """
    if nvec is None:
        return (prediction - target).square().sum(-1)
    log_probs = th.cat([th.log_softmax(x, -1) for x in prediction.split(nvec, -1)], -1)
    return -(log_probs * target).sum(-1)
