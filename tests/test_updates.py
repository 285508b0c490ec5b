"""What updates are made of: which numbers reach them, when they begin, and what a failed one leaves alone."""

from __future__ import annotations

import copy
import csv
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_dreamer_gpld import BOX, TINY, RandomSpaces, tiny
from test_saving import Clock

from sb3_dreamer_gpld import DreamerGPLD, dreamer_gpld
from sb3_dreamer_gpld.exploration import RETURN_RATE, correlated_noise, episodes_of
from sb3_dreamer_gpld.learner import Draws
from sb3_dreamer_gpld.nets.world_model import Batch
from sb3_dreamer_gpld.pace import updates_per_step
from sb3_dreamer_gpld.parallel import Processes
from sb3_dreamer_gpld.policies import DreamerPolicy


def batches_of(model: DreamerGPLD, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batch, Draws]]:
    """Batches and random numbers of the updates that the model makes from now on."""
    seen: list[tuple[Batch, Draws]] = []
    loss = model.learner.weighted_loss

    def recording(batch: Batch, draws: Draws, *args: Any) -> Any:
        seen.append((batch, draws))
        return loss(batch, draws, *args)

    monkeypatch.setattr(model.learner, "weighted_loss", recording)
    return seen


def test_replayed_numbers_are_normalised_as_they_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 1, seed=0), clip_obs=100.0, clip_reward=100.0)
    model = tiny(env, "MlpPolicy").learn(60)
    assert model.replay_buffer is not None
    generator = copy.deepcopy(model.replay_buffer.rng)
    seen = batches_of(model, monkeypatch)
    model.train(1, 4)
    ((batch, _),) = seen
    # The same windows without the statistics: what is stored is what the environment gave.
    model.replay_buffer.rng = generator
    raw = model.replay_buffer.sample(4)
    assert not np.allclose(raw.observations, batch.observations[""])
    expected = env.normalize_obs(raw.observations.numpy())  # type: ignore[union-attr]
    np.testing.assert_allclose(batch.observations[""], expected, rtol=1e-4, atol=1e-5)
    started = ~raw.is_first.numpy()  # the first reward of an episode is 0, and stays so
    rewards = env.normalize_reward(raw.rewards.numpy().copy())
    np.testing.assert_allclose(batch.rewards.numpy()[started], rewards[started], rtol=1e-4, atol=1e-5)


def test_rewards_are_stored_as_the_environment_gave_them() -> None:
    env = VecNormalize(DummyVecEnv([lambda: RandomSpaces(BOX, BOX)]))  # which gives a reward of 1 at each step
    buffer = tiny(env, "MlpPolicy", learning_starts=1000).learn(15).replay_buffer
    assert buffer is not None and buffer.size() == 16
    np.testing.assert_array_equal(buffer.rewards[:16, 0], np.where(buffer.is_first[:16, 0], 0.0, 1.0))


def test_a_loss_is_computed_without_the_gradients_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory would add to its own; they can be looked at until then."""
    model = tiny(RandomSpaces(BOX, BOX), "MlpPolicy", learning_starts=20).learn(40)
    parameters = list(model.policy.parameters())
    assert any(each.grad is not None for each in parameters)
    loss, held = model.learner.weighted_loss, []
    monkeypatch.setattr(
        model.learner, "weighted_loss", lambda *args: held.append([each.grad for each in parameters]) or loss(*args)
    )
    model.train(1)
    assert held == [[None] * len(parameters)]


class Constant(ActionNoise):
    """The same noise at every step."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def __call__(self) -> np.ndarray:
        return np.full((1, 1), self.value)


def test_action_noise_reaches_environment_buffer_and_state() -> None:
    """An action is the one without noise, with the same random numbers, and the noise; clipped it goes to all three."""
    model = tiny("Pendulum-v1", action_noise=Constant(-0.5)).learn(3)
    before = model._state
    th.manual_seed(5)
    _, without = model._sample_action(0, None, 1)
    model._state = before
    th.manual_seed(5)
    action, stored = model._sample_action(0, model.action_noise, 1)
    assert model._state is not None
    expected = np.clip(without - 0.5, -1, 1)
    np.testing.assert_allclose(stored, expected, rtol=1e-5)
    np.testing.assert_allclose(action, 2.0 * expected, rtol=1e-5)  # Pendulum's actions are in [−2, 2]
    np.testing.assert_allclose(model._state.action, expected, rtol=1e-5)


