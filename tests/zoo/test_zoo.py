"""The command line: registration, commands through rl_zoo3, and the checker of hyperparameter files."""

import inspect
import json
import os
import pkgutil
import re
import runpy
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

from sb3_dreamer_gpld import DreamerGPLD, SequenceReplayBuffer

pytest.importorskip("rl_zoo3")

import optuna  # noqa: E402
import rl_zoo3.enjoy  # noqa: E402
import rl_zoo3.exp_manager  # noqa: E402
import rl_zoo3.hyperparams_opt  # noqa: E402
import rl_zoo3.train  # noqa: E402

from sb3_dreamer_gpld.zoo import check, plot  # noqa: E402
from sb3_dreamer_gpld.zoo import main as zoo  # noqa: E402

SHIPPED = sorted(zoo.CONFIGS.glob("*.yml"))
PLAIN = {"n_timesteps": 150, "policy": "MlpPolicy"}
SMALL = {"model_size": "debug", "batch_size": 4, "batch_length": 8, "train_ratio": 16, "learning_starts": 64}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a screen for pygame."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a small agent on Pendulum-v1."""
    path = tmp_path_factory.mktemp("zoo")
    (path / "small.yml").write_text(yaml.safe_dump({"default": {**PLAIN, **SMALL}}))
    args = "--env Pendulum-v1 --device cpu --seed 1 --eval-freq 75 --eval-episodes 1 --save-freq 100 --verbose 0"
    files = ["-conf", str(path / "small.yml"), "-f", str(path / "logs")]
    assert zoo.main(["train", *args.split(), *files]) == 0
    return path


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the replay buffer takes memory."""

    def refuse(self: SequenceReplayBuffer) -> None:
        raise AssertionError("the replay buffer was allocated")

    monkeypatch.setattr(SequenceReplayBuffer, "_allocate", refuse)


@pytest.fixture(autouse=True)
def same_arguments() -> Iterator[None]:
    """The commands leave ``sys.argv`` as it was."""
    before = list(sys.argv)
    yield
    assert sys.argv == before


# ---------------------------------------------------------------------------------------------------------- registration


def test_registers_the_algorithm_everywhere() -> None:
    zoo.register()
    for algorithms in (rl_zoo3.ALGOS, rl_zoo3.train.ALGOS, rl_zoo3.enjoy.ALGOS, rl_zoo3.exp_manager.ALGOS):
        assert algorithms["dreamer_gpld"] is DreamerGPLD
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER["dreamer_gpld"] is zoo.sample_params
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER["dreamer_gpld"] is zoo.convert_params


def test_search_space_gives_constructor_arguments() -> None:
    values = {
        "learning_rate": 1e-4,
        "train_ratio_pow": 6,
        "batch_length_pow": 5,
        "imagination_horizon": 10,
        "ent_coef": 1e-3,
        "posterior_penalty": 0.0,
        "penalty_fraction": 0.25,
    }
    trial = optuna.trial.FixedTrial(values)
    sampled = zoo.sample_params(trial, n_actions=1, n_envs=1, additional_args={})
    assert sampled == zoo.convert_params(trial.params)  # what a run from a stored trial gets
    assert sampled["train_ratio"] == 64 and sampled["batch_length"] == 32 and sampled["posterior_penalty"] == 0
    assert check.check_entry({**PLAIN, **sampled}) == []


def test_whole_search_space_is_valid() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        sampled = zoo.sample_params(study.ask(), 1, 1, {})
        assert check.check_entry({**PLAIN, "model_size": "debug", **sampled}) == []


# --------------------------------------------------------------------------------------------------------------- checker


def test_files_are_shipped() -> None:
    names = {path.name for path in SHIPPED}
    assert names == {"dreamer_gpld.yml", "dreamer_gpld_cpu.yml", "dreamer_gpld_pixels.yml", "dreamer_v3.yml"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_have_no_problem(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["check", file.name]) == 0  # found by its name from anywhere
    assert "no problem found" in capsys.readouterr().out


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_name_existing_environments(file: Path) -> None:
    pytest.importorskip("shimmy")
    entries = yaml.safe_load(file.read_text())
    assert set(entries) - {"default"} <= set(gym.registry)
    if "cpu" not in file.stem:
        assert len(entries) == 21


def test_plain_dreamer_differs_in_the_penalty_only() -> None:
    plain, penalised = (yaml.safe_load((zoo.CONFIGS / f"{name}.yml").read_text()) for name in ("dreamer_v3", "dreamer_gpld"))
    assert plain.keys() == penalised.keys()
    for name, entry in plain.items():
        assert entry["posterior_penalty"] == 0 and entry.get("prior_penalty", 0) == 0
        others = {key: value for key, value in penalised[name].items() if "penalty" not in key}
        assert {key: value for key, value in entry.items() if "penalty" not in key} == others


PAPER = {
    "model_size": "12m",
    "learning_rate": 4e-5,
    "learning_rate_warmup": 1000,
    "learning_starts": 1024,
    "batch_size": 16,
    "batch_length": 64,
    "train_ratio": 512,
    "imagination_horizon": 25,
    "posterior_penalty": 0.5,
    "penalty_fraction": 0.5,
    "penalty_schedule": "sqrt_time",
    "penalty_min": 0.001,
}


@pytest.mark.parametrize("name", ["dreamer_gpld", "dreamer_gpld_pixels"])
def test_every_task_has_the_setting_of_the_paper(name: str) -> None:
    wrappers = [{"sb3_dreamer_gpld.envs.ActionRepeat": {"repeat": 2}}]
    for task, entry in yaml.safe_load((zoo.CONFIGS / f"{name}.yml").read_text()).items():
        assert {key: entry[key] for key in PAPER} == PAPER, task
        given = set(inspect.signature(DreamerGPLD).parameters) & set(entry)
        assert given - {"policy", "buffer_size"} == set(PAPER), task  # what is not named keeps its default
        if task != "default" or name == "dreamer_gpld_pixels":
            assert entry["env_wrapper"][:1] == wrappers and entry["policy"] == "MultiInputPolicy", task
        if name == "dreamer_gpld_pixels":
            assert entry["env_wrapper"][1]["sb3_dreamer_gpld.envs.PixelObservation"]["size"] == [64, 64], task


@pytest.mark.parametrize(
    "entry, problem",
    [
        ({"batchsize": 16}, r"^batchsize: the key 'batchsize' does not exist\. Did you mean 'batch_size'\?$"),
        ({"penalty": 16}, r"^penalty: the key 'penalty' does not exist\. Did you mean"),
        ({"lr": 16}, r"^lr: the key 'lr' does not exist\. Allowed: batch_length, batch_size"),
        ({"seed": 1}, r"^seed: this is set by --seed"),
        ({"batch_size": "16"}, r"^batch_size: .* not '16'"),
        ({"batch_size": 0}, r"^batch_size: .* not 0"),
        ({"ent_coef": "3e-4"}, r"^ent_coef: .*YAML reads 3e-4 as text: write 3\.0e-04"),
        ({"learning_rate": "3e-4"}, r"^learning_rate: .*YAML reads 3e-4 as text"),
        ({"learning_rate": "const_0.1"}, r"^learning_rate: .* not 'const_0.1'"),
        ({"learning_rate": -1.0}, r"^learning_rate: .* not -1.0"),
        ({"model_size": "12"}, r"^model_size: .* Did you mean '12m'\?"),
        ({"policy": "MlpPolicie"}, r"^policy: .* Did you mean 'MlpPolicy'\?"),
        ({"policy": "torch.nn.Linear"}, r"^policy: .* must derive from DreamerPolicy"),
        ({"n_timesteps": "1e6"}, r"^n_timesteps: .*write 1\.0e\+06"),
        ({"n_envs": 0}, r"^n_envs: "),
        ({"frame_stack": "4"}, r"^frame_stack: "),
        ({"train_freq": [1, "epsode"]}, r"^train_freq: "),
        ({"gradient_steps": 2.5}, r"^gradient_steps: "),
        ({"stats_window_size": "a"}, r"^stats_window_size: "),
        ({"penalty_random_rows": 1}, r"^penalty_random_rows: .* true or false"),
        ({"penalty_rows": 40}, r"^penalty_rows: .* at most 32"),
        ({"penalty_schedule": "sqrt"}, r"^penalty_schedule: .* Did you mean 'sqrt_time'\?"),
        ({"optimize_memory_usage": True}, r"^optimize_memory_usage: "),
        ({"policy_kwargs": "dict(units=3"}, r"^policy_kwargs: .* not a Python expression"),
        ({"policy_kwargs": "dict(unit=3)"}, r"^policy_kwargs, unit: .* Did you mean 'units'\?"),
        ({"policy_kwargs": {"units": "3e2"}}, r"^policy_kwargs, units: .* YAML reads 3e2 as text"),
        ({"policy_kwargs": {"deter": 36, "blocks": 5}}, r"policy_kwargs together: deter must be a multiple of blocks"),
        ({"policy_kwargs": [1]}, r"^policy_kwargs: "),
        ({"replay_buffer_class": "HerReplayBuffer"}, r"^replay_buffer_class: .*SequenceReplayBuffer"),
        ({"replay_buffer_kwargs": {"size": 1}}, r"^replay_buffer_kwargs: .*'size'"),
        ({"normalize": "dict(norm_ob=True)"}, r"^normalize: .* Did you mean 'norm_obs'\?"),
        ({"normalize": 1}, r"^normalize: "),
        ({"monitor_kwargs": {"info_keyword": []}}, r"^monitor_kwargs: .* Did you mean 'info_keywords'\?"),
        ({"env_kwargs": "g=1"}, r"^env_kwargs: "),
        ({"env_wrapper": "ActionRepeat"}, r"^env_wrapper: .* a class with its module"),
        ({"env_wrapper": "sb3_dreamer_gpld.env.ActionRepeat"}, r"^env_wrapper: .*No module named"),
        ({"env_wrapper": ["sb3_dreamer_gpld.envs.ActionRepet"]}, r"^env_wrapper: .* Did you mean 'ActionRepeat'\?"),
        ({"env_wrapper": [{"sb3_dreamer_gpld.envs.ActionRepeat": {"repet": 2}}]}, r"^env_wrapper: .* Did you mean 'repeat'\?"),
        ({"env_wrapper": [{"sb3_dreamer_gpld.envs.ActionRepeat": None}]}, r"^env_wrapper: the arguments of"),
        ({"env_wrapper": [{"sb3_dreamer_gpld.envs.ActionRepeat": {}, "repeat": 2}]}, r"^env_wrapper: .*indented"),
        ({"callback": [{"stable_baselines3.common.callbacks.CheckpointCallback": {"freq": 1}}]}, r"^callback: .*'freq'"),
        ({"noise_type": "normal"}, r"^noise_type: .*need each other"),
        ({"noise_type": "pink", "noise_std": 0.1}, r"^noise_type: .* not 'pink'"),
        ({"action_noise": 0.1}, r"^action_noise: this is set by noise_type"),
    ],
)
def test_names_the_mistake(entry: dict[str, Any], problem: str) -> None:
    (found,) = check.check_entry({**PLAIN, **entry})
    assert re.search(problem, found), found


def test_names_all_mistakes_of_an_entry() -> None:
    found = check.check_entry({"policy": "MlpPolicy", "gamma": 2, "train_ratio": "x", "batchsize": 1})
    assert [problem.split(":")[0] for problem in found] == ["batchsize", "n_timesteps", "gamma", "train_ratio"]


@pytest.mark.parametrize(
    "entry",
    [
        {"learning_rate": "lin_3e-4", "n_timesteps": 1e6, "n_envs": 4, "train_freq": [1, "episode"], "gradient_steps": -1},
        {"normalize": True, "monitor_kwargs": "dict(info_keywords=('a',))", "env_kwargs": {"g": 9.81}, "frame_stack": 2},
        {"normalize": "dict(norm_obs=True, norm_reward=False)", "noise_type": "normal", "noise_std": 0.1},
        {"policy_kwargs": "dict(net_arch=[16], optimizer_kwargs=dict(eps=1e-8))", "policy": "MultiInputPolicy"},
        {"policy_kwargs": {"deter": 36, "blocks": 4, "stoch": 40}, "penalty_rows": 40},
        {"policy": "sb3_dreamer_gpld.policies.DreamerPolicy", "penalty_schedule": {"name": "step", "interval": 10}},
        {"policy": "CnnPolicy", "policy_kwargs": {"normalize_images": False}},
        {"callback": ["stable_baselines3.common.callbacks.ProgressBarCallback"], "env_wrapper": None},
        {"env_wrapper": ["rl_zoo3.wrappers.HistoryWrapper", {"rl_zoo3.wrappers.ActionNoiseWrapper": {"noise_std": 0.1}}]},
        {"vec_env_wrapper": "stable_baselines3.common.vec_env.VecMonitor"},
    ],
)
def test_accepts_what_rl_zoo3_accepts(entry: dict[str, Any]) -> None:
    assert check.check_entry({**PLAIN, **entry}) == []


def test_check_lists_the_problems_of_all_entries(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = {"Pendulum-v1": {**PLAIN, "gama": 1}, "CartPole-v1": 3, "dm_control/walker-wlk-v0": PLAIN}
    (folder / "bad.yml").write_text(yaml.safe_dump(entries))
    assert zoo.main(["check", "bad.yml", "dreamer_v3.yml"]) == 1
    out = capsys.readouterr().out
    assert "bad.yml, Pendulum-v1: gama: the key 'gama' does not exist. Did you mean 'gamma'?" in out
    assert "bad.yml, CartPole-v1: an entry is a list of 'key: value' lines, not 3" in out
    assert "dreamer_v3.yml: no problem found" in out
    if "dm_control/walker-walk-v0" in gym.registry:
        assert "Did you mean 'dm_control/walker-walk-v0'?" in out


@pytest.mark.parametrize("text, problem", [("a: [", "is not YAML"), ("- a", "must have an entry"), ("", "must have an entry")])
def test_check_refuses_other_files(folder: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str) -> None:
    (folder / "bad.yml").write_text(text)
    assert zoo.main(["check", "bad.yml"]) == 1
    assert problem in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- commands


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main([]) == 2
    assert zoo.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in zoo.COMMANDS)


def test_ways_to_start_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``python -m sb3_dreamer_gpld.zoo``, and what the console command calls."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (command,) = re.findall(r'^dreamer-gpld = "(.*)"$', project, re.MULTILINE)
    assert pkgutil.resolve_name(command) is zoo.main
    monkeypatch.setattr(sys, "argv", ["zoo", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("sb3_dreamer_gpld.zoo", run_name="__main__")
    assert end.value.code == 0 and "usage: dreamer-gpld" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, problem",
    [
        ("trian", "the command 'trian' does not exist. Did you mean 'train'"),
        ("train --env Pendulm-v1", "Did you mean 'Pendulum-v1'"),
        ("train --env Pendulum-v1 -conf dreamer_gpdl.yml", "Did you mean 'dreamer_gpld.yml'"),
        ("train --env Pendulum-v1 -params batch_size=3", "name:value"),
        ("train --env Pendulum-v1 --hyperparams bach_size:3", "Did you mean 'batch_size'"),
        ("train --env Pendulum-v1 -i nothing.zip", "nothing.zip"),
        ("train --env Pendulum-v1 --gym-packages no_package", "No module named 'no_package'"),
        ("optimize --env Pendulm-v1", "Did you mean 'Pendulum-v1'"),
        ("enjoy --env Pendulum-v1 --no-render", "Train an agent first"),
        ("enjoy --env Pendulum-v1 --no-render --exp-id 3", "Pendulum-v1_3 folder was not found"),
        ("record-video --env Pendulum-v1", "Train an agent first"),
        ("plot", "no evaluated run of any environment in logs"),
    ],
)
def test_wrong_input_ends_with_a_message(folder: Path, command: str, problem: str) -> None:
    with pytest.raises(SystemExit, match=problem):
        zoo.main(command.split())


def test_train_needs_an_entry_for_the_environment(folder: Path) -> None:
    (folder / "one.yml").write_text(yaml.safe_dump({"Pendulum-v1": PLAIN}))
    with pytest.raises(SystemExit, match="the entry 'CartPole-v1' does not exist. Allowed: Pendulum-v1"):
        zoo.main(["train", "--conf", "one.yml"])


def test_train_writes_the_files_of_rl_zoo3(trained: Path) -> None:
    run = trained / "logs" / "dreamer_gpld" / "Pendulum-v1_1"
    for name in ("Pendulum-v1.zip", "best_model.zip", "rl_model_100_steps.zip", "evaluations.npz", "Pendulum-v1/config.yml"):
        assert (run / name).is_file(), name
    model = DreamerGPLD.load(run / "Pendulum-v1.zip")
    assert model.num_timesteps == 150 and model._n_updates > 0 and model.model_size == "debug"


def test_other_algorithms_keep_their_own_file(folder: Path) -> None:
    given = ["--env", "Pendulum-v1", "--algo", "sac"]
    assert zoo._prepare_training(given) == given
    assert zoo._prepare_training(["--env", "Pendulum-v1"])[-1] == str(zoo.CONFIGS / "dreamer_gpld.yml")


@pytest.mark.parametrize("option", [[], ["--load-best"], ["--load-last-checkpoint"], ["--stochastic"]])
def test_enjoy_takes_no_memory_for_replay(
    trained: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    monkeypatch.chdir(trained)  # the folder of the runs is "logs" by default
    zoo.main(["enjoy", "--env", "Pendulum-v1", "-n", "201", "--no-render", "--device", "cpu", *option])
    assert "Mean reward" in capsys.readouterr().out


def test_record_video(trained: Path, folder: Path, no_memory: None) -> None:
    pytest.importorskip("moviepy")
    zoo.main(["record-video", "--env", "Pendulum-v1", "-n", "5", "-f", str(trained / "logs"), "-o", "videos"])
    assert list((folder / "videos").glob("*.mp4"))


def test_record_video_of_dm_control_without_a_display(folder: Path, rendering: None) -> None:
    pytest.importorskip("moviepy")
    wrapper = {"sb3_dreamer_gpld.envs.ActionRepeat": {"repeat": 2}}
    entry = {**PLAIN, **SMALL, "policy": "MultiInputPolicy", "env_wrapper": [wrapper]}
    (folder / "small.yml").write_text(yaml.safe_dump({"dm_control/reacher-easy-v0": entry}))
    args = ["--env", "dm_control/reacher-easy-v0"]
    zoo.main(["train", *args, "-conf", "small.yml", "-n", "20", "--eval-freq", "-1", "--device", "cpu"])
    zoo.main(["record-video", *args, "-n", "5"])
    run = folder / "logs" / "dreamer_gpld" / "dm_control-reacher-easy-v0_1"
    assert list((run / "videos").glob("*.mp4"))


def test_rendering_needs_a_backend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moviepy")
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    with pytest.raises(SystemExit, match="cannot be rendered here.*libegl1"):
        zoo.main(["record-video", "--env", "dm_control/reacher-easy-v0"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems always have a display")
def test_rendering_is_set_up_without_a_display_only(monkeypatch: pytest.MonkeyPatch) -> None:
    works = [True]
    result = type("Result", (), {"returncode": property(lambda self: int(not works[0]))})()
    monkeypatch.setattr(zoo.subprocess, "run", lambda *args, **kwargs: result)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert zoo._set_up_rendering() and os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("DISPLAY", ":0")
    assert zoo._set_up_rendering() and "MUJOCO_GL" not in os.environ
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    works[0] = False
    assert not zoo._set_up_rendering() and "MUJOCO_GL" not in os.environ
    works[0] = True
    assert zoo._set_up_rendering() and os.environ["MUJOCO_GL"] == "egl"


def test_enjoy_needs_a_display_for_dm_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_has_display", lambda: False)
    with pytest.raises(SystemExit, match="--no-render, or record-video"):
        zoo.main(["enjoy", "--env", "dm_control/walker-walk-v0"])


STUDY = (
    "--env Pendulum-v1 -conf small.yml -n 60 --eval-episodes 1 --n-evaluations 2 --n-startup-trials 1 --pruner none "
    "--sampler random --no-optim-plots --device cpu --seed 1 --storage study.log --study-name test --verbose 0"
).split()


def test_a_failed_trial_does_not_end_the_study(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "small.yml").write_text(yaml.safe_dump({"default": {**PLAIN, **SMALL, "learning_starts": 1000}}))
    learn, calls = DreamerGPLD.learn, []

    def fail_first(self: DreamerGPLD, *args: Any, **kwargs: Any) -> DreamerGPLD:
        calls.append(self.train_ratio)
        if len(calls) == 1:
            raise FloatingPointError("a loss became not finite")
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(DreamerGPLD, "learn", fail_first)
    manager = rl_zoo3.train.ExperimentManager
    zoo.main(["optimize", *STUDY, "--n-trials", "2"])
    assert rl_zoo3.train.ExperimentManager is manager
    assert "Trial 0 failed and is pruned: FloatingPointError" in capsys.readouterr().err
    # the study goes on where it ended
    zoo.main(["optimize", *STUDY, "--n-trials", "1"])
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
    study = optuna.load_study(storage=storage, study_name="test")
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE", "COMPLETE"]
    # and a run can take a trial's values
    zoo.main(
        "train --env Pendulum-v1 -conf small.yml -n 10 --eval-freq -1 --device cpu --storage study.log --study-name test "
        "--trial-id 2 --verbose 0".split()
    )
    (config,) = (yaml.unsafe_load(path.read_text()) for path in folder.glob("logs/*/*/*/config.yml"))
    assert config["train_ratio"] == 2 ** study.trials[2].params["train_ratio_pow"]


def test_a_study_without_a_complete_trial_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "small.yml").write_text(yaml.safe_dump({"default": {**PLAIN, **SMALL}}))

    def fail(self: DreamerGPLD, *args: Any, **kwargs: Any) -> DreamerGPLD:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DreamerGPLD, "learn", fail)
    with pytest.raises(SystemExit, match="every trial was pruned.*out of memory"):
        zoo.main(["optimize", *STUDY, "--n-trials", "1"])


def test_push_to_hub_makes_the_files_without_network(
    trained: Path, folder: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    client = huggingface_hub.HfApi
    args = ["--env", "Pendulum-v1", "-f", str(trained / "logs"), "--no-upload", "-n", "5", "--device", "cpu"]
    args += ["--env-kwargs", "max_episode_steps:20"]
    zoo.main(["push-to-hub", *args])
    assert huggingface_hub.HfApi is client
    assert "Nothing was uploaded" in capsys.readouterr().out
    files = folder / "hub" / "dreamer_gpld-Pendulum-v1"
    assert (files / "dreamer_gpld-Pendulum-v1.zip").is_file() and (files / "config.yml").is_file()
    results = json.loads((files / "results.json").read_text())
    card = (files / "README.md").read_text()
    assert card.startswith("---\n") and "value: " in card
    for text in (f"{results['mean_reward']:.2f} ± ", "DreamerGPLD.load(", "train_ratio: 16", "| torch | "):
        assert text in card


def test_push_to_hub_sends_the_folder_with_our_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    from sb3_dreamer_gpld.zoo import hub

    calls: list[tuple[str, dict[str, Any]]] = []
    for name in ("create_repo", "snapshot_download", "upload_folder"):
        monkeypatch.setattr(HfApi, name, lambda self, *args, _name=name, **kwargs: calls.append((_name, kwargs)))
    monkeypatch.setattr(hub, "write_model_card", lambda *args: calls.append(("card", {"args": args})))
    client = hub._client(folder, upload=True)()
    client.create_repo(repo_id="me/agent", private=False)
    client.snapshot_download(repo_id="me/agent", local_dir=folder)
    client.upload_folder(repo_id="me/agent", folder_path=folder, commit_message="hello")
    assert [name for name, _ in calls] == ["create_repo", "snapshot_download", "card", "upload_folder"]
    assert calls[-1][1] == {"repo_id": "me/agent", "folder_path": folder, "commit_message": "hello"}


# ----------------------------------------------------------------------------------------------------------------- plots


def _write_runs(folder: Path, task: str, seeds: int, final: float, evaluations: int = 4) -> None:
    for seed in range(1, seeds + 1):
        run = folder / "dreamer_gpld" / f"{task}_{seed}"
        run.mkdir(parents=True)
        steps = 100 * np.arange(1, evaluations + 1)
        returns = final * steps / steps[-1] + np.array([[-10.0, 10.0]]).T.repeat(evaluations, 1) + seed
        np.savez(run / "evaluations.npz", timesteps=steps, results=returns.T)


def test_plot_draws_tasks_and_aggregate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, final in (("a", 800.0), ("b", 600.0)):
        _write_runs(folder / name, "dm_control-walker-walk-v0", seeds=3, final=final)
        _write_runs(folder / name, "dm_control-ball_in_cup-catch-v0", seeds=2, final=final, evaluations=5)
        _write_runs(folder / name, "Pendulum-v1", seeds=1, final=-200.0)
    zoo.main(["plot", "-f", "a", "b", "-l", "GPLD", "DreamerV3", "--reps", "50", "-o", "pictures"])
    names = {path.name for path in (folder / "pictures").iterdir()}
    tasks = {"dm_control-walker-walk-v0.png", "dm_control-ball_in_cup-catch-v0.png", "Pendulum-v1.png"}
    assert names == tasks | {"aggregate.png"}
    assert all((folder / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    zoo.main(["plot", "-f", "a", "-e", "Pendulum-v1", "--reps", "10", "-o", "one"])
    assert [path.name for path in (folder / "one").iterdir()] == ["Pendulum-v1.png"]
    assert "No aggregate" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no evaluated run of Foo-v1 in a"):
        zoo.main(["plot", "-f", "a", "-e", "Foo-v1"])
    with pytest.raises(SystemExit):
        zoo.main(["plot", "-f", "a", "b", "-l", "one"])


def test_plot_reads_what_train_logged(trained: Path) -> None:
    runs = plot.read_runs([str(trained / "logs")], ["x"], ["dreamer_gpld"])
    ((steps, returns),) = runs["Pendulum-v1"]["x"]
    assert steps.tolist() == [75, 150] and returns.shape == (2,)


def test_statistics() -> None:
    scores = np.array([[[0.0], [0.4]], [[0.2], [2.0]]])  # 2 seeds, 2 tasks, 1 step
    assert plot.mean(scores) == pytest.approx([0.65])
    assert plot.median(scores) == pytest.approx([0.65])  # of 0.1 and 1.2
    assert plot.interquartile_mean(scores) == pytest.approx([0.3])
    assert plot.optimality_gap(scores) == pytest.approx([1 - 0.4])


def test_interval_is_stratified_by_task() -> None:
    style = plot.Style(size=0.9, reps=500)
    # No spread within the tasks: however different the tasks are, there is no uncertainty
    constant = np.repeat([[[0.1], [0.9]]], 4, 0)
    assert plot.interval(constant, plot.mean, style)[:, 0] == pytest.approx([0.5, 0.5])
    normal = np.random.default_rng(0).normal(size=(100, 1, 1))
    low, high = plot.interval(normal, plot.mean, style)[:, 0]
    assert high - low == pytest.approx(2 * 1.645 * normal.std() / 10, rel=0.15)


def test_curves_end_with_the_shortest_run(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [plot.Run(np.array([10, 20, 30]), np.arange(3.0)), plot.Run(np.array([5, 15, 25, 28]), np.arange(4.0))]
    steps = plot._common_steps(runs)
    assert steps.tolist() == [10, 20]
    assert plot._at(steps, runs) == pytest.approx(np.array([[0, 1], [0.5, 1.5]]))
    assert "Drawn up to 28 steps" in capsys.readouterr().out
