"""One full update against recorded updates of the authors' release, number by number.

Each recording holds what went into an update, every random draw, every loss, every gradient and the parameters
afterwards (see ``tests/parity/README.md``). All sizes are read from the arrays. More recordings are replayed from the
folder named by the environment variable DREAMER_PARITY_DIR.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.nn import functional as F

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.learner import Draws
from sb3_dreamer_gpld.nets import actor_critic, world_model
from sb3_dreamer_gpld.nets.actor_critic import ImaginationDraws
from sb3_dreamer_gpld.nets.distributions import BoundedNormal, uniform_mix
from sb3_dreamer_gpld.nets.world_model import Batch, WorldModelDraws

FOLDERS = [Path(__file__).parents[1] / "parity"] + [Path(p) for p in [os.environ.get("DREAMER_PARITY_DIR", "")] if p]
RECORDINGS = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.npz"))}
LOSS_TOLERANCE = 1e-5  # relative
TENSOR_TOLERANCE = 1e-4  # of the largest entry
# Where float32 leaves more open. The bins of a value reach ±4.8e8, and while a head still gives the outer ones weight, the sum
# over them cancels: its last bits are lost, and what they move is in the gradient of the value. By how much is found for each
# tensor: see rounding_errors.
RUNS = 5
ROUNDING = 2.0**-24  # relative, of a number in float32
FLOAT32_ERROR = 2e-5  # of other gradients in float32 beside those in float64, of the largest entry

# The names of the recorded parameters, and ours.
NAMES = [
    (r"^rew/", "world_model.reward/"),
    (r"^con/", "world_model.cont/"),
    (r"^val/", "actor_critic.value/"),
    (r"^slowval/", "actor_critic.slow_value/"),
    (r"^pol/", "actor_critic.policy/"),
    (r"^dec/mlp/", "world_model.vector_decoder/mlp/"),
    (r"^dec/imgout", "world_model.image_decoders.0.image"),
    (r"^dec/sp0", "world_model.image_decoders.0.deter_grid"),
    (r"^dec/sp1norm", "world_model.image_decoders.0.stoch_in.norm"),
    (r"^dec/sp1", "world_model.image_decoders.0.stoch_in.linear"),
    (r"^dec/sp2", "world_model.image_decoders.0.stoch_grid"),
    (r"^dec/spnorm", "world_model.image_decoders.0.grid_norm"),
    (r"^enc/mlp(\d+)norm", r"world_model.encoder.layers.\1.norm"),
    (r"^enc/mlp(\d+)", r"world_model.encoder.layers.\1.linear"),
    (r"^enc/cnn(\d+)norm", r"world_model.encoder.images.0.norms.\1"),
    (r"^enc/cnn(\d+)", r"world_model.encoder.images.0.convs.\1"),
    (r"^dyn/dynin0norm", "world_model.rssm.deter_in.norm"),
    (r"^dyn/dynin0", "world_model.rssm.deter_in.linear"),
    (r"^dyn/dynin1norm", "world_model.rssm.stoch_in.norm"),
    (r"^dyn/dynin1", "world_model.rssm.stoch_in.linear"),
    (r"^dyn/dynin2norm", "world_model.rssm.action_in.norm"),
    (r"^dyn/dynin2", "world_model.rssm.action_in.linear"),
    (r"^dyn/dynhid0norm", "world_model.rssm.core_norm"),
    (r"^dyn/dynhid0", "world_model.rssm.core"),
    (r"^dyn/dyngru", "world_model.rssm.gates"),
    (r"^dyn/obs(\d+)norm", r"world_model.rssm.posterior.layers.\1.norm"),
    (r"^dyn/obs(\d+)", r"world_model.rssm.posterior.layers.\1.linear"),
    (r"^dyn/obslogit", "world_model.rssm.posterior.output.parts.0"),
    (r"^dyn/prior(\d+)norm", r"world_model.rssm.prior.layers.\1.norm"),
    (r"^dyn/prior(\d+)", r"world_model.rssm.prior.layers.\1.linear"),
    (r"^dyn/priorlogit", "world_model.rssm.prior.output.parts.0"),
    (r"/mlp/linear(\d+)", r".layers.\1.linear"),
    (r"/mlp/norm(\d+)", r".layers.\1.norm"),
    (r"/head/(logits?|action/mean|action/logits)/", ".output.parts.0/"),
    (r"/head/action/stddev/", ".output.parts.1/"),
    (r"/kernel$", ".weight"),
    (r"/scale$", ".weight"),
    (r"/bias$", ".bias"),
]


class SpacesOnly(gym.Env):
    """An environment that only has spaces."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space


