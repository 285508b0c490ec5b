"""The objective of R2-Dreamer in place of the decoder, ``reconstruction="redundancy"``.

Letters: B sequences, T steps, N states, M tokens, D deter, C classes, K rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from test_dreamer_gpld import ACTIONS, BOX, OBSERVATIONS, RandomSpaces, check_trains_and_loads, tiny
from torch.nn import functional as F

from sb3_dreamer_gpld import DreamerGPLD, export
from sb3_dreamer_gpld.learner import Draws
from sb3_dreamer_gpld.nets.layers import Encoder, Head
from sb3_dreamer_gpld.nets.redundancy import Projector, redundancy_loss
from sb3_dreamer_gpld.nets.rssm import RSSM
from sb3_dreamer_gpld.nets.world_model import Batch, WorldModel
from sb3_dreamer_gpld.policies import MlpPolicy

DATA = Path(__file__).parents[1] / "data"
PICTURE = spaces.Box(0, 255, (3, 16, 16), np.uint8)
MIXED = spaces.Dict({"image": PICTURE, "vec": spaces.Box(-1.0, 1.0, (5,))})  # 24 tokens


def without_decoder(observations: spaces.Space = BOX, actions: spaces.Space = BOX, **kwargs: Any) -> DreamerGPLD:
    sizes = {"reconstruction": "redundancy", **kwargs.pop("policy_kwargs", {})}
    return tiny(RandomSpaces(observations, actions), policy_kwargs=sizes, **kwargs)


def drawn(model: DreamerGPLD, seed: int = 0) -> tuple[Batch, Draws]:
    """A batch of a model that has collected, and random numbers for it."""
    assert model.replay_buffer is not None
    batch = model.policy.to_batch(model.replay_buffer.peek(4, np.random.default_rng(seed)))
    with th.random.fork_rng():
        th.manual_seed(seed)
        return batch, model.learner.draw(*batch.rewards.shape)


# -------------------------------------------------------------------------------------------------------- what is computed


def test_parity_with_the_release() -> None:
    """Loss and gradients of R2-Dreamer's release (github.com/NM512/r2dreamer, commit 546e4fa, ``rep_loss: r2dreamer``).

    Its ``Dreamer._cal_grad`` was called on three sequences of seven random steps, with an image and a vector each, for nets of
    this package's size "debug" (seed 0), in float32 on a processor, with the scales of all other losses set to 0. Recorded are
    the states and tokens that its encoder and RSSM made, the projector's weight, and the loss; and of a second call, on copies
    of these states and tokens in their place, the gradients of these and of the projector, the loss's scale included. The
    tokens had none, which is recorded as zeros. Scale and λ are those of its ``configs/model/_base_.yaml``.
    """
    with np.load(DATA / "redundancy.npz") as file:
        recorded = {name: th.as_tensor(file[name]) for name in file.files}
    world_model = without_decoder(MIXED).policy.world_model
    config = world_model.config
    assert (config.redundancy_weight, config.redundancy_lambda) == pytest.approx((0.05, 5e-4))
    assert [config.redundancy_weight, config.redundancy_lambda] == pytest.approx(
        [recorded["weight"].item(), recorded["lambda"].item()]
    )
    stoch_size = config.stoch_size

    def ours(weight: th.Tensor) -> th.Tensor:
        """Columns [stoch (K, C), deter] → [deter, stoch (C, K)]."""
        stoch, deter = weight[:, :stoch_size], weight[:, stoch_size:]
        return th.cat([deter, stoch.unflatten(-1, (config.stoch, config.classes)).mT.flatten(-2)], -1)

    assert world_model.projector is not None
    with th.no_grad():
        world_model.projector.weight.copy_(ours(recorded["projector"]))
    deter, tokens = (recorded[name].clone().requires_grad_() for name in ("deter", "tokens"))
    stoch = recorded["stoch"].mT.clone().requires_grad_()  # (B, T, C, K)
    loss = world_model.redundancy(th.cat([deter, stoch.flatten(-2)], -1), tokens)
    (config.redundancy_weight * loss).backward()
    th.testing.assert_close(loss.detach(), recorded["loss"], rtol=1e-6, atol=0.0)
    th.testing.assert_close(config.redundancy_weight * loss.detach(), recorded["weighted"], rtol=1e-6, atol=0.0)
    assert tokens.grad is None and not recorded["grad/tokens"].any()
    for name, found, expected in (
        ("deter", deter.grad, recorded["grad/deter"]),
        ("stoch", stoch.grad, recorded["grad/stoch"].mT),
        ("projector", world_model.projector.weight.grad, ours(recorded["grad/projector"])),
    ):
        assert found is not None and expected.abs().max() > 0.01, name
        largest = expected.abs().max().item()
        th.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}")


def reference(projected: np.ndarray, tokens: np.ndarray, off_diagonal: float) -> float:
    """The loss from NumPy's correlation coefficients, pair by pair."""
    n, size = projected.shape
    c = np.corrcoef(projected, tokens, rowvar=False)[:size, size:] * (n - 1) / n
    return sum((c[i, j] - 1) ** 2 if i == j else off_diagonal * c[i, j] ** 2 for i in range(size) for j in range(size))


