"""Stable-Baselines3's saving and loading, with whole files, exact resume, and errors that say what is wrong with a file."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv

from sb3_dreamer_gpld.arguments import KNOWN_ELSEWHERE, check_names
from sb3_dreamer_gpld.buffers import SequenceReplayBuffer
from sb3_dreamer_gpld.parallel import ALONE, SEED_STRIDE, Processes, current
from sb3_dreamer_gpld.policies import DreamerPolicy
from sb3_dreamer_gpld.saving import FORMAT_VERSION, atomic_file, check_model_file, module_tensors, rng_states

STATISTICS = ("obs_rms", "ret_rms", "returns")  # of VecNormalize, which has only those that it uses
# What save_run writes, and what a process that was killed in it left behind
RUN_FILE = re.compile(r"\.?run_(\d+)_steps(_vecnormalize|_monitors|_evaluations)?(\.rank\d+)?\.(zip|pkl|pt|json|npz)(\.part)?")

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="ResumableAlgorithm")


def share_of(path: Any, suffix: str, processes: Processes, own_suffix: str | None = None) -> Any:
    """Where a process saves its share: "model.zip" → "model.rank1.pt"; the first process's is the path itself.

    :param path: of the first process; an open file is handed through
    :param suffix: that it gets if it has none, without the dot
    :param own_suffix: of the share; None: the same
    """
    if processes.is_first or isinstance(path, io.BufferedIOBase):
        return path
    path = Path(path) if Path(path).suffix else Path(f"{path}.{suffix}")
    stem = path.stem if path.suffix == f".{suffix}" else path.name  # "model_0.1" has none, though it looks so
    return path.with_name(f"{stem}.rank{processes.rank}.{own_suffix or suffix}")


def run_file(folder: Path, steps: int, kind: str = ".zip") -> Path:
    """A file of the run that was saved after some environment steps; :data:`RUN_FILE` knows its kinds.

    :param kind: what its name ends with, such as "_monitors.json"
    """
    return folder / f"run_{steps}_steps{kind}"


def _saved_runs(folder: Path) -> list[Path]:
    """Model files of :meth:`ResumableAlgorithm.save_run`."""
    return [file for file in folder.glob("run_*_steps.zip") if file.stem[4:-6].isdigit()]


def _steps_of_run(file: Path) -> int:
    return int(file.stem[4:-6])


def steps_saved(folder: Path, processes: Processes = ALONE) -> int:
    """Environment steps of the run that :meth:`ResumableAlgorithm.load_run` would load from a folder; 0: none.

    :raises FileNotFoundError: as there
    """
    file = _newest_run(folder, processes)
    return 0 if file is None else _steps_of_run(file)


def _newest_run(folder: Path, processes: Processes, partial_is_error: bool = True) -> Path | None:
    """The model's file of the run that was saved last and of which all processes have all files; None: nothing was saved.

    :raises FileNotFoundError: of every run in the folder a file is missing, and ``partial_is_error``; names one
    """
    missing = None
    for file in processes.told_by_first(sorted(_saved_runs(folder), key=_steps_of_run, reverse=True)):
        absent = [part for part in _files_of_run(file, processes) if not part.is_file()]
        missing = missing or (absent[0] if absent else None)
        if processes.sums([len(absent)])[0] == 0:
            return Path(file)
    if partial_is_error and processes.sums([missing is not None])[0]:
        raise FileNotFoundError(
            f"{folder} has no saved run with the files of all {processes.size} processes; {missing or 'those of another'} "
            "is missing. Allowed: as many processes as the run was saved with, and all of its files"
        )
    return None


def check_room(folder: Path, steps: int, processes: Processes) -> None:
    """Look whether a run can be saved in a folder, where nothing of another one may be lost.

    :param folder: that :meth:`ResumableAlgorithm.save_run` writes into
    :param steps: that the run has made
    :param processes: that have it, of which all call this
    :raises ValueError: a run is saved there that has made more steps
    """
    newest = _newest_run(folder, processes, partial_is_error=False)
    if newest is None:  # one of another number of processes may be there
        whole = [file for file in _saved_runs(folder) if file.with_suffix(".pkl").is_file()]
        newest = processes.told_by_first(max(whole, key=_steps_of_run, default=None))
    if newest is not None and _steps_of_run(newest) > steps:
        raise ValueError(
            f"{folder} holds a run of {_steps_of_run(newest)} steps, {newest.name}, and this one is at {steps}: it would be "
            "overwritten. Allowed: another folder, or to go on with it: load_run(folder, env), and "
            "learn(..., reset_num_timesteps=False)"
        )


def _statistics_of_run(file: Path) -> Path:
    """Where the statistics of VecNormalize lie, if there is one."""
    return file.with_name(f"{file.stem}_vecnormalize.pkl")


def _files_of_run(file: Path, processes: Processes) -> list[Path]:
    """What a process has saved of a run."""
    return [share_of(file.with_suffix(".pkl"), "pkl", processes), share_of(file, "zip", processes, "pt")]


class ResumableAlgorithm(OffPolicyAlgorithm):
    """An off-policy algorithm whose files are whole, and whose runs go on as if they had not stopped. Arguments as in SB3."""

    policy: DreamerPolicy
    replay_buffer: SequenceReplayBuffer | None
    model_size: str | None
    actor_learning_rate: Any
    _was_stopped: bool  # by a callback, in the last learn()
    processes: Processes = ALONE  # that learn together, of which the first one saves the model, and all save what is their own

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.format_version = FORMAT_VERSION
        self._rng_states: dict[str, Any] | None = None  # of a loaded run, until it goes on
        self._reseeded = False  # a loaded run that goes on with random numbers of its own
        self._missing_share: Path | None = None  # of a loaded run: this process's file, if it is not there
        self._was_loaded = False  # and has not gone on yet
        self._counted_first = False  # of a loaded run: VecNormalize's statistics have the observations that it starts from
        self._saved: list[tuple[str, Any]] = []  # by the first process, and not yet by the others: method and path

    @property
    def stats_window_size(self) -> int:
        """:return: episodes over which the logged return is averaged; it can change"""
        return self._stats_window_size

    @stats_window_size.setter
    def stats_window_size(self, episodes: int) -> None:
        self._stats_window_size = episodes
        if self.ep_info_buffer is not None and self.ep_success_buffer is not None:
            self.ep_info_buffer = deque(self.ep_info_buffer, maxlen=episodes)
            self.ep_success_buffer = deque(self.ep_success_buffer, maxlen=episodes)

    def save(
        self,
        path: str | os.PathLike[str] | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Save everything but the replay buffer, the states of the random generators included.

        :param path: name of the file, which appears when it is complete; ".zip" is added
        :param exclude: further attributes to leave out
        :param include: attributes to keep that are usually left out
        :raises OSError: it could not be written; names the file. One that was there before is unchanged
        """
        if not self.processes.is_first:
            return self._save_share(path)
        self._tell_the_others("save", path)
        before = dict(self.__dict__)
        self.__dict__.update(self._run_state())
        try:
            with atomic_file(path, "zip") as file:
                super().save(file, exclude, include)  # type: ignore[arg-type]
        finally:
            self.__dict__.clear()
            self.__dict__.update(before)

    def _run_state(self) -> dict[str, Any]:
        """Attributes that are made for the file alone."""
        states = self._rng_states or rng_states(self.device)  # those that a loaded run has yet to go on with
        return {"_rng_states": states, "format_version": FORMAT_VERSION}  # a loaded model has the one of its file

    def _save_share(self, path: str | os.PathLike[str] | io.BufferedIOBase) -> None:
        """What a process other than the first adds to a saved model: the states of its random generators."""
        if not isinstance(path, io.BufferedIOBase):
            with atomic_file(share_of(path, "zip", self.processes, "pt")) as file:
                th.save({"num_timesteps": self.num_timesteps, **self._run_state()}, file)

    def _tell_the_others(self, method: str, path: Any) -> None:
        """Remember to tell the other processes of a method that only the first one has called, in a callback."""
        if self.processes.size > 1 and not isinstance(path, io.BufferedIOBase):  # an open file is of this process alone
            self._saved.append((method, path))

    def _save_shares(self, saved: Iterable[tuple[str, Any]]) -> None:
        """Save what belongs to what the first process has saved.

        :param saved: method and path of each
        """
        if not self.processes.is_first:
            for method, path in saved:
                getattr(self, method)(path)

    def _load_share(self, path: str | os.PathLike[str] | io.BufferedIOBase) -> None:
        """Take over what :meth:`_save_share` wrote.

        :raises ValueError: it was saved at another step than the model
        """
        if self.processes.is_first or isinstance(path, io.BufferedIOBase):
            return
        share = share_of(path, "zip", self.processes, "pt")
        self._rng_states, self._missing_share = None, None if share.is_file() else share
        if self._missing_share is None:
            state = th.load(share, weights_only=False)
            if state["num_timesteps"] != self.num_timesteps:
                raise ValueError(
                    f"{share} was saved after {state['num_timesteps']} steps, and the model that it belongs to after "
                    f"{self.num_timesteps}: the run was stopped between the two. Use an earlier checkpoint"
                )
            self._take_over(state)

    def _own_seed(self, seed: int) -> int:
        """The seed of this process, for one of all processes."""
        return (seed + SEED_STRIDE * self.processes.rank) % 2**31

    def _take_over(self, state: dict[str, Any]) -> None:
        """Go on with what this process alone has saved.

        :param state: what :meth:`_run_state` gave when it was saved
        """
        self._rng_states = state["_rng_states"]

    @classmethod
    def load(
        cls: type[SelfAlgorithm],
        path: str | os.PathLike[str] | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """Load a model. With ``load_replay_buffer`` and ``learn(..., reset_num_timesteps=False)`` a run saved at an
        episode's end goes on bit for bit as if it had not stopped (``compile="auto"`` looks at the steps that are left, and
        may compile the run before the stop and not what comes after it).

        A model file can run code when it is loaded: load only files that you trust. Arguments as in SB3; those of the
        constructor take the place of the file's. With a ``seed`` the run goes on with random numbers of its own.
        When a run goes on, its environments are seeded by the seed and the steps that were made, so that their starts are
        not those of before.

        :raises FileNotFoundError: there is no such file
        :raises TypeError: there is no such argument; names the closest one
        :raises ValueError: the file is truncated, of another algorithm, of a later version, or of other spaces than ``env``
        :raises RuntimeError: nets of another size are asked for than those of the file
        """
        model = cls._load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        model._check_loaded()
        return model

    @classmethod
    def _load(
        cls: type[SelfAlgorithm],
        path: str | os.PathLike[str] | io.BufferedIOBase,
        env: GymEnv | None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """As :meth:`load`, without a look at what VecNormalize does."""
        attributes = check_model_file(path)
        inits = [kind.__init__ for kind in cls.__mro__ if issubclass(kind, ResumableAlgorithm)]
        check_names(cls, inits, [name for name in kwargs if name not in attributes or name in KNOWN_ELSEWHERE])
        episodes = kwargs.pop("stats_window_size", None)
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)  # type: ignore[arg-type]
        model._load_share(path)
        if episodes is not None:
            model.stats_window_size = episodes
        if kwargs.get("seed") is not None:
            model._rng_states, model._reseeded = None, True
        model._was_loaded = True
        return model

    def _check_loaded(self) -> None:
        """What a subclass looks at when a model was loaded, and warns of."""

    def _check_resumed(self) -> None:
        """What a subclass looks at when a run was loaded to go on.

        :raises ValueError: it cannot go on
        """

    def set_random_seed(self, seed: int | None = None) -> None:
        """As in SB3. A loaded run goes on with these random numbers, in place of those that were saved.

        :param seed: None: nothing changes
        """
        goes_on = seed is not None and (self._was_loaded or self._reseeded)
        if seed is not None and goes_on:
            seed = self._own_seed(seed)  # each process has numbers of its own
        super().set_random_seed(seed)
        if goes_on:
            self._rng_states, self._reseeded, self._was_loaded = None, True, False
            if self.replay_buffer is not None:
                self.replay_buffer.rng = np.random.default_rng(seed)

    def save_run(self, folder: str | os.PathLike[str]) -> Path:
        """Save model, replay buffer and VecNormalize's statistics for :meth:`load_run`, and then remove what it saved
        before. Of several processes all call it.

        :param folder: of the run, which is made if it is not there
        :return: the model's file
        :raises OSError: it could not be written; what was saved before is still there
        :raises ValueError: a run is saved there that has made more steps; it is left as it is
        """
        folder, told = Path(folder), list(self._saved)
        check_room(folder, self.num_timesteps, self.processes)
        if self.processes.is_first:
            folder.mkdir(parents=True, exist_ok=True)
        self.processes.barrier()  # nobody writes before the folder is there
        file = run_file(folder, self.num_timesteps)
        self.save_replay_buffer(file.with_suffix(".pkl"))
        normalize = self.get_vec_normalize_env()
        if normalize is not None:
            with atomic_file(_statistics_of_run(file)) as statistics:
                pickle.dump({name: getattr(normalize, name) for name in STATISTICS if hasattr(normalize, name)}, statistics)
        self.save(file)
        self._saved = told
        self.processes.barrier()  # nothing is removed before all files are there
        # Models first, by whose buffers they are known: others may be of a CheckpointCallback
        for other in sorted(folder.iterdir(), key=lambda file: file.suffix != ".zip"):
            found = RUN_FILE.fullmatch(other.name)
            foreign = other.suffix == ".zip" and not other.with_suffix(".pkl").is_file()
            if found and not foreign and (int(found[1]) != self.num_timesteps or other.suffix == ".part"):
                other.unlink(missing_ok=True)
        self.processes.barrier()  # and nobody writes the next ones before
        return file

    @classmethod
    def load_run(
        cls: type[SelfAlgorithm], folder: str | os.PathLike[str], env: GymEnv, device: th.device | str = "auto", **kwargs: Any
    ) -> SelfAlgorithm | None:
        """Load what :meth:`save_run` has saved; ``learn(..., reset_num_timesteps=False)`` goes on.

        :param folder: of the run
        :param env: its environments
        :param device: of the nets
        :param kwargs: further arguments of :meth:`load`
        :return: None: nothing was saved there
        :raises FileNotFoundError: of several processes, the files of one are missing
        :raises ValueError: as in :meth:`load` and :meth:`load_replay_buffer`; or the run was saved with VecNormalize, and
            ``env`` is without it, or the other way round, or it normalises other things
        """
        file = _newest_run(Path(folder), current())
        if file is None:
            return None
        model = cls._load(file, env, device, **kwargs)
        model.load_replay_buffer(file.with_suffix(".pkl"))
        normalize, statistics = model.get_vec_normalize_env(), _statistics_of_run(file)
        if (normalize is not None) != statistics.is_file():
            was, now = ("with", "without") if normalize is None else ("without", "with")
            raise ValueError(f"{file} was saved {was} VecNormalize, and env is {now} it; allowed: {was} it, as before")
        if normalize is not None:
            for name, value in pickle.loads(statistics.read_bytes()).items():
                setattr(normalize, name, value)
            model._counted_first = True
        model._check_resumed()
        return model

    @contextlib.contextmanager
    def _first_observations(self) -> Iterator[None]:
        """Within, environments are reset for :meth:`learn`. VecNormalize does not count observations that it has counted."""
        normalize = self.get_vec_normalize_env() if self._counted_first else None
        self._counted_first = False
        if normalize is None or not normalize.training:
            yield
            return
        normalize.training = False
        try:
            yield
        finally:
            normalize.training = True

    def _seed_environments_anew(self, goes_on: bool) -> None:
        """Before a loaded run goes on: its environments would have the random numbers of its beginning.

        :param goes_on: and does not begin again
        """
        loaded, self._was_loaded = self._was_loaded, False
        if loaded and goes_on and self.seed is not None and self.env is not None and self.num_timesteps:
            self.env.seed(self._own_seed(self.seed + self.num_timesteps))

    def _excluded_save_params(self) -> list[str]:
        own = ["processes", "_saved", "_missing_share", "_counted_first", "_reseeded", "_was_loaded"]
        return [*super()._excluded_save_params(), *own]

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Load parameters, as in SB3.

        :raises RuntimeError: they belong to nets of another size or other spaces; names the first tensors that differ
        :raises ValueError: the actor had a learning rate of its own there and has none here, or the other way round
        """
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except ValueError as error:
            if "parameter groups" not in str(error):
                raise
            given = "None" if self.actor_learning_rate is None else "given"
            raise ValueError(
                f"The optimiser of this file has other groups than this model's, whose actor_learning_rate is {given}. "
                "Allowed: the same choice, None or a learning rate, as when the file was saved; or take single modules by "
                "load_modules"
            ) from error
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise RuntimeError(  # the type that SB3 raises
                f"These parameters belong to a model of another size or of other spaces than this one (model_size="
                f"{self.model_size!r}). Load the file with DreamerGPLD.load and without model_size or policy_kwargs, or take "
                f"over single modules by load_modules. The differences: {str(error)[:500]}"
            ) from error

    def load_modules(self, path: str | os.PathLike[str] | io.BufferedIOBase, modules: Sequence[str]) -> None:
        """Warm start: take single modules from a saved model; all else stays as it is, the optimiser included.

        :param path: a file of :meth:`save`
        :param modules: some of "encoder", "rssm", "decoder", "projector", "reward", "continue", "actor", "critic"
        :raises ValueError: an unknown name, or tensors of other shapes; nothing is loaded then
        """
        check_model_file(path)
        _, params, _ = load_from_zip_file(path, load_data=False, device=self.device)  # type: ignore[arg-type]
        tensors = module_tensors(params["policy"], self.policy.state_dict(), modules)  # type: ignore[arg-type]
        self.policy.load_state_dict(tensors, strict=False)

    def save_replay_buffer(self, path: str | os.PathLike[str] | io.BufferedIOBase) -> None:
        """Save the replay buffer, as far as it is filled. Of several processes each saves its own, under names that differ.

        :param path: name of the file, which appears when it is complete; ".pkl" is added
        :raises OSError: it could not be written; names the file. One that was there before is unchanged
        """
        self._tell_the_others("save_replay_buffer", path)
        with atomic_file(share_of(path, "pkl", self.processes), "pkl") as file:
            super().save_replay_buffer(file)  # type: ignore[arg-type]

    def load_replay_buffer(self, path: str | os.PathLike[str] | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """Load a replay buffer. The file can run code when it is loaded: load only files that you trust.

        The rows then lie where those of the present buffer do (``storage``), wherever they lay when they were saved, and are
        drawn as its are (``batch_length``, ``recency``). The buffer keeps its capacity, with a warning where that of
        ``buffer_size`` would be another one.

        :param path: a file of :meth:`save_replay_buffer`
        :param truncate_last_traj: for SB3's HER buffer; without effect here
        :raises ValueError: it is truncated, or of another number of environments, other spaces or other sizes of the
            recurrent state, or of another process or number of processes; the present buffer is kept
        :raises FileNotFoundError: there is no such file
        """
        path = share_of(path, "pkl", self.processes)
        if not self.processes.is_first and not Path(path).is_file():  # type: ignore[arg-type]
            raise FileNotFoundError(
                f"{path} is missing, the replay buffer of process {self.processes.rank} of {self.processes.size}; allowed: as "
                "many processes as the run was saved with, and the files of all of them"
            )
        present = self.replay_buffer
        try:
            super().load_replay_buffer(path, truncate_last_traj)  # type: ignore[arg-type]
        except (EOFError, pickle.UnpicklingError, AssertionError) as error:
            self.replay_buffer = present
            raise ValueError(f"{path} is no replay buffer, or a truncated one: {error}") from error
        loaded, config = self.replay_buffer, self.policy.config
        self.replay_buffer = present
        if not isinstance(loaded, SequenceReplayBuffer):
            raise ValueError(f"{path} holds a {type(loaded).__name__}; allowed: SequenceReplayBuffer")
        for name, its, ours in (
            ("observation space", loaded.observation_space, self.observation_space),
            ("action space", loaded.action_space, self.action_space),
            ("number of environments", loaded.n_envs, self.n_envs),
            ("deter", loaded.deter_size, config.deter),
            ("stoch", loaded.stoch_size, config.stoch),
            ("classes", loaded.classes or config.classes, config.classes),
            ("process (number, of how many)", loaded.process, (self.processes.rank, self.processes.size)),
        ):
            if its != ours:
                raise ValueError(f"{path} does not belong to this model: its {name} is {its}, the model's {ours}")
        if present is not None:
            for name in ("storage", "recency", "batch_length", *(("rng",) if self._reseeded else ())):
                setattr(loaded, name, getattr(present, name))
            if loaded.buffer_size != present.buffer_size:
                warnings.warn(
                    f"{path} has room for {loaded.buffer_size} rows for each environment, and keeps it, where the model's "
                    f"buffer_size={self.buffer_size} would be {present.buffer_size}",
                    stacklevel=2,
                )
        self.replay_buffer = loaded
        if self._last_obs is not None:  # the episode that goes on is not that of the file
            self._last_episode_starts = np.ones((self.n_envs,), dtype=bool)