class Recording:
    """A recorded update, in our names and layouts."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.keys = [k for k in self.under("obs/") if k not in ("reward", "is_first", "is_last", "is_terminal")]
        self.images = [k for k in self.keys if self["obs/" + k].ndim == 5]
        self.vectors = sorted(set(self.keys) - set(self.images))
        self.discrete = self["prev_action"].ndim == 2
        self.convs = sum(bool(re.match(r"dec/conv\d+/kernel", k)) for k in self.under("param/"))
        deter, self.stoch_size = self["carry/deter"].shape[-1], int(np.prod(self["carry/stoch"].shape[1:]))
        self.deter = deter
        self.exact: tuple[dict[str, th.Tensor], dict[str, float]] | None = None  # see exact_gradients

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def tensor(self, key: str) -> th.Tensor:
        return th.as_tensor(self[key].copy())

    def under(self, prefix: str) -> list[str]:
        return [key[len(prefix) :] for key in self.arrays if key.startswith(prefix)]

    def name(self, key: str) -> str:
        """Our name of a recorded parameter."""
        if match := re.match(r"^dec/vec/(\w+)/pred/(kernel|bias)$", key):
            part = f"world_model.vector_decoder.output.parts.{self.vectors.index(match[1])}"
            return f"{part}.{'weight' if match[2] == 'kernel' else 'bias'}"
        if match := re.match(r"^dec/conv(\d+)(norm)?/(\w+)$", key):
            kind = "norms" if match[2] else "convs"
            index = self.convs - 1 - int(match[1])
            return f"world_model.image_decoders.0.{kind}.{index}.{'bias' if match[3] == 'bias' else 'weight'}"
        for pattern, ours in NAMES:
            key = re.sub(pattern, ours, key)
        return key

    def layout(self, key: str, array: np.ndarray) -> th.Tensor:
        """A recorded parameter, gradient or moment in our layout.

        Stochastic states are recorded as (K, C) and ours are (C, K); the decoder's input is recorded as
        [stoch, deter] and ours is [deter, stoch].
        """
        if key in ("dyn/dynin1/kernel", "dec/sp1/kernel"):
            array = self.classes_first(array)
        elif re.match(r"^(rew|con|val|slowval|pol)/mlp/linear0/kernel$", key):
            array = np.concatenate([array[: self.deter], self.classes_first(array[self.deter :])])
        elif key == "dec/mlp/linear0/kernel":
            array = np.concatenate([array[self.stoch_size :], self.classes_first(array[: self.stoch_size])])
        elif re.match(r"^dyn/(obs|prior)logit/", key):
            array = self.classes_first(array.T).T
        if key.endswith("kernel"):
            if array.ndim == 2:
                array = array.T
            elif array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)
        return th.as_tensor(np.ascontiguousarray(array))

    def classes_first(self, array: np.ndarray) -> np.ndarray:
        """Rows in the order (K, C) → (C, K)."""
        return array.reshape(*self["carry/stoch"].shape[1:], *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    def parameters(self, prefix: str) -> dict[str, th.Tensor]:
        return {self.name(key): self.layout(key, self[prefix + key]) for key in self.under(prefix)}

    def layers(self, pattern: str) -> int:
        return sum(bool(re.match(pattern + r"\d+/kernel$", k)) for k in self.under("param/"))

    def model(self) -> DreamerGPLD:
        """DreamerGPLD with the recording's sizes, parameters, optimiser state and percentiles."""
        observation = {k: spaces.Box(-np.inf, np.inf, self["obs/" + k].shape[2:]) for k in self.vectors}
        for k in self.images:
            height, width, channels = self["obs/" + k].shape[2:]
            observation[k] = spaces.Box(0, 255, (channels, height, width), np.uint8)
        if self.discrete:
            action: spaces.Space = spaces.Discrete(self["param/dyn/dynin2/kernel"].shape[0])
        else:
            action = spaces.Box(-1, 1, self["prev_action"].shape[2:])
        stoch, classes = self["carry/stoch"].shape[1:]
        sizes: dict[str, Any] = dict(
            deter=self.deter,
            hidden=self["param/dyn/dynin0/kernel"].shape[1],
            stoch=stoch,
            classes=classes,
            blocks=self["param/dyn/dyngru/kernel"].shape[0],
            units=self["param/rew/mlp/linear0/kernel"].shape[1],
            bins=self["param/rew/head/logits/kernel"].shape[1],
            policy_arch=tuple(self[f"param/pol/mlp/linear{i}/kernel"].shape[1] for i in range(self.layers("pol/mlp/linear"))),
            value_arch=tuple(self[f"param/val/mlp/linear{i}/kernel"].shape[1] for i in range(self.layers("val/mlp/linear"))),
            posterior_layers=self.layers("dyn/obs"),
            prior_layers=self.layers("dyn/prior"),
            reward_layers=self.layers("rew/mlp/linear"),
            continue_layers=self.layers("con/mlp/linear"),
        )
        if self.vectors:
            sizes.update(encoder_layers=self.layers("enc/mlp"), decoder_layers=self.layers("dec/mlp/linear"))
        if self.images:
            sizes.update(
                depth=self["param/enc/cnn0/kernel"].shape[-1] // 2,
                kernel=self["param/enc/cnn0/kernel"].shape[0],
                decoder_blocks=self["param/dec/sp0/kernel"].shape[0],
            )
        update = int(self["state/opt_step"])
        batch, length = self["obs/reward"].shape
        model = DreamerGPLD(
            "MultiInputPolicy",
            SpacesOnly(spaces.Dict(observation), action),
            model_size="debug",
            policy_kwargs=sizes,
            batch_size=batch,
            batch_length=length,
            imagination_horizon=self["rec/imagine.deter"].shape[1],
            posterior_penalty=self.initial_weight("metric/gp_post_lam", update),
            prior_penalty=self.initial_weight("metric/gp_prior_lam", update),
            penalty_rows=self["gp/post_probes"].shape[0] if "gp/post_probes" in self.arrays else None,
            device="cpu",
            precision="float32",
            compile=False,
        )
        missing, unexpected = model.policy.load_state_dict(self.parameters("param/"), strict=False)
        assert missing == ["actor_critic.percentiles"] and not unexpected
        percentiles = th.tensor([float(self["state/retnorm_lo"]), float(self["state/retnorm_hi"])])
        model.policy.actor_critic.percentiles.copy_(percentiles)
        model._n_updates = update
        second, first = self.parameters("optstate/1/1/"), self.parameters("optstate/2/1/")
        for name, p in model.policy.named_parameters():
            if p.requires_grad:
                model.policy.optimizer.state[p] = {
                    "step": th.tensor(float(self["optstate/1/0"])),
                    "exp_avg_sq": second[name].clone(),
                    "exp_avg": first[name].clone(),
                }
        return model

    def initial_weight(self, key: str, update: int) -> float:
        """λ₀ of the sqrt_time schedule from the λ in force."""
        return float(self[key]) * np.sqrt(1 + update / 1000) if key in self.arrays else 0.0

    def batch(self, model: DreamerGPLD) -> Batch:
        observations = {k: self.tensor("obs/" + k) for k in self.vectors}
        observations.update({k: self.tensor("obs/" + k).movedim(-1, -3) for k in self.images})
        action = self.tensor("prev_action")
        return Batch(
            observations,
            model.policy.encode_stored_action(action.unsqueeze(-1) if self.discrete else action),
            self.tensor("obs/reward"),
            self.tensor("obs/is_first"),
            self.tensor("obs/is_last"),
            self.tensor("obs/is_terminal"),
            self.tensor("carry/deter"),
            self.tensor("carry/stoch").mT,
        )

    def world_draws(self, model: DreamerGPLD) -> WorldModelDraws:
        rows = None
        if "gp/post_probes" in self.arrays and len(self["gp/post_probes"]) < model.policy.config.stoch:
            rows = th.arange(len(self["gp/post_probes"]))
        probes = {k: self.tensor(f"gp/{k}_probes") for k in ("post", "prior") if f"gp/{k}_probes" in self.arrays}
        mix = model.policy.config.unimix
        return WorldModelDraws(
            noise_behind(uniform_mix(self.tensor("rec/observe.logit").mT, mix), self.tensor("rec/observe.stoch").mT),
            self.tensor("gp/indices").long() if "gp/indices" in self.arrays else None,
            rows,
            rows,
            probes.get("post"),
            probes.get("prior"),
        )

    def imagination_draws(self, model: DreamerGPLD) -> ImaginationDraws:
        mix = model.policy.config.unimix
        logits, stoch = (self.tensor(f"rec/imagine.{k}").transpose(0, 1).mT for k in ("logit", "stoch"))  # (H, N, C, K)
        action = self.tensor("rec/imagine.action").transpose(0, 1)  # (H, N, ...)
        # The random numbers behind the recorded actions, from the policy at the recorded states.
        states = [
            th.cat([self.tensor(f"rec/{k}.deter"), self.tensor(f"rec/{k}.stoch").mT.flatten(-2)], -1)
            for k in ("observe", "imagine")
        ]
        features = th.cat([states[0].flatten(0, 1).unsqueeze(0), states[1].transpose(0, 1)[:-1]])  # (H, N, D + C·K)
        actor = model.policy.actor_critic
        with th.no_grad():
            outputs = actor.policy(features)
            if isinstance(actor.distribution, BoundedNormal):
                mean, std = actor.distribution.parameters(outputs)
                noise = (action - mean) / std
            else:
                probs = th.softmax(outputs, -1).unsqueeze(-1)  # (H, N, A, 1)
                noise = noise_behind(probs, F.one_hot(action.long(), probs.shape[-2]).unsqueeze(-1))
        return ImaginationDraws(noise_behind(uniform_mix(logits, mix), stoch), noise)