@pytest.mark.parametrize("off_diagonal", [0.0, 0.3, 2.0])
@pytest.mark.parametrize(("n", "size"), [(2, 3), (7, 1), (9, 4)])
def test_value_and_gradient_in_float64(n: int, size: int, off_diagonal: float) -> None:
    """Against NumPy's correlation coefficients, and the derivative of cosines between centred columns."""
    generator = th.Generator().manual_seed(n)
    x, y = (3.0 + 2.0 * th.randn(n, size, generator=generator, dtype=th.float64) for _ in range(2))
    y = 0.5 * y + 0.5 * x  # correlated
    x.requires_grad_()
    loss = redundancy_loss(x, y, off_diagonal)
    assert loss.dtype == th.float64
    assert loss.item() == pytest.approx(reference(x.detach().numpy(), y.numpy(), off_diagonal), rel=1e-6)

    centred, other = x - x.mean(0), y - y.mean(0)
    cosines = th.stack([F.cosine_similarity(centred, column.unsqueeze(1), dim=0) for column in other.unbind(1)], 1)
    c, same = cosines * (n - 1) / n, th.eye(size, dtype=th.float64)
    expected = (same * (c - 1.0).square() + off_diagonal * (1.0 - same) * c.square()).sum()
    gradients = [th.autograd.grad(value, x)[0] for value in (loss, expected)]
    if n > 2:  # two states are correlated by 1 or −1, whatever they are
        assert gradients[1].abs().max() > 1e-3
    th.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)  # what is added to the standard deviations is left out here


def test_equal_columns_have_the_smallest_loss_and_constant_ones_none() -> None:
    generator = th.Generator().manual_seed(0)
    x = th.randn(50, 5, generator=generator, dtype=th.float64)
    same, turned = redundancy_loss(x, 7.0 * x + 2.0, 0.0), redundancy_loss(x, -x, 0.0)
    assert same.item() == pytest.approx(5 * (1 / 50) ** 2, rel=1e-4) and turned.item() == pytest.approx(5 * 1.98**2, rel=1e-4)
    y = x.clone()
    y[:, 2] = 0.5  # a token that never changes
    x.requires_grad_()
    redundancy_loss(x, y, 0.3).backward()
    assert x.grad is not None and th.isfinite(x.grad).all() and x.grad[:, 1].any()
    assert redundancy_loss(x, th.full_like(y, 0.5), 0.3).item() == pytest.approx(5.0)


def test_projector() -> None:
    """One linear layer without a bias, with the published initialisation: a normal distribution cut at 2 deviations."""
    projector = Projector(100, 400)
    assert [(name, p.shape) for name, p in projector.named_parameters()] == [("weight", (400, 100))]
    weight, bound = projector.weight.detach(), 2 * 1.1368 / 10
    assert weight.std().item() == pytest.approx(0.1, rel=0.02) and 0.95 * bound < weight.abs().max() <= bound


@pytest.fixture(scope="module")
def collected() -> DreamerGPLD:
    return without_decoder(MIXED, prior_penalty=0.3, precision="float32", train_ratio=0.0).learn(60, log_interval=None)


