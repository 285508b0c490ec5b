"""What the nets are built from: sizes and constants, the penalty's setting, and the two spaces.

Everything here is frozen and checked when it is made, so that a wrong name or value is reported before any
environment step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first

from sb3_dreamer_gpld.checks import check_int, check_range, unknown_name
from sb3_dreamer_gpld.observations import ONLY_KEY, spaces_by_key
from sb3_dreamer_gpld.schedules import SCHEDULES, default_parameters

# Network sizes of the authors' release; "debug" is for tests.
SIZES: dict[str, dict[str, int]] = {
    "debug": dict(deter=32, hidden=16, stoch=4, classes=4, blocks=4, units=16, depth=2),
    "1m": dict(deter=512, hidden=64, classes=4, units=64, depth=4),
    "12m": dict(deter=2048, hidden=256, classes=16, units=256, depth=16),
    "25m": dict(deter=3072, hidden=384, classes=24, units=384, depth=24),
    "50m": dict(deter=4096, hidden=512, classes=32, units=512, depth=32),
    "100m": dict(deter=6144, hidden=768, classes=48, units=768, depth=48),
    "200m": dict(deter=8192, hidden=1024, classes=64, units=1024, depth=64),
    "400m": dict(deter=12288, hidden=1536, classes=96, units=1536, depth=96),
}

# Nets that spectral_norm may name
SPECTRAL_NETS = ("encoder", "posterior", "prior", "decoder", "reward", "continue", "actor", "critic")

# What the world model's representation is learned from
RECONSTRUCTIONS = ("decoder", "redundancy")

IMAGE_STAGES = (2, 3, 4, 4)  # channels of the four image stages, in multiples of ``depth``
MIN_IMAGE_SIDE = 2 ** len(IMAGE_STAGES)
MOST_INTEGERS = 2.0**53  # that float64 tells apart


def _check_layers(name: str, layers: Any) -> None:
    if not isinstance(layers, (tuple, list, type(None))):
        raise ValueError(f"{name} must be a list of the units of each layer, not {layers!r}")
    for units in layers or ():
        check_int(f"every layer of {name}", units, 1)


def _check_spectral_norm(nets: Any) -> None:
    if not isinstance(nets, (tuple, list)):
        raise ValueError(f"spectral_norm must be a list of nets ({', '.join(SPECTRAL_NETS)}), not {nets!r}")
    for net in nets:
        if net not in SPECTRAL_NETS:
            raise ValueError(unknown_name("spectral_norm's net", net, SPECTRAL_NETS))


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of the nets (Nature 2025, Extended Data Tables; authors' release, ``configs.yaml``).

    Every field can be set through ``policy_kwargs``.

    :param deter: numbers in the deterministic state, D
    :param hidden: units of the recurrent core, posterior and prior nets
    :param stoch: rows of the stochastic state, K
    :param classes: classes of each row, C
    :param blocks: blocks of the block-linear layers of the core
    :param units: units of encoder, decoder and heads
    :param depth: channels of the image nets, in units of IMAGE_STAGES
    :param policy_arch, value_arch: units of each layer of the policy and the value; None: three layers of ``units``
    :param encoder_layers, decoder_layers, reward_layers, continue_layers: layers of these nets
    :param posterior_layers, prior_layers: layers before the logits of posterior and prior
    :param encoder_units: units of the vector encoder; None: ``units``
    :param image_features: if given, a layer of that size after the image encoder (not in the papers)
    :param kernel: side of the convolution kernels, odd
    :param decoder_blocks: blocks of the first layer of the image decoder
    :param normalize_vectors: encoder and decoder see the numbers of Box observations in units of their own running
        standard deviation, before symlog, so that one of ±0.1 counts as much as one of ±5 (not in the papers, see
        :mod:`~sb3_dreamer_gpld.nets.normalizer`)
    :param unimix: share of the uniform distribution in the categoricals
    :param bins: bins of the two-hot heads, odd
    :param min_std, max_std: bounds of the standard deviation of continuous actions
    :param free_nats: KL below which dyn and rep have no gradient
    :param reconstruction_weight ... replay_value_weight: weights of the losses
    :param slow_value_rate: rate of the moving average of the value net, per update
    :param percentile_rate: rate of the moving average of the return percentiles, per update
    :param percentile_low, percentile_high: percentiles of the returns, in percent
    :param reconstruction: what ties the states to the observations: "decoder" (they are predicted), or "redundancy" (no
        decoder is built, and a projection of the states is correlated with the encoder's output: R2-Dreamer, Morihira et al.,
        ICLR 2026, see :mod:`~sb3_dreamer_gpld.nets.redundancy`)
    :param redundancy_weight: weight of that loss (release of R2-Dreamer, ``loss_scales.barlow``)
    :param redundancy_lambda: weight of its correlations off the diagonal (release of R2-Dreamer, ``r2dreamer.lambd``)
    :param spectral_norm: nets whose hidden layers are spectrally normalised, some of :data:`SPECTRAL_NETS` (not in the papers)
    :raises ValueError: a size is not allowed; the text names it
    """

    deter: int = 512
    hidden: int = 64
    stoch: int = 32
    classes: int = 4
    blocks: int = 8
    units: int = 64
    depth: int = 4
    policy_arch: tuple[int, ...] | None = None
    value_arch: tuple[int, ...] | None = None
    encoder_layers: int = 3
    decoder_layers: int = 3
    reward_layers: int = 1
    continue_layers: int = 1
    posterior_layers: int = 1
    prior_layers: int = 2
    encoder_units: int | None = None
    image_features: int | None = None
    kernel: int = 5
    decoder_blocks: int = 8
    normalize_vectors: bool = False
    unimix: float = 0.01
    bins: int = 255
    min_std: float = 0.1
    max_std: float = 1.0
    free_nats: float = 1.0
    reconstruction_weight: float = 1.0
    reward_weight: float = 1.0
    continue_weight: float = 1.0
    dyn_weight: float = 1.0
    rep_weight: float = 0.1
    policy_weight: float = 1.0
    value_weight: float = 1.0
    replay_value_weight: float = 0.3
    slow_value_rate: float = 0.02
    percentile_rate: float = 0.01
    percentile_low: float = 5.0
    percentile_high: float = 95.0
    reconstruction: str = "decoder"
    redundancy_weight: float = 0.05
    redundancy_lambda: float = 5e-4
    spectral_norm: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("deter", "hidden", "stoch", "blocks", "units", "depth", "decoder_blocks"):
            check_int(name, getattr(self, name), 1)
        check_int("classes", self.classes, 2)
        for name in (
            "encoder_layers",
            "decoder_layers",
            "reward_layers",
            "continue_layers",
            "posterior_layers",
            "prior_layers",
        ):
            check_int(name, getattr(self, name), 1)
        for name in ("encoder_units", "image_features"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if not isinstance(self.normalize_vectors, bool):
            raise ValueError(f"normalize_vectors must be True or False, not {self.normalize_vectors!r}")
        for name in ("policy_arch", "value_arch"):
            _check_layers(name, getattr(self, name))
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(unknown_name("reconstruction", self.reconstruction, RECONSTRUCTIONS))
        check_range("redundancy_lambda", self.redundancy_lambda, 0.0, math.inf)
        _check_spectral_norm(self.spectral_norm)
        for name in ("kernel", "bins"):
            check_int(name, getattr(self, name), 3 if name == "bins" else 1)
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"{name} must be odd, not {getattr(self, name)}")
        if self.deter % self.blocks:
            raise ValueError(f"deter must be a multiple of blocks: deter={self.deter}, blocks={self.blocks}")
        for name in ("unimix", "slow_value_rate", "percentile_rate"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        if self.unimix in (0, 1):
            raise ValueError(f"unimix must be above 0, so that no probability is 0, and below 1, not {self.unimix}")
        check_range("min_std", self.min_std, 0.0, math.inf, low_open=True)
        check_range("max_std", self.max_std, self.min_std, math.inf)
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_weight") or f.name == "free_nats"):
            check_range(name, getattr(self, name), 0.0, math.inf)
        check_range("percentile_low", self.percentile_low, 0.0, 100.0)
        check_range("percentile_high", self.percentile_high, self.percentile_low, 100.0)

    @property
    def stoch_size(self) -> int:
        """Numbers in the flattened stochastic state, K·C."""
        return self.stoch * self.classes

    @property
    def feature_size(self) -> int:
        """Numbers in the input of the heads, D + K·C."""
        return self.deter + self.stoch_size

    @classmethod
    def make(cls, model_size: str, **overrides: Any) -> ModelConfig:
        """Sizes by name, with single fields changed.

        :param model_size: a name in SIZES
        :param overrides: fields of this class
        :raises ValueError: unknown size, or a value that is not allowed
        :raises TypeError: unknown field
        """
        if model_size not in SIZES:
            raise ValueError(unknown_name("model_size", model_size, SIZES))
        allowed = [f.name for f in dataclasses.fields(cls)]
        for name in overrides:
            if name in POLICY_KWARGS_ELSEWHERE:
                raise TypeError(f"policy_kwargs entry {name!r} does not exist: {POLICY_KWARGS_ELSEWHERE[name]}")
            if name not in allowed:
                raise TypeError(unknown_name("policy_kwargs entry", name, [*allowed, *POLICY_ARGUMENTS]))
        return cls(**{**SIZES[model_size], **overrides})


_NO_STD = "the policy's deviation is an output of its net, between policy_kwargs=dict(min_std=..., max_std=...)"
# Those of other algorithms' policies, by name: what does their work here, or that there is none
POLICY_KWARGS_ELSEWHERE = {
    "activation_fn": "every hidden layer is linear, RMSNorm and SiLU, of which the penalty's closed form is made",
    "features_extractor_class": (
        "encoder, RSSM and decoder belong together and are replaced by a policy's world_model_class, see docs/extending.md. "
        "Sizes are changed by features_extractor_kwargs"
    ),
    "share_features_extractor": "policy and value always see the states of the same world model",
    "n_critics": "there is one value net, and a slow copy of it (slow_value_rate)",
    "ortho_init": "nets begin as in the authors' release",
    "log_std_init": _NO_STD,
    "full_std": _NO_STD,
    "use_expln": _NO_STD,
    "use_sde": "actions have no state-dependent noise here; exploration_noise of the algorithm adds noise that lasts",
    "squash_output": "actions in a Box are always squashed to it",
    "lstm_hidden_size": "the memory is the recurrent state of the world model, of size deter",
    "n_lstm_layers": "the memory is the recurrent state of the world model, of size deter",
    "enable_critic_lstm": "the memory is that of the world model, for policy and value",
    "shared_lstm": "the memory is that of the world model, for policy and value",
}
# Entries of policy_kwargs that are not fields of ModelConfig.
POLICY_ARGUMENTS = ("net_arch", "normalize_images", "features_extractor_kwargs", "optimizer_class", "optimizer_kwargs")


def _checked_schedule(schedule: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A schedule of λ as the constructor takes it, as its name and all of its parameters.

    :raises ValueError: a name or a value is not allowed
    """
    if not isinstance(schedule, (str, Mapping)):
        raise ValueError(f"penalty_schedule must be a name or a dict with 'name', not {schedule!r}")
    given = {"name": schedule} if isinstance(schedule, str) else dict(schedule)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(unknown_name("penalty_schedule", str(name), SCHEDULES))
    defaults = default_parameters(name)
    for key in given:
        if key not in defaults:
            raise ValueError(unknown_name(f"parameter of penalty_schedule {name!r}", key, defaults))
    parameters = {**defaults, **given}
    for key in ("decay_steps", "interval", "time_scale"):
        if key in parameters:
            check_range(f"penalty_schedule's {key}", parameters[key], 0.0, math.inf, low_open=True)
    if "factor" in parameters:
        check_range("penalty_schedule's factor", parameters["factor"], 0.0, 1.0)
    if name == "custom":
        _check_custom(**parameters)
    return name, parameters


def _check_custom(steps: Any, values: Any) -> None:
    """The parameters of the schedule "custom"."""
    if not all(isinstance(given, (list, tuple)) for given in (steps, values)):
        raise ValueError("penalty_schedule 'custom' needs lists of steps and of values")
    steps, values = list(steps), list(values)
    for step in steps:
        check_range("penalty_schedule's steps", step, 0.0, math.inf)
    if len(steps) != len(values) or not steps or steps != sorted(steps):
        raise ValueError(
            "penalty_schedule 'custom' needs as many steps as values, at least one, with increasing steps; "
            f"got steps={steps}, values={values}"
        )
    for value in values:
        check_range("penalty_schedule's values", value, 0.0, math.inf)


@dataclass(frozen=True)
class PenaltyConfig:
    """The GPLD penalty (arXiv 2605.23089; authors' release).

    :param posterior: λ₀ of the posterior's penalty; 0 turns it off
    :param prior: λ₀ of the prior's penalty; 0 turns it off
    :param fraction: share ρ of the B·T states at which it is computed, in (0, 1]
    :param rows: rows penalised, from 1 to K; None: all
    :param random_rows: draw the ``rows`` rows afresh at every update instead of taking the first ones
    :param estimator: "hutchinson" (one Rademacher probe per row and state) or "exact"
    :param schedule: a name in :data:`~sb3_dreamer_gpld.schedules.SCHEDULES`, or a dict with "name" and its parameters
    :param minimum: λ never falls below it, which leaves the schedule "none" alone
    :param start: optimiser updates before which λ is 0
    :raises ValueError: a value is not allowed; the text names the constructor argument
    """

    posterior: float = 0.5
    prior: float = 0.0
    fraction: float = 0.5
    rows: int | None = None
    random_rows: bool = False
    estimator: str = "hutchinson"
    schedule: str | Mapping[str, Any] = "sqrt_time"
    minimum: float = 0.001
    start: int = 0
    schedule_name: str = field(init=False, default="")
    schedule_parameters: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_range("posterior_penalty", self.posterior, 0.0, math.inf)
        check_range("prior_penalty", self.prior, 0.0, math.inf)
        check_range("penalty_fraction", self.fraction, 0.0, 1.0, low_open=True)
        check_range("penalty_min", self.minimum, 0.0, math.inf)
        check_int("start", self.start, 0)
        if self.rows is not None:
            check_int("penalty_rows", self.rows, 1)
        if self.estimator not in ("hutchinson", "exact"):
            raise ValueError(unknown_name("penalty_estimator", self.estimator, ("hutchinson", "exact")))
        name, parameters = _checked_schedule(self.schedule)
        for argument, initial in (("posterior_penalty", self.posterior), ("prior_penalty", self.prior)):
            if 0.0 < initial < self.minimum and name != "none":
                raise ValueError(
                    f"{argument}={initial} is less than penalty_min={self.minimum}, to which λ would rise; allowed: 0, a "
                    "larger one, or a smaller penalty_min"
                )
        object.__setattr__(self, "schedule_name", name)
        object.__setattr__(self, "schedule_parameters", parameters)

    def states(self, total: int) -> int:
        """How many of ``total`` states are penalised: max(1, ⌊ρ·total⌋)."""
        return max(1, int(self.fraction * total))


@dataclass(frozen=True)
class VectorKey:
    """An observation that the vector encoder sees.

    :param name: key in the Dict space, ONLY_KEY if the space is no Dict
    :param shape: shape of one observation
    :param nvec: classes of each number of a Discrete, MultiDiscrete or MultiBinary space, None for a Box
    :param offset: smallest value of a Discrete space
    """

    name: str
    shape: tuple[int, ...]
    nvec: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def size(self) -> int:
        """Numbers that the encoder gets and the decoder gives."""
        return sum(self.nvec) if self.nvec is not None else math.prod(self.shape)


@dataclass(frozen=True)
class ImageKey:
    """An observation that the image encoder sees.

    :param name: key in the Dict space, ONLY_KEY if the space is no Dict
    :param height, width, channels: size in pixels
    :param channels_first: the space is (channels, height, width)
    :param scale: width of the range of its numbers, 255 for uint8 images
    :param low: smallest number
    """

    name: str
    height: int
    width: int
    channels: int
    channels_first: bool
    scale: float
    low: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


@dataclass(frozen=True)
class ObservationSpec:
    """Keys of an observation space in sorted order, split into vectors and images."""

    vectors: tuple[VectorKey, ...]
    images: tuple[ImageKey, ...]

    @property
    def vector_size(self) -> int:
        return sum(key.size for key in self.vectors)

    @property
    def image_groups(self) -> dict[tuple[int, int], tuple[ImageKey, ...]]:
        """Images of equal height and width share a net, as channels of one image."""
        sizes = sorted({key.size for key in self.images})
        return {size: tuple(key for key in self.images if key.size == size) for size in sizes}

    @classmethod
    def from_space(cls, space: spaces.Space, normalize_images: bool = True) -> ObservationSpec:
        """
        :param space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
        :param normalize_images: images are uint8 in [0, 255]; if False those of any bounded numbers are images
        :raises ValueError: another space, an empty one, an image smaller than 16 pixels, or one without bounds
        """
        subspaces = spaces_by_key(space)
        vectors, images = [], []
        for name in sorted(subspaces):
            key = _observation_key(name, subspaces[name], normalize_images)
            if isinstance(key, ImageKey):
                images.append(key)
            elif key.size:
                vectors.append(key)
        if not vectors and not images:
            raise ValueError(f"The observation space has no numbers in it: {space}")
        return cls(tuple(vectors), tuple(images))


def _check_start(where: str, space: spaces.MultiDiscrete) -> None:
    if np.any(space.start):
        raise ValueError(f"{where} is a MultiDiscrete that starts at {space.start.tolist()}; allowed: starts at 0")


def _image_range(where: str, space: spaces.Box) -> tuple[float, float]:
    """Width of the range of an image's numbers, and the smallest; that of floats within [0, 1] is [0, 1].

    :raises ValueError: the range is not finite
    """
    low, high = float(space.low.min()), float(space.high.max())
    if not math.isfinite(high - low):
        raise ValueError(
            f"{where} is an image of numbers from {low:g} to {high:g}; allowed: finite bounds, of which images are scaled to "
            "[0, 1]. Or flatten it with gymnasium.wrappers.FlattenObservation"
        )
    if space.dtype.kind == "f" and 0.0 <= low and high <= 1.0:
        return 1.0, 0.0
    return high - low or 1.0, low


def _observation_key(name: str, space: spaces.Space, normalize_images: bool) -> VectorKey | ImageKey:
    where = "the observation space" if name == ONLY_KEY else f"observation {name!r}"
    if isinstance(space, spaces.Box):
        if is_image_space(space, check_channels=False, normalized_image=not normalize_images):
            # SB3 hands uint8 images over channels first. An image side has 16 pixels at least, so only a shape of three
            # such numbers leaves open which of them the channels are.
            ambiguous = min(space.shape) >= MIN_IMAGE_SIDE
            first = (ambiguous and is_image_space(space)) or is_image_space_channels_first(space)
            channels, height, width = space.shape if first else (space.shape[2], *space.shape[:2])
            if min(height, width) < MIN_IMAGE_SIDE:
                raise ValueError(
                    f"{where} is an image of {height}x{width} pixels; allowed: at least {MIN_IMAGE_SIDE} in both directions. "
                    "Enlarge it, or flatten it with gymnasium.wrappers.FlattenObservation"
                )
            return ImageKey(name, height, width, channels, first, *_image_range(where, space))
        return VectorKey(name, space.shape)
    if isinstance(space, spaces.Discrete):
        return VectorKey(name, (), (int(space.n),), int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        _check_start(where, space)
        return VectorKey(name, space.shape, tuple(int(n) for n in space.nvec.flatten()))
    if isinstance(space, spaces.MultiBinary):
        return VectorKey(name, space.shape, (2,) * math.prod(space.shape))
    raise ValueError(
        f"{where} is a {type(space).__name__} space; allowed: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these"
    )


@dataclass(frozen=True)
class ActionSpec:
    """How actions look to the nets.

    :param shape: shape of one action of the environment
    :param nvec: classes of each number of a Discrete, MultiDiscrete or MultiBinary space, None for a Box
    :param offset: smallest value of a Discrete space
    """

    shape: tuple[int, ...]
    nvec: tuple[int, ...] | None = None
    offset: int = 0

    @property
    def size(self) -> int:
        """Numbers in an action as the nets see it, A: scaled to [−1, 1], or concatenated one-hots."""
        return sum(self.nvec) if self.nvec is not None else math.prod(self.shape)

    @classmethod
    def from_space(cls, space: spaces.Space) -> ActionSpec:
        """:raises ValueError: not a Box, Discrete, one-dimensional MultiDiscrete or MultiBinary space, or an empty one"""
        if 0 in (space.shape or ()):
            raise ValueError(f"the action space {space} has no numbers in it; allowed: at least one")
        if isinstance(space, spaces.Box):
            with np.errstate(over="ignore", invalid="ignore"):
                if space.dtype.kind in "iu":
                    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
                    wide = np.maximum(-low, high) > MOST_INTEGERS
                else:
                    wide = ~np.isfinite(space.high - space.low)
            if wide.any():
                most, allowed = f"{space.dtype} can hold", "finite bounds with a finite difference"
                if space.dtype.kind in "iu":
                    most, allowed = "float64 can tell apart", "bounds within 2^53 of 0"
                raise ValueError(
                    f"the action space reaches from {space.low[wide][0]} to {space.high[wide][0]}, which is more than {most}; "
                    f"allowed: {allowed}. Bound the actions, to [-1, 1] for instance, and scale them in the environment"
                )
            return cls(space.shape)
        if isinstance(space, spaces.Discrete):
            return cls((), (int(space.n),), int(space.start))
        if isinstance(space, spaces.MultiDiscrete):
            _check_start("the action space", space)
            if len(space.shape) != 1:
                raise ValueError(
                    f"the action space is a MultiDiscrete of shape {space.shape}; allowed: one dimension. You can flatten it"
                )
            return cls(space.shape, tuple(int(n) for n in space.nvec.flatten()))
        if isinstance(space, spaces.MultiBinary):
            return cls(space.shape, (2,) * math.prod(space.shape))
        raise ValueError(f"the action space is {space}; allowed: Box, Discrete, MultiDiscrete, MultiBinary")
