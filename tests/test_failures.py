"""Environments that fail: the run ends with an error that names what failed, and what was saved before can be used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor
from test_dreamer_gpld import BOX, RandomSpaces, tiny

from sb3_dreamer_gpld import DreamerGPLD

DICT = spaces.Dict({"x": BOX, "y": BOX})


class Failing(RandomSpaces):
    """Does something wrong at one of its steps.

    :param wrong: takes the observation, gives the wrong one or raises
    :param at: the step, counted over all episodes; 0: at the first reset
    """

    def __init__(self, wrong: Callable[[Any], Any], at: int = 25) -> None:
        super().__init__(DICT, BOX)
        self.wrong, self.at, self.total = wrong, at, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        observation, info = super().reset(seed=seed)
        return (self.wrong(observation) if self.at == 0 and self.total == 0 else observation), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        observation, *others = super().step(action)
        self.total += 1
        return self.wrong(observation) if self.total == self.at else observation, *others  # type: ignore[return-value]


def crash(observation: Any) -> Any:
    raise ZeroDivisionError("the simulator broke")


def too_long(observation: Any) -> Any:
    return {**observation, "y": np.zeros(4, dtype=np.float32)}


def nan(observation: Any) -> Any:
    return {**observation, "y": np.array([0, np.nan, 0], dtype=np.float32)}


def missing(observation: Any) -> Any:
    return {"x": observation["x"]}


def good() -> RandomSpaces:
    return RandomSpaces(DICT, BOX)


def check_saved_before(model: DreamerGPLD, folder: Path, steps: int) -> None:
    """The checkpoint of that step loads and learns on; so does the model that met the error, in a new environment."""
    loaded = DreamerGPLD.load(folder / f"rl_model_{steps}_steps", DummyVecEnv([good, good]), device="cpu")
    loaded.load_replay_buffer(folder / f"rl_model_replay_buffer_{steps}_steps")
    assert loaded.num_timesteps == steps and loaded.replay_buffer is not None
    assert loaded.replay_buffer.stored_rows().min() >= steps // 2 - 1
    model.set_env(DummyVecEnv([good, good]))
    for agent in (loaded, model):
        updates = agent._n_updates
        agent.learn(40, reset_num_timesteps=False)
        assert agent._n_updates > updates > 0


@pytest.mark.parametrize(
    "wrong, error, text",
    [
        (crash, ZeroDivisionError, "the simulator broke"),
        (too_long, ValueError, r"could not broadcast .*shape \(4,\) into shape \(3,\)"),
        (nan, ValueError, "observation 'y' of environment 1 is not finite at step 50"),
        (missing, KeyError, "^'y'"),
    ],
)
def test_an_environment_that_fails(wrong: Callable[[Any], Any], error: type[Exception], text: str, tmp_path: Path) -> None:
    model = tiny(DummyVecEnv([good, lambda: Failing(wrong)]), "MultiInputPolicy")
    checkpoint = CheckpointCallback(20, str(tmp_path), save_replay_buffer=True)
    with pytest.raises(error, match=text) as info:
        model.learn(100, callback=checkpoint)
    assert model.num_timesteps == (50 if wrong is nan else 48)
    if wrong is not nan and sys.version_info >= (3, 11):
        assert info.value.__notes__ == ["It was raised at step 48 by environment 1"]
    check_saved_before(model, tmp_path, 40)


@pytest.mark.parametrize(
    "wrong, error, text",
    [
        (crash, ZeroDivisionError, "the simulator broke"),
        (too_long, ValueError, r"shape \(4,\) into shape \(3,\)"),
        (nan, ValueError, "observation 'y' of environment 1 is not finite at step 0"),
    ],
)
def test_an_environment_that_fails_at_its_first_reset(wrong: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    model = tiny(DummyVecEnv([good, lambda: Failing(wrong, at=0)]), "MultiInputPolicy")
    with pytest.raises(error, match=text):
        model.learn(100)
    assert model.num_timesteps == 0


class Kill(BaseCallback):
    """Kills the process of one environment in the middle of the run."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def _on_step(self) -> bool:
        if self.n_calls == 25:
            env = self.training_env.unwrapped
            assert isinstance(env, SubprocVecEnv)
            pid = env.processes[self.number].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        return True