def test_losses_of_an_update(collected: DreamerGPLD) -> None:
    """The loss above of all states and tokens is in it; all else is as it is with a decoder, both penalties too."""
    model, (batch, draws) = collected, drawn(collected)
    result = model.learner.loss(batch, draws, 5)
    assert "redundancy" in result.terms and not any("reconstruction" in name for name in result.terms)
    assert not any("decoder" in name for name, _ in model.policy.named_parameters())
    world_model = model.policy.world_model
    with th.no_grad():
        tokens = world_model.encode(batch.observations, batch.rewards.shape).flatten(0, 1)  # (B·T, tokens)
        assert world_model.projector is not None
        projected = result.states.features.flatten(0, 1) @ world_model.projector.weight.mT
    term = result.terms["redundancy"]
    assert term.value.item() == pytest.approx(reference(projected.double().numpy(), tokens.double().numpy(), 5e-4), rel=1e-4)
    assert term.weight == 0.05
    total = sum(each.weight * each.value.mean().item() for each in result.terms.values())
    assert result.total.item() == pytest.approx(total, rel=1e-5)

    decoding = tiny(RandomSpaces(MIXED, BOX), prior_penalty=0.3, precision="float32")
    missing, unexpected = decoding.policy.load_state_dict(model.policy.state_dict(), strict=False)
    assert missing and all("decoder" in name for name in missing) and unexpected == ["world_model.projector.weight"]
    others = decoding.learner.loss(batch, draws, 5).losses
    assert {"posterior_penalty", "prior_penalty", "dyn", "rep", "reward", "continue", "policy"} < set(others)
    assert set(result.losses) - {"redundancy"} == {name for name in others if "reconstruction" not in name}
    for name in set(others) & set(result.losses):
        th.testing.assert_close(result.losses[name], others[name], msg=lambda text, name=name: f"{name}: {text}")


def test_where_its_gradient_goes(collected: DreamerGPLD) -> None:
    """Into the projector, and through the states into RSSM and encoder; into no head. The tokens compared with get none."""
    model, (batch, draws) = collected, drawn(collected)
    world_model, policy = model.policy.world_model, model.policy

    def gradients(loss: th.Tensor) -> dict[str, th.Tensor]:
        policy.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}

    found = gradients(model.learner.loss(batch, draws, 5).terms["redundancy"].value)
    reached = {name.split(".")[1] for name in found}
    assert reached == {"projector", "encoder", "rssm"} and all(name.startswith("world_model.") for name in found)
    assert not any(".prior." in name for name in found)  # states are samples of the posterior

    vectors, images, tokens = world_model.encode_targets(batch.observations, batch.rewards.shape)
    states = world_model.rssm.observe(tokens, batch.actions, batch.is_first, batch.deter, batch.stoch, draws.world_model.stoch)
    assert world_model.projector is not None
    projected = world_model.projector(states.features.flatten(0, 1))
    cut = gradients(redundancy_loss(projected, tokens.flatten(0, 1).detach().clone(), 5e-4))
    for name, gradient in cut.items():
        th.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_updates_make_states_tell_the_tokens(collected: DreamerGPLD) -> None:
    """Updates of one batch bring the loss down, which without them stays where it is."""
    losses = {}
    for weight in (0.0, 0.05):
        model = without_decoder(MIXED, policy_kwargs=dict(redundancy_weight=weight), precision="float32")
        batch, _ = drawn(collected)
        for number in range(150):
            model.learner.update(batch, model.learner.draw(*batch.rewards.shape), 1000 + number, [3e-3])
        losses[weight] = model.learner.loss(batch, model.learner.draw(*batch.rewards.shape), 0).losses["redundancy"].item()
    assert losses[0.05] < 0.7 * losses[0.0] and losses[0.0] > 15, losses


