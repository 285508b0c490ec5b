"""Runs that go on: in one process, in two, killed, and many of them in a sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

pytest.importorskip("rl_zoo3")

from rl_zoo3.exp_manager import ExperimentManager  # noqa: E402
from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.callbacks import (  # noqa: E402
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
)
from stable_baselines3.common.monitor import Monitor, load_results  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402
from test_dreamer_gpld import BOX, RandomSpaces, tiny  # noqa: E402
from test_saving import Clock, assert_same  # noqa: E402

from sb3_dreamer_gpld import DreamerGPLD, SaveRunCallback  # noqa: E402
from sb3_dreamer_gpld.parallel import Processes  # noqa: E402
from sb3_dreamer_gpld.resumable import check_room, steps_saved  # noqa: E402
from sb3_dreamer_gpld.zoo import sweep  # noqa: E402
from sb3_dreamer_gpld.zoo.evaluations import NoteBest, restore_evaluations  # noqa: E402
from sb3_dreamer_gpld.zoo.main import main  # noqa: E402
from sb3_dreamer_gpld.zoo.runs import (  # noqa: E402
    SaveMonitoredRun,
    going_on_monitors,
    lock,
    monitored_episodes,
    new_folder,
    rewind_monitor,
)
from sb3_dreamer_gpld.zoo.sweep import SweepRun  # noqa: E402

SETTINGS: dict[str, Any] = dict(
    policy="sb3_dreamer_gpld.policies.DreamerPolicy",
    model_size="debug",
    batch_size=4,
    batch_length=8,
    learning_starts=64,
    train_ratio=8,
    compile=False,
)


HALF_LINES = ["", "-3", "-3.0,2", "-3.0,200,", "-3.0,200,30.5"]  # of a Monitor that was killed while it wrote
NO_EPISODE = "\x00\x00\x00\n-4.0,2\n"  # of a machine that failed


def write_entry(file: Path, **keys: Any) -> None:
    """A hyperparameter file of the tests' settings, and further keys."""
    file.write_text(yaml.safe_dump({"default": {"n_timesteps": 600, **SETTINGS, **keys}}))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "settings.yml"
    write_entry(file)
    return file


def zoo(*words: str) -> list[str]:
    return [sys.executable, "-m", "sb3_dreamer_gpld.zoo", *words]


