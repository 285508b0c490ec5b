"""Registration with rl_zoo3."""

from pathlib import Path

import pytest
import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.hyperparams_opt
import rl_zoo3.train

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.zoo import arguments, register, search


def test_registers_the_algorithm_everywhere() -> None:
    register.register()
    for algorithms in (rl_zoo3.ALGOS, rl_zoo3.train.ALGOS, rl_zoo3.enjoy.ALGOS, rl_zoo3.exp_manager.ALGOS):
        assert algorithms["dreamer_gpld"] is DreamerGPLD
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER["dreamer_gpld"] is search.sample_params
    assert rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER["dreamer_gpld"] is search.convert_params


def test_rl_zoo3_takes_the_algorithm_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/zoo.md says: not with ``python -m``, but from a program that registers it."""
    register.register()
    args = "train --algo dreamer_gpld --env Pendulum-v1 --device cpu --eval-freq -1 -n 5 --verbose 0 -conf"
    monkeypatch.setattr("sys.argv", [*args.split(), str(arguments.CONFIGS / "dreamer_gpld_cpu.yml")])
    rl_zoo3.train.train()
    assert (folder / "logs" / "dreamer_gpld" / "Pendulum-v1_1" / "Pendulum-v1.zip").is_file()