def noise_behind(probs: th.Tensor, one_hots: th.Tensor) -> th.Tensor:
    """Uniform numbers with which categoricals (..., C, K) give these samples: the middle of each class's interval."""
    return ((probs.cumsum(-2) - 0.5 * probs) * one_hots).sum(-2)


def assert_losses(name: str, ours: th.Tensor, recorded: th.Tensor) -> None:
    """The loss, which is a mean, agrees within LOSS_TOLERANCE, and its entries as those of any other tensor."""
    assert_tensor(name, ours, recorded)
    ours = ours.detach()
    th.testing.assert_close(ours.mean(), recorded.mean(), rtol=LOSS_TOLERANCE, atol=1e-7, msg=lambda m: f"{name}: {m}")


def assert_tensor(
    name: str, ours: th.Tensor, recorded: th.Tensor, before: th.Tensor | None = None, rounding: float = 0.0
) -> None:
    """Agreement within TENSOR_TOLERANCE of the largest entry; of an update, if ``before`` is given.

    :param rounding: what float32 leaves open, if that is more
    """
    assert ours.shape == recorded.shape, name
    ours, recorded = ours.detach(), recorded
    reference = recorded if before is None else recorded - before
    error = (ours - recorded).abs().max().item()
    # A parameter of size 1 is stored to 6e-8: no update can agree better than that.
    stored = 0.0 if before is None else 1.2e-7 * recorded.abs().max().item()
    allowed = max(TENSOR_TOLERANCE * reference.abs().max().item() + stored, rounding)
    assert error <= allowed, f"{name}: error {error}, allowed {allowed}"


