"""What Stable-Baselines3's EvalCallback leaves in the folder of a run: its evaluations, and its best agent."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback

from sb3_dreamer_gpld.saving import atomic_file
from sb3_dreamer_gpld.zoo.arguments import fail

EVALUATIONS = "evaluations.npz"
BEST = "best_model.json"  # what the best agent's evaluation returned


def read_evaluations(file: Path) -> dict[str, np.ndarray] | None:
    """What an EvalCallback has written.

    :param file: "evaluations.npz"
    :return: its arrays by name; None, after a warning, if it cannot be read: SB3 writes it in place, and a run may have been
        killed in between
    """
    try:
        with np.load(file) as log:
            return {name: log[name] for name in log.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        warnings.warn(f"{file} cannot be read and is left out ({error}): a run was killed while it was written", stacklevel=3)
        return None


class NoteBest(BaseCallback):
    """Notes what the agent in ``best_model.zip`` has returned; as ``callback_on_new_best``.

    :param evaluation: whose best agent it is
    """

    def __init__(self, evaluation: EvalCallback) -> None:
        super().__init__()
        self.evaluation = evaluation

    def _on_step(self) -> bool:
        folder = self.evaluation.best_model_save_path
        if folder is not None:
            with atomic_file(Path(folder) / BEST) as file:
                file.write(json.dumps({"mean_reward": float(self.evaluation.best_mean_reward)}).encode())
        return True


def restore_evaluations(callback: EvalCallback, num_timesteps: int, saved: Path | None = None) -> None:
    """Give a callback the evaluations that a run made before it was stopped; SB3 writes the file anew each time.

    A file that cannot be read, since the run was killed while it was written, is replaced by the one that was saved with the
    run, with a warning; without that it is left behind. The best agent is replaced by a better one only, also if it was found
    after the run was saved.

    :param callback: of the run that goes on
    :param num_timesteps: from where; later evaluations are made again
    :param saved: the evaluations as they were saved with the run
    :raises SystemExit: it has made evaluations of another number of episodes, with which new ones cannot share the file
    """
    file = None if callback.log_path is None else Path(f"{callback.log_path}.npz")
    log = None
    if file is not None and file.is_file():
        log = read_evaluations(file)
        if log is None and saved is not None and saved.is_file():
            with atomic_file(file) as mended:
                mended.write(saved.read_bytes())
            log = read_evaluations(file)
    kept = np.zeros(0, dtype=bool) if log is None else log["timesteps"] <= num_timesteps
    if log is not None and kept.any():
        episodes = log["results"].shape[1]
        if episodes != callback.n_eval_episodes:
            fail(
                f"--eval-episodes {callback.n_eval_episodes}: the evaluations in {file} have {episodes} episodes each. "
                f"Allowed: --eval-episodes {episodes}, or move that file away first"
            )
        callback.evaluations_timesteps = log["timesteps"][kept].tolist()
        callback.evaluations_results = log["results"][kept].tolist()
        callback.evaluations_length = log["ep_lengths"][kept].tolist()
        if "successes" in log:
            callback.evaluations_successes = log["successes"][kept].tolist()
        callback.best_mean_reward = float(log["results"][kept].mean(1).max())
    if callback.best_model_save_path is not None:
        best = Path(callback.best_model_save_path) / BEST
        if best.is_file() and best.with_suffix(".zip").is_file():
            callback.best_mean_reward = max(callback.best_mean_reward, json.loads(best.read_text())["mean_reward"])