def finish(command: list[str], folder: Path, **options: Any) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def kill_when(command: list[str], folder: Path, there: Callable[[], bool], pattern: str) -> None:
    """Start a command, and kill it (or its child that ``pattern`` finds, if it is not "") once something is there."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not there() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert there() and process.poll() is None, "it ended before it could be killed"
    killed = process.pid
    if pattern:
        children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", pattern], capture_output=True, text=True, check=True)
        killed = int(children.stdout.split()[-1])
    os.kill(killed, signal.SIGKILL)
    assert process.wait(60) != 0


# ------------------------------------------------------------------------------------------------------ one process


def test_a_run_is_saved_from_time_to_time_and_goes_on(tmp_path: Path) -> None:
    env = RandomSpaces(BOX, BOX)  # episodes of 10 steps
    assert DreamerGPLD.load_run(tmp_path / "run", env) is None
    saved: list[int] = []
    watch = ConvertCallback(lambda *_: saved.append(steps_saved(tmp_path / "run")) or True)
    model = tiny(env).learn(47, callback=[SaveRunCallback(tmp_path / "run", every=15), watch])
    assert sorted(set(saved)) == [0, 20, 40]  # at the ends of episodes after 15 and 35 steps
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == ["run_47_steps.pkl", "run_47_steps.zip"]  # and at the end
    loaded = DreamerGPLD.load_run(tmp_path / "run", env, device="cpu")
    assert loaded is not None and loaded.num_timesteps == 47 and loaded._n_updates == model._n_updates
    assert loaded.replay_buffer is not None and loaded.replay_buffer.size() == 51  # and four last observations
    loaded.learn(20, reset_num_timesteps=False, callback=SaveRunCallback(tmp_path / "run", every=100))
    assert loaded.num_timesteps == steps_saved(tmp_path / "run") == 67
    before = (tmp_path / "run" / "run_67_steps.zip").stat().st_mtime_ns
    loaded.learn(0, reset_num_timesteps=False, callback=SaveRunCallback(tmp_path / "run", every=100))
    assert (tmp_path / "run" / "run_67_steps.zip").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("make", "every", "steps", "expected"),
    [
        (lambda: "Pendulum-v1", 15, 65, [0, 30, 60]),  # its first episode has 200 steps
        (lambda: DummyVecEnv([lambda: RandomSpaces(BOX, BOX), lambda: RandomSpaces(BOX, BOX, True)]), 80, 150, [0, 140]),
    ],
    ids=["overdue", "episodes of 10 and 7 steps"],
)
def test_a_run_is_saved_between_episodes_of_all_environments_unless_it_is_overdue(
    make: Callable[[], Any], every: int, steps: int, expected: list[int], tmp_path: Path
) -> None:
    saved: list[int] = []
    watch = ConvertCallback(lambda *_: saved.append(steps_saved(tmp_path)) or True)
    tiny(make(), "MlpPolicy", learning_starts=1000).learn(steps, callback=[SaveRunCallback(tmp_path, every), watch])
    assert sorted(set(saved)) == expected


def test_a_longer_run_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one that begins in its folder, or that goes on from it with a count of its own; nor are the files of others."""
    env, folder = RandomSpaces(BOX, BOX), tmp_path / "run"
    tiny(env).learn(60, callback=CheckpointCallback(20, str(folder), name_prefix="run")).save_run(folder)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in files} == {f"run_{steps}_steps.zip" for steps in (20, 40, 60)} | {"run_60_steps.pkl"}
    message = "holds a run of 60 steps, run_60_steps.zip, and this one is at {}: it would be overwritten.*load_run"
    with pytest.raises(ValueError, match=message.format(0)):
        tiny(env).learn(100, callback=SaveRunCallback(folder, every=15))
    loaded = DreamerGPLD.load_run(folder, env)
    assert loaded is not None
    with pytest.raises(ValueError, match=message.format(0)):
        loaded.learn(100, callback=SaveRunCallback(folder, every=15))
    with pytest.raises(ValueError, match=message.format(20)):
        tiny(env).learn(20).save_run(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    two = Processes(0, 2)  # of which the other has no files of this run
    monkeypatch.setattr(Processes, "sums", lambda self, values: [2 * value if self.size == 2 else value for value in values])
    monkeypatch.setattr(Processes, "told_by_first", lambda self, value: value)
    with pytest.raises(ValueError, match=message.format(0)):
        check_room(folder, 0, Processes(1, 2))
    check_room(folder, 60, two)
    loaded = DreamerGPLD.load_run(folder, env)
    assert loaded is not None
    loaded.learn(20, reset_num_timesteps=False).save_run(folder)
    left = {f"run_{steps}_steps.zip" for steps in (20, 40, 80)} | {"run_80_steps.pkl"}
    assert {path.name for path in folder.iterdir()} == left


def test_a_run_without_its_buffer_is_not_begun_anew(tmp_path: Path) -> None:
    env = RandomSpaces(BOX, BOX)
    tiny(env).learn(10).save_run(tmp_path)
    (tmp_path / "run_10_steps.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"run_10_steps.pkl is missing"):
        DreamerGPLD.load_run(tmp_path, env)


def test_the_evaluations_before_are_kept(tmp_path: Path) -> None:
    callback = EvalCallback(RandomSpaces(BOX, BOX), n_eval_episodes=2, log_path=str(tmp_path))
    restore_evaluations(callback, 100)
    assert callback.evaluations_timesteps == []
    results = np.array([[1.0, 2.0], [5.0, 6.0], [9.0, 9.0]])
    log: dict[str, Any] = dict(timesteps=[10, 20, 30], results=results, ep_lengths=[[3, 4]] * 3)
    np.savez(tmp_path / "evaluations.npz", **log, successes=[[True, False], [False, False], [True, True]])
    restore_evaluations(callback, 25)
    assert callback.evaluations_successes == [[True, False], [False, False]]
    np.savez(tmp_path / "evaluations.npz", **log)  # of an environment that does not report success
    callback = EvalCallback(RandomSpaces(BOX, BOX), n_eval_episodes=2, log_path=str(tmp_path))
    restore_evaluations(callback, 25)
    assert callback.evaluations_successes == []
    assert callback.evaluations_timesteps == [10, 20] and callback.best_mean_reward == 5.5
    assert callback.evaluations_results == [[1.0, 2.0], [5.0, 6.0]]


def test_evaluations_of_another_number_of_episodes(tmp_path: Path) -> None:
    """Stable-Baselines3 could not write them beside the new ones."""
    np.savez(tmp_path / "evaluations.npz", timesteps=[10], results=[[1.0, 2.0]], ep_lengths=[[3, 4]])
    callback = EvalCallback(RandomSpaces(BOX, BOX), n_eval_episodes=5, log_path=str(tmp_path))
    restore_evaluations(callback, 9)  # nothing of them is kept
    with pytest.raises(SystemExit, match=r"--eval-episodes 5: .*have 2 episodes each. Allowed: --eval-episodes 2, or move"):
        restore_evaluations(callback, 10)


def test_two_processes_do_not_make_the_same_run(tmp_path: Path) -> None:
    held = lock(tmp_path / "run")
    with pytest.raises(SystemExit, match="another process makes this run now"):
        lock(tmp_path / "run")
    assert held is not None
    held.close()
    lock(tmp_path / "run")


@pytest.mark.long
def test_a_killed_run_goes_on_by_the_same_command(tmp_path: Path, config: Path) -> None:
    command = zoo("train", "--env", "Pendulum-v1", "-conf", str(config), "--eval-freq", "200", "--eval-episodes", "1")
    command += ["--save-run", "200", "--run-folder", "run"]
    run = tmp_path / "run"
    kill_when(command, tmp_path, lambda: (run / "run_400_steps.zip").is_file(), "")
    assert "Going on after 400 steps" in finish(command, tmp_path)
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [200, 400, 600]
    assert DreamerGPLD.load(run / "Pendulum-v1.zip").num_timesteps == 600
    assert load_results(str(run))["l"].tolist() == [200, 200, 200]
    assert (run / "finished.txt").read_text() == "600\n"
    other = subprocess.run([*command, "-params", "gamma:0.9"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "has other hyperparameters (gamma None -> 0.9). Allowed: the same ones" in other.stderr
    command[command.index("run")] = "settings.yml"
    other = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "--run-folder settings.yml: this is a file; allowed" in other.stderr


# ---------------------------------------------------------------------------------------------------- two processes


@pytest.mark.long
def test_a_run_of_two_processes_goes_on_when_one_was_killed(tmp_path: Path, config: Path) -> None:
    pytest.importorskip("dm_control")
    entry = {**SETTINGS, "n_timesteps": 3000, "n_envs": 2, "train_ratio": 4}
    config.write_text(yaml.safe_dump({"default": entry}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sb3_dreamer_gpld.zoo", "train", "--env", "dm_control/cartpole-balance-v0", "-conf", str(config)]
    command += ["--eval-freq", "-1", "--save-run", "1000", "--run-folder", "run"]
    run = tmp_path / "run"
    kill_when(command, tmp_path, lambda: (run / "run_2000_steps.zip").is_file(), "sb3_dreamer_gpld.zoo")
    assert "Going on after 2000 steps" in finish(command, tmp_path)
    names = {path.name for path in run.iterdir()}
    assert {
        "dm_control-cartpole-balance-v0.zip",
        "dm_control-cartpole-balance-v0.rank1.pt",
        "run_3000_steps.rank1.pkl",
    } <= names
    assert DreamerGPLD.load(run / "dm_control-cartpole-balance-v0.zip").num_timesteps == 3000


# ------------------------------------------------------------------------------------------------------------ sweep


@pytest.mark.parametrize(("text", "seeds"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("5, 1-2,2", [5, 1, 2])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert sweep.parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--seeds", "4-1"], "--seeds 4-1: allowed are numbers and ranges"),
        (["--seeds", "a"], "--seeds a: allowed"),
        (["--arms", "gpdl"], "the arm 'gpdl' does not exist. Did you mean 'gpld'"),
        (["--arms-file", "none.yml"], "none.yml"),
        (["--tasks", "Pendulum-v7"], "Pendulum-v7"),
        (["--save-run", "0"], "--save-run 0: allowed are whole numbers of at least 1"),
        (["--arms-file", "arms.yml", "--arms", "wrong"], "arm wrong: gama"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    words: list[str],
    text: str,
    tmp_path: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    Path("arms.yml").write_text("wrong: {gama: 0.9}\n")
    with pytest.raises(SystemExit) as error:
        sweep.main(["--tasks", "Pendulum-v1", "-conf", str(config), *words])
    assert text in str(error.value) + capsys.readouterr().err
    assert not Path("sweep").exists()


def test_a_sweep_whose_runs_would_never_be_evaluated(config: Path) -> None:
    pytest.importorskip("ray")
    options = sweep.parse(["--tasks", "Pendulum-v1", "-conf", str(config)])
    with pytest.raises(SystemExit, match=r"--eval-freq 10000: a run in Pendulum-v1 has 600 steps .* Allowed: at most 600"):
        sweep.prepare(options)


def test_arms_are_written_with_spaces_or_commas() -> None:
    for words in (["gpld,v3", "wide"], ["gpld", "v3", "wide"]):
        assert sweep.parse(["--tasks", "Pendulum-v1", "--arms", *words]).arms == ["gpld", "v3", "wide"]
    assert sweep.parse(["--tasks", "Pendulum-v1", "--arms", "v3,gpld", "v3"]).arms == ["v3", "gpld"]


def test_a_ray_of_ones_own_has_the_cores_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("ray._private.utils")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    for counted, taken in ((8, 3), (2, 2)):  # by Ray, which knows the limits of a container
        monkeypatch.setattr(utils, "get_num_cpus", lambda counted=counted: counted)
        assert sweep.cores_of_this_job(None) == {"address": "local", "num_cpus": taken}
    assert sweep.cores_of_this_job("auto") == {"address": "auto"}
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert sweep.cores_of_this_job(None) == {"address": None}


def test_a_sweep_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'a sweep needs Ray: pip install "sb3-dreamer-gpld\[ray\]"'):
        sweep.main(["--tasks", "Pendulum-v1", "-conf", str(config)])


def test_a_finished_run_of_a_sweep_has_the_same_hyperparameters(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "arms.yml").write_text("a: {imagination_horizon: 10}\n")
    words = ["--tasks", "Pendulum-v1", "-conf", str(config), "-n", "20", "--eval-freq", "10", "-f", str(tmp_path / "sweep")]
    words += ["--arms", "a", "--arms-file", str(tmp_path / "arms.yml")]
    ((run, command),) = sweep.prepare(sweep.parse(words)).items()
    monkeypatch.chdir(tmp_path)
    main(command[3:])
    assert list(sweep.prepare(sweep.parse(words))) == [run] and run.finished
    (tmp_path / "arms.yml").write_text("a: {imagination_horizon: 20}\n")
    with pytest.raises(
        SystemExit, match=r"_1: the run there is finished with other hyperparameters \(imagination_horizon 10 -> 20\)"
    ):
        sweep.prepare(sweep.parse(words))


@pytest.mark.parametrize("half", HALF_LINES)
def test_the_progress_of_a_run(half: str, tmp_path: Path) -> None:
    run = SweepRun("Pendulum-v1", "gpld", 0, 1000, tmp_path)
    assert run.progress()["frames"] == 0 and not run.finished
    (tmp_path / "0.monitor.csv").write_text(f"#{{}}\nr,l,t\n-10.0,200,1\n{NO_EPISODE}-20.0,200,2\n{half}")
    (tmp_path / "1.monitor.csv").write_text("#{}\nr,l,t\n-30.0,200,1.5\n")
    assert run.progress() == {"frames": 600, "return": -20.0, "episodes": 3}
    for steps, finished in (("999", False), ("1000", True), ("350, stopped by a callback", True)):
        (tmp_path / "finished.txt").write_text(f"{steps}\n")
        assert run.finished == finished


def test_episodes_that_are_made_again_leave_the_monitors_file(tmp_path: Path) -> None:
    file, start = tmp_path / "0.monitor.csv", time.time() - 100.0
    file.write_text(f'#{{"t_start": {start}, "env_id": "x"}}\nr,l,t\n1.0,200,10.0\n2.0,200,20.0\n3.0,200,30.0\n4.0,2')
    rewind_monitor(file, 2)
    results = load_results(str(tmp_path))
    assert results["r"].tolist() == [1.0, 2.0] and results["l"].tolist() == [200, 200]
    monitor = Monitor(RandomSpaces(BOX, BOX), str(tmp_path / "0"), override_existing=False)
    monitor.reset()
    while not monitor.step(np.zeros(3, np.float32))[3]:
        pass
    monitor.close()
    results = load_results(str(tmp_path))
    assert results["r"].tolist() == [1.0, 2.0, 10.0]
    assert np.allclose(results["t"] - results["t"][0], [0.0, 10.0, 90.0], atol=5.0)


@pytest.mark.parametrize("half", HALF_LINES)
def test_all_whole_episodes_stay_where_it_is_not_known_what_was_saved(half: str, tmp_path: Path) -> None:
    file = tmp_path / "0.monitor.csv"
    file.write_text(f'#{{"t_start": 1.0}}\nr,l,t\n1.0,200,10.0\n{NO_EPISODE}2.0,200,20.0\n{half}')
    rewind_monitor(file, None)
    assert load_results(str(tmp_path))["r"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("text", ["", "\x00\x00\n\x00\n", "#{}\nr,l,t\n1.0,200,10.0\n", '#{"t_start": 1.0}\n'])
def test_a_monitors_file_that_cannot_be_read_is_moved_away(text: str, tmp_path: Path) -> None:
    file = tmp_path / "0.monitor.csv"
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"0.monitor.csv cannot be read .*; it is 0.monitor.csv.unreadable now, and"):
        rewind_monitor(file, 1)
    assert not file.exists() and (tmp_path / "0.monitor.csv.unreadable").read_text() == text
    keywords: dict[str, Any] = {"info_keywords": ("is_success",)}
    env = going_on_monitors(Successful, 1, monitor_dir=str(tmp_path), monitor_kwargs=keywords)
    env.reset()
    for _ in range(20):
        env.step(np.zeros((1, 3), np.float32))
    env.close()
    results = load_results(str(tmp_path))
    assert results["r"].tolist() == [10.0, 10.0] and results["is_success"].tolist() == [True, True]


def test_a_run_knows_how_many_episodes_its_monitors_had(tmp_path: Path) -> None:
    """However long these are in the Monitor's own count, and wherever the run was cut."""
    env = Monitor(RandomSpaces(BOX, BOX), str(tmp_path / "0"))  # episodes of 10 steps
    tiny(env).learn(47, callback=SaveMonitoredRun(tmp_path, every=15))
    assert len(load_results(str(tmp_path))) == 4
    assert sorted(path.name for path in tmp_path.glob("run*")) == [
        "run_47_steps.pkl", "run_47_steps.zip", "run_47_steps_monitors.json"
    ]  # fmt: skip
    assert monitored_episodes(tmp_path, 47) == {"0.monitor.csv": 4} and monitored_episodes(tmp_path, 20) == {}


def test_evaluations_are_saved_with_the_run_for_when_their_file_is_spoilt(tmp_path: Path) -> None:
    def evaluation() -> EvalCallback:
        env = RandomSpaces(BOX, BOX)
        return EvalCallback(env, n_eval_episodes=1, eval_freq=20, log_path=str(tmp_path), best_model_save_path=str(tmp_path))

    callbacks = [evaluation(), SaveMonitoredRun(tmp_path, every=15)]
    tiny(RandomSpaces(BOX, BOX)).learn(50, callback=callbacks)
    (tmp_path / "evaluations.npz").write_bytes(b"spoilt")
    restored = evaluation()
    with pytest.warns(UserWarning, match="evaluations.npz cannot be read"):
        restore_evaluations(restored, 50, tmp_path / "run_50_steps_evaluations.npz")
    assert restored.evaluations_timesteps == [20, 40] and restored.best_mean_reward == 10.0
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [20, 40]  # what is saved next is whole
    (tmp_path / "evaluations.npz").unlink()  # as the error about another --eval-episodes says
    again = evaluation()
    restore_evaluations(again, 50, tmp_path / "run_50_steps_evaluations.npz")
    assert again.evaluations_timesteps == []
    tiny(RandomSpaces(BOX, BOX)).learn(60).save_run(tmp_path)
    assert not list(tmp_path.glob("run_50*"))


def test_the_best_agent_stays_if_the_run_goes_on_from_before_it(tmp_path: Path) -> None:
    """It was evaluated after the run had been saved, or the file of evaluations is lost."""
    callback = EvalCallback(RandomSpaces(BOX, BOX), log_path=str(tmp_path), best_model_save_path=str(tmp_path))
    note = NoteBest(callback)
    note.init_callback(tiny(RandomSpaces(BOX, BOX)))
    callback.best_mean_reward = 900.0
    assert note.on_step()
    np.savez(tmp_path / "evaluations.npz", timesteps=[20, 30], results=[[500.0] * 5, [900.0] * 5], ep_lengths=[[3] * 5] * 2)
    for there, best in ((False, 500.0), (True, 900.0)):
        if there:
            (tmp_path / "best_model.zip").touch()
        again = EvalCallback(RandomSpaces(BOX, BOX), log_path=str(tmp_path), best_model_save_path=str(tmp_path))
        restore_evaluations(again, 25)
        assert again.evaluations_timesteps == [20] and again.best_mean_reward == best
    (tmp_path / "evaluations.npz").unlink()
    restore_evaluations(again, 25)
    assert again.best_mean_reward == 900.0


def test_two_processes_have_two_folders(tmp_path: Path) -> None:
    folders = [new_folder(tmp_path / "dreamer_gpld" / "dm_control-walker-walk-v0_2") for _ in range(3)]
    assert [folder.name.rpartition("_")[2] for folder in folders] == ["2", "3", "4"]
    assert len({folder.name.rpartition("_")[0] for folder in folders}) == 1 and all(folder.is_dir() for folder in folders)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        new_folder(tmp_path / "file" / "Pendulum-v1_1")


def test_older_files_are_taken_where_the_newest_are_incomplete(tmp_path: Path) -> None:
    model = tiny(RandomSpaces(BOX, BOX)).learn(10)
    model.save_run(tmp_path)
    (tmp_path / "run_20_steps.zip").touch()
    assert steps_saved(tmp_path) == 10
    loaded = DreamerGPLD.load_run(tmp_path, RandomSpaces(BOX, BOX), device="cpu")
    assert loaded is not None and loaded.num_timesteps == 10
    (tmp_path / "run_10_steps.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"run_20_steps.pkl is missing"):
        steps_saved(tmp_path)


def test_a_run_that_was_killed_while_it_was_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    left = [".run_30_steps.pkl.part", ".run_30_steps.zip.part", "run_20_steps.pkl", "run_20_steps_vecnormalize.pkl"]
    mine = ["run_5_steps_of_mine.zip", "best_model.zip"]
    for name in (*left, *mine):
        (tmp_path / name).touch()
    tiny(RandomSpaces(BOX, BOX)).learn(10).save_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run_10_steps.pkl", "run_10_steps.zip", *mine}


def normalized(**kwargs: Any) -> VecNormalize:
    """Environments with episodes of 20 steps.

    :param kwargs: of VecNormalize
    """
    return VecNormalize(DummyVecEnv([Clock]), **kwargs)


def statistics(model: DreamerGPLD) -> VecNormalize:
    found = model.get_vec_normalize_env()
    assert found is not None
    return found


@pytest.mark.parametrize("name, kwargs", [("obs_rms", {}), ("ret_rms", {"norm_obs": False})])
def test_statistics_of_vec_normalize_are_part_of_a_run(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(normalized(**kwargs), "MlpPolicy").learn(40)
    model.save_run(tmp_path)
    loaded = DreamerGPLD.load_run(tmp_path, normalized(**kwargs), device="cpu")
    assert loaded is not None
    ours, theirs = getattr(statistics(loaded), name), getattr(statistics(model), name)
    assert theirs.count > 40 and ours.count == theirs.count
    assert np.array_equal(ours.mean, theirs.mean) and np.array_equal(ours.var, theirs.var)
    model.learn(10, reset_num_timesteps=False).save_run(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_with_vec_normalize_goes_on_exactly(tmp_path: Path) -> None:
    """Its statistics do not count the first observation of an episode twice."""
    model = tiny(normalized(), "MlpPolicy").learn(40)  # two episodes
    model.save_run(tmp_path)
    model.learn(40, reset_num_timesteps=False)
    loaded = DreamerGPLD.load_run(tmp_path, normalized(), device="cpu")
    assert loaded is not None
    loaded.learn(40, reset_num_timesteps=False)
    assert_same(model, loaded)
    ours, theirs = statistics(loaded), statistics(model)
    assert ours.training and ours.obs_rms.count == theirs.obs_rms.count
    assert np.array_equal(ours.obs_rms.var, theirs.obs_rms.var) and ours.ret_rms.var == theirs.ret_rms.var


def test_the_callback_is_for_this_algorithm(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="SaveRunCallback saves a DreamerGPLD model, not a PPO"):
        PPO("MlpPolicy", RandomSpaces(BOX, BOX), n_steps=8, batch_size=8).learn(8, callback=SaveRunCallback(tmp_path, 5))


class Broken(RandomSpaces):
    """Its simulator ends in the 47th step."""

    def step(self, action: Any) -> Any:
        if len(self.actions) == 46:
            raise OSError("the simulator died")
        return super().step(action)


def test_an_interrupted_run_keeps_what_was_saved_between_episodes(tmp_path: Path) -> None:
    """rl_zoo3 ends callbacks then, too: of several processes in one that the others would wait for."""
    callback = SaveRunCallback(tmp_path, every=15)
    with pytest.raises(OSError, match="the simulator died"):
        tiny(Broken(BOX, BOX)).learn(60, callback=callback)
    callback.on_training_end()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_40_steps.pkl", "run_40_steps.zip"]


def test_a_callback_that_could_never_save_is_refused_at_the_beginning(tmp_path: Path) -> None:
    model = tiny(RandomSpaces(BOX, BOX))
    for inner in (SaveRunCallback(tmp_path / "run", 5), CallbackList([SaveRunCallback(tmp_path / "run", 5)])):
        for outer in (EveryNTimesteps(5, inner), EvalCallback(RandomSpaces(BOX, BOX), callback_on_new_best=inner)):
            name = type(outer).__name__
            with pytest.raises(ValueError, match=f"{name} would call it at some steps, in one; allowed: give it to learn"):
                model.learn(20, callback=outer)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
        model.learn(20, callback=SaveRunCallback(tmp_path / "file", 5))
    assert model.num_timesteps == 0


@pytest.mark.parametrize("before, after", [(True, False), (False, True)])
def test_a_run_goes_on_with_vec_normalize_or_without_it(before: bool, after: bool, tmp_path: Path) -> None:
    envs = {True: normalized(), False: DummyVecEnv([Clock])}
    tiny(envs[before], "MlpPolicy").learn(20).save_run(tmp_path)
    with pytest.raises(ValueError, match=rf"was saved with{'' if before else 'out'} VecNormalize, and env is with"):
        DreamerGPLD.load_run(tmp_path, envs[after], device="cpu")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, dict(norm_obs=False), "do not normalise the observation, as they did"),
        (dict(norm_obs=False), {}, "normalise the observation, as they did not"),
        ({}, dict(norm_reward=False), "norm_reward was True, and is False"),
    ],
)
def test_a_run_goes_on_in_the_same_units(before: dict, after: dict, message: str, tmp_path: Path) -> None:
    tiny(normalized(**before), "MlpPolicy").learn(20).save_run(tmp_path)
    with pytest.raises(ValueError, match=f"in other units: .*{message}. Allowed: VecNormalize as it was"):
        DreamerGPLD.load_run(tmp_path, normalized(**after), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what load() would say of statistics that load_run restores
        assert DreamerGPLD.load_run(tmp_path, normalized(**before), device="cpu") is not None


def begin(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """``dreamer-gpld train`` with the tests' settings, in this process."""
    monkeypatch.chdir(folder)
    main(["train", "-conf", "settings.yml", "--eval-freq", "-1", "--run-folder", "run", *words])


def test_a_folder_keeps_the_run_that_it_has(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another environment, of other arguments of it, or one that cannot go on, is neither taken up nor overwritten."""
    begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20", "--save-run", "10")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("run_*")}
    assert len(files) == 3
    with pytest.raises(SystemExit, match=r"--run-folder run: the run there is of Pendulum-v1, not of CartPole-v1. Allowed"):
        begin(tmp_path, monkeypatch, "--env", "CartPole-v1", "-n", "20", "--save-run", "10")
    with pytest.raises(SystemExit, match=r"other hyperparameters \(--env-kwargs None -> \{'g': 5.0\}\)"):
        begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "40", "--save-run", "10", "--env-kwargs", "g:5.0")
    with pytest.raises(SystemExit, match=r"other hyperparameters \(--eval-env-kwargs None -> \{'g': 5.0\}\)"):
        begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "40", "--save-run", "10", "--eval-env-kwargs", "g:5.0")
    begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20", "--save-run", "10")  # there is nothing to do
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("run_*")} == files
    for file in files:
        file.unlink()
    begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20", "--run-folder", ".")  # other runs may lie below
    with pytest.raises(SystemExit, match="the run there is finished after 20 steps, and nothing was saved that it could"):
        begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20")


def test_a_run_that_a_callback_stops_has_come_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is interrupted has not."""
    write_entry(tmp_path / "settings.yml", callback=[{"test_runs.Stop": {"at": 12}}])
    monkeypatch.setattr(Stop, "interrupted", True)
    begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20", "--run-folder", "interrupted")
    assert not (tmp_path / "interrupted" / "finished.txt").exists()
    monkeypatch.setattr(Stop, "interrupted", False)
    begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20")
    assert (tmp_path / "run" / "finished.txt").read_text() == "12, stopped by a callback\n"
    with pytest.raises(SystemExit, match="the run there was stopped by a callback after 12 steps, and nothing was saved"):
        begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20")
    words = "--env", "Pendulum-v1", "-n", "20", "--save-run", "100", "--run-folder", "saved"
    begin(tmp_path, monkeypatch, *words)
    finished = tmp_path / "saved" / "finished.txt"
    assert steps_saved(tmp_path / "saved") == 12 and finished.exists()
    monkeypatch.setattr(Stop, "interrupted", True)
    begin(tmp_path, monkeypatch, *words)  # goes on, and is interrupted
    assert not finished.exists()
    monkeypatch.setattr(Stop, "over", True)
    begin(tmp_path, monkeypatch, *words)
    assert steps_saved(tmp_path / "saved") == 20 and finished.read_text() == "20\n"
    finished.unlink()  # it was killed before it wrote this
    begin(tmp_path, monkeypatch, *words)
    assert finished.read_text() == "20\n"


class Stop(BaseCallback):
    """Ends a run, or interrupts it.

    :param at: step
    """

    interrupted = over = False

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.num_timesteps < self.at or self.over:
            return True
        if self.interrupted:
            raise KeyboardInterrupt
        return False


def test_a_run_that_goes_on_is_saved_when_it_ends(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a command without --save-run; from what is older than the run it does not go on."""
    words = "--env", "Pendulum-v1", "-n"
    begin(tmp_path, monkeypatch, *words, "20", "--save-run", "10")
    begin(tmp_path, monkeypatch, *words, "40")
    assert steps_saved(tmp_path / "run") == 40
    (tmp_path / "run" / "finished.txt").write_text("60\n")
    with pytest.raises(SystemExit, match="is finished after 60 steps, and what was saved last is of step 40 that it could"):
        begin(tmp_path, monkeypatch, *words, "80")
    (tmp_path / "run" / "run_40_steps.pkl").unlink()
    with pytest.raises(SystemExit, match="--run-folder run has no saved run with .*run_40_steps.pkl is missing. Allowed"):
        begin(tmp_path, monkeypatch, *words, "80")


@pytest.mark.parametrize("option", ["--env-kwargs", "--eval-env-kwargs"])
def test_arguments_that_an_environment_does_not_have(
    option: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"the environment cannot be made: .*'h'.* Allowed as env_kwargs: its own arguments"):
        begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20", "--eval-freq", "10", option, "h:1")


def test_a_folder_with_a_uuid(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["train", "--env", "Pendulum-v1", "-conf", "settings.yml", "--eval-freq", "-1", "-n", "20", "--uuid"])
    (folder,) = (tmp_path / "logs" / "dreamer_gpld").iterdir()
    assert len(folder.name) > 40 and (folder / "Pendulum-v1.zip").is_file()


def test_the_return_of_the_best_agent_is_noted(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20", "--eval-freq", "10", "--eval-episodes", "1")
    noted = json.loads((tmp_path / "run" / "best_model.json").read_text())["mean_reward"]
    assert noted == np.load(tmp_path / "run" / "evaluations.npz")["results"].mean(1).max()


def test_a_run_keeps_its_seed(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = "actor_learning_rate:SimpleLinearSchedule(3e-5)"  # an object of its own at each start
    words = "--env", "Pendulum-v1", "--save-run", "10", "-params", schedule

    def seed() -> Any:
        return yaml.unsafe_load((tmp_path / "run" / "Pendulum-v1" / "args.yml").read_text())["seed"]

    begin(tmp_path, monkeypatch, *words, "-n", "20")  # a random one
    first = seed()
    begin(tmp_path, monkeypatch, *words, "-n", "40")
    assert seed() == first == DreamerGPLD.load(tmp_path / "run" / "run_40_steps.zip", device="cpu").seed
    begin(tmp_path, monkeypatch, *words, "-n", "40", "--seed", str(first))
    with pytest.raises(SystemExit, match=rf"other hyperparameters \(--seed {first} -> 7\)"):
        begin(tmp_path, monkeypatch, *words, "-n", "60", "--seed", "7")


def test_each_run_has_its_own_tensorboard_log(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--env", "Pendulum-v1", "--save-run", "10", "-tb", "logs"
    for steps in ("20", "40"):
        for folder in ("a/run", "b/run"):
            begin(tmp_path, monkeypatch, *words, "-n", steps, "--run-folder", folder)
    logs = sorted(path.name for path in (tmp_path / "logs" / "Pendulum-v1").iterdir())
    assert len(logs) == 2 and logs[0].endswith("-a-run_1") and logs[1].endswith("-b-run_1")
    env = RandomSpaces(BOX, BOX)
    for number in (1, 2):  # a script that goes on where it can, and begins two runs
        model = tiny(env, tensorboard_log=str(tmp_path / "script")).learn(10, reset_num_timesteps=False)
        assert model.logger.dir is not None and model.logger.dir.endswith(f"DreamerGPLD_{number}")
    model.learn(10, reset_num_timesteps=False)
    assert len(list((tmp_path / "script").iterdir())) == 2


def test_the_same_command_goes_on_with_arguments_of_normalize(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rl_zoo3 writes gamma into them."""
    write_entry(config, gamma=0.99, normalize={"norm_reward": False})
    for steps in ("20", "40"):
        begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", steps, "--save-run", "10")
    assert "Going on after 20 steps" in capsys.readouterr().out
    saved = yaml.unsafe_load((tmp_path / "run" / "Pendulum-v1" / "config.yml").read_text())
    assert saved["normalize"] == {"norm_reward": False}


class Successful(RandomSpaces):
    """Each step is one."""

    def __init__(self) -> None:
        super().__init__(BOX, BOX)

    def step(self, action: Any) -> Any:
        *found, info = super().step(action)
        return *found, {**info, "is_success": True}


gym.register("Successful-v0", Successful)


@pytest.mark.parametrize("robotics", [False, True])
def test_monitors_with_arguments_go_on_with_their_files(
    robotics: bool, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of YAML is as good as a tuple; for some tasks rl_zoo3 has arguments of its own."""
    write_entry(config, monitor_kwargs={"info_keywords": ["is_success"]})
    monkeypatch.setattr(ExperimentManager, "is_robotics_env", staticmethod(lambda env_id: robotics))
    for steps in ("20", "40"):
        begin(tmp_path, monkeypatch, "--env", "Successful-v0", "-n", steps, "--save-run", "10")
    assert load_results(str(tmp_path / "run"))["is_success"].tolist() == [True] * 4


def test_a_model_that_was_stopped_is_not_overwritten(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rl_zoo3 saves it after Ctrl-C, too."""

    def stop(self: DreamerGPLD, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(DreamerGPLD, "learn", stop)
        begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "0.monitor.csv", "Pendulum-v1", "Pendulum-v1.zip"}
    with pytest.raises(SystemExit, match="the run there was stopped, .* so that Pendulum-v1.zip would be overwritten"):
        begin(tmp_path, monkeypatch, "--env", "Pendulum-v1", "-n", "20")


def test_a_run_goes_on_when_it_was_killed_while_its_settings_were_written(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--env", "Pendulum-v1", "-n", "40", "--save-run", "10"]
    begin(tmp_path, monkeypatch, *words, "-n", "20")

    def die(data: Any, file: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr("rl_zoo3.exp_manager.yaml.dump", die)
        begin(tmp_path, monkeypatch, *words)
    begin(tmp_path, monkeypatch, *words)
    assert "Going on after 20 steps" in capsys.readouterr().out and steps_saved(tmp_path / "run") == 40
    names = {path.name for path in (tmp_path / "run" / "Pendulum-v1").iterdir()}
    assert names == {"args.yml", "command.txt", "config.yml"}


def test_evaluations_that_cannot_be_read_do_not_stop_a_run(tmp_path: Path) -> None:
    """Stable-Baselines3 writes their file in place, and a run may be killed in between."""
    np.savez(tmp_path / "evaluations.npz", timesteps=[10], results=[[1.0]], ep_lengths=[[3]])
    whole = (tmp_path / "evaluations.npz").read_bytes()
    callback = EvalCallback(RandomSpaces(BOX, BOX), log_path=str(tmp_path))
    for part in (b"", whole[: len(whole) // 2]):
        (tmp_path / "evaluations.npz").write_bytes(part)
        with pytest.warns(UserWarning, match="evaluations.npz cannot be read and is left out"):
            restore_evaluations(callback, 100)
    assert callback.evaluations_timesteps == []


def test_a_run_that_fails_shows_the_end_of_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SECONDS", 0.05)
    run, reports = SweepRun("Pendulum-v1", "gpld", 0, 1000, tmp_path / "run"), []
    script = "import time, os; time.sleep(1); print(os.environ['OMP_NUM_THREADS']); raise SystemExit('gone wrong')"
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 1:\n3\ngone wrong"):
        sweep.make_run(run, [sys.executable, "-c", script], 3, str(tmp_path), reports.append)
    assert reports and reports[0]["episodes"] == 0


@pytest.mark.long
def test_a_sweep_that_was_killed_is_finished_by_the_same_command(tmp_path: Path, config: Path) -> None:
    pytest.importorskip("ray")
    command = zoo("sweep", "--tasks", "Pendulum-v1", "CartPole-v1", "--seeds", "0-1", "--arms", "gpld", "v3", "-n", "600")
    command += ["-conf", str(config), "--eval-freq", "300", "--eval-episodes", "1", "--save-run", "100"]
    folder = tmp_path / "sweep"

    def there() -> bool:
        """Two runs are finished, and one more is saved."""
        finished = {path.parent for path in folder.glob("*/*/*/finished.txt")}
        return len(finished) >= 2 and bool({path.parent for path in folder.glob("*/*/*/run_*_steps.zip")} - finished)

    kill_when(command, tmp_path, there, "")
    time.sleep(10)  # Ray ends what it has started
    finished = {path: path.stat().st_mtime for path in folder.glob("*/*/*/finished.txt")}
    printed = finish(command, tmp_path)
    assert f"8 runs, of which {len(finished)} are finished" in printed and 2 <= len(finished) < 8
    assert len(list(folder.glob("*/*/*/finished.txt"))) == len(list(folder.glob("*/*/*/*-v1.zip"))) == 8
    assert all(path.stat().st_mtime == before for path, before in finished.items())
    assert any("Going on after" in path.read_text() for path in folder.glob("*/*/*/output.txt"))
    assert sorted(path.name for path in (folder / "plots").iterdir()) == ["CartPole-v1.png", "Pendulum-v1.png"]
