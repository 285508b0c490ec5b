"""The ladder of arms in ``benchmarks/learning``: what an arm's settings are, runs that go on, and the table."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from test_dreamer_gpld import RandomSpaces

pytest.importorskip("dm_control")
pytest.importorskip("rl_zoo3")

from benchmarks.learning import confirmation, draw, ladder, nothing  # noqa: E402
from benchmarks.learning.ladder import Arm, Job  # noqa: E402
from benchmarks.results import read_csv, write_csv  # noqa: E402
from sb3_dreamer_gpld import DreamerGPLD, preset  # noqa: E402
from sb3_dreamer_gpld.presets import CONFIGS, PRESETS  # noqa: E402
from sb3_dreamer_gpld.zoo.check import check_entry  # noqa: E402

RESULTS = ladder.RESULTS
TINY_SETTINGS = {"model_size": "debug", "batch_size": 4, "batch_length": 8, "imagination_horizon": 3, "learning_starts": 32}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results."""
    monkeypatch.setattr(ladder, "RESULTS", tmp_path / "ladder")
    return tmp_path


def test_an_arm_has_what_its_base_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arms = {
        "first": {"gamma": 0.9, "batch_size": 4, "policy_kwargs": {"units": 8, "free_nats": 0.5}},
        "second": {"base": "first", "gamma": 0.8, "action_repeat": 1, "policy_kwargs": {"units": 16}},
        "third": {"base": "second", "target_entropy_per_number": 0.5, "unavailable": "lost"},
        "fourth": {"decay_frames": 10, "fade_frames": 20},
    }
    (tmp_path / "arms.yml").write_text(yaml.safe_dump(arms))
    monkeypatch.setattr(ladder, "HERE", tmp_path)
    found = ladder.read_arms()
    kwargs = {"units": 16, "free_nats": 0.5}
    assert found["second"] == Arm("second", {"gamma": 0.8, "batch_size": 4, "policy_kwargs": kwargs}, 1, None, None)
    assert found["third"] == Arm("third", {"gamma": 0.8, "batch_size": 4, "policy_kwargs": kwargs}, 1, 0.5, "lost")
    assert found["fourth"] == Arm("fourth", {}, 2, None, None, 10, 20)


def test_the_preset_is_an_arm() -> None:
    """``preset("cpu")`` for continuous actions, where its actor_gradient "auto" is "dynamics"."""
    chosen = {**preset("cpu"), "actor_gradient": "dynamics"}
    settings = ladder.read_arms()[confirmation.ARM].settings
    assert settings == {key: chosen[key] for key in settings}
    published = {key: value for key, value in chosen.items() if key not in settings}
    assert published.keys() <= {"penalty_fraction", "penalty_schedule", "penalty_min"}
    defaults = inspect.signature(DreamerGPLD).parameters
    assert published == {key: defaults[key].default for key in published}


@pytest.mark.parametrize("task", ladder.TASKS)
def test_the_command_line_trains_the_eight_tasks_as_long_as_the_ladder(task: str) -> None:
    env_id = f"dm_control/{task}-v0"
    entry = yaml.safe_load((CONFIGS / PRESETS["cpu"]).read_text())[env_id]
    assert entry["n_timesteps"] * ladder.read_arms()[confirmation.ARM].action_repeat == confirmation.FRAMES
    assert entry["env_wrapper"] == [{"sb3_dreamer_gpld.envs.ActionRepeat": {"repeat": 2}}]
    assert preset("cpu", env_id) == preset("cpu")


