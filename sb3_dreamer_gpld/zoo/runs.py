"""Runs of rl_zoo3 that go on where they were stopped, and runs of several processes that torchrun has started.

Import it after :func:`~sb3_dreamer_gpld.zoo.register.register`, which says what is missing if rl_zoo3 is not installed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from unittest import mock

import rl_zoo3.train
import yaml
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_dreamer_gpld import parallel
from sb3_dreamer_gpld.callbacks import SaveRunCallback, callbacks_of_all
from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.resumable import ResumableAlgorithm, run_file, steps_saved
from sb3_dreamer_gpld.saving import atomic_file, staged
from sb3_dreamer_gpld.zoo.arguments import fail
from sb3_dreamer_gpld.zoo.evaluations import EVALUATIONS, NoteBest, restore_evaluations
from sb3_dreamer_gpld.zoo.recorded import Finished, changes
from sb3_dreamer_gpld.zoo.sweep import episodes_in, whole_lines

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MONITORS = "*.monitor.csv"  # files in the folder of a run, one for each environment


class Experiment(ExperimentManager):
    """Inside rl_zoo3: a run, which may be in a folder of its own choice, and one of several processes.

    Each process has its share of the environments; the first one logs, evaluates and saves, but for the others' shares.

    :param folder: of the run, where a saved one goes on; None: a new one, as rl_zoo3 chooses it
    :param every: environment steps between two times that the run is saved; None: it is not saved before its end
    :param asked_seed: that the command names; None: none, and rl_zoo3 has drawn one
    """

    def __init__(
        self, *args: Any, folder: str | None, every: int | None, asked_seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.processes = parallel.current()
        self.folder, self.every, self.asked_seed = folder, every, asked_seed
        if folder is not None and self.processes.is_first:
            self._lock = lock(Path(folder))
        self.save_path = self.processes.told_by_first(folder or self.save_path)
        self.params_path = f"{self.save_path}/{self.env_name}"
        self.seed = self.processes.told_by_first(self.seed)  # it may be a random one
        try:
            self.saved = 0 if folder is None else steps_saved(Path(folder), self.processes)
        except FileNotFoundError as error:
            fail(f"--run-folder {error}")
        if folder is not None:
            self._check_folder(Path(folder))
        self.done = self.total = 0  # steps that the run had made when it was saved, and all that it shall make
        self.ended = False
        if not self.processes.is_first:
            self.verbose, self.tensorboard_log = 0, None

    def setup_experiment(self) -> tuple[Any, dict[str, Any]] | None:
        if self.saved:
            self._check_hyperparameters()
        found = super().setup_experiment()
        if self.folder is None or found is None:
            return found
        fresh, hyperparams = found
        assert fresh.env is not None
        to_log = {"tensorboard_log": self.tensorboard_log, "verbose": self.verbose}
        model = DreamerGPLD.load_run(self.folder, fresh.env, self.device, **to_log)
        if model is None:
            return fresh, hyperparams
        print(f"Going on after {model.num_timesteps} steps")
        if self.processes.is_first:
            Finished.forget(Path(self.folder))  # it says so again when it ends
        self.done = model.num_timesteps
        for callback in self.callbacks:
            callback.n_calls = self.done // self.n_envs
            if isinstance(callback, EvalCallback):
                restore_evaluations(callback, self.done, saved_evaluations(Path(self.folder), self.done))
        return model, hyperparams

    @property
    def logs(self) -> bool:
        """Whether this process writes into the folder of the run; a study has none."""
        return self.processes.is_first and not self.optimize_hyperparameters

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        hyperparams, saved = super().read_hyperparameters()
        return copy.deepcopy(hyperparams), saved  # rl_zoo3 writes into dicts of the first, and the second becomes config.yml

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        found = super()._preprocess_hyperparams(hyperparams)
        if self._eval_env_kwargs_args is None:  # rl_zoo3 would evaluate without env_kwargs of the file
            self.eval_env_kwargs = self.env_kwargs
        # A Monitor wants tuples, which YAML does not have
        self.monitor_kwargs = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.monitor_kwargs.items()
        }
        return found

    def _check_folder(self, folder: Path) -> None:
        """:raises SystemExit: a run of another environment is in the folder, or one that cannot go on"""
        others = [file.parent for file in folder.glob("*/args.yml") if file.parent != Path(self.params_path)]
        if others:
            name = others[0].relative_to(folder)
            fail(f"--run-folder {folder}: the run there is of {name}, not of {self.env_name}. Allowed: another folder")
        end = Finished.read(folder)
        if end is not None and end.steps > self.saved:
            last = f"what was saved last is of step {self.saved}" if self.saved else "nothing was saved"
            how = "was stopped by a callback" if end.stopped else "is finished"
            fail(
                f"--run-folder {folder}: the run there {how} after {end.steps} steps, and {last} that it could go on "
                "from, so that it would be overwritten. Allowed: another folder"
            )
        model = folder / f"{self.env_name}.zip"
        if not self.saved and model.exists():
            fail(
                f"--run-folder {folder}: the run there was stopped, and nothing was saved that it could go on from, so that "
                f"{model.name} would be overwritten. Allowed: another folder, or move that file away first"
            )

    def _check_hyperparameters(self) -> None:
        """:raises SystemExit: a saved run would go on with other hyperparameters than it was begun with"""
        file = Path(self.params_path) / "config.yml"
        if not file.is_file():
            return
        with contextlib.redirect_stdout(io.StringIO()):
            _, now = self.read_hyperparameters()
        # Files of this run, whose model is loaded as well
        before, given = (
            dict(yaml.load(each.read_text(), Loader=yaml.UnsafeLoader)) for each in (file, file.with_name("args.yml"))
        )
        for name in ("env_kwargs", "eval_env_kwargs"):
            option = f"--{name.replace('_', '-')}"
            before[option], now[option] = given.get(name), getattr(self.args, name)
        if self.asked_seed is not None and self.asked_seed >= 0:
            before["--seed"], now["--seed"] = given.get("seed"), self.asked_seed
        else:
            self.seed = self.args.seed = given.get("seed", self.seed)
            print(f"The seed is that of the run, {self.seed}")
        if found := changes(before, now):
            fail(
                f"--run-folder {self.folder}: the run that is saved there has other hyperparameters ({found}). Allowed: the "
                "same ones, n_timesteps excepted, or another folder"
            )

    def learn(self, model: Any) -> None:
        self.total = self.n_timesteps
        self.n_timesteps -= self.done
        if self.done and self.n_timesteps <= 0:
            self.ended = True  # though it may have been killed before it said so
            return print(f"Nothing to do: the run has made its {self.done} steps")
        learn: Any = DreamerGPLD.learn
        settings: dict[str, Any] = {"reset_num_timesteps": False} if self.done else {}
        if self.folder is not None:  # SB3 goes on in the newest TensorBoard log of a name, which may be of another run
            path = Path(self.folder).resolve()
            settings["tb_log_name"] = "-".join(path.relative_to(path.anchor).parts)[-200:]

        def to_its_end(model: DreamerGPLD, *args: Any, **kwargs: Any) -> DreamerGPLD:
            learn(model, *args, **kwargs, **settings)
            self.ended = True  # and was not interrupted, which rl_zoo3 does not tell
            return model

        with mock.patch.object(DreamerGPLD, "learn", to_its_end):
            super().learn(model)

    def save_trained_model(self, model: Any) -> None:
        super().save_trained_model(model)
        if self.processes.is_first and self.ended:
            Finished(model.num_timesteps, stopped=model.num_timesteps < self.total).write(Path(self.save_path))

    def create_log_folder(self) -> None:
        if self.logs and self.folder is None:
            self.save_path = str(new_folder(Path(self.save_path)))
            self._lock = lock(Path(self.save_path))
        self.save_path = self.processes.told_by_first(self.save_path)
        self.params_path = f"{self.save_path}/{self.env_name}"
        if self.logs:
            super().create_log_folder()
        self.processes.barrier()  # nobody goes on before it is there

    def create_callbacks(self) -> None:
        if self.processes.is_first:
            super().create_callbacks()
            for callback in self.callbacks:
                if isinstance(callback, EvalCallback) and callback.callback_on_new_best is not None:
                    callback.callback_on_new_best = CallbackList([callback.callback_on_new_best, NoteBest(callback)])
        else:
            self.callbacks = callbacks_of_all(self.callbacks)
        if self.every is not None or self.saved:  # what is saved is not older than the run when it is finished
            self.callbacks.append(SaveMonitoredRun(self.save_path, self.every or sys.maxsize))

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> Any:
        if not eval_env:
            if self.saved and self.processes.is_first:
                episodes = monitored_episodes(Path(self.save_path), self.saved)
                for file in Path(self.save_path).glob(MONITORS):
                    rewind_monitor(file, episodes.get(file.name))
            n_envs = self.processes.share("n_envs", n_envs)
        # Here, since rl_zoo3 sets monitor_kwargs in between for some tasks
        make = going_on_monitors if self.saved else make_vec_env
        with mock.patch.object(exp_manager, "make_vec_env", make):
            try:
                return super().create_envs(n_envs, eval_env, no_log or not self.logs)
            except TypeError as error:  # as Gymnasium raises it, with the environment's name
                if "unexpected keyword argument" not in str(error):
                    raise
                fail(f"the environment cannot be made: {error}. Allowed as env_kwargs: its own arguments")

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        if self.processes.is_first:
            folder = Path(self.params_path)
            # A run that goes on reads what is there, so that it must always be whole
            with staged(folder) as temporary, mock.patch.object(self, "params_path", str(temporary)):
                super()._save_config(saved_hyperparams)


def new_folder(folder: Path) -> Path:
    """Make the folder of a run, under the next number if another process has been faster.

    :param folder: whose name ends with a number, "Pendulum-v1_1", or with a UUID behind that
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    name, _, number = folder.name.rpartition("_")
    if not number.isdigit():  # that of --uuid, which no other has
        folder.mkdir()
        return folder
    free = int(number)
    while True:
        found = folder.with_name(f"{name}_{free}")
        with contextlib.suppress(FileExistsError):
            found.mkdir()
            return found
        free += 1


