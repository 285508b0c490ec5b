"""What a run says about itself: its pace, and warnings of runs and calls that cannot do what was meant."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.callbacks import CallbackList, CheckpointCallback, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env
from test_dreamer_gpld import tiny
from test_saving import Clock as ClockEnv

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.pace import AGAIN_SECONDS, FIRST_SECONDS, Pace, spell_seconds, tell

UPDATE_EACH_STEP = 32  # train_ratio of a tiny model


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(pace: Pace, clock: Clock, seconds: float, steps: range) -> list[str]:
    """What is told while an update is made at each of the steps, ``seconds`` apart."""
    told = []
    for step in steps:
        clock.now += seconds
        text = pace.after(1, step)
        told += [] if text is None else [text]
    return told


def test_pace_is_told_once_and_does_not_count_the_first_update() -> None:
    clock = Clock()
    pace = Pace(10_000, clock)
    clock.now += 200.0  # collecting and compiling
    assert pace.after(1, 1000) is None
    told = run(pace, clock, 0.5, range(1002, 2000, 2))  # 2 updates and 4 steps a second
    after = 1000 + 2 * round(FIRST_SECONDS / 0.5)
    assert told == [f"2 updates and 4 steps per second, {spell_seconds((10_000 - after) / 4)} left"]


@pytest.mark.parametrize(("factor", "times"), [(3.0, 1), (1 / 3, 1), (1.2, 0), (1 / 1.2, 0)])
def test_pace_is_told_again_when_it_changes_much(factor: float, times: int) -> None:
    clock = Clock()
    pace = Pace(100_000, clock)
    pace.after(1, 1000)
    assert len(run(pace, clock, 0.5, range(1001, 1011))) == 1
    told = run(pace, clock, 0.5 * factor, range(1011, 1011 + round(AGAIN_SECONDS / (0.5 * factor)) + 1))
    assert len(told) == times
    if told:
        assert f"{2 / factor:.3g} updates" in told[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (50, "50 s"),
        (89, "89 s"),
        (720, "12 min"),
        (3599, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert spell_seconds(seconds) == text


def test_a_run_prints_its_pace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sb3_dreamer_gpld.pace.FIRST_SECONDS", 0.01)
    tiny("Pendulum-v1", learning_starts=16, verbose=1, train_ratio=UPDATE_EACH_STEP).learn(40, log_interval=None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Learning: ")]
    assert len(lines) == 1 and lines[0].endswith(" s left")
    tiny("Pendulum-v1", learning_starts=16, train_ratio=UPDATE_EACH_STEP).learn(40, log_interval=None)
    assert capsys.readouterr().out == ""


def test_the_progress_bar_shows_the_pace() -> None:
    class Bar:
        text = ""

        def set_description(self, text: str) -> None:
            self.text = text

    progress = ProgressBarCallback()
    progress.pbar = Bar()
    for callback in (progress, CallbackList([CallbackList([CheckpointCallback(10, "nowhere"), progress])])):
        progress.pbar.text = ""
        tell("2 updates per second", callback, verbose=0)
        assert progress.pbar.text == "2 updates per second"


@pytest.mark.parametrize("gradient_steps", [None, 1])
@pytest.mark.parametrize(("steps", "warns"), [(20, True), (60, True), (70, False)])
def test_a_run_that_ends_before_the_first_update_warns(gradient_steps: int | None, steps: int, warns: bool) -> None:
    model = tiny("Pendulum-v1", learning_starts=64, gradient_steps=gradient_steps, train_ratio=UPDATE_EACH_STEP)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(steps, log_interval=None)
    told = [warning for warning in caught if "before the first update" in str(warning.message)]
    assert bool(told) == warns == (model._n_updates == 0)
    if warns:
        assert "learning_starts=64" in str(told[0].message) and told[0].filename == __file__


def test_steps_of_many_environments_and_short_episodes_are_counted_as_rows() -> None:
    """64 steps are too few for windows of 8 in each of 16 environments; 44 are enough for 45 rows of short episodes."""
    env = make_vec_env(ClockEnv, 16)
    with pytest.warns(UserWarning, match="of one of the 16 environments more than batch_length=8, and"):
        assert tiny(env, "MlpPolicy", learning_starts=16).learn(64, log_interval=None)._n_updates == 0
    short = TimeLimit(ClockEnv(), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert tiny(short, "MlpPolicy", learning_starts=45).learn(44, log_interval=None)._n_updates > 0


def test_a_run_that_only_collects_says_nothing() -> None:
    model = tiny("Pendulum-v1", learning_starts=64, train_ratio=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.learn(20, log_interval=None)


def test_a_run_in_pieces_says_nothing() -> None:
    model = tiny("Pendulum-v1", learning_starts=64, train_ratio=UPDATE_EACH_STEP)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.learn(20, reset_num_timesteps=False, log_interval=None)


def lost_state(calls: int, **kwargs: object) -> int:
    """Warnings of a state that is lost, from calls of predict with these arguments."""
    model = tiny("CartPole-v1")
    obs = np.zeros(4, dtype=np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            model.predict(obs, **kwargs)
    return sum("without a state" in str(warning.message) for warning in caught)


def test_predict_without_its_state_warns_once() -> None:
    assert lost_state(9) == 0
    assert lost_state(50) == 1
    assert lost_state(50, episode_start=np.array([False])) == 1


def test_predict_at_starts_of_episodes_is_silent() -> None:
    assert lost_state(50, episode_start=np.array([True])) == 0


def test_predict_with_its_state_is_silent() -> None:
    env = gym.make("CartPole-v1")
    model = tiny(env, "MlpPolicy")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for seed in range(30):
            obs, _ = env.reset(seed=seed)
            action, state = model.predict(obs)
            model.predict(obs, state)


@pytest.mark.skipif(th.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said() -> None:
    with pytest.warns(UserWarning, match="device='cuda', but PyTorch finds no GPU: the nets are on 'cpu'") as caught:
        DreamerGPLD("MlpPolicy", "CartPole-v1", model_size="debug", device="cuda")
    assert [each.filename for each in caught if "finds no GPU" in str(each.message)] == [__file__]
