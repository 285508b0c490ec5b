"""Spectral normalisation of chosen nets: the largest singular value of each hidden layer's weight is kept at 1.

Sources: Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (ICLR 2018); for reinforcement learning
Bjorck et al., "Towards Deeper Deep Reinforcement Learning with Spectral Normalization" (NeurIPS 2021), and Gogianu et al.,
"Spectral Normalisation for Deep Reinforcement Learning: An Optimisation Perspective" (ICML 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch as th
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sb3_dreamer_gpld.nets.layers import NormedLinear

# Where the nets of config.SPECTRAL_NETS are in the policy
NETS = {
    "encoder": ("world_model.encoder",),
    "posterior": ("world_model.rssm.posterior",),
    "prior": ("world_model.rssm.prior",),
    "decoder": ("world_model.vector_decoder", "world_model.image_decoders"),
    "reward": ("world_model.reward",),
    "continue": ("world_model.cont",),
    "actor": ("actor_critic.policy",),
    "critic": ("actor_critic.value", "actor_critic.slow_value"),
}


def normalize_spectrally(policy: Any, nets: Sequence[str]) -> None:
    """Normalise the hidden layers of some nets of a policy: not the last linear of a head, which starts at zero or near it,
    and not convolutions.

    Their parameters get PyTorch's names of a parametrised weight; its power iteration makes a step with each use of the weight
    in training, and none in evaluation.

    :param policy: a :class:`~sb3_dreamer_gpld.policies.DreamerPolicy`
    :param nets: names in :data:`NETS`
    :raises ValueError: a net has no hidden layers, or the policy has no such net
    """
    for name in nets:
        linears = [linear for path in NETS[name] for linear in hidden_linears(attrgetter(path)(policy))]
        if not linears:
            raise ValueError(f"spectral_norm={name!r}: this policy's {name} has no hidden layers that could be normalised")
        for linear in linears:
            parametrize.register_parametrization(linear, "weight", SpectralNorm(linear.weight))


class SpectralNorm(parametrizations._SpectralNorm):  # Inside PyTorch: what spectral_norm registers
    """PyTorch's, in the weight's own precision: on a GPU its products would be those of bfloat16 where the nets' are."""

    def forward(self, weight: Tensor) -> Tensor:
        """:param weight: (outputs, inputs)
        :return: divided by its largest singular value
        """
        with th.autocast(weight.device.type, enabled=False):
            return super().forward(weight)


def hidden_linears(net: nn.Module | None) -> Iterator[nn.Linear]:
    """The linear layers of a net that a norm follows."""
    for module in () if net is None else net.modules():
        if isinstance(module, NormedLinear):
            yield module.linear