def test_every_step_has_random_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each sequence, each start and each step: of the posterior's samples, the prior's, and the actions."""
    model = tiny("Pendulum-v1").learn(40)
    seen = batches_of(model, monkeypatch)
    model.train(2, 4)
    for name in ("posterior", "prior", "action"):
        of_updates = {
            "posterior": [draws.world_model.stoch for _, draws in seen],  # (B, T, K)
            "prior": [draws.imagination.stoch for _, draws in seen],  # (H, N, K)
            "action": [draws.imagination.action for _, draws in seen],  # (H, N, A)
        }[name]
        numbers = th.stack(of_updates)
        assert numbers.unique().numel() > 0.99 * numbers.numel(), name


def test_states_follow_the_numbers_of_their_own_step() -> None:
    """Other numbers at one step change the samples of that step and later ones, and of none before it."""
    world_model = tiny("Pendulum-v1").policy.world_model
    config = world_model.config
    tokens, actions = th.randn(2, 6, world_model.encoder.size), th.zeros(2, 6, 1)
    first = th.zeros(2, 6, dtype=th.bool)
    start = th.zeros(2, config.deter), th.zeros(2, config.classes, config.stoch)
    noise = th.rand(2, 6, config.stoch)
    other = noise.clone()
    other[:, 3] = 1.0 - other[:, 3]
    with th.no_grad():
        a, b = (world_model.rssm.observe(tokens, actions, first, *start, numbers) for numbers in (noise, other))
    assert th.equal(a.stoch[:, :3], b.stoch[:, :3]) and not th.equal(a.stoch[:, 3], b.stoch[:, 3])
    assert th.equal(a.deter[:, :4], b.deter[:, :4]) and not th.equal(a.deter[:, 4], b.deter[:, 4])


def test_warm_up_begins_with_no_step_at_all() -> None:
    model = tiny("Pendulum-v1", learning_rate=1e-2, learning_rate_warmup=3)
    rates = []
    before = {name: p.clone() for name, p in model.policy.named_parameters() if p.requires_grad}
    for steps in (40, 8, 8, 8, 8):
        model.learn(steps, reset_num_timesteps=False)
        rates.append(model.policy.optimizer.param_groups[0]["lr"])
        if len(rates) == 1:
            assert model._n_updates == 1
            assert all(th.equal(p, before[name]) for name, p in model.policy.named_parameters() if p.requires_grad)
    assert rates == pytest.approx([0.0, 1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])


def test_updates_wait_for_a_whole_window() -> None:
    model = tiny("Pendulum-v1", learning_starts=2, batch_length=16, batch_size=1, train_ratio=16)
    model.learn(12)
    assert model._n_updates == 0
    model.learn(12, reset_num_timesteps=False)
    assert model._n_updates > 0


def test_a_failed_update_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, the slow value, which would go on following the value, the percentiles and the entropy's coefficient."""
    options = dict(ent_coef="auto", target_entropy=1.41, learning_rate=1e-2, learning_rate_warmup=0)
    model = tiny("Pendulum-v1", **{**TINY, **options}).learn(80)
    critic = model.policy.actor_critic
    pairs = zip(critic.value.parameters(), critic.slow_value.parameters(), strict=True)
    assert any(not th.equal(value, slow) for value, slow in pairs) and critic.percentiles.abs().sum() > 0
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    update = model.learner.update

    def poisoned(batch: Batch, *args: Any) -> Any:
        rewards = batch.rewards.clone()
        rewards[0, 0] = np.nan
        return update(batch._replace(rewards=rewards), *args)

    monkeypatch.setattr(model.learner, "update", poisoned)
    with pytest.raises(FloatingPointError, match="losses .*reward.* became not finite"):
        model.train(1, 4)
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, before[name]), name


