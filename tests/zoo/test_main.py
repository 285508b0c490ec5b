"""The commands, through rl_zoo3."""

import inspect
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import rl_zoo3.train
import yaml
from entries import PLAIN, SMALL

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.zoo import arguments, environments
from sb3_dreamer_gpld.zoo import main as zoo


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
        ("train --env Pendulum-v1 -conf dreamer_gpld_cpuu", "Did you mean 'dreamer_gpld_cpu.yml'"),
        ("train --env Pendulum-v1 -conf no_package.settings", "the file 'no_package.settings' does not exist"),
        ("train --env Pendulum-v1 -conf nowhere/zoo_configs/dreamer_v3.yml", "'nowhere/zoo_configs/dreamer_v3.yml' does not"),
        ("train --env Pendulum-v1 -params batch_size=3", "name:value"),
        ("train --env Pendulum-v1 --hyperparams bach_size:3", "Did you mean 'batch_size'"),
        ("train --env Pendulum-v1 -i nothing.zip", "nothing.zip"),
        ("train --env Pendulum-v1 --gym-packages no_package", "No module named 'no_package'"),
        ("optimize --env Pendulm-v1", "Did you mean 'Pendulum-v1'"),
        (
            "optimize --env Pendulum-v1 --run-folder run",
            "--run-folder is for train: a trial does not go on; allowed: --storage",
        ),
        ("optimize --env Pendulum-v1 --save-run 10", "--save-run is for train"),
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


@pytest.mark.parametrize("command", ["train", "optimize"])
def test_says_which_environment_is_taken_if_none_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    taken: list[str] = []
    monkeypatch.setattr("rl_zoo3.train.train", lambda: taken.extend(sys.argv[1:]))
    zoo.main([command])
    assert "--env was not given, so the environment is CartPole-v1" in capsys.readouterr().out
    assert "--env" not in taken  # rl_zoo3's own default, which must be the same
    zoo.main([command, "--env", "Pendulum-v1"])
    assert "--env was not given" not in capsys.readouterr().out


def test_default_environment_is_that_of_rl_zoo3() -> None:
    assert f'"--env", type=str, default="{arguments.DEFAULT_ENV}"' in inspect.getsource(rl_zoo3.train)


def test_train_writes_the_files_of_rl_zoo3(trained: Path) -> None:
    run = trained / "logs" / "dreamer_gpld" / "Pendulum-v1_1"
    for name in ("Pendulum-v1.zip", "best_model.zip", "rl_model_100_steps.zip", "evaluations.npz", "Pendulum-v1/config.yml"):
        assert (run / name).is_file(), name
    model = DreamerGPLD.load(run / "Pendulum-v1.zip")
    assert model.num_timesteps == 150 and model._n_updates > 0 and model.model_size == "debug"


def test_other_algorithms_keep_their_own_file(folder: Path) -> None:
    given = ["--env", "Pendulum-v1", "--algo", "sac"]
    assert zoo._prepare_training(given, True) == given
    assert zoo._prepare_training(["--env", "Pendulum-v1"], True)[-1] == str(arguments.CONFIGS / "dreamer_gpld.yml")


@pytest.mark.parametrize(
    "given, taken",
    [
        ("", "2400"),  # 12,000 steps
        ("-n 1000", "200"),
        ("-params n_timesteps:4", "1"),
        ("-n 25000", None),
        ("--eval-freq -1", "-1"),
        ("--eval-freq 90000", "90000"),
    ],
)
def test_a_short_run_is_evaluated(given: str, taken: str | None) -> None:
    """rl_zoo3's default is longer than it, and would leave neither a best agent nor evaluations."""
    assert f"default={zoo.EVAL_FREQ}," in inspect.getsource(rl_zoo3.train)
    args = ["--env", "Pendulum-v1", "-conf", "dreamer_gpld_cpu.yml", *given.split()]
    found = zoo._prepare_training(args, evaluates=True)
    assert (found[found.index("--eval-freq") + 1] if "--eval-freq" in found else None) == taken
    assert zoo._prepare_training(args, evaluates=False)[: len(args)] == args
    assert found.count("--eval-freq") <= 1