def test_in_bfloat16(collected: DreamerGPLD) -> None:
    """Within 1 % of the loss in float32, and a gradient of the same direction and length, where states hardly differ."""
    world_model = collected.policy.world_model
    assert world_model.projector is not None
    generator = th.Generator().manual_seed(0)
    features, tokens = (th.randn(4, 50, size, generator=generator) for size in (48, 24))
    features[..., :24] += tokens
    features = 5.0 + 0.05 * features
    half = [x.flatten(0, 1).bfloat16() for x in (features[..., :24], tokens)]
    assert redundancy_loss(*half, 0.3).item() == redundancy_loss(*(x.float() for x in half), 0.3).item()
    results = []
    for enabled in (False, True):
        world_model.zero_grad()
        with th.autocast("cpu", th.bfloat16, enabled=enabled):
            loss = world_model.redundancy(features, tokens)
        assert loss.dtype == th.float32
        loss.backward()
        assert world_model.projector.weight.grad is not None
        results.append((loss.detach(), world_model.projector.weight.grad.flatten().clone()))
    (exact, gradient), (low, low_gradient) = results
    assert not th.equal(exact, low)
    th.testing.assert_close(low, exact, rtol=1e-2, atol=0.0)
    assert th.cosine_similarity(gradient, low_gradient, dim=0) > 0.999
    th.testing.assert_close(low_gradient.norm(), gradient.norm(), rtol=1e-2, atol=0.0)