def test_rates_and_noise_that_fall() -> None:
    """Linearly to a tenth; noise that was there before is forgotten with the episode."""
    settings = {**TINY_SETTINGS, "learning_rate": 1e-3, "actor_learning_rate": 1e-4, "exploration_noise": 0.4}
    arm = Arm("falling", settings, 2, None, None, decay_frames=1000, fade_frames=2000)
    model = ladder.make_model(arm, Job("falling", "cartpole-swingup", 0, 1000))
    assert [schedule(1.0) for schedule in (model.lr_schedule, *model._own_schedules)] == [1e-3, 1e-4]  # type: ignore[attr-defined]
    ladder.set_rates_and_noise(model, arm, 500)
    assert [schedule(0.5) for schedule in (model.lr_schedule, *model._own_schedules)] == pytest.approx([5.5e-4, 5.5e-5])  # type: ignore[attr-defined]
    ladder.set_rates_and_noise(model, arm, 5000)
    assert [schedule(0.5) for schedule in (model.lr_schedule, *model._own_schedules)] == pytest.approx([1e-4, 1e-5])  # type: ignore[attr-defined]
    model._follow_attributes()  # type: ignore[attr-defined]  # as learn does
    noise = np.stack([model._exploration() for _ in range(5000)])  # type: ignore[attr-defined]
    assert noise.std() == pytest.approx(0.04, rel=0.15)
    arm.settings["exploration_share"] = model.exploration_share = 0.5  # the first episode has none
    ladder.set_rates_and_noise(model, arm, 500)
    model._follow_attributes()  # type: ignore[attr-defined]
    assert not model._exploration().any()  # type: ignore[attr-defined, misc]


@pytest.mark.parametrize("name", [name for name, arm in ladder.read_arms().items() if not arm.is_sac])
def test_every_arm_is_valid(name: str) -> None:
    settings = ladder.read_arms()[name].settings
    assert check_entry({"n_timesteps": 1, "policy": "MultiInputPolicy", **settings}) == []


def test_every_result_belongs_to_an_arm_and_a_task() -> None:
    arms = ladder.read_arms()
    files = list(RESULTS.glob("*/*.csv"))
    assert len(files) > 100
    for path in files:
        found = re.fullmatch(r"(.+)_\d+(_evaluation|_measures)?", path.stem)
        assert found and found[1] in ladder.EVERY_TASK and path.parent.name in arms, path


def test_a_run_goes_on_and_is_evaluated_where_it_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arm = Arm("tiny", {"model_size": "debug", "learning_starts": 100_000}, 2, None, None)
    monkeypatch.setattr(ladder, "read_arms", lambda: {"tiny": arm})
    monkeypatch.setattr(ladder, "EVALUATION_EPISODES", 1)
    job = Job("tiny", "cartpole-swingup", 3, 2000)
    assert not job.finished
    ladder.run(job, tmp_path / "runs")
    assert job.finished and not job._replace(frames=3000).finished
    first = read_csv(job.file)
    assert [row["frames"] for row in first] == ["1000", "2000"] and first[0]["updates"] == "0"
    ladder.run(job._replace(frames=3000), tmp_path / "runs")
    rows = read_csv(job.file)
    assert rows[:2] == first and [row["frames"] for row in rows] == ["1000", "2000", "3000"]
    evaluations = read_csv(job.evaluations)
    assert [row["frames"] for row in evaluations] == ["2000", "3000"]
    assert all(float(row[name]) >= 0 for row in evaluations for name in ("deterministic", "sampled"))
    with pytest.raises(
        FileNotFoundError, match="has a run of 3000 frames, and its checkpoint in .* is missing.*Allowed: another"
    ):
        ladder.run(job._replace(frames=4000), tmp_path / "elsewhere")
    assert read_csv(job.file) == rows


@pytest.mark.usefixtures("rendering")
def test_a_task_from_pixels() -> None:
    arm = Arm("tiny", {"model_size": "debug"}, 2, None, None)
    model = ladder.make_model(arm, Job("tiny", "cartpole-swingup-pixels", 0, 1000))
    assert isinstance(model.observation_space, gym.spaces.Dict)
    assert [space.shape for space in model.observation_space.values()] == [(3, 64, 64)]


