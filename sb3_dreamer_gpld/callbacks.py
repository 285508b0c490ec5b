"""Callbacks for :meth:`DreamerGPLD.learn`; those that measure the world model are in :mod:`sb3_dreamer_gpld.diagnostics`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EventCallback

from sb3_dreamer_gpld.checks import check_int
from sb3_dreamer_gpld.resumable import ResumableAlgorithm, check_room
from sb3_dreamer_gpld.saving import check_writable


def callbacks_of_all(callback: Any) -> list[BaseCallback]:
    """Those callbacks that every process calls which learns with others, by their attribute ``in_all_processes``.

    :param callback: as ``learn`` takes it: None, a function, a callback, or a list of them
    :raises ValueError: one of them is called by another callback, which not every process calls, and not at every step
    """
    if isinstance(callback, CallbackList):
        callback = callback.callbacks
    if isinstance(callback, list):
        return [each for part in callback for each in callbacks_of_all(part)]
    called = [getattr(callback, name, None) for name in ("callback", "callback_on_new_best")]
    for inner in called if isinstance(callback, EventCallback) else []:
        if callbacks_of_all(inner):
            raise ValueError(
                f"{type(inner).__name__} must be told of everything, in all processes, and {type(callback).__name__} would "
                "call it at some steps, in one; allowed: give it to learn by itself, or in a list"
            )
    return [callback] if getattr(callback, "in_all_processes", False) else []


class SaveRunCallback(BaseCallback):
    """Saves the whole run from time to time, model and replay buffer, to go on where it was stopped or killed::

        folder, steps = "runs/pendulum", 12_000
        model = DreamerGPLD.load_run(folder, env) or DreamerGPLD("MlpPolicy", env, **preset("cpu"))
        callback = SaveRunCallback(folder, every=2000)
        model.learn(steps - model.num_timesteps, callback=callback, reset_num_timesteps=False)

    It saves when an episode has ended in all environments, from where a run goes on exactly (with ``compile="auto"`` see
    ``load``), or ``every`` steps later than it wanted to; and when ``learn`` has made all its steps, or a callback has stopped
    it. The files of before are removed when the new ones are complete. Of several processes each saves its share.

    :param folder: of the run, which is made if it is not there
    :param every: environment steps
    :param verbose: 1: print what was saved
    :raises ValueError: ``every`` is no whole number of at least 1; and by ``learn``, another callback than a list calls it, or
        the folder has a run of more steps
    :raises NotADirectoryError, PermissionError: in ``learn``, nothing can be written in the folder
    """

    in_all_processes = True  # that learn together

    def __init__(self, folder: str | os.PathLike[str], every: int, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.folder, self.every = Path(folder), check_int("every", every, 1)
        self._due = self._known = 0  # environment steps: to save from there on, and that are saved or were loaded

    def _init_callback(self) -> None:
        if not isinstance(self.model, ResumableAlgorithm):
            raise TypeError(f"SaveRunCallback saves a DreamerGPLD model, not a {type(self.model).__name__}")
        check_writable(self.folder)

    def _on_training_start(self) -> None:
        assert isinstance(self.model, ResumableAlgorithm)
        check_room(self.folder, self.num_timesteps, self.model.processes)
        self._known = self.num_timesteps
        self._due = self._known + self.every

    def _on_training_end(self) -> None:
        """Of a run that was interrupted nothing is saved: rl_zoo3 calls this then, too, in one process."""
        model = self.model
        assert isinstance(model, ResumableAlgorithm)
        if (model._was_stopped or model._total_timesteps <= model.num_timesteps) and model.num_timesteps != self._known:
            self._save(model)

    def _on_rollout_start(self) -> None:
        """Here all that came before is stored and learned from."""
        model = self.model
        if model.num_timesteps < self._due:
            return
        assert isinstance(model, ResumableAlgorithm) and model._last_episode_starts is not None
        between = model.processes.sums([float(model._last_episode_starts.all())])[0] == model.processes.size
        if between or model.num_timesteps >= self._due + self.every:
            self._save(model)

    def _save(self, model: ResumableAlgorithm) -> None:
        file = self.save(model)
        self._known = model.num_timesteps
        self._due = self._known + self.every
        if self.verbose >= 1 and model.processes.is_first:
            print(f"Saved the run as {file}")

    def save(self, model: ResumableAlgorithm) -> Path:
        """
        :param model: what is trained
        :return: its file
        """
        return model.save_run(self.folder)

    def _on_step(self) -> bool:
        return True
