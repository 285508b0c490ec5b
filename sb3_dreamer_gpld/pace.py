"""When updates are due and what they take: their number, pace and time left, and warnings of runs that end without one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

if TYPE_CHECKING:
    from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD

FIRST_SECONDS = 5.0  # of updates, before their pace is told
AGAIN_SECONDS = 60.0  # until the pace is looked at again; twice as long each time
MUCH = 1.5  # a pace that is so many times as high or as low is told again


class Pace:
    """Measures updates and environment steps together, from the first update on; that one may have been compiled.

    :param total_timesteps: environment steps at which the run ends
    :param clock: seconds
    """

    def __init__(self, total_timesteps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total_timesteps = total_timesteps
        self.clock = clock
        self._window = FIRST_SECONDS
        self._start: tuple[float, int] | None = None  # seconds and environment steps at which the window began
        self._updates = 0  # in the window
        self._told = 0.0  # environment steps per second

    def after(self, updates: int, num_timesteps: int) -> str | None:
        """Count updates.

        :param updates: made since the last call
        :param num_timesteps: environment steps so far
        :return: what to tell, if there is something new
        """
        now = self.clock()
        if self._start is None:
            self._start = now, num_timesteps
            return None
        self._updates += updates
        seconds, steps = now - self._start[0], num_timesteps - self._start[1]
        if seconds < self._window or steps == 0:
            return None
        rate, updates_rate = steps / seconds, self._updates / seconds
        self._start, self._updates = (now, num_timesteps), 0
        first = not self._told
        self._window = AGAIN_SECONDS if first else 2 * self._window
        if not first and self._told / MUCH <= rate <= self._told * MUCH:
            return None
        self._told = rate
        left = spell_seconds((self.total_timesteps - num_timesteps) / rate)
        return f"{updates_rate:.3g} updates and {rate:.3g} steps per second, {left} left"


class UpdateRatio:
    """How many updates are due after some steps; what makes no whole update yet is kept for later.

    :param credit: replayed steps that are due
    """

    def __init__(self, credit: float = 0.0) -> None:
        self.credit = credit

    def add(self, steps: int, train_ratio: float) -> None:
        """Count environment steps.

        :param steps: since the last time, of all environments
        :param train_ratio: replayed steps for each of them
        """
        self.credit += steps * train_ratio

    def take(self, replayed: int) -> int:
        """Updates to make now.

        :param replayed: steps that an update replays, B·T
        """
        updates = int(self.credit // replayed)
        self.credit -= updates * replayed
        return updates


def spell_seconds(seconds: float) -> str:
    """:return: a duration in the two largest of its units: "50 s", "12 min", "3 h 20 min", "2 d 4 h" """
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(seconds, 0.0):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def tell(text: str | None, callback: BaseCallback, verbose: int) -> None:
    """Print what there is to tell, and show it in front of the progress bar.

    :param text: None: nothing
    :param callback: of the run
    :param verbose: printed from 1 on
    """
    if text is None:
        return
    if verbose >= 1:
        print(f"Learning: {text}")
    for bar in _progress_bars(callback):
        bar.pbar.set_description(text)


def show_steps_of_others(steps: int, callback: BaseCallback) -> None:
    """Count the steps of other processes in the progress bar, which counts those of this one.

    :param steps: environment steps of all others, since the last time
    :param callback: of the run
    """
    for bar in _progress_bars(callback) if steps else ():
        bar.pbar.update(steps)


def _progress_bars(callback: BaseCallback) -> Iterator[ProgressBarCallback]:
    if isinstance(callback, ProgressBarCallback):
        yield callback
    for part in getattr(callback, "callbacks", ()):
        yield from _progress_bars(part)


def warn_without_room(algorithm: DreamerGPLD) -> None:
    """Warn of a replay buffer that never has enough to learn from.

    :param algorithm: about to learn
    """
    buffer = algorithm.replay_buffer
    assert buffer is not None
    if _wants_updates(algorithm) and needs_whole_windows(algorithm) and buffer.buffer_size <= buffer.batch_length:
        warnings.warn(
            f"There will be no update: buffer_size={algorithm.buffer_size} is {buffer.buffer_size} rows for each of "
            f"{algorithm.n_envs} environments, in which no window of batch_length={buffer.batch_length} steps and the one "
            "before them fits",
            stacklevel=4,
        )


def updates_per_step(algorithm: DreamerGPLD) -> float:
    """
    :param algorithm: about to learn
    :return: updates for each environment step of all processes, once they have begun; 0: it is not known, since updates come
        after episodes, and none has ended yet
    """
    assert isinstance(algorithm.train_freq, TrainFreq)
    if algorithm.gradient_steps is None:
        return algorithm.train_ratio / algorithm._replayed_steps
    if algorithm.gradient_steps < 0:
        return 1.0
    steps = float(algorithm.train_freq.frequency * algorithm.n_envs * algorithm.processes.size)
    if algorithm.train_freq.unit == TrainFrequencyUnit.EPISODE:
        lengths = [info["l"] for info in algorithm.ep_info_buffer or ()]
        steps *= float(np.mean(lengths)) if lengths else float("inf")
    return algorithm.gradient_steps / steps


def rows_before_updates(algorithm: DreamerGPLD) -> int:
    """Rows of all environments of all processes, more than which must be stored when the first update is made."""
    buffer = algorithm.replay_buffer
    assert buffer is not None
    return min(algorithm.learning_starts, buffer.buffer_size * algorithm.n_envs * algorithm.processes.size - 1)


def _wants_updates(algorithm: DreamerGPLD) -> bool:
    return bool(algorithm.train_ratio if algorithm.gradient_steps is None else algorithm.gradient_steps)


def needs_whole_windows(algorithm: DreamerGPLD) -> bool:
    """Whether updates wait for a whole window; those of ``gradient_steps`` begin on ones that still grow, in one process."""
    return algorithm.gradient_steps is None or algorithm.processes.size > 1


def warn_before_updates(algorithm: DreamerGPLD, total_timesteps: int) -> bool:
    """Warn of a run that is sure to end before there is enough to learn from.

    :param algorithm: about to learn
    :param total_timesteps: environment steps at which the run ends
    :return: whether it was warned of
    """
    if algorithm._n_updates or not _wants_updates(algorithm) or total_timesteps <= algorithm.num_timesteps:
        return False
    buffer = algorithm.replay_buffer
    assert buffer is not None
    needed = rows_before_updates(algorithm)
    # A step is a row, and an episode one more: at most two
    most = int(buffer.stored_rows().sum()) * algorithm.processes.size + 2 * (total_timesteps - algorithm.num_timesteps)
    if most > needed and (algorithm.gradient_steps is None or total_timesteps > algorithm.learning_starts):
        return False
    if isinstance(algorithm.train_freq, TrainFreq) and algorithm.train_freq.unit == TrainFrequencyUnit.EPISODE:
        return False  # the last episode goes on beyond the end
    warnings.warn(
        f"The run ends after {total_timesteps} steps, before the first update: "
        f"learning_starts={algorithm.learning_starts} steps are collected before",
        stacklevel=3,
    )
    return True


def warn_without_updates(algorithm: DreamerGPLD) -> None:
    """Warn of a run that ended before there was enough to learn from.

    :param algorithm: has learned
    """
    buffer = algorithm.replay_buffer
    assert buffer is not None
    told = needs_whole_windows(algorithm) and buffer.buffer_size <= buffer.batch_length  # by warn_without_room
    if algorithm._n_updates or not _wants_updates(algorithm) or told:
        return
    warnings.warn(
        f"The run of {algorithm.num_timesteps} steps ended before the first update. It comes when more than "
        f"learning_starts={algorithm.learning_starts} rows are stored, of one of the {algorithm.n_envs} environments more "
        f"than batch_length={buffer.batch_length}, and train_ratio or gradient_steps then makes a whole update due",
        stacklevel=3,
    )