def test_table(folder: Path) -> None:
    for seed, level in ((0, 100.0), (1, 200.0)):
        rows = [
            {"frames": 1000 * k, "episode_return": level if k > 5 else 0.0, "core_seconds": 60 * k, "updates": 10 * k}
            for k in range(1, 11)
        ]
        path = Job("rw10", "walker-walk", seed, 0).file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(path, rows)
    lines = list(ladder.table(["rw10", "recipe"], ["walker-walk"], None, 10_000))
    assert lines[2:] == ["| rw10 | 150 (100, 200) | 150 | 10 | 100 |"]
    assert list(ladder.table(["rw10"], ["walker-walk", "cheetah-run"], [1], 7000))[2:] == [
        "| rw10 | 80 (80) |  |  | 7 | 70 |"  # two of the last five episodes; no mean over the tasks without all of them
    ]
    assert len(list(ladder.table(["rw10"], ["walker-walk"], None, 11_000))) == 2  # no run got that far
    write_csv(Job("rw10", "walker-walk", 1, 0).evaluations, [{"frames": 7000, "deterministic": 12.4, "sampled": 30.0}])
    for kind, shown in (("deterministic", "12 (12)"), ("sampled", "30 (30)")):
        assert f"| rw10 | {shown} | " in list(ladder.table(["rw10"], ["walker-walk"], [1], 7000, kind))[2]
    assert "| rw10 |  | " in list(ladder.table(["rw10"], ["walker-walk"], [1], 6000, "sampled"))[2]  # not evaluated there


def test_confirmation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of the seeds that are asked for, training episodes of SAC; no mean over the tasks without all of them."""
    monkeypatch.setattr(draw, "RESULTS", folder)
    published = yaml.safe_load(confirmation.PUBLISHED.read_text())
    assert all(published[kind].keys() == set(ladder.TASKS) for kind in confirmation.BY_OTHERS)
    assert published["dreamer"].keys() == {"frames", *ladder.TASKS} - {"quadruped-run"}
    rows = [
        {"frames": f, "episode_return": f / 1000, "core_seconds": 6 * f / 1000, "updates": f}
        for f in range(1000, 100_001, 1000)
    ]
    for arm, seeds in (("rw10", (1, 2, 3)), ("sac", (0,))):
        for task in ladder.TASKS[arm == "sac" :]:
            for seed in seeds:
                job = Job(arm, task, seed, 0)
                job.file.parent.mkdir(parents=True, exist_ok=True)
                write_csv(job.file, rows)
                write_csv(job.evaluations, [{"frames": 100_000, "deterministic": 100.0 * seed, "sampled": 10.0 * seed}])
    lines = list(confirmation.table("rw10", [1, 2], published))
    others = "475 (298 to 714) | 630 | 708 | 962"
    assert lines[2] == f"| walker-walk | 1, 2 | 100, 200 | 10, 20 | 98, 98 | 10, 10 |  | {others} |"
    assert "| walker-run | 1, 2 | 100, 200 | 10, 20 | 98, 98 | 10, 10 | 98 | " in lines[3]
    assert lines[-1] == "| mean of the eight |  | 150 | 15 | 98 |  |  | 399 | 396 | 396 | 582 |"
    Job("rw10", "reacher-hard", 1, 0).evaluations.unlink()
    *_, reacher, _, last = confirmation.table("rw10", [1], published)
    assert "| reacher-hard | 1 | nan | nan |" in reacher and last.startswith("| mean of the eight |  |  |  | 98 |")
    confirmation.figure("rw10", [1, 2], published, folder / "new" / "figure.png")
    assert (folder / "new" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --arms nothing", "there is no arm 'nothing'; allowed: before"),
        ("run --tasks walker-wlak", "there is no task 'walker-wlak'; allowed: walker-walk"),
        ("one rw10-rate16-correlated walker-walk 0 1000", "rw10-rate16-correlated cannot be run: the numbers behind"),
        ("one sac walker-walk-pixels 0 1000", "sac cannot be run on walker-walk-pixels; allowed: tasks without -pixels"),
        ("table --at x", "invalid int value"),
    ],
)
def test_wrong_input(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ladder", *arguments.split()])
    with pytest.raises(SystemExit):
        ladder.main()
    assert message in capsys.readouterr().err


def test_returns_where_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    acted: list[Any] = []
    space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def make_env(*args: Any, **kwargs: Any) -> RandomSpaces:
        env = RandomSpaces(space, space)
        step = env.step
        monkeypatch.setattr(env, "step", lambda action: acted.append(action) or step(action))
        return env

    monkeypatch.setattr(nothing, "make_dmc", make_env)
    assert nothing.returns("walker-walk", 2).tolist() == [10.0, 10.0]  # a reward of 1 at each of ten steps
    assert len(acted) == 20 and not np.any(acted)