@pytest.mark.parametrize("storage", ["host", "device"])
def test_a_failed_update_leaves_no_latents_that_are_not_finite(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Pendulum-v1", replay_buffer_kwargs={"storage": storage}).learn(80)
    assert model.replay_buffer is not None
    with monkeypatch.context() as patch:
        encode = model.policy.world_model.encoder.forward
        patch.setattr(model.policy.world_model.encoder, "forward", lambda *args: encode(*args).mul_(th.nan))
        with pytest.raises(FloatingPointError, match="the parameters were not changed"):
            model.train(1, 64)
    for _ in range(20):
        samples = model.replay_buffer.sample(16)
        later = th.as_tensor(samples.starts) > 1  # the first row is before every window, and in none
        assert samples.deter.isfinite().all() and (samples.deter[later] == 0).all() and (samples.stoch[later] == -1).all()
    model.train(20, 16)


def test_what_another_optimiser_does_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Pendulum-v1", policy_kwargs={"optimizer_class": th.optim.AdamW}).learn(40)
    monkeypatch.setattr(model.policy.world_model, "predict_reward", lambda outputs: outputs[..., 0] * th.nan)
    with pytest.raises(FloatingPointError, match="became not finite; the optimiser went on with its momentum alone"):
        model.train(1, 4)


def test_the_learning_rate_ends_at_0() -> None:
    """The last episode ends behind the run's end, where the share that is left would be negative."""
    model = tiny(
        "Pendulum-v1", train_freq=(1, "episode"), learning_rate=lambda left: 1e-3 * left, learning_rate_warmup=0, train_ratio=8
    )
    model.learn(210)  # two episodes of 200 steps
    assert model.num_timesteps == 400 and model._current_progress_remaining < 0 < model._n_updates
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [0.0]


def test_processes_wait_until_all_have_a_whole_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradient_steps too: windows that still grow have another length in each process."""
    model = tiny("Pendulum-v1", gradient_steps=1).learn(40)
    ready = 2.0
    monkeypatch.setattr(model, "processes", Processes(0, 2))
    monkeypatch.setattr(Processes, "sums", lambda self, numbers: [1e6, ready])
    assert model._can_update()
    ready = 1.0
    assert not model._can_update()


@pytest.mark.parametrize("saved", [False, True])
def test_updates_are_due_after_what_an_interrupted_collection_stored(saved: bool, tmp_path: Path) -> None:
    """By Ctrl-C, or in a file that is written within it."""

    class At(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 151:  # the step itself is not stored
                if not saved:
                    raise KeyboardInterrupt
                self.model.save(tmp_path / "model")
            return True

    model = tiny("Pendulum-v1", train_freq=(1, "episode"), train_ratio=4)
    if saved:
        model.learn(200, callback=At())
        assert model.update_ratio.credit == (200 * 4) % (4 * 8)
        model = DreamerGPLD.load(tmp_path / "model", device="cpu")
    else:
        with pytest.raises(KeyboardInterrupt):
            model.learn(200, callback=At())
    assert model.update_ratio.credit == 150 * 4
    model.save(tmp_path / "again")
    assert DreamerGPLD.load(tmp_path / "again", device="cpu").update_ratio.credit == 150 * 4


@pytest.mark.parametrize("envs", [1, 2])
def test_first_update_at_the_step_of_the_release(envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/algorithm.md says which learning_starts waits until B·T windows can be drawn."""
    windows_wanted, steps = 4 * 8, 8
    env = make_vec_env("Pendulum-v1", envs, seed=0)
    model = tiny(env, "MlpPolicy", learning_starts=windows_wanted - 1 + steps * envs, train_ratio=32)
    windows: list[int] = []
    train = model.train

    def counting(gradient_steps: int, batch_size: int) -> None:
        assert model.replay_buffer is not None
        windows.append(int((model.replay_buffer.stored_rows() - steps).sum()))
        train(gradient_steps, batch_size)

    monkeypatch.setattr(model, "train", counting)
    model.learn(100)
    assert windows[0] == windows_wanted


class StopAfter(BaseCallback):
    """Stops at a step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.n_calls < self.steps


@pytest.mark.parametrize("envs, share", [(1, 1.0), (2, 0.5)])
@pytest.mark.parametrize("steps", [30, 40], ids=["within an episode", "at its end"])
def test_a_run_that_a_callback_stopped_goes_on_as_if_it_had_not(steps: int, envs: int, share: float) -> None:
    """What is stored is the same, the latents and the noise in the actions too: the step at which it stopped is not lost."""

    def run() -> DreamerGPLD:
        settings = dict(learning_starts=1000, exploration_noise=0.5, exploration_share=share)
        return tiny(DummyVecEnv([Clock] * envs), "MlpPolicy", **settings)

    whole = run().learn(60 * envs)
    stopped = run().learn(60 * envs, callback=StopAfter(steps))
    assert stopped.num_timesteps == steps * envs
    stopped.learn((60 - steps) * envs, reset_num_timesteps=False)
    a, b = whole.replay_buffer, stopped.replay_buffer
    assert a is not None and b is not None and a.size() == b.size() == 63  # with the last observations of three episodes
    drawn = [buffer.peek(64, np.random.default_rng(0)) for buffer in (a, b)]
    for one, other in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one, other)
    assert whole._episode_num == stopped._episode_num == 3 * envs
    assert whole.ep_info_buffer is not None and stopped.ep_info_buffer is not None
    assert [info["r"] for info in whole.ep_info_buffer] == [info["r"] for info in stopped.ep_info_buffer]


@pytest.mark.parametrize("train_freq", [1, 4])
def test_updates_that_a_stop_left_undone_are_made_when_the_run_goes_on(train_freq: int) -> None:
    whole, stopped = (tiny(Clock(), train_freq=train_freq, train_ratio=24) for _ in range(2))
    whole.learn(80)
    stopped.learn(80, callback=StopAfter(50))
    stopped.learn(30, reset_num_timesteps=False)
    made = [model._n_updates * 4 * 8 + model.update_ratio.credit for model in (whole, stopped)]
    steps = [80, 50 + -(-30 // train_freq) * train_freq]
    assert made[1] - made[0] == 24 * (steps[1] - steps[0])
    fixed = tiny(Clock(), gradient_steps=1, learning_starts=8).learn(80, callback=StopAfter(50))
    assert fixed._n_updates == 49 - 8 and fixed.update_ratio.credit == 0  # a fixed number for each collection leaves nothing


class Interrupt(BaseCallback):
    """Ctrl-C at a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.n_calls == self.step:
            raise KeyboardInterrupt
        return True


@pytest.mark.parametrize("step", [15, 20], ids=["within an episode", "at its end"])
def test_a_run_that_was_interrupted_begins_another_episode(step: int) -> None:
    """The step at which it was is lost, as in Stable-Baselines3, and nothing is joined across it."""
    model = tiny(Clock(), learning_starts=1000)
    with pytest.raises(KeyboardInterrupt):
        model.learn(60, callback=Interrupt(step))
    model.learn(5, reset_num_timesteps=False)
    buffer = model.replay_buffer
    assert buffer is not None and buffer.rows_added.item() == step + 5  # one is the last observation of the cut episode
    assert np.flatnonzero(buffer.is_first[:, 0]).tolist() == [0, step]
    assert np.flatnonzero(buffer.dones[:, 0]).tolist() == [step - 1] == np.flatnonzero(buffer.timeouts[:, 0]).tolist()


def test_windows_that_still_grow_are_not_compiled() -> None:
    """Each length would be compiled by itself, and soon given up."""
    model = tiny(DummyVecEnv([Clock] * 2), "MlpPolicy", gradient_steps=1, learning_starts=8)
    model.learner.execution.compiled = True  # as compile() does, without the compiler
    seen: list[tuple[int, bool]] = []
    update = model.learner.update

    def noting(batch: Batch, *args: Any) -> Any:
        seen.append((batch.rewards.shape[1], model.learner.execution.compiled))
        with model.learner.execution.plain():
            return update(batch, *args)

    model.learner.update = noting  # type: ignore[method-assign]
    model.learn(40)
    growing = [compiled for length, compiled in seen if length < 8]
    assert growing and not any(growing) and seen[-1] == (8, True)


def test_the_length_of_windows_is_that_of_the_buffer() -> None:
    """``replay_buffer_kwargs`` may name another one, and the train ratio holds for it."""
    model = tiny("Pendulum-v1", train_ratio=8, replay_buffer_kwargs={"batch_length": 4}).learn(80)
    assert model._n_updates == (80 - 32) * 8 // (4 * 4)
    assert tiny("Pendulum-v1", train_ratio=None, replay_buffer_kwargs={"batch_length": 4}).train_ratio == 4 * 4 / 2


def test_a_penalty_that_is_to_start_later_waits_again() -> None:
    model = tiny("Pendulum-v1").learn(60)
    first = model._n_updates
    assert model.penalty.start == 0 < first
    model.penalty_start = 100
    model.learn(60, reset_num_timesteps=False)
    start = model.penalty.start
    assert first < start < model._n_updates
    model.penalty_start = 50  # which is over
    model.learn(8, reset_num_timesteps=False)
    model.learn(60)  # a second run of the same model, whose penalty has started
    assert model.penalty.start == start


@pytest.mark.parametrize(
    "settings, steps, expected",
    [
        (dict(train_ratio=8), 1, 8 / 32),
        (dict(gradient_steps=-1), 1, 1.0),
        (dict(gradient_steps=3, train_freq=10), 2, 3 / 20),
        (dict(gradient_steps=40, train_freq=(2, "episode")), 1, 40 / (2 * 20)),
        (dict(gradient_steps=0), 1, 0.0),
    ],
)
def test_updates_per_step(settings: dict[str, Any], steps: int, expected: float) -> None:
    """``compile="auto"`` looks at them. Where updates come after episodes, their length is known when some have ended."""
    model = tiny(DummyVecEnv([lambda: Monitor(Clock())] * steps), "MlpPolicy", learning_starts=1000, **settings)
    before = updates_per_step(model)
    assert before == (0.0 if "episode" in str(settings) else expected)
    model.learn(60)
    assert updates_per_step(model) == pytest.approx(expected)


def test_updates_after_episodes_are_compiled_when_their_length_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    settings = dict(gradient_steps=40, train_freq=(1, "episode"), compile="auto", learning_starts=10_000)
    model = tiny(Monitor(Clock()), "MlpPolicy", **settings)
    monkeypatch.setattr(dreamer_gpld, "AUTO_COMPILE_UPDATES", 100)
    monkeypatch.setattr(model.learner.execution, "compile", lambda leave_out: compiled.append(model.num_timesteps))
    model.learn(60)  # 40 updates after each of the two episodes that are left are less than 100
    assert compiled == []
    model.learn(100, callback=StopAfter(20))  # four are left
    assert compiled == []  # it was stopped before
    model.learn(100, callback=StopAfter(21))
    assert compiled == [20]


def test_environments_that_end_together_log_losses_once(tmp_path: Path) -> None:
    """Losses and the share of updates are those of the time since the last log, not of none at all."""
    model = tiny(DummyVecEnv([lambda: Monitor(Clock())] * 4), "MlpPolicy")
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(240, log_interval=2)
    rows = list(csv.DictReader((tmp_path / "progress.csv").open()))
    assert [int(row["time/total_timesteps"]) for row in rows] == [80, 80, 160, 160, 240, 240]
    assert all(float(row["time/update_share"]) > 0 and row["loss/dyn"] for row in rows[0::2])
    assert all(row["time/update_share"] == row["loss/dyn"] == "" for row in rows[1::2])


def test_each_log_of_tensorboard_is_closed(tmp_path: Path) -> None:
    model = tiny("Pendulum-v1", tensorboard_log=str(tmp_path))
    others = set(threading.enumerate())
    for _ in range(3):
        model.learn(10, reset_num_timesteps=False)
        assert len(set(threading.enumerate()) - others) == 1


# ------------------------------------------------------------------------------------------------------- exploration


def test_correlated_noise_has_the_deviation_asked_for_and_lasts() -> None:
    np.random.seed(0)
    noise = correlated_noise(0.3, 200, 1)
    steps = np.stack([noise() for _ in range(400)])[100:]  # (300, A)
    assert steps.std() == pytest.approx(0.3, rel=0.03)
    for lag in (1, 5):
        correlation = (steps[:-lag] * steps[lag:]).mean() / steps.var()
        assert correlation == pytest.approx((1 - RETURN_RATE) ** lag, abs=0.03)
    noise.reset()
    assert np.abs(noise()).mean() < 0.3 * np.sqrt(1 - (1 - RETURN_RATE) ** 2)  # it starts at 0


def test_each_environment_has_noise_of_its_own() -> None:
    noise = correlated_noise(0.3, 2, 3)
    first = noise()
    assert first.shape == (3, 2) and len(np.unique(first)) == 6
    noise.reset(indices=[1])  # type: ignore[call-arg]
    following = noise()
    assert not np.allclose(following[0], following[1])


@pytest.mark.parametrize("share, noisy", [(1.0, "1111111"), (0.5, "0101010"), (0.25, "0001000"), (0.7, "0110110")])
def test_a_share_of_the_episodes_has_noise(share: float, noisy: str) -> None:
    """Also from an episode in the middle on; each environment has episodes of its own, and they take turns."""
    for before in (0, 2):
        noise = correlated_noise(0.3, 2, 1, share, [before])
        for expected in noisy[before:]:
            assert [noise().any() for _ in range(3)] == [expected == "1"] * 3
            noise.reset()
    several = correlated_noise(0.3, 2, 3, share)
    assert several().any(-1).tolist() == [each == "1" for each in noisy[:3]]
    several.reset(indices=[1])  # type: ignore[call-arg]
    several.reset(indices=[1, 2])  # type: ignore[call-arg]
    assert episodes_of(several) == [0, 3, 3]
    assert several().any(-1).tolist() == [noisy[i] == "1" for i in (0, 3, 3)]


class Short(Clock):
    """Episodes of 8 steps instead of 20."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated or self.steps == 8, info


def test_noise_of_a_share_of_the_episodes_goes_on_from_files(tmp_path: Path) -> None:
    """Environments with episodes of different length have had different numbers of them."""
    settings: dict[str, Any] = dict(exploration_noise=0.3, exploration_share=0.5, learning_starts=1000)
    env = DummyVecEnv([Clock, Short])
    model = tiny(env, "MlpPolicy", **settings)
    assert episodes_of(model._exploration) == [0, 1]
    model.learn(2 * 20)  # one episode of the first, two and a half of the second
    assert episodes_of(model._exploration) == [1, 3]
    model.save(tmp_path / "model")
    assert episodes_of(DreamerGPLD.load(tmp_path / "model", env=env)._exploration) == [1, 3]
    alone = DreamerGPLD.load(tmp_path / "model", env=DummyVecEnv([Clock]))  # another number of environments: 3 episodes of one
    assert episodes_of(alone._exploration) == [3]
    model.learn(2)  # from the beginning
    assert episodes_of(model._exploration) == [0, 1]


@pytest.mark.parametrize("envs", [1, 2])
def test_exploration_noise_is_added_to_what_is_collected_alone(envs: int) -> None:
    """Training episodes have it, also over several calls of learn; predict has none."""
    model = tiny(make_vec_env("Pendulum-v1", envs, seed=0), "MlpPolicy", exploration_noise=0.5, learning_starts=10_000)
    noises: list[np.ndarray] = []
    assert model._exploration is not None
    original = type(model._exploration).__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model._exploration), "__call__", lambda self: noises.append(original(self)) or noises[-1])
        model.learn(10 * envs)
        model.learn(10 * envs, reset_num_timesteps=False)
        assert len(noises) == 20
        model.predict(np.zeros((envs, 3), np.float32))
        assert len(noises) == 20
    steps = np.stack(noises).reshape(20, -1)
    increments = steps[1:] - (1 - RETURN_RATE) * steps[:-1]  # what is new at each step, through both calls
    assert np.abs(increments).max() < 5 * 0.5 * np.sqrt(1 - (1 - RETURN_RATE) ** 2) and np.abs(steps).max() > 0.2


def test_exploration_noise_is_for_boxes_and_gives_way_to_action_noise() -> None:
    discrete = tiny("CartPole-v1", exploration_noise=0.5).learn(40)
    assert discrete._exploration is None and discrete._n_updates > 0
    given = tiny("Pendulum-v1", exploration_noise=0.5, action_noise=Constant(0.0), learning_starts=1000).learn(3)
    plain = tiny("Pendulum-v1", learning_starts=1000).learn(3)
    for model in (given, plain):
        assert model.replay_buffer is not None
    np.testing.assert_array_equal(
        given.replay_buffer.peek(2, np.random.default_rng(0)).prev_actions,  # type: ignore[union-attr]
        plain.replay_buffer.peek(2, np.random.default_rng(0)).prev_actions,  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_wrong_exploration_noise_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="exploration_noise must be a number"):
        tiny("Pendulum-v1", exploration_noise=wrong)


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.1, float("nan"), "0.5", None, True])
def test_wrong_exploration_share_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"exploration_share must be a number in \(0"):
        tiny("Pendulum-v1", exploration_noise=0.1, exploration_share=wrong)


@pytest.mark.parametrize("settings", [{}, {"exploration_share": 0.5, "replay_buffer_kwargs": {"recency": 0.5}}])
def test_a_run_with_exploration_noise_goes_on_from_its_files(settings: dict[str, Any], tmp_path: Path) -> None:
    def run() -> DreamerGPLD:
        return tiny(Clock(), exploration_noise=0.3, **settings)

    whole = run().learn(80)
    first = run().learn(40)  # two episodes
    first.save(tmp_path / "model")
    first.save_replay_buffer(tmp_path / "buffer")
    resumed = DreamerGPLD.load(tmp_path / "model", env=Clock(), device="cpu")
    resumed.load_replay_buffer(tmp_path / "buffer")
    resumed.learn(40, reset_num_timesteps=False)
    for name, value in whole.policy.state_dict().items():
        assert th.equal(value, resumed.policy.state_dict()[name]), name


def test_the_penalty_on_the_policy_is_a_loss_of_the_update() -> None:
    """It counts in the total with its weight, and is neither computed nor logged without one."""
    logged = []
    for weight in (0.0, 10.0):
        model = tiny(RandomSpaces(BOX, BOX), policy_penalty=weight, train_ratio=0.0).learn(40, log_interval=None)
        model.train(1, 4)
        logged.append(model.learner.metrics.take())
    without, with_it = logged
    assert set(with_it) - set(without) == {"loss/policy_penalty"} and with_it["loss/policy_penalty"] > 0
    added = with_it["loss/total"] - without["loss/total"]
    assert added == pytest.approx(10.0 * with_it["loss/policy_penalty"], rel=1e-3)


# ------------------------------------------------------------------------------------ attributes that change


def test_learn_follows_attributes_that_have_changed() -> None:
    model = tiny(RandomSpaces(BOX, BOX), exploration_noise=0.3).learn(40)
    updates, noise = model._n_updates, model._exploration
    model.batch_length, model.exploration_noise, model.learning_rate, model.train_freq = 4, 0.1, 0.5, 2
    assert model.replay_buffer is not None
    model.learn(32, reset_num_timesteps=False)
    assert model.replay_buffer.sample(2).rewards.shape == (2, 4) and model._n_updates - updates == 32 * 4 // (4 * 4)
    assert model._exploration is not noise and model.train_freq == TrainFreq(2, TrainFrequencyUnit.STEP)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * model._n_updates / 1000, rel=0.2)  # warm-up
    noise = model._exploration
    model.learn(2, reset_num_timesteps=False)
    assert model._exploration is noise


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("gamma", 2.0, "gamma must be a number in"),
        ("batch_length", 0, "batch_length must be"),
        ("penalty_rows", 99, "penalty_rows must be at most 4"),
        ("train_freq", "x", "train_freq"),
        ("actor_learning_rate", 1e-3, "actor_learning_rate=0.001 has changed since the model was made; allowed: None"),
        ("planner", "mppi", r"planner='mppi' has changed since the policy was made; allowed: as it was, or save the model"),
    ],
)
def test_attributes_of_wrong_values_are_refused_before_the_first_step(name: str, value: Any, message: str) -> None:
    model = tiny(RandomSpaces(BOX, BOX)).learn(10)
    setattr(model, name, value)
    with pytest.raises(ValueError, match=message):
        model.learn(10, reset_num_timesteps=False)
    assert model.num_timesteps == 10


class Planning(DreamerPolicy):
    """Plans, whether the algorithm asks for it or not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        planner = dict(samples=8, policy_samples=2, elites=2, iterations=1)
        super().__init__(*args, **{**kwargs, "planner": planner})


def test_a_planner_of_the_policy_stays() -> None:
    """The argument has not changed, whatever the policy made of it."""
    model = tiny(RandomSpaces(BOX, BOX), Planning)
    model.learn(5)
    assert model.policy.planner is not None and model.planner is None


def test_a_buffer_without_room_for_a_window_is_told() -> None:
    """There is no update, ever; with gradient_steps shorter windows are drawn."""
    env = make_vec_env(lambda: RandomSpaces(BOX, BOX), 4)
    with pytest.warns(UserWarning, match="no update: buffer_size=32 is 8 rows for each of 4 environments, in which no window"):
        assert tiny(env, buffer_size=32).learn(200)._n_updates == 0
    model = tiny(env, buffer_size=36).learn(200)
    assert model._n_updates > 0
    model.batch_length = 20
    with pytest.warns(UserWarning, match="no update: buffer_size=36 is 9 rows for each of 4 environments"):
        model.learn(8, reset_num_timesteps=False)
    assert tiny(env, buffer_size=32, gradient_steps=1, learning_starts=16).learn(100)._n_updates > 0