@pytest.fixture(scope="module", params=sorted(RECORDINGS))
def recording(request: pytest.FixtureRequest) -> Recording:
    return Recording(RECORDINGS[request.param])


def test_recordings_are_there() -> None:
    assert {"cont0", "disc0", "image0", "edge0", "edge1"} <= set(RECORDINGS)


def test_parity(recording: Recording) -> None:
    model = recording.model()
    batch, world_draws = recording.batch(model), recording.world_draws(model)
    imagination_draws = recording.imagination_draws(model)
    policy = model.policy
    before = {name: value.clone() for name, value in policy.state_dict().items()}

    tokens = policy.world_model.encode(batch.observations, batch.rewards.shape)
    assert_tensor("tokens", tokens, recording.tensor("rec/observe.tokens"))
    draws = Draws(world_draws, imagination_draws)
    result = model.learner.loss(batch, draws, model._n_updates)
    states = result.states
    assert_tensor("deter", states.deter, recording.tensor("rec/observe.deter"))
    assert_tensor("posterior logits", states.logits, recording.tensor("rec/observe.logit").mT)
    th.testing.assert_close(states.stoch.detach(), recording.tensor("rec/observe.stoch").mT)
    prior_logits = policy.world_model.rssm.prior_logits(states.deter)
    assert_tensor("prior logits", prior_logits, recording.tensor("rec/observe.prior_logit").mT)

    names = {"con": "continue", "rew": "reward", "repval": "replay_value", "gp_post": "posterior_penalty"}
    names.update(gp_prior="prior_penalty", **{key: f"reconstruction/{key}" for key in recording.keys})
    recorded_losses = {names.get(key, key): recording.tensor(f"loss/{key}") for key in recording.under("loss/")}
    assert set(result.losses) == set(recorded_losses)
    for name, loss in result.losses.items():
        assert_losses(name, loss, recorded_losses[name])
    assert_losses("total", result.total, recording.tensor("loss_total"))
    for kind, key in (("posterior", "metric/gp_post_lam"), ("prior", "metric/gp_prior_lam")):
        if key in recording.arrays:
            assert result.terms[f"{kind}_penalty"].weight == pytest.approx(float(recording[key]), rel=LOSS_TOLERANCE)

    returns = recording.tensor("rec/imag.ret")
    low, high = (float(recording[f"updated_state/retnorm_{end}"]) for end in ("lo", "hi"))
    logged = {
        "imagined_reward": recording.tensor("rec/imag.rew").mean().item(),
        "imagined_continue": recording.tensor("rec/imag.con").mean().item(),
        "imagined_return": returns.mean().item(),
        "value": recording.tensor("rec/imag.value").mean().item(),
        "return_scale": max(1.0, high - low),
    }
    for name, value in logged.items():
        assert result.metrics[name].item() == pytest.approx(value, rel=LOSS_TOLERANCE, abs=1e-6), name

    gradients: dict[str, th.Tensor] = {}
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.__setitem__(name, p.grad.clone()))
        for name, p in policy.named_parameters()
        if p.requires_grad
    ]
    model.learner.update(batch, draws, model._n_updates, [model.lr_schedule(1.0)])
    for hook in hooks:
        hook.remove()
    recorded_gradients = recording.parameters("grad/")
    norm = float(np.sqrt(sum(gradient.double().square().sum().item() for gradient in recorded_gradients.values())))
    assert model.learner.metrics.means()["train/grad_norm"] == pytest.approx(norm, rel=TENSOR_TOLERANCE)
    _, rounding = exact_gradients(recording)
    assert set(gradients) == set(recorded_gradients) == set(rounding)
    for name, gradient in recorded_gradients.items():
        assert_tensor(f"gradient of {name}", gradients[name], gradient, rounding=rounding[name])
    updated = recording.parameters("updated/")
    assert set(updated) == set(before) - {"actor_critic.percentiles", "actor_critic.ent_coef_rise"}
    for name, value in policy.state_dict().items():
        if name in updated:
            assert_tensor(f"updated {name}", value, updated[name], before[name])
    percentiles = [float(recording["updated_state/retnorm_lo"]), float(recording["updated_state/retnorm_hi"])]
    np.testing.assert_allclose(policy.actor_critic.percentiles.numpy(), percentiles, rtol=LOSS_TOLERANCE)


