"""Spectral normalisation of chosen nets."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from test_dreamer_gpld import BOX, RandomSpaces, tiny

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.config import SPECTRAL_NETS
from sb3_dreamer_gpld.nets.spectral import NETS, SpectralNorm, hidden_linears
from sb3_dreamer_gpld.policies import MlpPolicy


def normalized(*nets: str, **kwargs: object) -> DreamerGPLD:
    return tiny(RandomSpaces(BOX, BOX), policy_kwargs=dict(spectral_norm=list(nets)), **kwargs)


@pytest.mark.parametrize("net", SPECTRAL_NETS)
def test_weights_are_divided_by_their_largest_singular_value(net: str) -> None:
    """Value and gradient against a singular value decomposition in float64, after the power iteration has converged."""
    policy = normalized(net).policy.double()
    linears = [linear for path in NETS[net] for linear in hidden_linears(attrgetter(path)(policy))]
    assert linears
    for linear in linears:
        for _ in range(3000):
            linear.weight  # noqa: B018  (each use is a step of the power iteration)
        linear.eval()
        original = linear.parametrizations.weight.original
        reference = original / th.linalg.matrix_norm(original, 2)
        th.testing.assert_close(linear.weight, reference, rtol=1e-6, atol=1e-8)
        if original.requires_grad:
            probe = th.randn(original.shape, dtype=th.float64, generator=th.Generator().manual_seed(0))
            ours, expected = (th.autograd.grad((w * probe).sum(), original)[0] for w in (linear.weight, reference))
            th.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_they_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same names in files, with the same numbers; and in the weights' precision where products are in another."""
    th.manual_seed(0)
    ours, theirs = th.nn.Linear(7, 5), th.nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    for kind, linear in ((SpectralNorm, ours), (None, theirs)):
        th.manual_seed(1)
        if kind is None:
            th.nn.utils.parametrizations.spectral_norm(linear)
        else:
            th.nn.utils.parametrize.register_parametrization(linear, "weight", kind(linear.weight))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert th.equal(ours.weight, theirs.weight)
    seen = []
    forward = th.nn.utils.parametrizations._SpectralNorm.forward
    monkeypatch.setattr(
        th.nn.utils.parametrizations._SpectralNorm,
        "forward",
        lambda self, weight: seen.append(th.is_autocast_enabled("cpu")) or forward(self, weight),
    )
    with th.autocast("cpu", th.bfloat16):
        assert ours.weight.dtype == th.float32
    assert seen == [False]


def test_only_the_nets_that_are_named() -> None:
    plain, some = normalized(), normalized("actor", "prior")
    added = {name for name, _ in some.policy.named_parameters()} - {name for name, _ in plain.policy.named_parameters()}
    assert added and all(name.startswith(("actor_critic.policy", "world_model.rssm.prior")) for name in added)
    assert all("output" not in name for name in added)


def test_a_run_with_all_of_them(tmp_path: Path) -> None:
    """Learns, keeps the largest singular values near 1, and comes back from both kinds of files."""
    model = normalized(*SPECTRAL_NETS, policy_penalty=0.1, prior_penalty=0.1, actor_gradient="dynamics").learn(60)
    assert model._n_updates > 0
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pt")
    for path in (path for net in SPECTRAL_NETS for path in NETS[net]):
        for linear in hidden_linears(attrgetter(path)(model.policy)):
            assert th.linalg.matrix_norm(linear.weight.detach(), 2) == pytest.approx(1.0, abs=0.1)
    observations, start = np.random.default_rng(0).uniform(-1, 1, (2, 3)).astype(np.float32), np.ones(2, bool)
    actions, _ = model.predict(observations, episode_start=start, deterministic=True)
    loaded = DreamerGPLD.load(tmp_path / "model", device="cpu"), MlpPolicy.load(tmp_path / "policy.pt", device="cpu")
    for each in loaded:
        np.testing.assert_array_equal(each.predict(observations, None, start, deterministic=True)[0], actions)


def test_their_vectors_move_with_each_update() -> None:
    model = normalized("actor", train_ratio=0.0).learn(40)
    for linear in hidden_linears(model.policy.actor_critic.policy):
        norm = linear.parametrizations.weight[0]
        before = norm._u.clone()
        model.train(1, 4)
        assert not th.equal(norm._u, before)


@pytest.mark.parametrize(
    ("nets", "text"),
    [
        (["acter"], "spectral_norm's net 'acter' does not exist. Did you mean 'actor'"),
        ("actor", "spectral_norm must be a list of nets"),
    ],
)
def test_wrong_nets(nets: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        tiny(RandomSpaces(BOX, BOX), policy_kwargs=dict(spectral_norm=nets))


def test_decoders_of_images_are_decoders() -> None:
    """Their linear layers; convolutions are left out."""
    image = spaces.Box(0, 255, (16, 16, 3), np.uint8)
    policy = tiny(RandomSpaces(image, BOX), policy_kwargs=dict(spectral_norm=["decoder"])).policy
    linears = list(hidden_linears(policy.world_model.image_decoders))
    assert linears and all(hasattr(linear, "parametrizations") for linear in linears)


def test_nets_that_this_policy_does_not_have() -> None:
    kwargs = dict(spectral_norm=["decoder"], reconstruction="redundancy")
    with pytest.raises(ValueError, match="this policy's decoder has no hidden layers that could be normalised"):
        tiny(RandomSpaces(BOX, BOX), policy_kwargs=kwargs)
