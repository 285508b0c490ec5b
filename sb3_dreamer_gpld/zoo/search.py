"""Optuna's search of hyperparameters: what is drawn, and studies that outlive a trial that fails."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sb3_dreamer_gpld.zoo.arguments import fail

if TYPE_CHECKING:
    import optuna
    from rl_zoo3.exp_manager import ExperimentManager


def sample_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Search space of DreamerGPLD for ``optimize``. What it leaves out, such as the model size, stays as in the file.

    :param trial: draws the values
    :param n_actions: size of a continuous action, not used
    :param n_envs: parallel environments, not used
    :param additional_args: about hindsight replay, not used
    :return: constructor arguments
    """
    return convert_params(
        {
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 3e-3, log=True),
            "train_ratio_pow": trial.suggest_int("train_ratio_pow", 5, 9),
            "batch_length_pow": trial.suggest_int("batch_length_pow", 4, 6),
            "imagination_horizon": trial.suggest_int("imagination_horizon", 5, 30, step=5),
            "ent_coef": trial.suggest_float("ent_coef", 1e-5, 1e-2, log=True),
            # 0 is DreamerV3 without the penalty
            "posterior_penalty": trial.suggest_categorical("posterior_penalty", [0.0, 0.05, 0.1, 0.25, 0.5, 1.0]),
            "penalty_fraction": trial.suggest_float("penalty_fraction", 0.125, 1.0, step=0.125),
        }
    )


def convert_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Turn what a trial stores into constructor arguments.

    :param sampled_params: values by name; ``<name>_pow`` is an exponent of 2
    :return: constructor arguments
    """
    powers = {name.removesuffix("_pow"): 2**value for name, value in sampled_params.items() if name.endswith("_pow")}
    return {**powers, **{name: value for name, value in sampled_params.items() if not name.endswith("_pow")}}


@contextlib.contextmanager
def tolerant_studies() -> Iterator[None]:
    """A trial of rl_zoo3's ``train`` that fails, for whatever reason, is pruned and the study goes on."""
    import rl_zoo3.train as script

    # Inside rl_zoo3: the script takes the class from its own namespace
    before = script.ExperimentManager
    script.ExperimentManager = _tolerant(before)  # type: ignore[misc]
    try:
        yield
    finally:
        script.ExperimentManager = before  # type: ignore[misc]


def _tolerant(manager: type[ExperimentManager]) -> type[ExperimentManager]:
    """The ExperimentManager of rl_zoo3, but :func:`tolerant <tolerant_studies>`."""
    import optuna

    # Inside rl_zoo3: these two methods, and the text of an error
    class TolerantManager(manager):  # type: ignore[misc, valid-type]
        last_error = "none"  # as text: the error itself would keep the model of its trial in memory

        def objective(self, trial: optuna.Trial) -> float:
            try:
                return super().objective(trial)
            except optuna.TrialPruned as pruned:
                if pruned.__cause__ is not None:  # an error that rl_zoo3 itself takes for a bad trial
                    self.last_error = f"{type(pruned.__cause__).__name__}: {pruned.__cause__}"
                raise
            except Exception as error:
                self.last_error = f"{type(error).__name__}: {error}"
                print(f"Trial {trial.number} failed and is pruned: {self.last_error}", file=sys.stderr)
                raise optuna.TrialPruned from error

        def hyperparameters_optimization(self) -> None:
            try:
                super().hyperparameters_optimization()
            except ValueError as error:
                if "No trials are completed" not in str(error):
                    raise
                fail(f"every trial was pruned, so there is no best one. The last failure: {self.last_error}")

    return TolerantManager
