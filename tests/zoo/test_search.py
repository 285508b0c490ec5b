"""Optuna's search: the search space, and studies with trials that fail."""

import gc
import weakref
from pathlib import Path
from typing import Any

import optuna
import pytest
import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.hyperparams_opt
import rl_zoo3.train
import yaml
from entries import PLAIN, SMALL

from sb3_dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.zoo import check, search
from sb3_dreamer_gpld.zoo import main as zoo


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
    sampled = search.sample_params(trial, n_actions=1, n_envs=1, additional_args={})
    assert sampled == search.convert_params(trial.params)  # what a run from a stored trial gets
    assert sampled["train_ratio"] == 64 and sampled["batch_length"] == 32 and sampled["posterior_penalty"] == 0
    assert check.check_entry({**PLAIN, **sampled}) == []


def test_whole_search_space_is_valid() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        sampled = search.sample_params(study.ask(), 1, 1, {})
        assert check.check_entry({**PLAIN, "model_size": "debug", **sampled}) == []


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
    assert not list(folder.glob("logs/dreamer_gpld/Pendulum-v1_*"))  # where enjoy would look for the last run
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


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("the reward is not finite")])
def test_a_study_without_a_complete_trial_says_why(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of an error that rl_zoo3 itself takes for a bad trial, as it does a ValueError."""
    (folder / "small.yml").write_text(yaml.safe_dump({"default": {**PLAIN, **SMALL}}))

    def fail(self: DreamerGPLD, *args: Any, **kwargs: Any) -> DreamerGPLD:
        raise error

    monkeypatch.setattr(DreamerGPLD, "learn", fail)
    with pytest.raises(SystemExit, match=f"every trial was pruned.*{type(error).__name__}: {error}"):
        zoo.main(["optimize", *STUDY, "--n-trials", "1"])


def test_a_failed_trial_leaves_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error would keep its model, and the next one may then find no room."""
    (folder / "small.yml").write_text(yaml.safe_dump({"default": {**PLAIN, **SMALL}}))
    models: list[weakref.ref[DreamerGPLD]] = []

    def fail(self: DreamerGPLD, *args: Any, **kwargs: Any) -> DreamerGPLD:
        gc.collect()
        assert all(model() is None for model in models)
        models.append(weakref.ref(self))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DreamerGPLD, "learn", fail)
    with pytest.raises(SystemExit, match="RuntimeError: out of memory"):
        zoo.main(["optimize", *STUDY, "--n-trials", "3"])
    assert len(models) == 3


@pytest.mark.parametrize(
    "options", ["--n-jobs 2", "--n-jobs 2 --device cpu", "--n-jobs 2 -params compile:False", "--n-jobs 1", ""]
)
def test_trials_in_threads_of_a_gpu(options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Their recordings would disturb each other, and the user is told."""
    trained: list[Any] = []
    monkeypatch.setattr(zoo.th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(zoo, "_train", lambda args, command: trained.append(args))
    zoo._optimize(options.split())
    assert trained == [[*options.split(), "-optimize"]]
    assert ("start optimize several times" in capsys.readouterr().err) == (options == "--n-jobs 2")