def close(env: SubprocVecEnv) -> None:
    """All processes are gone with the one that was lost: ``close`` would wait for the others' answer for good."""
    assert env.closed and not any(process.is_alive() for process in env.processes)
    env.close()


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    env = SubprocVecEnv([good, good])
    try:
        model = tiny(VecMonitor(env), "MultiInputPolicy")
        with pytest.raises(RuntimeError, match="At step 50 the process of environment 1 was killed by signal 9") as info:
            model.learn(100, callback=[CheckpointCallback(20, str(tmp_path), save_replay_buffer=True), Kill(1)])
        assert isinstance(info.value.__cause__, (EOFError, ConnectionError))
    finally:
        close(env)
    check_saved_before(model, tmp_path, 40)


KILLED = """
import sys
sys.path.insert(0, {folder!r})
from test_failures import Kill, SubprocVecEnv, good, tiny
env = SubprocVecEnv([good, good])
try:
    tiny(env, "MultiInputPolicy").learn(100, callback=Kill(0))
except RuntimeError as error:
    print(error)
env.close()
"""


def test_the_other_processes_end_without_a_word() -> None:
    """Nobody reads what they have answered any more. In a process of its own: those that others have begun write elsewhere."""
    script = KILLED.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert "the process of environment 0 was killed by signal 9" in done.stdout and "Traceback" not in done.stderr


def test_an_error_in_a_process() -> None:
    env = SubprocVecEnv([lambda: Failing(crash, at=5)])
    try:
        with pytest.raises(
            RuntimeError, match="At step 4 the process of environment 0 ended with code 1; an error of its own"
        ):
            tiny(env, "MultiInputPolicy").learn(100)
    finally:
        close(env)


def test_an_error_in_a_process_at_its_first_reset() -> None:
    env = SubprocVecEnv([good, lambda: Failing(crash, at=0)])
    try:
        with pytest.raises(RuntimeError, match="At step 0 the process of environment 1 ended with code 1; an error"):
            tiny(env, "MultiInputPolicy").learn(100)
    finally:
        close(env)


def test_a_wrong_shape_from_a_process() -> None:
    """Nothing on the way looks at the shape if there is one environment only; the buffer does."""
    env = SubprocVecEnv([lambda: Failing(too_long, at=5)])
    try:
        model = tiny(env, "MultiInputPolicy")
        with pytest.raises(ValueError, match=r"obs\['y'\]: expected shape \(1, 3\), received \(1, 4\)"):
            model.learn(100)
        assert model.replay_buffer is not None
        np.testing.assert_array_equal(model.replay_buffer.rows_added, [4])
    finally:
        env.close()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes before Python 3.11")
def test_a_wrong_shape_from_one_process_of_several() -> None:
    env = SubprocVecEnv([good, lambda: Failing(too_long, at=5)])
    try:
        with pytest.raises(ValueError, match="same shape") as info:
            tiny(env, "MultiInputPolicy").learn(100)
        (note,) = info.value.__notes__
        assert note.endswith("by environment 1, observation 'y': expected shape (3,), received (4,)")
    finally:
        env.close()


def test_errors_outside_of_the_environments_get_no_note() -> None:
    class Broken(BaseCallback):
        def _on_step(self) -> bool:
            raise ZeroDivisionError("of the callback")

    with pytest.raises(ZeroDivisionError) as info:
        tiny(DummyVecEnv([good]), "MultiInputPolicy").learn(100, callback=Broken())
    assert not hasattr(info.value, "__notes__")


def test_a_broken_connection_of_an_environments_own() -> None:
    """Not mistaken for a lost process."""

    def refuse(observation: Any) -> Any:
        raise ConnectionRefusedError("no server at port 1")

    with pytest.raises(ConnectionRefusedError, match="no server at port 1"):
        tiny(DummyVecEnv([lambda: Failing(refuse)]), "MultiInputPolicy").learn(100)