def lock(folder: Path) -> IO[str] | None:
    """Keep other processes out of a run's folder while this one lives.

    :param folder: which is made if it is not there
    :return: what must be kept; None where the system has no such locks
    :raises SystemExit: another process makes that run
    """
    if fcntl is None:
        return None
    if folder.exists() and not folder.is_dir():
        fail(f"--run-folder {folder}: this is a file; allowed: a folder, or a name that does not exist yet")
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--run-folder {folder}: another process makes this run now")
    except OSError:  # a file system without locks
        pass
    return file


@contextlib.contextmanager
def goes_on(folder: str | None, every: int | None, asked_seed: int | None = None) -> Iterator[None]:
    """Within, the training script of rl_zoo3 makes an :class:`Experiment`; arguments as there."""
    first = parallel.current().is_first
    silent = contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO())
    base = rl_zoo3.train.ExperimentManager  # which tolerant_studies may have replaced
    kind = Experiment if base is ExperimentManager else type("Experiment", (Experiment, base), {})
    experiment = functools.partial(kind, folder=folder, every=every, asked_seed=asked_seed)
    with mock.patch.object(rl_zoo3.train, "ExperimentManager", experiment), silent:
        yield


class SaveMonitoredRun(SaveRunCallback):
    """Saves beside the run how many episodes the files of its Monitors have, and its evaluations."""

    def save(self, model: ResumableAlgorithm) -> Path:
        if model.processes.is_first:
            episodes = {file.name: len(episodes_in(whole_lines(file))) for file in self.folder.glob(MONITORS)}
            with atomic_file(episodes_file(self.folder, model.num_timesteps)) as file:
                file.write(json.dumps(episodes).encode())
            if (self.folder / EVALUATIONS).is_file():
                with atomic_file(saved_evaluations(self.folder, model.num_timesteps)) as file:
                    file.write((self.folder / EVALUATIONS).read_bytes())
        return super().save(model)


