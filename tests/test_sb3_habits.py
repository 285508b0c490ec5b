"""What users of Stable-Baselines3 do by habit: it works as there, or an error says what works here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.sac.policies import MlpPolicy as SACPolicy
from test_dreamer_gpld import BOX, RandomSpaces, tiny

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.diagnostics.callbacks import SmoothnessCallback
from sb3_dreamer_gpld.export import export_policy
from sb3_dreamer_gpld.parallel import Processes


@pytest.mark.parametrize(
    "entry, text",
    [
        ({"activation_fn": th.nn.ReLU}, "every hidden layer is linear, RMSNorm and SiLU"),
        ({"share_features_extractor": False}, "policy and value always see the states of the same world model"),
        ({"n_critics": 2}, "there is one value net"),
        ({"lstm_hidden_size": 64}, "of size deter"),
        ({"log_std_init": -2}, "min_std"),
        ({"features_extractor_class": object}, "world_model_class"),
    ],
)
def test_entries_of_other_policies_are_explained(entry: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=f"policy_kwargs entry '{next(iter(entry))}' does not exist: .*{text}"):
        tiny("Pendulum-v1", policy_kwargs=entry)


def test_layers_of_policy_and_value() -> None:
    """By the name of the value in on-policy or in off-policy algorithms."""
    for name in ("vf", "qf"):
        critic = tiny("Pendulum-v1", policy_kwargs={"net_arch": {"pi": [8], name: [12, 20]}}).policy.actor_critic
        widths = [[layer.linear.out_features for layer in net.layers] for net in (critic.policy, critic.value)]
        assert widths == [[8], [12, 20]]
    with pytest.raises(ValueError, match="net_arch entry 'pf' does not exist.* Allowed: pi, vf, qf"):
        tiny("Pendulum-v1", policy_kwargs={"net_arch": {"pf": [8]}})


def test_a_policy_of_another_algorithm() -> None:
    with pytest.raises(ValueError, match="policy must be one of 'MlpPolicy', .*, not SACPolicy"):
        tiny("Pendulum-v1", SACPolicy)


def test_what_is_no_gymnasium_environment() -> None:
    """SB3 says what is wrong with it."""
    with pytest.raises(ValueError, match="not a Gymnasium environment"):
        DreamerGPLD("MlpPolicy", object())  # type: ignore[arg-type]


def test_losses_are_in_the_logger_after_updates(tmp_path: Path) -> None:
    """As those of SAC: a callback can read them; what is written at the end of an episode are the means over its updates."""
    read: list[dict[str, float]] = []

    class Reads(BaseCallback):
        def _on_step(self) -> bool:
            read.append(dict(self.logger.name_to_value))
            return True

    model = tiny("Pendulum-v1", train_ratio=8)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(60, callback=Reads())
    seen = [values["loss/policy"] for values in read if "loss/policy" in values]
    assert len(seen) > 10 and len(set(seen)) > 2 and "loss/policy" not in read[20]
    assert model.logger.name_to_value["loss/policy"] == pytest.approx(model.learner.metrics.means()["loss/policy"])
    (kept,) = {model.learner.metrics.take()["loss/reward"]}
    assert np.isfinite(kept) and model.learner.metrics.means() == {}


def test_long_keys_are_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SB3's table shortens names, and stops at two that are the same then; other formats have both."""
    space = spaces.Dict({f"walker/sensors_velocimeter_{name}": BOX for name in ("left", "right")})
    model = tiny(RandomSpaces(space, BOX))
    model.set_logger(configure(str(tmp_path), ["stdout", "csv"]))
    model.learn(80, log_interval=2)
    assert capsys.readouterr().out.count("reconstruction/walker/sensors_") >= 1
    header = (tmp_path / "progress.csv").read_text().splitlines()[0]
    assert "loss/reconstruction/walker/sensors_velocimeter_left" in header and "velocimeter_right" in header


def test_normalised_images_of_floats() -> None:
    """Their space goes on saying what they were, by which they would be scaled; VecNormalize changes that of uint8 only."""
    for low, high, dtype, allowed in ((0, 255, np.uint8, True), (0, 1, np.float32, False), (-1, 1, np.float32, False)):
        space = spaces.Box(low, high, (16, 16, 1), dtype)
        env = VecNormalize(DummyVecEnv([lambda space=space: RandomSpaces(space, BOX)]))
        model = tiny(env, "CnnPolicy", policy_kwargs=dict(normalize_images=False))
        if allowed:
            model.learn(3)
        else:
            with pytest.raises(ValueError, match="VecNormalize normalises the observation, an image .* from .* to 1; allowed"):
                model.learn(3)


