"""The diagnostics against definitions written out here, the callbacks, and the command.

Letters: B sequences, T steps, N states, D deter, C classes, K rows.
"""

import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import test_dreamer_gpld
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor

from sb3_dreamer_gpld import DreamerGPLD, diagnostics, saving
from sb3_dreamer_gpld.diagnostics import OpenLoopCallback, SmoothnessCallback, callbacks, measures
from sb3_dreamer_gpld.envs import ActionRepeat
from sb3_dreamer_gpld.nets.world_model import Batch
from sb3_dreamer_gpld.policies import DreamerPolicy

GAMMA = 0.9
LENGTH = 12  # steps of an episode of Counter


class Counter(gym.Env):
    """Observation and reward are the number of steps; ends for good after LENGTH steps. Actions are anything."""

    observation_space: spaces.Space = spaces.Box(0.0, np.inf, (2,))
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        return self.observation(), float(self.steps), self.steps == LENGTH, False, {}

    def observation(self) -> Any:
        return np.full(2, self.steps, np.float32)


class Pictures(Counter):
    """The same as a picture that gets brighter, with sides that no codec likes."""

    observation_space = spaces.Dict({"eye": spaces.Box(0, 255, (17, 19, 3), np.uint8), "x": spaces.Box(-1, 1, (1,))})

    def observation(self) -> Any:
        return {"eye": np.full((17, 19, 3), 20 * self.steps, np.uint8), "x": np.zeros(1, np.float32)}


gym.register("DiagnosticsCounter-v0", Counter)
gym.register("DiagnosticsTwice-v0", lambda: ActionRepeat(Counter(), 2))
gym.register("DiagnosticsPictures-v0", Pictures)


def tiny(env: gym.Env, **kwargs: Any) -> DreamerGPLD:
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    return test_dreamer_gpld.tiny(env, policy, **{"learning_starts": 16, "buffer_size": 500, "gamma": GAMMA, **kwargs})


@pytest.fixture(scope="module")
def model() -> DreamerGPLD:
    return tiny(Counter(), train_ratio=8).learn(100)


