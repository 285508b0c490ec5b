"""Building blocks of the nets: layers, heads, image and vector encoders and decoders.

Letters: B sequences, T steps, N states, D deter, C classes, K rows, G blocks, A action numbers; ``...`` stands for any
batch dimensions.

Sources: Hafner et al., Nature 2025 (Methods, "Networks"); the authors' JAX release for layer order, initialisation
and output scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch as th
from torch import Tensor, nn
from torch.nn import functional as F

from sb3_dreamer_gpld.config import IMAGE_STAGES, ImageKey, ModelConfig, ObservationSpec
from sb3_dreamer_gpld.nets.cotangents import Layer
from sb3_dreamer_gpld.nets.distributions import encode_categories, symlog

NORM_EPS = 1e-4


def initialize_(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Truncated normal, cut at two standard deviations, with variance scale²/fan_in after the cut."""
    nn.init.trunc_normal_(weight, 0.0, 1.0, -2.0, 2.0)
    with th.no_grad():
        weight.mul_(scale * 1.1368 / math.sqrt(fan_in))


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it has half precision, else as it is."""
    return x.float() if x.dtype in (th.bfloat16, th.float16) else x


def rms_norm_silu(z: Tensor, scale: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """SiLU of the RMS-normalised ``z``, in float32 at least.

    :param z: pre-activation
    :param scale: scale of the norm, broadcastable to ``z``
    :param dims: dimensions that are normalised together
    :return: same shape and dtype as ``z``
    """
    x = at_least_float32(z)
    square = (x * x).sum(dims, keepdim=True) * (scale.numel() ** -1)
    x = x * (th.rsqrt(square + NORM_EPS) * scale)
    return F.silu(x).to(z.dtype)


class Linear(nn.Linear):
    """Linear layer with the published initialisation; ``scale`` multiplies the initial weights."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        self.scale = scale
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        initialize_(self.weight, self.in_features, self.scale)
        nn.init.zeros_(self.bias)


class MultiLinear(nn.Module):
    """Several linear layers of one input, computed as one product; their weights stay separate parameters.

    :param inputs: size of the input
    :param outputs: sizes of the outputs
    :param scale: of the initial weights
    """

    parts: list[Linear]

    def __init__(self, inputs: int, outputs: Sequence[int], scale: float = 1.0) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Linear(inputs, size, scale) for size in outputs)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """:return: outputs side by side, (..., Σ outputs)"""
        if len(self.parts) == 1:
            return self.parts[0](x)
        return F.linear(x, th.cat([p.weight for p in self.parts]), th.cat([p.bias for p in self.parts]))


