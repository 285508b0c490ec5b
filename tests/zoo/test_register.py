"""Registration with rl_zoo3."""

import subprocess
import sys
from pathlib import Path

import pytest
import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.hyperparams_opt
import rl_zoo3.train

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.zoo import arguments, register, search
from sb3_dreamer_gpld.zoo import main as zoo


def test_registers_the_algorithm_everywhere() -> None:
    register.register()
    for algorithms in (rl_zoo3.ALGOS, rl_zoo3.train.ALGOS, rl_zoo3.enjoy.ALGOS, rl_zoo3.exp_manager.ALGOS):
        assert algorithms["dreamer_gpld"] is DreamerGPLD
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER["dreamer_gpld"] is search.sample_params
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER["dreamer_gpld"] is search.convert_params


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("record-video --env PendulumNoVel-v1", "Train an agent first"),
        ("diagnose --env PendulumNoVel-v1 --model none.zip --out out", "none.zip: there is no such file"),
        ("sweep --tasks PendulumNoVel-v1 -conf wrong.yml", "gama: the key 'gama' does not exist"),
    ],
)
def test_every_command_knows_the_environments_of_rl_zoo3(folder: Path, command: str, problem: str) -> None:
    """In a process of its own, since other tests bring them in here."""
    if command.startswith("sweep"):
        pytest.importorskip("ray")
    (folder / "wrong.yml").write_text("default: {n_timesteps: 1, policy: MlpPolicy, gama: 0.9}")
    words = [sys.executable, "-m", "sb3_dreamer_gpld.zoo", *command.split()]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and problem in done.stderr, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "record-video",
        "check none.yml",
        "diagnose --env Pendulum-v1 --model none.zip --out out",
        "sweep --tasks Pendulum-v1 -conf none.yml",
    ],
)
def test_what_is_missing_without_rl_zoo3(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    with pytest.raises(SystemExit, match=r'this needs rl_zoo3: pip install "sb3-dreamer-gpld\[zoo\]"'):
        zoo.main(command.split())


def test_rl_zoo3_takes_the_algorithm_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/zoo.md says: not with ``python -m``, but from a program that registers it."""
    register.register()
    args = "train --algo dreamer_gpld --env Pendulum-v1 --device cpu --eval-freq -1 -n 5 --verbose 0 -conf"
    monkeypatch.setattr("sys.argv", [*args.split(), str(arguments.CONFIGS / "dreamer_gpld_cpu.yml")])
    rl_zoo3.train.train()
    assert (folder / "logs" / "dreamer_gpld" / "Pendulum-v1_1" / "Pendulum-v1.zip").is_file()
