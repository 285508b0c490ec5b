"""Layers, against a second way to compute them."""

from __future__ import annotations

import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_dreamer_gpld.nets.layers import Conv, UpConv


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_convolution_of_a_grown_image(kernel: int) -> None:
    """Values and gradients are those of growing the image and convolving it then, up to rounding, its edges included."""
    layer = UpConv(3, 4, kernel).double()
    nn.init.normal_(layer.bias)
    x = th.randn(2, 5, 6, 3, dtype=th.float64, requires_grad=True)  # (N, height, width, inputs)
    grown = x.repeat_interleave(2, 1).repeat_interleave(2, 2).permute(0, 3, 1, 2)  # (N, inputs, 2·height, 2·width)
    expected = F.conv2d(grown, layer.weight, layer.bias, padding=kernel // 2).permute(0, 2, 3, 1)
    found = layer(x)
    assert found.shape == (2, 10, 12, 4)
    th.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction, wrt = th.randn_like(found), [x, *layer.parameters()]
    gradients = zip(th.autograd.grad(found, wrt, direction), th.autograd.grad(expected, wrt, direction), strict=True)
    for gradient, other in gradients:
        th.testing.assert_close(gradient, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", [Conv, UpConv])
def test_a_convolution_begins_as_published(layer: type[Conv]) -> None:
    """Truncated normal with a variance of 1 / fan-in, no bias."""
    th.manual_seed(0)
    made = layer(64, 96, 5)
    assert made.weight.shape == (96, 64, 5, 5) and not made.bias.any()
    assert made.weight.var().item() * 64 * 25 == pytest.approx(1, rel=0.02)
    assert made.weight.abs().max().item() <= 2 * 1.1368 / (64 * 25) ** 0.5
