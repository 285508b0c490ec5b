"""Meta-World itself, where it is installed: `make test-metaworld`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

from sb3_dreamer_gpld.envs import METAWORLD, ActionRepeat, make_metaworld, registered, steps_per_second
from sb3_dreamer_gpld.presets import CONFIGS

pytest.importorskip("metaworld")

TASKS = ["reach", "drawer-close", "button-press"]
TINY = "model_size:'debug' batch_size:4 batch_length:8 train_ratio:16 learning_starts:64 imagination_horizon:3".split()


def test_the_hyperparameter_file_has_all_tasks() -> None:
    METAWORLD.register()
    entries = yaml.safe_load((CONFIGS / "dreamer_gpld_metaworld.yml").read_text())
    assert set(entries) - {"default"} == set(METAWORLD.tasks())


@pytest.mark.parametrize("task", TASKS)
def test_observations_are_those_of_the_space_and_follow_from_the_seed(task: str) -> None:
    def episode(env: gym.Env, steps: int = 10) -> np.ndarray:
        actions = np.random.default_rng(0).uniform(-1, 1, (steps, 4)).astype(np.float32)
        observations = [env.reset(seed=7)[0], *(env.step(action)[0] for action in actions)]
        assert all(env.observation_space.contains(observation) for observation in observations)
        return np.stack(observations)

    first, second = gym.make(registered(f"metaworld/{task}-v3")), make_metaworld(task, seed=1)
    assert first.spec is not None and first.spec.id == f"metaworld/{task}-v3"
    seen = episode(first)
    assert seen.shape == (11, 39) and seen.dtype == np.float64
    assert np.array_equal(seen, episode(second)) and np.array_equal(seen, episode(first))
    goals = {tuple(first.reset()[0][-3:]) for _ in range(5)}
    assert len(goals) > 1 and not np.array_equal(episode(make_metaworld(task, goal_seed=1)), seen)


@pytest.mark.parametrize(("repeat", "steps"), [(1, 500), (2, 250), (3, 167)])
def test_episodes_end_by_truncation_after_500_frames(repeat: int, steps: int) -> None:
    env = make_metaworld("reach", action_repeat=repeat)
    assert steps_per_second(env) == 80 / repeat
    env.reset(seed=0)
    frames = 0
    for step in range(1, steps + 1):
        _, reward, terminated, truncated, info = env.step(np.zeros(4, np.float32))
        frames += info.get("frames", 1)
        assert 0 <= float(reward) <= 10 * repeat and not terminated and truncated == (step == steps)
    assert frames == 500 and info["is_success"] is False


@pytest.mark.parametrize(
    ("task", "policy"), [("reach", "SawyerReachV3Policy"), ("coffee-button", "SawyerCoffeeButtonV3Policy")]
)
def test_what_solves_a_task_is_a_success(task: str, policy: str) -> None:
    """Meta-World's own scripted policy. After a button's press, the last step of the episode is no success."""
    from metaworld import policies

    env: gym.Env[Any, Any] = make_metaworld(task, seed=0)
    agent, (observation, info), truncated = getattr(policies, policy)(), env.reset(), False
    while not truncated:
        action = np.clip(agent.get_action(observation), -1, 1).astype(np.float32)
        observation, _, terminated, truncated, info = env.step(action)
        assert not terminated
    assert info["is_success"] is True and bool(info["success"]) == (task == "reach")


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_evaluates_and_records(task: str, tmp_path: Path) -> None:
    pytest.importorskip("rl_zoo3")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def zoo(*words: str) -> str:
        command = [sys.executable, "-m", "sb3_dreamer_gpld.zoo", *words, "--env", env]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    env = f"metaworld/{task}-v3"
    evaluations = ["--eval-freq", "250", "--eval-episodes", "1", "--log-interval", "1", "-tb", "tb", "--device", "cpu"]
    zoo("train", "-conf", "dreamer_gpld_metaworld.yml", "-n", "300", *evaluations, "-params", *TINY)
    run = tmp_path / "logs" / "dreamer_gpld" / f"metaworld-{task}-v3_1"
    log = np.load(run / "evaluations.npz")
    assert log["timesteps"].tolist() == [250] and log["successes"].shape == (1, 1) and log["ep_lengths"].tolist() == [[500]]
    (events,) = tmp_path.glob("tb/*/*/events*")
    scalars = accumulator.EventAccumulator(str(events)).Reload()
    for name in ("rollout/success_rate", "eval/success_rate"):
        assert [event.value in (0.0, 1.0) for event in scalars.Scalars(name)] == [True], name
    assert np.isfinite(scalars.Scalars("loss/total")[-1].value)
    assert "Success rate:" in zoo("enjoy", "--no-render", "-n", "260")
    if os.environ["MUJOCO_GL"] == "disabled":
        pytest.skip("no OpenGL to record with: install libegl1, or set MUJOCO_GL")
    zoo("record-video", "-n", "20")
    (video,) = run.glob("videos/*.mp4")
    assert video.stat().st_size > 2000


@pytest.mark.skipif(
    os.environ["MUJOCO_GL"] == "disabled", reason="no OpenGL to render with: install libegl1, or set MUJOCO_GL"
)
def test_pictures() -> None:
    def picture(**kwargs: Any) -> np.ndarray:
        env: Any = ActionRepeat(make_metaworld("reach", render_mode="rgb_array", width=64, height=48, seed=0, **kwargs), 2)
        env.reset()
        drawn = env.render()
        env.close()
        return drawn

    free, top = picture(), picture(camera_name="topview")
    assert free.shape == (48, 64, 3) and free.dtype == np.uint8 and free.std() > 10 and not np.array_equal(free, top)
