"""DreamerGPLD as an SB3 user meets it: spaces, predict, callbacks, saving, and wrong input."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecNormalize

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.buffers import SequenceReplayBuffer
from sb3_dreamer_gpld.exploration import episodes_of

TINY: dict[str, Any] = dict(
    model_size="debug",
    batch_size=4,
    batch_length=8,
    learning_starts=32,
    train_ratio=4,
    imagination_horizon=3,
    buffer_size=2000,
    device="cpu",
    seed=0,
)


class RandomSpaces(gym.Env):
    """Random observations; the episode is cut after ten steps, or ends for good after seven."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, terminates: bool = False) -> None:
        self.observation_space, self.action_space, self.terminates = observation_space, action_space, terminates
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.actions.append(action)
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.terminates and self.steps == 7, self.steps == 10, {}


def policy_for(space: spaces.Space) -> str:
    return "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"


def tiny(env: Any, policy: str | None = None, **kwargs: Any) -> DreamerGPLD:
    if policy is None:
        policy = "MlpPolicy" if isinstance(env, str) else policy_for(env.observation_space)
    return DreamerGPLD(policy, env, **{**TINY, **kwargs})


BOX = spaces.Box(-1.0, 1.0, (3,))
OBSERVATIONS = {
    "0-d": spaces.Dict({"height": spaces.Box(-np.inf, np.inf, (), np.float64), "x": BOX}),
    "2-d": spaces.Box(-1.0, 1.0, (8, 2), np.float64),
    "huge bounds": spaces.Box(-1e10, 1e10, (2,), np.float64),
    "discrete": spaces.Discrete(500),
    "discrete start": spaces.Discrete(5, start=3),
    "multi-discrete": spaces.MultiDiscrete([3, 5]),
    "multi-discrete 2-d": spaces.MultiDiscrete(np.full((3, 3), 3)),
    "multi-discrete 2-d, first": spaces.Dict({"board": spaces.MultiDiscrete([[2, 3, 4], [5, 2, 3]]), "x": BOX}),
    "multi-discrete unsigned": spaces.MultiDiscrete([3, 300], dtype=np.uint16),
    "discrete unsigned": spaces.Discrete(500, start=2, dtype=np.uint32),
    "multi-binary": spaces.MultiBinary((3, 2)),
    "image hwc": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "image chw": spaces.Box(0, 255, (1, 16, 20), np.uint8),
    "mixed": spaces.Dict(
        {"b": spaces.Discrete(4), "a": spaces.MultiBinary(3), "image": spaces.Box(0, 255, (3, 16, 16), np.uint8), "x": BOX}
    ),
    "two image sizes": spaces.Dict(
        {"near": spaces.Box(0, 255, (3, 16, 16), np.uint8), "far": spaces.Box(0, 255, (1, 32, 20), np.uint8)}
    ),
}
ACTIONS = {
    "box": spaces.Box(np.array([-1.0, -1.0, -0.8]), np.array([1.0, 1.1, 0.8]), dtype=np.float64),
    "box float32": spaces.Box(-2.0, 2.0, (1,)),
    "discrete": spaces.Discrete(3),
    "discrete start": spaces.Discrete(3, start=-1),
    "discrete far below 0": spaces.Discrete(3, start=-5),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-binary": spaces.MultiBinary(4),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observation_spaces(name: str, tmp_path: Path) -> None:
    env = RandomSpaces(OBSERVATIONS[name], BOX)
    check_trains_and_loads(tiny(env), tmp_path)


@pytest.mark.parametrize("name", ACTIONS)
def test_action_spaces(name: str, tmp_path: Path) -> None:
    env = RandomSpaces(BOX, ACTIONS[name])
    check_trains_and_loads(tiny(env), tmp_path)


def check_trains_and_loads(model: DreamerGPLD, folder: Path) -> None:
    """Trains a little, saves, loads, and predicts the same."""
    before = th.cat([p.detach().flatten().clone() for p in model.policy.world_model.parameters()])
    model.learn(60)
    after = th.cat([p.detach().flatten() for p in model.policy.world_model.parameters()])
    assert model._n_updates >= 3 and th.isfinite(after).all() and not th.equal(before, after)
    model.save(folder / "model")
    loaded = DreamerGPLD.load(folder / "model", device="cpu")
    env = model.get_env()
    assert env is not None
    observation = env.reset()
    expected, _ = model.predict(observation, deterministic=True)
    actual, _ = loaded.predict(observation, deterministic=True)
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == env.action_space.dtype and env.action_space.contains(actual[0])


def test_normalised_float_images() -> None:
    env = RandomSpaces(spaces.Box(0.0, 1.0, (3, 20, 20)), BOX)
    model = tiny(env, "CnnPolicy", policy_kwargs=dict(normalize_images=False)).learn(50)
    assert model.policy.observation_spec.images[0].scale == 1.0 and model._n_updates > 0


# --------------------------------------------------------------------------------------------- collecting


def test_the_state_follows_every_step_with_the_action_taken() -> None:
    """The stored latents are those that the policy gets by replaying the episode with the stored actions."""
    model = tiny(RandomSpaces(BOX, BOX), action_noise=NormalActionNoise(np.zeros(3), np.full(3, 0.5)), learning_starts=1000)
    th.manual_seed(3)
    model.learn(9)
    buffer = model.replay_buffer
    assert buffer is not None
    world_model = model.policy.world_model
    observations = th.as_tensor(buffer.observations[:9, 0]).unsqueeze(0)  # (1, 9, 3)
    actions = th.as_tensor(buffer.actions[:9, 0]).unsqueeze(0)  # (1, 9, A)
    previous = th.cat([th.zeros(1, 1, 3), actions[:, :-1]], 1)
    # Replay with noise that picks the stored classes: recompute step by step.
    deter, stoch = world_model.rssm.initial(1)
    is_first = th.zeros(1, 1, dtype=th.bool)
    with th.no_grad():
        for t in range(9):
            tokens = world_model.encode({"": observations[:, t : t + 1]}, (1, 1))
            states = world_model.rssm.observe(tokens, previous[:, t : t + 1], is_first, deter, stoch, None)
            np.testing.assert_allclose(states.deter[0, 0].numpy(), buffer.deter[t, 0], atol=1e-5)
            classes = th.arange(4).unsqueeze(-1)
            stoch = (th.as_tensor(buffer.stoch[t, 0].astype(int)) == classes).float().unsqueeze(0)
            deter = states.deter[:, 0]


def test_buffer_rows_of_terminal_and_truncated_episodes() -> None:
    for terminates, steps in ((True, 7), (False, 10)):
        model = tiny(RandomSpaces(BOX, BOX, terminates), learning_starts=1000).learn(25)
        buffer = model.replay_buffer
        assert buffer is not None
        assert buffer.dones[steps, 0] == 1 and buffer.timeouts[steps, 0] == (0 if terminates else 1)
        assert buffer.is_first[0, 0] and buffer.is_first[steps + 1, 0] and buffer.is_first[:, 0].sum() == 25 // steps + 1
        assert buffer.rewards[0, 0] == 0 and buffer.rewards[steps, 0] == 1


def test_cuts_start_a_new_episode() -> None:
    model = tiny(RandomSpaces(BOX, BOX), learning_starts=1000)
    model.learn(4)
    model.learn(3)  # resets the environment
    model.set_env(RandomSpaces(BOX, BOX))
    model.learn(3, reset_num_timesteps=False)
    buffer = model.replay_buffer
    assert buffer is not None
    firsts = np.flatnonzero(buffer.is_first[:, 0])
    np.testing.assert_array_equal(firsts, [0, 5, 9])  # each cut has a closing row
    assert buffer.dones[4, 0] == 1 and buffer.timeouts[4, 0] == 1


@pytest.mark.parametrize("moved", ["evaluated", "reset", ""])
@pytest.mark.parametrize(
    "make",
    [
        lambda env: DummyVecEnv([env]),
        lambda env: VecNormalize(DummyVecEnv([env])),
        lambda env: SubprocVecEnv([env], start_method="fork"),
    ],
    ids=["dummy", "normalized", "subproc"],
)
def test_environments_that_were_moved_begin_anew(make: Callable[[Any], VecEnv], moved: str) -> None:
    """Between two calls of learn: the episode that stood open is cut there."""
    env = make(lambda: Monitor(RandomSpaces(BOX, BOX)))
    model = tiny(env, "MlpPolicy", learning_starts=1000, exploration_noise=0.1)
    model.learn(14)
    if moved == "evaluated":
        evaluate_policy(model, env, n_eval_episodes=1)
    elif moved:
        env.reset()
    model.learn(3, reset_num_timesteps=False)
    env.close()
    buffer = model.replay_buffer
    assert buffer is not None
    if moved == "reset" and isinstance(env, SubprocVecEnv):
        moved = ""  # which Monitors do not count
    assert np.flatnonzero(buffer.is_first[:, 0]).tolist() == [0, 11, *([16] if moved else [])]
    assert (buffer.dones[15, 0], buffer.timeouts[15, 0]) == ((1, 1) if moved else (0, 0))
    assert episodes_of(model._exploration) == [2 if moved else 1]


def test_a_run_that_fails_at_its_start_does_not_lose_sight_of_the_environments() -> None:
    class Refusing(BaseCallback):
        def _on_training_start(self) -> None:
            raise OSError("no room")

        def _on_step(self) -> bool:
            return True

    model = tiny(RandomSpaces(BOX, BOX), learning_starts=1000).learn(14)
    with pytest.raises(OSError, match="no room"):
        model.learn(3, Refusing(), reset_num_timesteps=False)
    env = model.get_env()
    assert env is not None
    env.reset()
    model.learn(3, reset_num_timesteps=False)
    buffer = model.replay_buffer
    assert buffer is not None
    assert np.flatnonzero(buffer.is_first[:, 0]).tolist() == [0, 11, 16]


@pytest.mark.parametrize("moved", [True, False])
def test_environments_that_were_moved_after_an_interrupted_update(moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves an episode to go on, but for those that somebody else has moved."""

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model = tiny(RandomSpaces(BOX, BOX), learning_starts=12).learn(12)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DreamerGPLD, "train", interrupted)
        model.learn(10, reset_num_timesteps=False)
    steps = model.num_timesteps
    assert 10 < steps < 20
    if moved:
        evaluate_policy(model, model.get_env(), n_eval_episodes=1)
    model.learn(1, reset_num_timesteps=False)
    buffer = model.replay_buffer
    assert buffer is not None
    assert np.flatnonzero(buffer.is_first[:, 0]).tolist() == [0, 11, *([steps + 2] if moved else [])]


@pytest.mark.parametrize("n_envs", [1, 3])
def test_update_count_follows_the_train_ratio(n_envs: int) -> None:
    env = make_vec_env(lambda: RandomSpaces(BOX, BOX), n_envs)
    model = tiny(env, "MlpPolicy", train_ratio=10.0, learning_starts=40)
    model.learn(400)
    trained_steps = model._n_updates * 4 * 8 + model.update_ratio.credit
    # Training starts with the first step at which 40 rows and a full window are there.
    assert trained_steps % (10 * n_envs) == 0
    assert (400 - 60 * n_envs) * 10 <= trained_steps <= 400 * 10
    credit = model.update_ratio.credit
    model.learn(30, reset_num_timesteps=False)
    steps = -(-30 // n_envs) * n_envs
    assert model._n_updates * 32 + model.update_ratio.credit == trained_steps + 10 * steps, credit


def test_gradient_steps_overrule_the_train_ratio() -> None:
    env = make_vec_env(lambda: RandomSpaces(BOX, BOX), 2)
    model = tiny(env, "MlpPolicy", learning_starts=0, train_freq=3, gradient_steps=-1).learn(3)
    assert model._n_updates == 6
    assert tiny(env, "MlpPolicy", buffer_size=1, learning_starts=0, gradient_steps=1).learn(6)._n_updates > 0


def test_a_window_starts_with_the_stored_latent() -> None:
    model = tiny(RandomSpaces(BOX, BOX), train_ratio=0.0).learn(40)
    assert model.replay_buffer is not None
    samples = model.replay_buffer.sample(16)
    batch = model.policy.to_batch(samples)
    assert samples.deter.any() and th.equal(batch.deter, samples.deter)
    known = samples.stoch >= 0  # (B, K); of no latent −1
    assert known.any() and not known.all()
    assert th.equal(batch.stoch.sum(-2), known.float()) and th.equal(batch.stoch.argmax(-2)[known], samples.stoch[known])


def test_latents_are_refreshed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of an update's windows have its states then: the sampled classes, and the deterministic part that led there."""
    model = tiny(RandomSpaces(BOX, BOX), train_ratio=0.0).learn(40)
    buffer, sample, update = model.replay_buffer, model.replay_buffer.sample, model.learner.update  # type: ignore[union-attr]
    kept: list[Any] = []
    monkeypatch.setattr(buffer, "sample", lambda *args, **kwargs: kept.append(sample(*args, **kwargs)) or kept[-1])
    monkeypatch.setattr(model.learner, "update", lambda *args: kept.append(update(*args)) or kept[-1])
    model.train(1, 4)
    assert buffer is not None
    samples, states = kept
    expected = {}  # of a row that is in several windows, that of the last one
    for b, (env, start) in enumerate(zip(samples.envs, samples.starts, strict=True)):
        for t in range(states.deter.shape[1]):
            expected[start + t, env] = states.deter[b, t].numpy(), states.stoch[b, t].argmax(-2).numpy()
    assert len(expected) >= 8
    for row, (deter, classes) in expected.items():
        np.testing.assert_array_equal(buffer.deter[row], deter)
        np.testing.assert_array_equal(buffer.stoch[row], classes)


def test_vec_normalize_and_frame_stack() -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    model = tiny(env, "MlpPolicy").learn(80)
    assert model._n_updates > 0
    assert tiny(VecFrameStack(make_vec_env("Pendulum-v1", 2), 3), "MlpPolicy").learn(80)._n_updates > 0


def test_features_extractor_kwargs_are_sizes_of_the_encoder() -> None:
    image, units = spaces.Box(0, 255, (3, 16, 16), np.uint8), tiny("Pendulum-v1").policy.config.units
    for space, given, size in (
        (BOX, {"features_dim": 24}, 24),
        (image, {"features_dim": 24}, 24),
        (spaces.Dict({"x": BOX, "image": image}), {"cnn_output_dim": 8}, units + 8),
    ):
        model = tiny(RandomSpaces(space, BOX), policy_kwargs={"features_extractor_kwargs": given})
        assert model.policy.world_model.encoder.size == size


def test_arguments_of_the_optimiser() -> None:
    """They hold in both groups, where the actor has a learning rate of its own."""
    kwargs = dict(optimizer_kwargs=dict(clip=0.1, eps=1e-8))
    for rate, count in ((None, 1), (1e-4, 2)):
        groups = tiny("Pendulum-v1", actor_learning_rate=rate, policy_kwargs=kwargs).policy.optimizer.param_groups
        assert [(group["clip"], group["eps"]) for group in groups] == [(0.1, 1e-8)] * count


def test_arguments_of_the_penalty() -> None:
    changed = {
        "posterior": ("posterior_penalty", 0.4),
        "prior": ("prior_penalty", 0.3),
        "fraction": ("penalty_fraction", 0.7),
        "rows": ("penalty_rows", 2),
        "random_rows": ("penalty_random_rows", True),
        "estimator": ("penalty_estimator", "exact"),
        "schedule": ("penalty_schedule", {"name": "linear", "decay_steps": 9}),
        "minimum": ("penalty_min", 0.01),
    }
    plain, model = tiny("Pendulum-v1"), tiny("Pendulum-v1", **dict(changed.values()))
    for name, (_, value) in changed.items():
        assert getattr(model.penalty, name) == value != getattr(plain.penalty, name), name


def test_subprocesses() -> None:
    env = make_vec_env("Pendulum-v1", 2, vec_env_cls=SubprocVecEnv)
    assert tiny(env, "MlpPolicy").learn(80)._n_updates > 0
    env.close()


# ------------------------------------------------------------------------------------------------ predict


def test_predict_keeps_and_drops_the_state() -> None:
    env = DummyVecEnv([lambda: RandomSpaces(BOX, BOX) for _ in range(3)])
    model = tiny(env, "MlpPolicy").learn(60)
    observation = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    start = np.array([True, False, False])
    kept = start.copy()
    _, fresh = model.predict(observation, deterministic=True)
    _, second = model.predict(observation, fresh, deterministic=True)
    assert fresh is not None and second is not None
    _, mixed = model.predict(observation, fresh, start, deterministic=True)
    assert mixed is not None
    for a, b, c in zip(fresh, second, mixed, strict=True):
        np.testing.assert_allclose(c[0], a[0], atol=1e-6)  # dropped: as if fresh
        np.testing.assert_allclose(c[1:], b[1:], atol=1e-6)  # kept
    assert not np.allclose(fresh[0], second[0])
    np.testing.assert_array_equal(start, kept)
    assert model.predict(observation[:1])[0].shape == (1, 3) and model.predict(observation[0])[0].shape == (3,)
    with pytest.raises(ValueError, match="state belongs to 3 environments, but there are 1"):
        model.predict(observation[:1], fresh)
    with pytest.raises(ValueError, match="state has 2 parts; allowed: a state that this policy returned"):
        model.predict(observation, fresh[:2])  # as RecurrentPPO's
    for number, name in enumerate(("deter", "stoch", "action")):  # of nets of another size, or of other actions
        other = tuple(x[:, 1:] if i == number else x for i, x in enumerate(fresh))
        shapes = f"{other[number].shape}, and this policy's has {fresh[number].shape}; allowed: a state that this"
        with pytest.raises(ValueError, match=re.escape(f"state holds a {name} of shape {shapes}")):
            model.predict(observation, other)
    np.testing.assert_array_equal(
        model.predict(observation, tuple(x.astype(np.float64) for x in fresh), deterministic=True)[1][0],
        second[0],  # type: ignore[index]
    )
    with pytest.raises(ValueError, match="mixing Gym API"):
        model.predict((observation, {}))


def test_deterministic_predict_draws_nothing() -> None:
    model = tiny("Pendulum-v1")
    observation = np.zeros(3, dtype=np.float32)
    generators = th.get_rng_state(), np.random.get_state()[1].copy()
    actions = [model.predict(observation, deterministic=True)[0] for _ in range(2)]
    np.testing.assert_array_equal(*actions)
    assert th.equal(generators[0], th.get_rng_state()) and (generators[1] == np.random.get_state()[1]).all()
    assert not np.array_equal(model.predict(observation)[0], model.predict(observation)[0])


def test_latents_and_actions_are_sampled() -> None:
    """Classes as often as they are probable, and actions with the deviation around the mean that each latent gives."""
    n, model = 4000, tiny("Pendulum-v1")
    policy, observation = model.policy, np.ones((n, 3), dtype=np.float32)
    th.nn.init.normal_(policy.world_model.rssm.posterior.output.parts[0].weight)  # far from equal probabilities
    th.manual_seed(0)
    _, state = model.predict(observation, episode_start=np.ones(n, dtype=bool))
    assert state is not None
    deter, stoch, actions = map(th.as_tensor, state)  # (n, D), (n, C, K), (n, 1)
    with th.no_grad():
        tokens = policy.world_model.encode({"": th.as_tensor(observation)}, (n, 1)).squeeze(1)
        rssm = policy.world_model.rssm
        probs = rssm.probabilities(rssm.posterior_logits(th.cat([deter, tokens], -1)))[0]  # (C, K)
        outputs = policy.actor_critic.policy(th.cat([deter, stoch.flatten(1)], -1))
        mean, std = policy.actor_critic.distribution.parameters(outputs)  # type: ignore[union-attr]
    assert (probs.max(0).values - probs.min(0).values).min() > 0.1
    error = (stoch.mean(0) - probs).abs() / (probs * (1 - probs) / n).sqrt()
    assert error.max() < 4.5
    inside = actions.abs() < 1
    clipped = 1 - th.distributions.Normal(mean, std).cdf(th.ones(())) + th.distributions.Normal(mean, std).cdf(-th.ones(()))
    assert 1 - inside.float().mean() == pytest.approx(clipped.mean().item(), abs=0.03)
    middle = ((actions - mean).abs() < 0.5 * std) & inside
    assert middle.float().mean().item() == pytest.approx(0.383, abs=0.03)  # of a normal distribution


def test_evaluation_leaves_the_collecting_state_alone() -> None:
    model = tiny("Pendulum-v1").learn(50)
    assert model._state is not None
    before = [x.clone() for x in model._state.parts]
    model.predict(np.ones((5, 3), dtype=np.float32), deterministic=True)
    for a, b in zip(before, model._state.parts, strict=True):
        assert th.equal(a, b)


def test_forward_is_what_the_export_guide_calls() -> None:
    model = tiny("Pendulum-v1")
    observation = th.zeros(2, 3)
    action = model.policy(observation, deterministic=True)
    assert action.shape == (2, 1) and (action.abs() <= 1).all()
    expected, _ = model.predict(observation.numpy(), deterministic=True)
    np.testing.assert_allclose(2.0 * action.numpy(), expected, rtol=1e-5)  # Pendulum's torque is in [-2, 2]


# ---------------------------------------------------------------------------------- callbacks and saving


def test_callbacks_and_tensorboard(tmp_path: Path) -> None:
    model = tiny("Pendulum-v1", tensorboard_log=str(tmp_path), learning_rate_warmup=1000)
    evaluation = EvalCallback(gym.make("Pendulum-v1"), n_eval_episodes=1, eval_freq=150, best_model_save_path=str(tmp_path))
    checkpoint = CheckpointCallback(150, str(tmp_path), save_replay_buffer=True)
    model.learn(420, callback=[evaluation, checkpoint], log_interval=1, progress_bar=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"best_model.zip", "rl_model_150_steps.zip", "rl_model_replay_buffer_300_steps.pkl", "DreamerGPLD_1"} <= names
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "DreamerGPLD_1"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {
        "rollout/ep_rew_mean",
        "train/learning_rate",
        "train/grad_norm",
        "loss/dyn",
        "loss/reconstruction",
        "loss/policy",
    }
    assert expected | {"gpld/posterior_lambda", "gpld/posterior_penalty", "actor_critic/entropy"} <= tags
    assert 0.4 < events.Scalars("gpld/posterior_lambda")[0].value <= 0.5
    reached = model.policy.optimizer.param_groups[0]["lr"]  # some updates after the last log, amid the warm-up
    assert 0.9 * reached < events.Scalars("train/learning_rate")[-1].value < reached < 0.1 * model.learning_rate


def test_save_and_load_continue(tmp_path: Path) -> None:
    model = tiny("Pendulum-v1", posterior_penalty=0.25, penalty_schedule={"name": "linear", "decay_steps": 50}).learn(120)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DreamerGPLD.load(tmp_path / "model", env=gym.make("Pendulum-v1"), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded._n_updates == model._n_updates and loaded.posterior_penalty == 0.25
    assert loaded.penalty.schedule_parameters == {"decay_steps": 50}
    for (name, a), b in zip(model.policy.state_dict().items(), loaded.policy.state_dict().values(), strict=True):
        assert th.equal(a, b), name
    step = next(iter(model.policy.optimizer.state.values()))["step"]
    assert next(iter(loaded.policy.optimizer.state.values()))["step"] == step == model._n_updates
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded._n_updates > model._n_updates


def test_policy_save_and_load(tmp_path: Path) -> None:
    model = tiny("Pendulum-v1", policy_kwargs=dict(net_arch=[8], deter=64))
    model.policy.save(str(tmp_path / "policy"))
    policy = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    observation = np.zeros(3, dtype=np.float32)
    expected, _ = model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(policy.predict(observation, deterministic=True)[0], expected)


def test_same_seed_same_parameters() -> None:
    def parameters(seed: int) -> th.Tensor:
        model = tiny("Pendulum-v1", seed=seed).learn(80)
        return th.cat([p.detach().flatten() for p in model.policy.parameters()])

    first = parameters(1)
    assert th.equal(first, parameters(1)) and not th.equal(first, parameters(2))


def test_bfloat16_learns_the_same_losses() -> None:
    """The same update in both precisions: losses agree to the rounding of bfloat16."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = tiny(RandomSpaces(BOX, BOX), precision=precision, learning_starts=1000).learn(40)
        model.train(1, 4)
        losses[precision] = {name: x for name, x in model.learner.metrics.take().items() if name.startswith("loss/")}
    assert all(p.dtype == th.float32 for p in model.policy.parameters())
    assert losses["bfloat16"]["loss/reconstruction"] != losses["float32"]["loss/reconstruction"]
    for name, value in losses["float32"].items():
        assert losses["bfloat16"][name] == pytest.approx(value, rel=0.05, abs=0.02), name


# -------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        (dict(model_size="2m"), ValueError, "model_size '2m'.*Allowed: debug, 1m"),
        (dict(model_size="12M"), ValueError, "model_size '12M' does not exist. Did you mean '12m'"),
        (dict(batch_length=0), ValueError, "batch_length must be .* at least 1"),
        (dict(batch_size=0), ValueError, "batch_size"),
        (dict(imagination_horizon=0), ValueError, "imagination_horizon"),
        (dict(posterior_penalty=-1), ValueError, "posterior_penalty"),
        (dict(penalty_fraction=1.5), ValueError, "penalty_fraction"),
        (dict(penalty_fraction=0.0), ValueError, "penalty_fraction"),
        (dict(penalty_rows=5), ValueError, "penalty_rows must be at most 4"),
        (dict(penalty_estimator="exakt"), ValueError, "Did you mean 'exact'"),
        (dict(penalty_schedule="sqrt"), ValueError, "penalty_schedule 'sqrt'"),
        (dict(policy_kwargs=dict(dter=64)), TypeError, "Did you mean 'deter'"),
        (dict(policy_kwargs=dict(deter=30)), ValueError, "deter must be a multiple of blocks"),
        (dict(policy_kwargs=dict(net_arch=[0])), ValueError, "policy_arch"),
        (dict(policy_kwargs=dict(features_extractor_kwargs=dict(dim=3))), TypeError, "features_dim"),
        (dict(policy_kwargs=dict(net_arch=64)), ValueError, "policy_arch must be a list"),
        (dict(policy_kwargs=dict(unimix=1.0)), ValueError, "unimix"),
        (dict(penalty_schedule=None), ValueError, "penalty_schedule must be a name or a dict"),
        (dict(penalty_schedule={"name": "custom", "steps": [-5], "values": [0.1]}), ValueError, "penalty_schedule's steps"),
        (dict(precision="float16"), ValueError, "precision"),
        (dict(compile="yes"), ValueError, "compile"),
        (dict(train_ratio=-1), ValueError, "train_ratio"),
        (dict(gamma=1.5), ValueError, "gamma"),
        (dict(optimize_memory_usage=True), ValueError, "optimize_memory_usage"),
        (dict(train_freq=(1, "hour")), ValueError, "train_freq"),
        (dict(learning_rate=None), ValueError, "learning_rate .* not None"),
        (dict(policy_kwargs="x"), TypeError, "policy_kwargs must be a dict"),
        (dict(policy_kwargs=dict(optimizer_class="adam")), TypeError, "'optimizer_class' must be a class.* not 'adam'"),
        (dict(policy_kwargs=dict(model_size="1m")), TypeError, "'model_size' is not allowed: it is an argument of"),
        (dict(policy_kwargs=dict(planner="mppi")), TypeError, "'planner' is not allowed: it is an argument of DreamerGPLD"),
        (dict(policy_kwargs=dict(actor_group=True)), TypeError, "actor_learning_rate of DreamerGPLD"),
        (dict(replay_buffer_kwargs=[1]), TypeError, "replay_buffer_kwargs must be a dict"),
        (dict(replay_buffer_class="x"), ValueError, "replay_buffer_class must be SequenceReplayBuffer.* not x"),
        (dict(action_noise=0.1), TypeError, "action_noise must be None or an ActionNoise.*exploration_noise"),
        (dict(seed="a"), ValueError, "seed"),
        (dict(seed=1.5), ValueError, "seed"),
        (dict(penalty_random_rows="no"), ValueError, "penalty_random_rows must be True or False"),
        (dict(planner="mppi", plan_in_training="no"), ValueError, "plan_in_training must be True or False"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        tiny("Pendulum-v1", **kwargs)


def test_wrong_policies_and_spaces() -> None:
    with pytest.raises(ValueError, match="Policy MlpPolic unknown"):
        tiny("Pendulum-v1", "MlpPolic")
    with pytest.raises(ValueError, match="policy must be one of 'MlpPolicy'.* not None"):
        DreamerGPLD(None, "Pendulum-v1", **TINY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="env must be an environment.* not None"):
        DreamerGPLD("MlpPolicy", None, **TINY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a Dict"):
        tiny("Pendulum-v1", "MultiInputPolicy")
    with pytest.raises(AssertionError, match="CnnPolicy needs images"):
        tiny("Pendulum-v1", "CnnPolicy")
    with pytest.raises(ValueError, match="12x40 pixels; allowed: at least 16"):
        tiny(RandomSpaces(spaces.Box(0, 255, (3, 12, 40), np.uint8), BOX), "CnnPolicy")
    with pytest.raises(ValueError, match="Tuple space; allowed: Box, Discrete"):
        tiny(RandomSpaces(spaces.Tuple([BOX, BOX]), BOX), "MlpPolicy")
    with pytest.raises(ValueError, match=r"MultiDiscrete that starts at \[1, 1\]; allowed: starts at 0"):
        tiny(RandomSpaces(BOX, spaces.MultiDiscrete([3, 3], start=[1, 1])))
    from stable_baselines3.common.buffers import ReplayBuffer

    with pytest.raises(ValueError, match="SequenceReplayBuffer"):
        tiny("Pendulum-v1", replay_buffer_class=ReplayBuffer)
    assert tiny("Pendulum-v1", policy_kwargs=MappingProxyType(dict(units=8))).policy.config.units == 8  # as of OmegaConf


class Faulty(RandomSpaces):
    """Gives a number that is not finite at one step."""

    def __init__(self, what: str, value: float, at: int = 5) -> None:
        super().__init__(spaces.Dict({"x": BOX, "y": BOX}), BOX)
        self.what, self.value, self.at, self.total = what, value, at, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        observation, reward, *others = super().step(action)
        self.total += 1
        if self.total == self.at:
            if self.what == "reward":
                reward = self.value
            else:
                observation["y"][1] = self.value
        return observation, reward, *others  # type: ignore[return-value]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("what, text", [("reward", "the reward"), ("observation", "observation 'y'")])
def test_not_finite_numbers_stop_before_the_buffer(what: str, text: str, value: float) -> None:
    env = DummyVecEnv([lambda: RandomSpaces(spaces.Dict({"x": BOX, "y": BOX}), BOX), lambda: Faulty(what, value)])
    model = tiny(env, "MultiInputPolicy", learning_starts=1000)
    with pytest.raises(ValueError, match=f"{text} of environment 1 is not finite at step 10"):
        model.learn(40)
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    np.testing.assert_array_equal(model.replay_buffer.rows_added, [4, 4])


def test_not_finite_terminal_observation() -> None:
    model = tiny(DummyVecEnv([lambda: Faulty("observation", np.nan, at=10)]), "MultiInputPolicy", learning_starts=1000)
    with pytest.raises(ValueError, match="terminal observation 'y' of environment 0 is not finite"):
        model.learn(40)


def test_not_finite_loss_leaves_the_parameters_alone() -> None:
    model = tiny("Pendulum-v1", learning_starts=1000).learn(40)
    assert model.replay_buffer is not None
    model.train(1, 4)
    model.replay_buffer.rewards[:] = np.nan  # as no environment can do it
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    with pytest.raises(FloatingPointError, match="reward.*the parameters were not changed"):
        model.train(1, 4)
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, before[name]), name


def test_no_warning_in_a_plain_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        tiny(RandomSpaces(BOX, BOX)).learn(60)


# ------------------------------------------------------------------------------------------------- the actor's objective


def rates(trained: DreamerGPLD) -> list[float]:
    return [group["lr"] for group in trained.policy.optimizer.param_groups]


def test_actor_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    """Warmed up with the other, by its own schedule, saved and loaded."""
    own = dict(learning_rate=1e-3, actor_learning_rate=lambda left: 1e-4 * left, learning_rate_warmup=4)
    trained = tiny("Pendulum-v1", **own)
    before = {name: p.clone() for name, p in trained.policy.named_parameters()}
    trained.learn(40)  # one update, with a rate of 0
    assert trained._n_updates == 1 and rates(trained) == [0.0, 0.0]
    trained.learn(24, reset_num_timesteps=False)
    assert trained._n_updates == 4
    left = trained._current_progress_remaining
    assert rates(trained) == pytest.approx([0.75e-3, 0.75e-4 * left])
    assert trained.logger.name_to_value["train/actor_learning_rate"] == rates(trained)[1]
    changed = {name for name, p in trained.policy.named_parameters() if not th.equal(p, before[name])}
    assert any(name.startswith("actor_critic.policy") for name in changed)
    trained.save(tmp_path / "model")
    loaded = DreamerGPLD.load(tmp_path / "model", env=trained.env, device="cpu")
    assert rates(loaded) == rates(trained)
    actor = {id(p) for p in loaded.policy.actor_critic.policy.parameters()}
    others, own_group = loaded.policy.optimizer.param_groups
    assert {id(p) for p in own_group["params"]} == actor and not actor & {id(p) for p in others["params"]}
    loaded.learn(80, reset_num_timesteps=False)


def test_actor_without_a_learning_rate_stays() -> None:
    trained = tiny("Pendulum-v1", actor_learning_rate=0.0, learning_rate=1e-3, learning_rate_warmup=0)
    before = {name: p.clone() for name, p in trained.policy.named_parameters() if p.requires_grad}
    trained.learn(80)
    same = {name for name, p in trained.policy.named_parameters() if p.requires_grad and th.equal(p, before[name])}
    assert same == {name for name in before if name.startswith("actor_critic.policy")}


def test_optimizer_of_another_choice_is_refused(tmp_path: Path) -> None:
    tiny("Pendulum-v1", actor_learning_rate=1e-4).save(tmp_path / "model")
    with pytest.raises(ValueError, match="actor_learning_rate is None. Allowed: the same choice"):
        DreamerGPLD.load(tmp_path / "model", actor_learning_rate=None)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_trains_with_the_actors_options(compile: bool) -> None:
    options = dict(
        actor_gradient="dynamics",
        ent_coef="auto",
        target_entropy=1.41,
        imagination_starts=2,
        actor_learning_rate=3e-5,
        compile=compile,
    )
    trained = tiny("Pendulum-v1", learning_rate_warmup=0, **options).learn(60)
    assert 0 < trained.policy.actor_critic.ent_coef_rise.item() <= 0.01 * trained._n_updates
    assert trained.logger is not None and np.isfinite(list(trained.predict(np.zeros(3, np.float32))[0])).all()
    tiny("CartPole-v1", actor_gradient="auto", ent_coef="auto", imagination_starts=2).learn(40)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(actor_gradient="backprop"), "actor_gradient 'backprop'"),
        (dict(actor_gradient=2.0), "actor_gradient"),
        (dict(imagination_starts=0), "imagination_starts"),
        (dict(imagination_starts=9), "imagination_starts must be at most batch_length=8, not 9"),
        (dict(imagination_starts=1.5), "imagination_starts"),
        (dict(ent_coef="aut"), "ent_coef"),
        (dict(target_entropy="none"), "target_entropy"),
        (dict(ent_coef="auto", target_entropy=1.42), r"target_entropy=1.42 is 1.42 nats, .* Allowed: less than 1.419"),
        (dict(ent_coef="auto", policy_kwargs=dict(min_std=0.05, max_std=0.2)), "'auto' is 0 nats, .* less than -0.1905"),
        (dict(imagination_starts=6, replay_buffer_kwargs=dict(batch_length=4)), "at most batch_length=4, not 6"),
        (dict(actor_learning_rate=-1e-4), "actor_learning_rate"),
        (dict(actor_learning_rate="fast"), "actor_learning_rate"),
    ],
)
def test_wrong_objectives_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("Pendulum-v1", **wrong)


def test_gradients_through_the_dynamics_need_a_box() -> None:
    with pytest.raises(ValueError, match="needs actions in a Box"):
        tiny("CartPole-v1", actor_gradient="dynamics")