def episodes_file(folder: Path, steps: int) -> Path:
    """Where the episodes of the Monitors are saved with a run, after some environment steps."""
    return run_file(folder, steps, "_monitors.json")


def saved_evaluations(folder: Path, steps: int) -> Path:
    """Where the evaluations are saved with a run, after some environment steps."""
    return run_file(folder, steps, "_evaluations.npz")


def monitored_episodes(folder: Path, steps: int) -> dict[str, int]:
    """What the Monitors' files had when the run was saved after some environment steps, by name; empty if it is not known."""
    file = episodes_file(folder, steps)
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def going_on_monitors(
    make_env: Any, n_envs: int, *, monitor_dir: str | None, monitor_kwargs: dict[str, Any], **kwargs: Any
) -> VecEnv:
    """Environments as Stable-Baselines3 makes them, whose Monitors go on with the files that are there; arguments as there."""
    for number in range(n_envs) if monitor_dir is not None else ():
        file = Path(str(monitor_dir), f"{number}.monitor.csv")
        if not file.exists():  # a Monitor that goes on writes no beginning
            keywords = (*monitor_kwargs.get("reset_keywords", ()), *monitor_kwargs.get("info_keywords", ()))
            _write_monitor(file, {"t_start": time.time(), "env_id": "None"}, ",".join(("r", "l", "t", *keywords)), [])
    monitor_kwargs = {**monitor_kwargs, "override_existing": False}
    return make_vec_env(make_env, n_envs, monitor_dir=monitor_dir, monitor_kwargs=monitor_kwargs, **kwargs)


def _write_monitor(file: Path, settings: dict[str, Any], names: str, episodes: Sequence[str]) -> None:
    """Write the file of a Monitor: what its first line says, the names of the columns, and the lines of episodes."""
    with atomic_file(file) as written:
        written.write("".join(f"{line}\n" for line in ["#" + json.dumps(settings), names, *episodes]).encode())


def rewind_monitor(file: Path, episodes: int | None) -> None:
    """Take episodes that will be made again out of the file of a Monitor, and count time from now.

    A file whose beginning cannot be read is moved away, with a warning; :func:`going_on_monitors` begins another one.

    :param file: of one environment
    :param episodes: that it had when the run was saved; None: all stay
    """
    lines = whole_lines(file)  # the process may have been killed while it wrote
    try:
        header, names = lines[:2]
        settings, now = json.loads(header.removeprefix("#")), time.time()
        shift = now - settings["t_start"]
    except (ValueError, KeyError) as error:
        aside = file.replace(file.with_name(f"{file.name}.unreadable"))
        warnings.warn(f"{file} cannot be read ({error}); it is {aside.name} now, and a new one is begun", stacklevel=2)
        return
    kept = []
    for row in episodes_in(lines)[:episodes]:
        values = row.split(",")
        values[2] = f"{float(values[2]) - shift:.6f}"
        kept.append(",".join(values))
    _write_monitor(file, {**settings, "t_start": now}, names, kept)