class BlockLinear(nn.Module):
    """G independent linear layers on G equal slices of the input.

    :param inputs, outputs: full sizes; the weight is (G, inputs/G, outputs/G), the bias (outputs,)
    :param blocks: G
    :raises ValueError: a size is not a multiple of the number of blocks
    """

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(f"{inputs} inputs and {outputs} outputs must be multiples of {blocks} blocks")
        self.blocks = blocks
        self.weight = nn.Parameter(th.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(th.zeros(outputs))
        initialize_(self.weight, inputs)  # the published fan-in is that of the full input

    @property
    def block_bias(self) -> Tensor:
        """Bias as (G, 1, outputs/G)."""
        return self.bias.view(self.blocks, 1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (N, inputs)
        :return: (G, N, outputs/G)
        """
        x = x.view(x.shape[0], self.blocks, -1).transpose(0, 1)  # (G, N, inputs/G)
        return th.baddbmm(self.block_bias, x, self.weight)


class NormSiLU(nn.Module):
    """RMSNorm followed by SiLU, on the last dimension."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.ones(size))

    def forward(self, z: Tensor) -> Tensor:
        return rms_norm_silu(z, self.weight)


class NormedLinear(nn.Module):
    """Linear → RMSNorm → SiLU, the layer that every net here is made of."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.norm = NormSiLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))

    def as_layer(self) -> Layer:
        """The parameters as the penalty reads them."""
        return Layer(self.linear.weight, self.linear.bias, self.norm.weight, NORM_EPS)


def normed_layers(sizes: Sequence[int]) -> nn.ModuleList:
    """NormedLinear layers from each size to the next."""
    return nn.ModuleList(NormedLinear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))


class Head(nn.Module):
    """A multi-layer perceptron with a last linear.

    :param inputs: size of the input
    :param hidden: units of each layer; may be empty
    :param outputs: sizes of the outputs, computed side by side
    :param scale: of the initial weights of the last linear
    """

    layers: list[NormedLinear]

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: Sequence[int], scale: float = 1.0) -> None:
        super().__init__()
        self.layers = normed_layers([inputs, *hidden])  # type: ignore[assignment]
        self.output = MultiLinear([inputs, *hidden][-1], outputs, scale)

    def forward(self, x: Tensor) -> Tensor:
        """:return: (..., Σ outputs)"""
        for layer in self.layers:
            x = layer(x)
        return at_least_float32(self.output(x))

    def from_first(self, z: Tensor) -> Tensor:
        """The same from the first layer's pre-activation (..., hidden[0])."""
        x = self.layers[0].norm(z)
        for layer in self.layers[1:]:
            x = layer(x)
        return at_least_float32(self.output(x))


def apply_heads(heads: Sequence[Head], x: Tensor) -> list[Tensor]:
    """Outputs of several heads of one input; their first layers are one wide product.

    :param heads: the heads
    :param x: (..., inputs)
    :return: one output per head
    """
    wide = [head for head in heads if len(head.layers)]
    if len(wide) < 2:
        return [head(x) for head in heads]
    weight = th.cat([head.layers[0].linear.weight for head in wide])
    bias = th.cat([head.layers[0].linear.bias for head in wide])
    sizes = [head.layers[0].linear.out_features for head in wide]
    parts = iter(F.linear(x, weight, bias).split(sizes, -1))
    return [head.from_first(next(parts)) if len(head.layers) else head(x) for head in heads]


# ------------------------------------------------------------------------------------------- observations


def vector_targets(
    spec: ObservationSpec, observations: Mapping[str, Tensor], batch: Sequence[int], dtype: th.dtype
) -> list[Tensor]:
    """Vector observations as the encoder sees them and the decoder predicts them.

    :param spec: keys of the space
    :param observations: (*batch, *shape) each
    :param batch: batch dimensions
    :param dtype: of the result
    :return: one tensor (*batch, size) per key: symlog of a Box, one-hots of the other spaces
    """
    targets = []
    for key in spec.vectors:
        x = observations[key.name].reshape(*batch, -1)
        if key.nvec is None:
            targets.append(symlog(x.to(dtype)))
        else:
            targets.append(encode_categories(x.long() - key.offset, key.nvec).to(dtype))
    return targets


def image_targets(
    keys: Sequence[ImageKey], observations: Mapping[str, Tensor], batch: Sequence[int], dtype: th.dtype
) -> Tensor:
    """Images of one size side by side as channels, in [0, 1].

    :param keys: images of equal height and width
    :param observations: (*batch, *shape) each
    :param batch: batch dimensions
    :param dtype: of the result
    :return: (*batch, height, width, Σ channels)
    """
    parts = []
    for key in keys:
        x = observations[key.name].reshape(*batch, *observations[key.name].shape[-3:]).to(dtype)
        x = (x - key.low if key.low else x) / key.scale
        parts.append(x.movedim(-3, -1) if key.channels_first else x)
    return parts[0] if len(parts) == 1 else th.cat(parts, -1)


class ImageEncoder(nn.Module):
    """Four stages of convolution → 2×2 max-pool → RMSNorm over channels → SiLU.

    Sides that are no multiples of 16 are rounded up by the pooling.

    :param channels: of the image
    :param height, width: of the image
    :param config: sizes
    """

    def __init__(self, channels: int, height: int, width: int, config: ModelConfig) -> None:
        super().__init__()
        depths = [channels, *(config.depth * m for m in IMAGE_STAGES)]
        self.convs = nn.ModuleList(Conv(a, b, config.kernel) for a, b in zip(depths[:-1], depths[1:], strict=True))
        self.norms = nn.ModuleList(NormSiLU(depth) for depth in depths[1:])
        self.size = smallest_side(height) * smallest_side(width) * depths[-1]
        self.project = None if config.image_features is None else NormedLinear(self.size, config.image_features)
        self.size = self.size if config.image_features is None else config.image_features

    def forward(self, image: Tensor) -> Tensor:
        """:param image: (N, height, width, channels) in [0, 1]
        :return: (N, size)
        """
        x = image - 0.5
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = layer(x.permute(0, 3, 1, 2))  # (N, depth, height, width), channels last in memory
            x = F.max_pool2d(x, 2, ceil_mode=True)
            x = norm(x.permute(0, 2, 3, 1))  # (N, height/2, width/2, depth)
        x = x.flatten(1)
        return x if self.project is None else self.project(x)


class ImageDecoder(nn.Module):
    """Block-linear of deter plus a small net of stoch to the smallest grid, then four stages of upsampling.

    :param channels: of the image
    :param height, width: of the image
    :param config: sizes
    """

    def __init__(self, channels: int, height: int, width: int, config: ModelConfig) -> None:
        super().__init__()
        depths = [channels, *(config.depth * m for m in IMAGE_STAGES[:-1])]
        self.height, self.width = height, width
        self.grid = (smallest_side(height), smallest_side(width), config.depth * IMAGE_STAGES[-1])
        cells, blocks = math.prod(self.grid), config.decoder_blocks
        if config.deter % blocks or self.grid[2] % blocks:
            raise ValueError(
                f"deter={config.deter} and {IMAGE_STAGES[-1]}·depth={self.grid[2]} must be multiples of "
                f"decoder_blocks={blocks} for image observations"
            )
        self.deter_grid = BlockLinear(config.deter, cells, blocks)
        self.stoch_in = NormedLinear(config.stoch_size, 2 * config.units)
        self.stoch_grid = Linear(2 * config.units, cells)
        self.grid_norm = NormSiLU(self.grid[2])
        inner = [self.grid[2], *reversed(depths[1:])]
        self.convs = nn.ModuleList(UpConv(a, b, config.kernel) for a, b in zip(inner[:-1], inner[1:], strict=True))
        self.norms = nn.ModuleList(NormSiLU(depth) for depth in inner[1:])
        self.image = UpConv(inner[-1], channels, config.kernel)

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """:param deter: (N, D)
        :param stoch: (N, C·K)
        :return: image in (0, 1), (N, height, width, channels)
        """
        height, width, depth = self.grid
        x = self.deter_grid(deter)  # (G, N, height·width·depth/G)
        x = x.view(len(x), -1, height, width, depth // len(x)).permute(1, 2, 3, 0, 4).flatten(3)  # (N, height, width, depth)
        x = x + self.stoch_grid(self.stoch_in(stoch)).view(-1, height, width, depth)
        x = self.grid_norm(x)
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = norm(layer(x))
        return th.sigmoid(at_least_float32(self.image(x))[:, : self.height, : self.width])


class Conv(nn.Conv2d):
    """Convolution that keeps the size, with the published initialisation.

    :param inputs, outputs: channels
    :param kernel: side, odd
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.to(memory_format=th.channels_last)  # type: ignore[call-overload]

    def reset_parameters(self) -> None:
        initialize_(self.weight, self.in_channels * self.kernel_size[0] ** 2)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]


class UpConv(Conv):
    """Every pixel made four of (nearest neighbour), and then the convolution; computed on the image before it has grown.

    The four pixels that one pixel becomes are equal, so each of the four results that lie there is a convolution of the small
    image whose weights are sums of those that fall on one pixel. For a kernel of 5 these are kernels of 3: 36 products in
    place of 100.
    """

    taps: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel)
        self.to(memory_format=th.contiguous_format)  # type: ignore[call-overload]
        self.side = 2 * ((kernel + 1) // 4) + 1  # s, of the small image's kernels
        # In one direction: weight k of the kernel of the first (0) or second (1) of two pixels falls on place (·)//2 of s
        places = (th.arange(kernel) + self.side - 1 - kernel // 2 + th.arange(2)[:, None]) // 2  # (2, kernel)
        one = F.one_hot(places, self.side).float()  # (2, kernel, s)
        taps = th.einsum("pka,qlb->klpqab", one, one)
        self.register_buffer("taps", taps.reshape(kernel**2, 4 * self.side**2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """:param x: (N, height, width, inputs)
        :return: (N, 2·height, 2·width, outputs)
        """
        assert self.bias is not None
        sums = self.weight.flatten(2) @ self.taps  # (outputs, inputs, 2·2·s·s)
        weight = sums.unflatten(-1, (2, 2, self.side, self.side)).permute(2, 3, 0, 4, 5, 1).flatten(0, 2)
        weight = weight.permute(0, 3, 1, 2)  # (2·2·outputs, inputs, s, s), channels last in memory
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias.repeat(4), 1, self.side // 2)
        y = y.permute(0, 2, 3, 1).unflatten(-1, (2, 2, self.out_channels))  # (N, height, width, 2, 2, outputs)
        return y.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def smallest_side(pixels: int) -> int:
    """Side of the smallest grid of an image side: pixels/16, rounded up."""
    return -(-pixels // 2 ** len(IMAGE_STAGES))


class Encoder(nn.Module):
    """Observations → tokens: an MLP of all vectors, then one image encoder per image size.

    :param spec: keys of the space
    :param config: sizes
    """

    def __init__(self, spec: ObservationSpec, config: ModelConfig) -> None:
        super().__init__()
        self.spec = spec
        units = config.encoder_units or config.units
        sizes = [spec.vector_size, *[units] * config.encoder_layers] if spec.vectors else [0]
        self.layers = normed_layers(sizes)
        self.images = nn.ModuleList(
            ImageEncoder(sum(key.channels for key in keys), *size, config) for size, keys in spec.image_groups.items()
        )
        self.size = sizes[-1] + sum(image.size for image in self.images)  # type: ignore[misc]

    def forward(self, vectors: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
        """:param vectors: :func:`vector_targets`, (..., size) each
        :param images: :func:`image_targets` of each group, (..., height, width, channels) each
        :return: tokens (..., tokens)
        """
        tokens = []
        if vectors:
            x = th.cat(tuple(vectors), -1)
            for layer in self.layers:
                x = layer(x)
            tokens.append(x)
        for net, image in zip(self.images, images, strict=True):
            tokens.append(net(image.flatten(0, -4)).view(*image.shape[:-3], -1))
        return th.cat(tokens, -1)