def test_a_run_without_a_model_names_one_that_has_it(folder: Path) -> None:
    """It was killed."""
    for number in (1, 2, 3):
        run = folder / "logs" / "dreamer_gpld" / f"Pendulum-v1_{number}"
        (run / "Pendulum-v1").mkdir(parents=True)
        if number < 3:
            (run / "Pendulum-v1.zip").touch()
    for options, hint in (([], "--exp-id 2$"), (["--load-best"], "with -f$"), (["--exp-id", "3"], "with -f$")):
        with pytest.raises(SystemExit, match=f"No model found.*Train an agent first.*{hint}"):
            zoo.main(["enjoy", "--env", "Pendulum-v1", "--no-render", *options])


@pytest.mark.parametrize("given", ["dreamer_v3", "dreamer_v3.yml", "zoo_configs/dreamer_v3.yml", "./dreamer_v3.yml"])
def test_files_of_the_package_are_found_by_their_names(folder: Path, given: str) -> None:
    assert arguments.find_config(given) == str(arguments.CONFIGS / "dreamer_v3.yml")
    assert arguments.find_config("email.charset") == "email.charset"  # a module, as rl_zoo3 takes it


@pytest.mark.parametrize("option", [[], ["--load-best"], ["--load-last-checkpoint"], ["--stochastic"]])
def test_enjoy_takes_no_memory_for_replay(
    trained: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    monkeypatch.chdir(trained)  # the folder of the runs is "logs" by default
    zoo.main(["enjoy", "--env", "Pendulum-v1", "-n", "201", "--no-render", "--device", "cpu", *option])
    assert "Mean reward" in capsys.readouterr().out


@pytest.mark.parametrize("given", [{}, {"max_episode_steps": 9}])
def test_arguments_of_the_environment_hold_for_all_commands(folder: Path, given: dict[str, int]) -> None:
    """Also those of a hyperparameter file, of which rl_zoo3 tells only training and enjoy."""
    entry = {**PLAIN, **SMALL, "env_kwargs": {"max_episode_steps": 15, "g": 5.0}}
    (folder / "small.yml").write_text(yaml.safe_dump({"default": entry}))
    train = "train --env Pendulum-v1 -conf small.yml -n 20 --eval-freq 20 --eval-episodes 1 --device cpu --verbose 0".split()
    evaluated = [f"{name}:{value}" for name, value in given.items()]
    zoo.main([*train, "--eval-env-kwargs", *evaluated] if given else train)
    run = folder / "logs" / "dreamer_gpld" / "Pendulum-v1_1"
    lengths = np.load(run / "evaluations.npz")["ep_lengths"]
    assert lengths.item() == given.get("max_episode_steps", 15)
    words = [word for name in evaluated for word in ("--env-kwargs", name)]
    args, found = zoo._prepare_agent(["--env", "Pendulum-v1", *words], rendering=True)
    assert found.absolute() == run
    assert arguments.parse(args, "env_kwargs").env_kwargs == {**entry["env_kwargs"], **given}


def test_recorded_arguments_of_the_environment_may_be_any(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rl_zoo3 evaluates them, and knows no inf."""
    recorded = {"heights": [0.7, float("inf")], "pair": (1, "a"), "nothing": None}
    monkeypatch.setattr(zoo, "recorded_env_kwargs", lambda run: recorded)
    args, _ = zoo._prepare_agent(["--env", "Pendulum-v1", "-f", str(trained / "logs")], rendering=False)
    assert arguments.parse(args, "env_kwargs").env_kwargs == recorded


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


@pytest.mark.parametrize("env", ["dm_control/walker-walk-v0", "metaworld/reach-v3", "Ant-v5", "CartPole-v1"])
def test_enjoy_needs_a_display(monkeypatch: pytest.MonkeyPatch, env: str) -> None:
    monkeypatch.setattr(environments, "has_display", lambda: False)
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    assert environments.can_be_shown("Printing-v0")  # nobody knows what that would open
    with pytest.raises(SystemExit, match="--no-render, or record-video"):
        zoo.main(["enjoy", "--env", env])
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # of pygame, not of MuJoCo
    assert environments.can_be_shown(env) == (env == "CartPole-v1")