@pytest.mark.parametrize("own", [None, 1e-3])
def test_a_schedule_in_place_of_the_models(own: float | None) -> None:
    """``lr_schedule`` holds from the next update on, and over the next run, until ``learning_rate`` changes."""

    class Lower(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 50:
                self.model.lr_schedule = FloatSchedule(1e-5)
            return True

    model = tiny("Pendulum-v1", learning_rate_warmup=0, learning_rate=1e-3, actor_learning_rate=own)
    rates = model.policy.optimizer.param_groups
    model.learn(45)
    assert rates[0]["lr"] == 1e-3
    model.learn(60, callback=Lower(), reset_num_timesteps=False)
    assert [group["lr"] for group in rates] == [1e-5, own][: len(rates)]
    model.learn(20, reset_num_timesteps=False)
    assert rates[0]["lr"] == 1e-5
    if own is not None:
        model.actor_learning_rate = 3e-4
        model.learn(20, reset_num_timesteps=False)
        assert [group["lr"] for group in rates] == [1e-5, 3e-4]
    model.learning_rate = 2e-4
    model.learn(20, reset_num_timesteps=False)
    assert rates[0]["lr"] == 2e-4


def test_training_by_hand(tmp_path: Path) -> None:
    model = tiny("Pendulum-v1", learning_starts=1000).learn(40)
    model.train(2)
    assert model._n_updates == 2
    other = tiny("Pendulum-v1")
    other.replay_buffer = model.replay_buffer
    before = [p.clone() for p in other.policy.parameters()]
    with pytest.raises(AttributeError, match="logger"):
        other.train(2)
    assert other._n_updates == 0 and all(map(th.equal, before, other.policy.parameters()))


def test_seeds_of_a_loaded_run(tmp_path: Path) -> None:
    """``set_random_seed`` gives it random numbers of its own, as ``load(seed=...)`` does."""
    model = tiny("Pendulum-v1", learning_starts=1000).learn(30)
    model.save(tmp_path / "model")

    def going_on(seed: int | None) -> np.ndarray:
        loaded = DreamerGPLD.load(tmp_path / "model", env=DummyVecEnv([make_pendulum]), device="cpu")
        loaded.set_random_seed(seed)
        loaded.learn(10, reset_num_timesteps=False)
        assert loaded.replay_buffer is not None
        return loaded.replay_buffer.actions[:10].copy()

    as_saved, one, again, two = going_on(None), going_on(1), going_on(1), going_on(2)
    assert np.array_equal(one, again) and not np.array_equal(one, two) and not np.array_equal(one, as_saved)
    assert np.array_equal(as_saved, going_on(None))
    two_processes = DreamerGPLD.load(tmp_path / "model", env=DummyVecEnv([make_pendulum]), device="cpu")
    two_processes.processes = Processes(1, 2)
    two_processes.set_random_seed(1)
    assert th.initial_seed() != 1


def make_pendulum() -> Any:
    import gymnasium

    return gymnasium.make("Pendulum-v1")


def test_an_optimiser_with_other_groups() -> None:
    class Split(th.optim.AdamW):
        def __init__(self, params: Any, **kwargs: Any) -> None:
            (group,) = params
            super().__init__([{"params": group["params"][:3]}, {"params": group["params"][3:]}], **kwargs)

    with pytest.raises(ValueError, match="the optimiser has 2 groups of parameters; allowed: 1, which has all"):
        tiny("Pendulum-v1", policy_kwargs={"optimizer_class": Split})


def test_a_policy_that_was_compiled_as_a_whole(tmp_path: Path) -> None:
    """As the documentation of SB3 shows it. The package's own tools find the policy in it."""
    model = tiny("Pendulum-v1", train_ratio=8)
    model.policy = th.compile(model.policy, backend="eager")  # type: ignore[assignment]
    model.learn(60, callback=SmoothnessCallback(eval_freq=50, n_windows=2))
    assert export_policy(model, tmp_path / "policy.pt2").is_file()


def test_a_logger_of_two_models_stays_open(tmp_path: Path) -> None:
    one, two = tiny("Pendulum-v1", tensorboard_log=str(tmp_path)), tiny("Pendulum-v1")
    one.learn(10)
    two.set_logger(one.logger)
    one.learn(10)
    two.learn(80, log_interval=1)
    two.logger.record("mine", 1.0)
    two.logger.dump(80)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
@pytest.mark.parametrize("envs", [1, 2])
def test_noise_of_any_shape(shape: tuple[int, ...], envs: int) -> None:
    """One number for all, one for each in a row, or in the shape of the actions; and the algorithm's own."""
    size = int(np.prod(shape))
    for noise_shape in ((1,), (size,), shape or (1,)):
        env = DummyVecEnv([lambda: RandomSpaces(BOX, spaces.Box(-1.0, 1.0, shape))] * envs)
        model = tiny(env, "MlpPolicy", action_noise=NormalActionNoise(np.full(noise_shape, -9.0), np.zeros(noise_shape)))
        model.learn(6)
        assert (np.array(env.envs[0].actions) == -1.0).all() and np.shape(env.envs[0].actions[0]) == shape
    env = DummyVecEnv([lambda: RandomSpaces(BOX, spaces.Box(-1.0, 1.0, shape))] * envs)
    tiny(env, "MlpPolicy", exploration_noise=0.3).learn(6)


def test_a_frequency_of_nothing() -> None:
    with pytest.raises(ValueError, match="train_freq must be a whole number of at least 1, not 0"):
        tiny("Pendulum-v1", train_freq=0, gradient_steps=1).learn(5)