def gradients_of(recording: Recording, dtype: th.dtype) -> dict[str, th.Tensor]:
    """Every gradient of the recorded update by the parameter's name, computed in float32 or float64."""

    def cast(value: Any) -> Any:
        if isinstance(value, th.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: cast(part) for key, part in value.items()}
        return type(value)(*(cast(part) for part in value)) if isinstance(value, tuple) else value

    model = recording.model()
    batch = recording.batch(model)
    draws = Draws(recording.world_draws(model), recording.imagination_draws(model))
    model.policy.to(dtype)
    model.learner.loss(cast(batch), cast(draws), model._n_updates).total.backward()
    return {name: p.grad for name, p in model.policy.named_parameters() if p.grad is not None}


def rounding_errors(recording: Recording) -> dict[str, float]:
    """What float32 may do to each gradient by way of the two-hot means alone: the largest change of any entry.

    The release sums a mean in float32, each term of which is rounded three times: its exponential, its quotient and its
    product. The update is made again in float64, once with plain means and a few times with such errors in them. Neither the
    recorded gradients, nor float32, nor the package's own means have a part in it, so a fault in one of these is not forgiven.
    """
    generator = th.Generator().manual_seed(0)

    def rounded_mean(logits: th.Tensor, bins: th.Tensor, rounding: float) -> th.Tensor:
        terms = th.softmax(logits, -1) * bins
        for _ in range(3):
            terms = terms * (1.0 + rounding * (2.0 * th.rand(terms.shape, generator=generator, dtype=terms.dtype) - 1.0))
        return terms.sum(-1)

    def run(rounding: float) -> dict[str, th.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            for module in (actor_critic, world_model):
                patch.setattr(module, "two_hot_mean", partial(rounded_mean, rounding=rounding))
            return gradients_of(recording, th.float64)

    plain, runs = run(0.0), [run(ROUNDING) for _ in range(RUNS)]
    return {name: max((each[name] - plain[name]).abs().max().item() for each in runs) for name in plain}


def exact_gradients(recording: Recording) -> tuple[dict[str, th.Tensor], dict[str, float]]:
    """Every gradient in float64, and the error of each by :func:`rounding_errors`."""
    if recording.exact is None:
        recording.exact = gradients_of(recording, th.float64), rounding_errors(recording)
    return recording.exact


def test_gradients_in_float64(recording: Recording) -> None:
    """They are the recorded ones, and ours, as far as float32 can tell: all three are one computation."""
    exact, rounding = exact_gradients(recording)
    ours, recorded = gradients_of(recording, th.float32), recording.parameters("grad/")
    for name, gradient in exact.items():
        assert_tensor(f"exact gradient of {name}", gradient, recorded[name], rounding=rounding[name])
        error, largest = (ours[name] - gradient).abs().max().item(), gradient.abs().max().item()
        assert error <= max(FLOAT32_ERROR * largest, rounding[name]), f"{name}: error {error / largest} of the largest entry"


def test_only_values_are_given_more_than_the_usual_tolerance(recording: Recording) -> None:
    """Nothing else sums over bins that far apart, so that no other fault can hide behind the rounding."""
    exact, rounding = exact_gradients(recording)
    more = {name for name, gradient in exact.items() if rounding[name] > TENSOR_TOLERANCE * gradient.abs().max().item()}
    assert all(name.startswith("actor_critic.value.") for name in more), more


def test_returns(recording: Recording) -> None:
    """λ-returns from the recorded rewards, continuations and values."""
    from sb3_dreamer_gpld.nets.actor_critic import imagined_returns, replayed_returns

    reward, cont, value = (recording.tensor(f"rec/imag.{k}").T for k in ("rew", "con", "value"))
    returns = imagined_returns(reward, cont, value, 0.95)
    assert_losses("imagined returns", returns.T, recording.tensor("rec/imag.ret"))
    bootstrap = recording.tensor("rec/imag.ret")[:, 0].view(recording["obs/reward"].shape)
    flags = (recording.tensor(f"obs/{k}") for k in ("reward", "is_last", "is_terminal"))
    assert_losses("replayed returns", replayed_returns(*flags, bootstrap, 1 - 1 / 333, 0.95), recording.tensor("rec/repl.ret"))


@pytest.mark.parametrize("size, count", [("1m", 640_867), ("12m", 9_738_019)])
def test_parameter_count(size: str, count: int) -> None:
    """Trainable parameters for dm_control's walker: 24 observation and 6 action numbers."""
    observation = spaces.Dict(
        {"height": spaces.Box(-np.inf, np.inf, ()), "orientations": spaces.Box(-np.inf, np.inf, (14,)),
         "velocity": spaces.Box(-np.inf, np.inf, (9,))}
    )  # fmt: skip
    model = DreamerGPLD("MultiInputPolicy", SpacesOnly(observation, spaces.Box(-1, 1, (6,))), model_size=size, device="cpu")
    assert sum(p.numel() for p in model.policy.parameters() if p.requires_grad) == count