@pytest.fixture(scope="module")
def files(model: DreamerGPLD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with saved models, and files that are none."""
    folder = tmp_path_factory.mktemp("models")
    model.save(folder / "counter.zip")
    tiny(Counter(), seed=1).save(folder / "fresh.zip")
    tiny(Counter(), policy_kwargs=dict(deter=48, stoch=3, classes=5)).save(folder / "larger.zip")
    tiny(VecNormalize(DummyVecEnv([Counter]))).learn(10).save(folder / "normalized.zip")
    tiny(VecNormalize(DummyVecEnv([Counter]), norm_obs=False)).learn(10).save(folder / "rewards.zip")
    tiny(ActionRepeat(Counter(), 2)).learn(10).save(folder / "twice.zip")
    tiny(Pictures()).learn(30).save(folder / "pictures.zip")
    tiny(Pictures(), policy_kwargs=dict(reconstruction="redundancy")).learn(30).save(folder / "undecoded.zip")
    PPO("MlpPolicy", Counter(), n_steps=8, batch_size=8).save(folder / "ppo.zip")
    (folder / "text.zip").write_text("nothing")
    return folder


@pytest.fixture
def policy(model: DreamerGPLD) -> Iterator[DreamerPolicy]:
    with diagnostics.undisturbed(model.policy, 0):
        yield model.policy


def inputs(policy: DreamerPolicy, count: int = 5) -> tuple[Tensor, Tensor]:
    """Any deter (N, D) and tokens (N, tokens)."""
    return th.randn(count, policy.config.deter), th.randn(count, policy.world_model.encoder.size)


# ----------------------------------------------------------------------------------------------------------- smoothness


def test_kl_is_zero_without_a_perturbation_and_grows_with_it(policy: DreamerPolicy) -> None:
    u = th.cat(inputs(policy, 200), -1)
    assert diagnostics.posterior_sensitivity(policy, u, 0.0).tolist() == [0.0] * 200
    means = [diagnostics.posterior_sensitivity(policy, u, scale).mean().item() for scale in (1e-2, 1e-1, 1.0)]
    assert 0 < 10 * means[0] < means[1] < means[2] / 10


def test_kl_of_small_perturbations_is_that_of_the_fisher_information(policy: DreamerPolicy) -> None:
    """KL(q(u) ‖ q(u + δ)) → ½ Σ (dq)²/q with dq = J δ."""
    u = th.cat(inputs(policy), -1)
    th.manual_seed(1)
    found = diagnostics.posterior_sensitivity(policy, u, 1e-2)
    th.manual_seed(1)
    with th.enable_grad():
        q, change = th.func.jvp(lambda x: diagnostics.posterior_probabilities(policy, x), (u,), (1e-2 * th.randn_like(u),))
    th.testing.assert_close(found, 0.5 * (change.square() / q).sum((1, 2)), rtol=0.1, atol=1e-6)


def test_jacobian_norms_equal_those_of_automatic_differentiation(policy: DreamerPolicy, monkeypatch: Any) -> None:
    monkeypatch.setattr(measures, "CHUNK_STATES", 2)  # 5 states are no whole number of chunks
    deter, tokens = inputs(policy)
    rssm = policy.world_model.rssm
    maps: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda u: diagnostics.posterior_probabilities(policy, u.unsqueeze(0)), th.cat([deter, tokens], -1)),
        (lambda u: rssm.probabilities(rssm.prior_logits(u)), deter),
    ]
    for (function, u), found in zip(maps, diagnostics.jacobian_norms(policy, deter, tokens), strict=True):
        with th.enable_grad():
            expected = th.stack([th.func.jacrev(function)(x).square().sum().sqrt() for x in u])
        assert found.shape == (5,)
        th.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_transition_ratio_of_a_known_transition() -> None:
    """With gates and prior of zeros, the next deter is σ(1) times the last one, and the probabilities are constant."""
    policy = tiny(Counter()).policy
    rssm, config = policy.world_model.rssm, policy.config
    with diagnostics.undisturbed(policy, 0):
        for parameter in (*rssm.gates.parameters(), *rssm.prior.output.parameters()):
            parameter.zero_()
        deter, stoch = th.randn(6, config.deter), th.rand(6, config.classes, config.stoch)
        th.manual_seed(1)
        found = diagnostics.transition_ratios(policy, deter, stoch, th.zeros(6, 1), 0.1)
        th.manual_seed(1)
        moved, others = th.randn_like(deter).square().sum(-1), th.randn_like(stoch).square().sum((1, 2))
        expected = th.sigmoid(th.ones(())) * (moved / (moved + others)).sqrt()
        th.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        ratios = diagnostics.imagined_ratios(policy, deter, stoch, horizon=3)
        assert ratios.shape == (18,) and ratios.max() < th.sigmoid(th.ones(()))


def test_ratios_are_those_of_imagined_states(policy: DreamerPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The starts come first, and each action leads to the next states."""
    given: list[Any] = []
    monkeypatch.setattr(measures, "transition_ratios", lambda policy, *args: given.extend(args))
    config = policy.config
    deter, stoch = th.randn(6, config.deter), th.rand(6, config.classes, config.stoch)
    th.manual_seed(1)
    diagnostics.imagined_ratios(policy, deter, stoch, horizon=3, scale=0.1)
    th.manual_seed(1)
    noise = th.rand(3, 6, config.stoch)
    deters, stochs, actions = (x.unflatten(0, (3, 6)) for x in given[:3])
    assert given[3] == 0.1 and th.equal(deters[0], deter) and th.equal(stochs[0], stoch)
    for h in range(2):
        _, after = policy.world_model.rssm.imagine(deters[h], stochs[h], lambda *_, a=actions[h]: a, noise[h : h + 1], 1)
        th.testing.assert_close(th.cat([deters[h + 1], stochs[h + 1].flatten(1)], -1), after)


# ------------------------------------------------------------------------------------------------------------ open loop


def test_what_is_seen_equals_observe(model: DreamerGPLD, policy: DreamerPolicy) -> None:
    batch = diagnostics.replay_windows(model, 6, np.random.default_rng(0))
    th.manual_seed(1)
    result = diagnostics.open_loop(policy, batch, context=3, gamma=GAMMA)
    th.manual_seed(1)
    world_model, noise = policy.world_model, th.rand(6, 8, policy.config.stoch)
    tokens = world_model.encode(batch.observations, (6, 8))
    states = world_model.rssm.observe(tokens, batch.actions, batch.is_first, batch.deter, batch.stoch, noise)
    th.testing.assert_close(result.features[:, :3], states.features[:, :3])
    assert not th.allclose(result.features[:, 3:], states.features[:, 3:])
    expected = diagnostics.prediction_errors(policy, states.features, batch, GAMMA)
    assert set(expected) == {"observation", "reward", "continue"}
    for name, error in expected.items():
        th.testing.assert_close(result.teacher_forced[name], error[:, 2:])
        th.testing.assert_close(result.errors[name][:, 0], error[:, 2])


def test_imagined_steps_take_the_real_actions(model: DreamerGPLD, policy: DreamerPolicy) -> None:
    batch = diagnostics.replay_windows(model, 6, np.random.default_rng(0))
    other = batch._replace(actions=batch.actions.clone())
    other.actions[:, 5] = 0.5 - 0.5 * batch.actions[:, 5]
    features = []
    for each in (batch, other):
        th.manual_seed(1)
        features.append(diagnostics.open_loop(policy, each, context=3, gamma=GAMMA).features)
    same = (features[0] == features[1]).all(-1)
    assert same[:, :5].all() and not same[:, 5].any()


@pytest.mark.parametrize("context", [0, 9])
def test_wrong_context(context: int, model: DreamerGPLD, policy: DreamerPolicy) -> None:
    batch = diagnostics.replay_windows(model, 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="context must be from 1 to 8"):
        diagnostics.open_loop(policy, batch, context, GAMMA)


def test_errors_in_a_known_environment(tmp_path: Path) -> None:
    """A model that predicts 0 everywhere, and ½ as the probability to go on, in an environment that counts."""
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib
    from sb3_dreamer_gpld.zoo import diagnose

    model = tiny(Counter())
    world_model = model.policy.world_model
    with th.no_grad():
        for head in (world_model.vector_decoder, world_model.reward, world_model.cont):
            for parameter in head.output.parameters():
                parameter.zero_()
    args = f"--model m --env e --out o --episodes 2 --context 3 --horizon 11 --windows {2 * (LENGTH - 2)}"
    options = diagnose.parse(args.split())
    env = model.get_env()
    assert env is not None
    episodes = diagnose.collect(model, env, options.episodes, options.max_steps)
    assert [episode.rewards.tolist() for episode in episodes] == [[list(range(LENGTH + 1))]] * 2
    assert all(episode.is_terminal.sum() == episode.is_terminal[0, -1] == 1 for episode in episodes)

    found = diagnose.measure(model, episodes, options)
    # All windows with at least one step after the context: they start at 0 to LENGTH − 3 and see 3 steps
    seen = np.arange(2, LENGTH)
    for k in range(12):
        steps = (seen + k)[seen + k <= LENGTH]
        assert found.counts[k] == 2 * len(steps)
        expected = {
            "observation": np.log1p(steps) ** 2,
            "reward": steps,
            "continue": np.where(steps == LENGTH, 0.5, GAMMA - 0.5),
        }
        for name, values in expected.items():
            for errors in (found.errors, found.teacher_forced):
                mean = values.mean() if len(steps) else np.nan
                assert errors[name][k].item() == pytest.approx(mean, rel=1e-5, nan_ok=True), (name, k)


def test_categories_and_keys() -> None:
    class Mixed(Counter):
        observation_space = spaces.Dict({"n": spaces.MultiDiscrete([20, 3]), "x": spaces.Box(0, np.inf, (2,))})

        def observation(self) -> Any:
            return {"n": np.array([self.steps, 0]), "x": super().observation()}

    model = tiny(Mixed()).learn(40)
    policy = model.policy
    with diagnostics.undisturbed(policy, 0):
        decoder = policy.world_model.vector_decoder.output.parts
        for part in decoder:
            part.weight.zero_(), part.bias.zero_()
        decoder[0].bias[20 + 1] = 1.0  # always says 0 for the first number, and 1 for the second, which is 0
        batch = diagnostics.replay_windows(model, 3, np.random.default_rng(0))
        errors = diagnostics.open_loop(policy, batch, 1, GAMMA).errors
    number = batch.observations["n"][..., 0]
    th.testing.assert_close(errors["observation/n"], 0.5 * (number != 0) + 0.5)
    th.testing.assert_close(errors["observation/x"], th.log1p(batch.observations["x"]).square().mean(-1))
    th.testing.assert_close(errors["observation"], (errors["observation/n"] + errors["observation/x"]) / 2)


# ------------------------------------------------------------------------------------------------- nothing is disturbed


def learned(callback: list[BaseCallback] | None) -> tuple[DreamerGPLD, dict[str, Any]]:
    model = tiny(Counter(), train_ratio=8).learn(90, callback=callback)
    buffer = model.replay_buffer
    assert buffer is not None and model._state is not None and model._n_updates > 10
    return model, {
        **dict(model.policy.state_dict()),
        "moments": [list(state.values()) for state in model.policy.optimizer.state_dict()["state"].values()],
        "state": list(model._state),
        "rewards": th.as_tensor(buffer.rewards),
        "deter": th.as_tensor(buffer.deter),
        "torch": th.get_rng_state(),
        "others": [str(x) for x in (buffer.windows.queue, buffer.rng.bit_generator.state, np.random.get_state()[1].tolist())],
    }


def test_callbacks_do_not_disturb_training() -> None:
    callbacks: list[BaseCallback] = [
        SmoothnessCallback(eval_freq=7, n_windows=3, n_states=10),
        OpenLoopCallback(eval_freq=11, n_windows=3, context=2),
    ]
    _, expected = learned(None)
    _, found = learned(callbacks)
    assert found.pop("others") == expected.pop("others")
    for name, value in expected.items():
        th.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_compiled_functions_are_left_out_and_put_back(model: DreamerGPLD) -> None:
    runner = model.learner.execution
    runner.compile()
    try:
        with pytest.raises(RuntimeError), diagnostics.undisturbed(model.policy, 0):
            assert not runner.compiled
            raise RuntimeError
        assert runner.compiled
    finally:
        runner.compiled = False


def test_spectral_norms_are_as_they_were() -> None:
    """Their vectors move with each call in training, and a policy is in that mode after ``learn``."""
    policy = tiny(Counter(), policy_kwargs={"spectral_norm": ["posterior", "actor"]}).learn(30).policy
    policy.set_training_mode(True)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with diagnostics.undisturbed(policy, 0):
        diagnostics.posterior_probabilities(policy, th.cat(inputs(policy), -1))
    assert policy.training and all(th.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    diagnostics.posterior_probabilities(policy, th.cat(inputs(policy), -1))
    assert not all(th.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def of_actions(actions: np.ndarray, first: list[int]) -> diagnostics.ActionSmoothness:
    """Of windows (B, T, A), with an episode's start at the flattened steps ``first``."""
    batch = diagnostics_batch(actions)
    batch.is_first.view(-1)[first] = True
    return diagnostics.action_smoothness(batch)


def diagnostics_batch(actions: np.ndarray) -> Batch:
    windows = actions.shape[:2]
    zeros, none = th.zeros(windows), th.zeros(windows, dtype=th.bool)
    return Batch({}, th.as_tensor(actions), zeros, none, none.clone(), none.clone(), th.zeros(1), th.zeros(1))


def test_smoothness_of_actions() -> None:
    """Hand-made numbers, a slow wave, a fast one, and noise."""
    actions = np.array([[[9.0], [0.0], [0.5], [0.25], [9.0], [1.0]]])
    found = of_actions(actions, [0, 4])  # the first of an episode is no action
    assert found.change == pytest.approx((0.5 + 0.25) / 2) and np.isnan(found.high_frequencies)
    t = np.arange(65.0)
    slow, fast = np.sin(2 * np.pi * 3 * t / 64), np.cos(np.pi * t)
    for wave, share in ((slow, 0.0), (fast, 1.0), (slow + 3.0, 0.0)):
        assert of_actions(wave[None, :, None], [0]).high_frequencies == pytest.approx(share, abs=1e-6)
    noise = np.random.default_rng(0).normal(size=(8, 65, 2))
    assert of_actions(noise, []).high_frequencies == pytest.approx(0.5, abs=0.03)
    assert np.isnan(of_actions(np.ones((1, 9, 1)), []).high_frequencies) and of_actions(np.ones((1, 9, 1)), []).change == 0.0


# ------------------------------------------------------------------------------------------------------------ callbacks


def test_what_callbacks_log(tmp_path: Path) -> None:
    model = tiny(Counter())
    model.set_logger(configure(str(tmp_path), ["json"]))
    callbacks: list[BaseCallback] = [SmoothnessCallback(eval_freq=20), OpenLoopCallback(eval_freq=20, context=2)]
    model.learn(60, callback=callbacks, log_interval=None)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    found = [{name for name in row if name.startswith(("smoothness", "open_loop"))} for row in rows]
    errors = {f"open_loop/{name}" for name in ("observation", "reward", "continue")}
    measures = ("posterior_kl_0.1", "posterior_kl_1", "posterior_jacobian", "prior_jacobian", "transition_ratio")
    measures = (*measures, "action_change", "action_high_frequencies")
    smooth = {f"smoothness/{name}" for name in (*measures, "transition_ratio_max", "input_rms")}
    assert [row["time/total_timesteps"] for row in rows] == [20, 20, 40, 40, 60, 60]
    assert found[0::2] == [smooth] * 3 and found[1] == errors | {f"{name}_last" for name in errors}
    assert all(row[name] > 0 for row, names in zip(rows, found, strict=True) for name in names)


def test_which_numbers_callbacks_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over the imagined steps and the last one; mean and largest of the ratios."""
    errors, one, ratios = th.tensor([[9.0, 1.0, 2.0, 6.0]]), th.ones(1), th.tensor([1.0, 3.0])
    result = measures.OpenLoop({"reward": errors}, {}, errors > 0, errors)
    monkeypatch.setattr(callbacks, "open_loop", lambda *args: result)
    monkeypatch.setattr(callbacks, "smoothness", lambda *args: measures.Smoothness({}, one, one, ratios, one))
    model = tiny(Counter())
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(20, callback=[SmoothnessCallback(20), OpenLoopCallback(20, context=2)], log_interval=None)
    smooth, open_loop = map(json.loads, (tmp_path / "progress.json").read_text().splitlines())
    assert (open_loop["open_loop/reward"], open_loop["open_loop/reward_last"]) == (3.0, 6.0)
    assert (smooth["smoothness/transition_ratio"], smooth["smoothness/transition_ratio_max"]) == (2.0, 3.0)


def test_long_keys_of_observations_are_printed(tmp_path: Path) -> None:
    """A printed table would show them shortened to the same, for which SB3 raises an error."""
    key = "jaco_arm/jaco_hand/pinch_site_"
    space = spaces.Dict({f"{key}{end}": spaces.Box(-1, 1, (2,)) for end in ("pos", "rmat")})
    model = tiny(test_dreamer_gpld.RandomSpaces(space, spaces.Box(-1, 1, (1,))))
    model.set_logger(configure(str(tmp_path), ["log", "json"]))
    model.learn(20, callback=OpenLoopCallback(eval_freq=20, context=2), log_interval=None)
    (row,) = map(json.loads, (tmp_path / "progress.json").read_text().splitlines())
    assert {f"open_loop/observation/{key}{end}" for end in ("pos", "rmat", "pos_last", "rmat_last")} <= set(row)


def test_video_in_tensorboard(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from PIL import Image

    model = tiny(Pictures(), tensorboard_log=str(tmp_path))
    model.learn(40, callback=OpenLoopCallback(eval_freq=40, n_windows=12, context=2, horizon=5, video=True, video_windows=2))
    (folder,) = tmp_path.iterdir()
    log = accumulators.EventAccumulator(str(folder)).Reload()
    (image,) = log.Images("open_loop/video/eye")
    video = Image.open(io.BytesIO(image.encoded_image_string))
    assert image.step == 40 and (video.n_frames, video.size) == (7, (2 * 19, 3 * 17))
    assert log.Scalars("open_loop/observation/eye")[0].value > 0


def test_video_shows_truth_prediction_and_difference() -> None:
    model = tiny(Pictures()).learn(40)
    policy = model.policy
    with diagnostics.undisturbed(policy, 0):
        batch = diagnostics.replay_windows(model, 2, np.random.default_rng(0))
        features = diagnostics.open_loop(policy, batch, 2, GAMMA).features
        frames = diagnostics.open_loop_video(policy, batch, features, diagnostics.image_key(policy)).astype(int)
        decoded = policy.world_model.decode(features)[1][0]  # (B, T, height, width, channels)
    truth, prediction, difference = frames[:, :17], frames[:, 17:34], frames[:, 34:]
    pictures = batch.observations["eye"].permute(1, 3, 0, 4, 2).reshape(8, 17, 38, 3)  # channels first in the model
    np.testing.assert_array_equal(truth, pictures.numpy())
    np.testing.assert_allclose(prediction[:, :, 19:], 255 * decoded[1].numpy(), atol=0.51)
    np.testing.assert_allclose(difference, (prediction - truth + 255) / 2, atol=1.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmoothnessCallback(eval_freq=0), "eval_freq must be a whole number of at least 1"),
        (lambda: SmoothnessCallback(scales=(-0.1,)), "scales must be"),
        (lambda: OpenLoopCallback(context=0), "context must be"),
        (lambda: OpenLoopCallback(context=8), "batch_length=8"),
        (lambda: OpenLoopCallback(context=3, horizon=6), "batch_length=8"),
        (lambda: OpenLoopCallback(context=2, video=True), "needs image observations"),
    ],
)
def test_wrong_callbacks(make: Callable[[], BaseCallback], message: str) -> None:
    model = tiny(Counter())
    with pytest.raises(ValueError, match=message):
        model.learn(10, callback=make())
    assert model.num_timesteps == 0


def test_windows_are_as_long_as_the_buffer_makes_them() -> None:
    """Also where the model's batch_length is another one."""
    model = tiny(Counter(), batch_length=16, replay_buffer_kwargs=dict(batch_length=6))
    with pytest.raises(ValueError, match="batch_length=6 steps, but context=6 and horizon=None"):
        model.learn(40, callback=OpenLoopCallback(eval_freq=20, context=6))
    for horizon in (None, 4):
        model.learn(40, callback=OpenLoopCallback(eval_freq=20, context=2, horizon=horizon))


def test_callbacks_without_a_decoder(tmp_path: Path) -> None:
    """Errors of reward and continuation are logged, and no video is; one that is asked for is refused."""
    pytest.importorskip("tensorboard")
    model = tiny(Pictures(), policy_kwargs=dict(reconstruction="redundancy"))
    model.set_logger(configure(str(tmp_path), ["json", "tensorboard"]))
    model.learn(40, callback=[SmoothnessCallback(40), OpenLoopCallback(40, context=2, horizon=3)], log_interval=None)
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    names = {name for row in rows for name in row if name.startswith("open_loop")}
    assert names == {f"open_loop/{name}{end}" for name in ("reward", "continue") for end in ("", "_last")}
    assert any("smoothness/posterior_jacobian" in row for row in rows)
    with pytest.raises(ValueError, match="A video needs a decoder.*reconstruction='redundancy'"):
        model.learn(40, callback=OpenLoopCallback(40, context=2, video=True))
    with diagnostics.undisturbed(model.policy, 0):
        batch = diagnostics.replay_windows(model, 2, np.random.default_rng(0))
        features = diagnostics.open_loop(model.policy, batch, 2, GAMMA).features
        with pytest.raises(ValueError, match="has no decoder"):
            diagnostics.open_loop_video(model.policy, batch, features, model.policy.observation_spec.images[0])


def test_video_without_tensorboard() -> None:
    with pytest.raises(ValueError, match="tensorboard_log"):
        tiny(Pictures()).learn(10, callback=OpenLoopCallback(context=2, video=True))


def test_callback_of_another_algorithm() -> None:
    with pytest.raises(TypeError, match="not a PPO"):
        PPO("MlpPolicy", Counter(), n_steps=8, batch_size=8).learn(8, callback=SmoothnessCallback())


# -------------------------------------------------------------------------------------------------------------- command


def diagnose(args: str) -> int:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rl_zoo3")
    from sb3_dreamer_gpld.zoo import main as zoo

    return zoo.main(["diagnose", *args.split()])


FEW = "--episodes 2 --windows 5 --states 20 --horizon 6 --context 2 --device cpu"


def test_command_compares_two_models_and_repeats_itself(files: Path, tmp_path: Path) -> None:
    both = f"--model {files}/counter.zip --baseline {files}/fresh.zip --env DiagnosticsCounter-v0 {FEW}"
    assert diagnose(f"{both} --out {tmp_path}/a/b") == 0
    assert {file.name for file in (tmp_path / "a" / "b").iterdir()} == {
        "diagnostics.json",
        "smoothness.png",
        "open_loop.png",
    }
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1
    text = (tmp_path / "a" / "b" / "diagnostics.json").read_text()
    report = json.loads(text)
    assert diagnose(f"{both} --out {tmp_path}/again") == 0
    assert (tmp_path / "again" / "diagnostics.json").read_text() == text
    assert diagnose(f"{both} --out {tmp_path}/other --seed 1") == 0
    assert (tmp_path / "other" / "diagnostics.json").read_text() != text

    for name in ("model", "baseline"):
        assert report[name]["collected_returns"] == [LENGTH * (LENGTH + 1) / 2] * 2
        assert len(report[name]["action_change"]) == 2 and min(report[name]["action_change"]) > 0
        assert all(0 < share < 1 for share in report[name]["action_high_frequencies"])
        assert report[name]["open_loop"]["k"] == list(range(7))
        assert report[name]["open_loop"]["windows"][0] == 5
        assert report[name]["posterior_kl"]["1"]["mean"] > report[name]["posterior_kl"]["0.01"]["mean"] > 0
    assert report["model"]["posterior_jacobian"] != report["baseline"]["posterior_jacobian"]
    assert report["model"]["open_loop"]["windows"] == report["baseline"]["open_loop"]["windows"]  # the same windows


def test_models_of_different_sizes(files: Path, tmp_path: Path) -> None:
    """Each goes through the episodes of both with states of its own size."""
    both = f"--model {files}/counter.zip --baseline {files}/larger.zip --env DiagnosticsCounter-v0"
    assert diagnose(f"{both} --out {tmp_path}/out {FEW}") == 0
    report = json.loads((tmp_path / "out" / "diagnostics.json").read_text())
    alone = f"--model {files}/larger.zip --baseline {files}/counter.zip --env DiagnosticsCounter-v0"
    assert diagnose(f"{alone} --out {tmp_path}/turned {FEW}") == 0
    turned = json.loads((tmp_path / "turned" / "diagnostics.json").read_text())
    assert report["model"]["collected_returns"] == turned["baseline"]["collected_returns"]
    assert report["model"]["open_loop"]["windows"] == report["baseline"]["open_loop"]["windows"]


def test_arguments_of_the_environment(files: Path, tmp_path: Path) -> None:
    """Of the hyperparameter file, or those that are given in their place."""
    (tmp_path / "mine.yml").write_text("default: {env_kwargs: {max_episode_steps: 6}}\n")
    for words, steps in (("", 6), ("--env-kwargs max_episode_steps:4", 4)):
        args = f"--model {files}/counter.zip --env DiagnosticsCounter-v0 -conf {tmp_path}/mine.yml --out {tmp_path} {FEW}"
        assert diagnose(f"{args} {words}") == 0
        report = json.loads((tmp_path / "diagnostics.json").read_text())
        assert report["model"]["collected_returns"] == [steps * (steps + 1) / 2] * 2
        assert report["settings"]["env_kwargs"] == {"max_episode_steps": str(steps)}


def test_model_beside_itself(files: Path, tmp_path: Path) -> None:
    one = files / "counter.zip"
    diagnose(f"--model {one} --baseline {one} --env DiagnosticsCounter-v0 --out {tmp_path}/out {FEW}")
    report = json.loads((tmp_path / "out" / "diagnostics.json").read_text())
    assert report["model"] == report["baseline"]


def test_command_without_a_decoder(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but what a decoder is needed for, alone and beside a model with one; what is missing is named."""
    one, other = (f"{files}/{name}.zip" for name in ("undecoded", "pictures"))
    assert diagnose(f"--model {one} --env DiagnosticsPictures-v0 --out {tmp_path}/alone {FEW}") == 0
    assert "no errors of observations, since this model has no decoder" in capsys.readouterr().out
    assert diagnose(f"--model {one} --baseline {other} --env DiagnosticsPictures-v0 --out {tmp_path}/both {FEW}") == 0
    assert capsys.readouterr().out.count("no errors of observations") == 1
    for folder in ("alone", "both"):
        assert {"smoothness.png", "open_loop.png"} < {file.name for file in (tmp_path / folder).iterdir()}
    alone, both = (json.loads((tmp_path / name / "diagnostics.json").read_text()) for name in ("alone", "both"))
    for report in (alone["model"], both["model"]):
        assert set(report["open_loop"]["errors"]) == {"reward", "continue"}
        assert report["open_loop"]["not_measured"] == ["observation"]
    assert "observation" in both["baseline"]["open_loop"]["errors"] and both["baseline"]["open_loop"]["not_measured"] == []
    assert min(alone["model"]["open_loop"]["errors"]["reward"]) > 0


def test_picture_of_open_loop_errors_has_no_empty_part() -> None:
    pytest.importorskip("matplotlib")
    from sb3_dreamer_gpld.zoo.figures import draw_open_loop

    some = {name: th.ones(3) for name in ("reward", "continue")}
    every = {"observation": th.ones(3), **some}
    for found, lines in (({"a": some}, [2, 2]), ({"a": some, "b": every}, [2, 4, 4]), ({"a": every}, [2, 2, 2])):
        figure = draw_open_loop({label: (errors, errors) for label, errors in found.items()})
        assert [len(axes.lines) for axes in figure.axes] == lines


def test_command_writes_videos(files: Path, tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    from moviepy.video.io.VideoFileClip import VideoFileClip

    args = f"--model {files}/pictures.zip --env DiagnosticsPictures-v0 --out {tmp_path}/out {FEW} --video --image eye"
    assert diagnose(args) == 0
    with VideoFileClip(str(tmp_path / "out" / "open_loop_model.mp4")) as clip:
        assert tuple(clip.size) == (4 * 19, 3 * 17 + 1)
    assert len(list((tmp_path / "out" / "tensorboard" / "model").glob("events*"))) == 1
    assert "observation/eye" in (tmp_path / "out" / "diagnostics.json").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--model {files}/nothing.zip --env DiagnosticsCounter-v0", "there is no such file"),
        ("--model {files}/text.zip --env DiagnosticsCounter-v0", "not a saved DreamerGPLD model"),
        ("--model {files}/ppo.zip --env DiagnosticsCounter-v0", "not a saved DreamerGPLD model"),
        ("--model {files}/counter.zip --env DiagnosticsCouter-v0", "DiagnosticsCounter-v0"),
        (
            "--model {files}/counter.zip --env DiagnosticsCounter-v0 --env-kwargs size:3",
            "DiagnosticsCounter-v0 cannot be made: .*'size'",
        ),
        ("--model {files}/counter.zip --env DiagnosticsCounter-v0 --env-kwargs size=3", "take name:value"),
        (
            "--model {files}/counter.zip --baseline {files}/normalized.zip --env DiagnosticsCounter-v0",
            "--baseline .*normalized.zip was trained with VecNormalize",
        ),
        ("--model {files}/rewards.zip --env DiagnosticsCounter-v0", "was trained with VecNormalize.* nor rewards"),
        ("--model {files}/counter.zip --env DiagnosticsCounter-v0 -conf sb3_dreamer_gpld", "diagnose reads YAML files only"),
        ("--model {files}/counter.zip --env Pendulum-v1", "--model .*another environment than Pendulum-v1"),
        (
            "--model {files}/counter.zip --baseline {files}/pictures.zip --env DiagnosticsCounter-v0",
            "--baseline .*another environment",
        ),
        (
            "--model {files}/counter.zip --env DiagnosticsTwice-v0",
            "trained with 1 frames for each of its steps, and DiagnosticsTwice-v0 makes 2.*-conf",
        ),
        (
            "--model {files}/twice.zip --env DiagnosticsCounter-v0",
            "trained with 2 frames .*, and DiagnosticsCounter-v0 makes 1",
        ),
        ("--model {files}/counter.zip --env DiagnosticsCounter-v0 --video", "this model has none"),
        ("--model {files}/pictures.zip --env DiagnosticsPictures-v0 --video --image eya", "Did you mean 'eye'"),
        ("--model {files}/pictures.zip --env DiagnosticsPictures-v0 --image eye", "needs --video"),
        ("--model {files}/undecoded.zip --env DiagnosticsPictures-v0 --video", "A video needs a decoder.*has no decoder"),
        (
            "--model {files}/pictures.zip --baseline {files}/undecoded.zip --env DiagnosticsPictures-v0 --video",
            "A video needs a decoder",
        ),
        ("--model {files}/counter.zip --env DiagnosticsCounter-v0 --horizon 0", "--horizon must be"),
        ("--model {files}/counter.zip --env DiagnosticsCounter-v0 --scales -1", "--scales must be"),
        ("--model {files}/counter.zip --env DiagnosticsCounter-v0 --seed -1", "--seed must be"),
    ],
)
def test_wrong_input_is_named_before_anything_is_written(args: str, message: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        diagnose(f"{args.format(files=files)} --out {tmp_path}/out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("repeat", "frames", "steps", "episodes", "can"),
    [
        (1, 1000, 1000, 10, True),
        (2, 1000, 1000, 10, False),
        (1, 1500, 1000, 10, False),
        (3, 2990, 1000, 10, True),  # each last action was applied twice
        (4, 2990, 1000, 10, False),
        (2, 2990, 1000, 10, False),
        (10, 30, 10, 10, True),  # episodes of three frames
        (2, 0, 1000, 10, True),  # not counted
    ],
)
def test_how_often_actions_were_repeated(repeat: int, frames: int, steps: int, episodes: int, can: bool) -> None:
    from sb3_dreamer_gpld.zoo.diagnose import can_have_repeated

    assert can_have_repeated(repeat, frames, steps, episodes) == can


def test_an_environment_that_cannot_be_made(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PixelObservation where there is no OpenGL."""

    def fail(self: Counter) -> None:
        raise RuntimeError("MuJoCo cannot render pictures")

    monkeypatch.setattr(Counter, "__init__", fail)
    with pytest.raises(SystemExit, match="DiagnosticsCounter-v0 cannot be made: MuJoCo cannot render pictures"):
        diagnose(f"--model {files}/counter.zip --env DiagnosticsCounter-v0 --out {tmp_path}/out")


def test_video_without_moviepy(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "moviepy" else found(name, *rest))
    with pytest.raises(SystemExit, match="pip install moviepy"):
        diagnose(f"--model {files}/pictures.zip --env DiagnosticsPictures-v0 --out {tmp_path}/out --video")
    assert list(tmp_path.iterdir()) == []


def test_context_longer_than_the_episodes(files: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="longest episode has 13 observations"):
        diagnose(f"--model {files}/counter.zip --env DiagnosticsCounter-v0 --out {tmp_path}/out --context 13 --episodes 1")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- files


def test_nothing_is_left_of_files_that_were_not_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    with pytest.raises(RuntimeError), saving.staged(out) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [("a", "old")]
    with saving.staged(out) as folder:
        (folder / "a").write_text("new")
        (folder / "b").mkdir()
        (folder / "b" / "c").write_text("newer")
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"]
    assert (out / "a").read_text() == "new" and (out / "b" / "c").read_text() == "newer"


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        saving.check_writable(tmp_path / "file" / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no permission to write in"):
        saving.check_writable(tmp_path / "new")