def test_compiled_steps_are_captured_whole(collected: DreamerGPLD, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is a graph of its own without a break; run as captured, losses and gradients are those of the plain steps."""
    compile_, graphs = th.compile, []

    def capture(function: Any, **kwargs: Any) -> Any:
        graphs.append((function.__name__, kwargs["fullgraph"]))
        return compile_(function, backend="aot_eager", **kwargs)

    monkeypatch.setattr(th, "compile", capture)
    batch, draws = drawn(collected)
    policy, runner = collected.policy, collected.learner.execution
    results = []
    try:
        for compiled in (False, True):
            if compiled:
                runner.compile()
            policy.zero_grad()
            loss = collected.learner.loss(batch, draws, 5)
            loss.total.backward()
            results.append((loss.losses, [p.grad.clone() for p in policy.parameters() if p.grad is not None]))
        assert not runner.failed
    finally:
        runner.compiled = False
    assert {("correlations", True), ("replay_losses", True)} <= set(graphs) and all(whole for _, whole in graphs)
    th.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- spaces, files, export


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observation_spaces(name: str, tmp_path: Path) -> None:
    model = without_decoder(OBSERVATIONS[name])
    check_trains_and_loads(model, tmp_path)
    names = {name.split(".")[1] for name, _ in model.policy.world_model.named_parameters(prefix="world_model")}
    assert names == {"encoder", "rssm", "projector", "reward", "cont"}


@pytest.mark.parametrize("name", ["discrete", "multi-binary"])
def test_action_spaces(name: str, tmp_path: Path) -> None:
    check_trains_and_loads(without_decoder(BOX, ACTIONS[name]), tmp_path)


def test_what_only_image_decoders_need_is_not_asked_for() -> None:
    """A number of blocks that does not divide the nets' sizes; the decoder alone has these blocks."""
    sizes = dict(decoder_blocks=7)
    with pytest.raises(ValueError, match="decoder_blocks=7"):
        tiny(RandomSpaces(PICTURE, BOX), policy_kwargs=sizes)
    without_decoder(PICTURE, policy_kwargs=sizes)


def test_policy_files(tmp_path: Path) -> None:
    model = without_decoder().learn(45)
    model.policy.save(tmp_path / "policy.pt")
    loaded = MlpPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert loaded.config.reconstruction == "redundancy" and not loaded.world_model.has_decoder
    for (name, a), b in zip(model.policy.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert th.equal(a, b), name
    observations, start = np.random.default_rng(0).uniform(-1, 1, (2, 3)).astype(np.float32), np.ones(2, bool)
    actions = [each.predict(observations, None, start, deterministic=True)[0] for each in (model, loaded)]
    np.testing.assert_array_equal(*actions)


def test_policies_from_before_the_option_have_a_decoder() -> None:
    """The default has the parameters, and the very numbers, that it had: nothing is drawn for a net that is not there."""
    first = DreamerGPLD.load(DATA / "model_v1.zip", device="cpu").policy
    assert first.config.reconstruction == "decoder" and first.world_model.has_decoder
    assert first.world_model.projector is None
    policy = tiny(RandomSpaces(BOX, BOX)).policy
    assert not any("projector" in name for name in policy.state_dict())
    spec, config = policy.observation_spec, policy.config
    th.manual_seed(0)
    world_model = WorldModel(spec, 3, config)
    th.manual_seed(0)
    encoder = Encoder(spec, config)
    RSSM(encoder.size, 3, config), Head(config.feature_size, [config.units] * config.decoder_layers, [3])
    Head(config.feature_size, [config.units], [config.bins])  # the reward's
    cont = Head(config.feature_size, [config.units], [1])
    for (name, a), b in zip(cont.state_dict().items(), world_model.cont.state_dict().values(), strict=True):
        assert th.equal(a, b), name


def test_modules_that_are_loaded_alone(tmp_path: Path) -> None:
    model, fresh = without_decoder(seed=1), without_decoder(seed=2)
    model.save(tmp_path / "model")
    before = fresh.policy.state_dict()["world_model.reward.layers.0.linear.weight"].clone()
    fresh.load_modules(tmp_path / "model", ["encoder", "projector"])
    for name, tensor in fresh.policy.state_dict().items():
        if name.startswith(("world_model.encoder.", "world_model.projector.")):
            assert th.equal(tensor, model.policy.state_dict()[name]), name
    assert th.equal(fresh.policy.state_dict()["world_model.reward.layers.0.linear.weight"], before)
    with pytest.raises(ValueError, match="neither the file nor the model has a decoder.*Nothing was loaded"):
        fresh.load_modules(tmp_path / "model", ["encoder", "decoder"])
    decoding = tiny(RandomSpaces(BOX, BOX))
    with pytest.raises(ValueError, match="world_model.vector_decoder.* is only in the model"):
        decoding.load_modules(tmp_path / "model", ["decoder"])
    with pytest.raises(ValueError, match="world_model.projector.weight is only in the file"):
        decoding.load_modules(tmp_path / "model", ["projector"])
    with pytest.raises(RuntimeError, match="of another size or of other spaces"):
        decoding.set_parameters(str(tmp_path / "model"))


def test_exported_policy_acts_as_predict(tmp_path: Path) -> None:
    model = without_decoder(MIXED).learn(45)
    step = th.export.load(export.export_policy(model, tmp_path / "policy")).module()
    observation = {name: space.sample()[None] for name, space in MIXED.items()}
    tensors = {name: th.as_tensor(value) for name, value in observation.items()}
    expected, state = model.predict(observation, None, np.ones(1, bool), deterministic=True)
    action, memory = step(tensors, model.policy.initial_state(1).parts, th.tensor([True]))
    np.testing.assert_allclose(action.numpy(), expected, atol=1e-5)
    for a, b in zip(memory, state, strict=True):  # type: ignore[arg-type]
        np.testing.assert_allclose(a.numpy(), b, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- wrong input


def test_wrong_values() -> None:
    text = r"reconstruction 'redundncy' does not exist. Did you mean 'redundancy'\? Allowed: decoder, redundancy"
    with pytest.raises(ValueError, match=text):
        without_decoder(policy_kwargs=dict(reconstruction="redundncy"))
    for name in ("redundancy_weight", "redundancy_lambda"):
        with pytest.raises(ValueError, match=f"{name} must be a number in"):
            without_decoder(policy_kwargs={name: -1.0})


def test_a_batch_of_one_state_has_no_correlations() -> None:
    with pytest.raises(ValueError, match=r"batch_size \* batch_length must be at least 2, not 1 \* 1"):
        without_decoder(batch_size=1, batch_length=1)
    assert tiny(RandomSpaces(BOX, BOX), batch_size=1, batch_length=1).policy.world_model.has_decoder
    model = without_decoder(batch_size=1, batch_length=2, train_ratio=2).learn(45)
    assert model._n_updates > 3 and all(th.isfinite(p).all() for p in model.policy.parameters())


def test_nothing_can_be_decoded(collected: DreamerGPLD) -> None:
    with pytest.raises(ValueError, match=r"no decoder.*cannot predict observations. Allowed: .*reconstruction='decoder'"):
        collected.policy.world_model.decode(th.zeros(2, 48))
    with pytest.raises(ValueError, match="this policy's decoder has no hidden layers"):
        without_decoder(policy_kwargs=dict(spectral_norm=["decoder"]))
