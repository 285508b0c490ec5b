"""Choice of the windows that a batch consists of: new ones first, then uniformly among all that are stored, or by their age.

Letters: B sequences, T steps, E environments.

Source: after the authors' release, ``replay.fracs`` and ``recexp``, for windows by their age.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from sb3_dreamer_gpld.replay.rows import Rows


class Windows(NamedTuple):
    """Windows of consecutive rows, all equally long.

    :param envs: their environments, int64 (B,)
    :param starts: numbers of their first trained rows, int64 (B,)
    :param steps: trained steps of each, T
    :param has_context: the row before the first trained one is stored; else the windows start from nothing
    """

    envs: np.ndarray
    starts: np.ndarray
    steps: int
    has_context: bool


class _Choice(NamedTuple):
    """The windows that can be drawn.

    :param counts: how many each ring has, (E,)
    :param oldest: first trained row of the oldest one of each ring, (E,)
    :param steps, has_context: as in :class:`Windows`
    """

    counts: np.ndarray
    oldest: np.ndarray
    steps: int
    has_context: bool


class WindowSampler:
    """Draws windows of rows.

    :param rows: draws from them
    :param batch_length: trained steps T of a full window; one more row before them gives the initial state
    """

    recency = 0.0  # share of the windows that are drawn by their age in newest_first; old pickles have none of their own

    def __init__(self, rows: Rows, batch_length: int) -> None:
        self.rows, self.batch_length = rows, batch_length
        # Windows not yet served: (environment, number of the first trained row), oldest first
        self.queue: deque[tuple[int, int]] = deque()

    def reset(self) -> None:
        """Forget the queued windows."""
        self.queue.clear()

    def queue_finished(self, envs: np.ndarray) -> None:
        """Queue the newest window of each ring in which a whole number of windows has been written.

        :param envs: the rings to which a row has just been added
        """
        window = self.batch_length + 1
        if window > self.rows.capacity:
            return
        for env in envs[self.rows.added[envs] % window == 0]:
            self.queue.append((int(env), int(self.rows.added[env]) - self.batch_length))
            # Nothing may be sampled for long: do not let windows that are gone pile up
            while not self._is_stored(*self.queue[0]):
                self.queue.popleft()

    def has_window(self) -> bool:
        """:return: whether a full window and the row before it are stored"""
        return bool(self.rows.stored().max() > self.batch_length)

    def newest_first(self, count: int, rng: np.random.Generator) -> Windows:
        """Windows that have been finished and were never served, then drawn ones: a share of them by their age, the others
        uniformly.

        :param count: how many, B
        :param rng: draws them
        :return: they leave the queue
        :raises ValueError: no row is stored
        """
        fresh: list[tuple[int, int]] = []
        while self.queue and len(fresh) < count:
            window = self.queue.popleft()
            if self._is_stored(*window):
                fresh.append(window)
        drawn = self.uniform(count - len(fresh), rng)
        if self.recency:
            by_age = rng.random(len(drawn.starts)) < self.recency
            drawn = drawn._replace(starts=np.where(by_age, self._by_age(drawn.envs, rng), drawn.starts))
        envs, starts = np.array(fresh, dtype=np.int64).reshape(-1, 2).T
        return drawn._replace(envs=np.concatenate((envs, drawn.envs)), starts=np.concatenate((starts, drawn.starts)))

    def uniform(self, count: int, rng: np.random.Generator) -> Windows:
        """Windows of which each that is stored is equally likely; shorter ones as long as no full one is stored.

        :param count: how many, B
        :param rng: draws them
        :return: the queue is as it was
        :raises ValueError: no row is stored
        """
        choice = self._choice()
        # Window i of all rings in a line belongs to the ring before whose end it lies
        ends = np.cumsum(choice.counts)
        drawn = rng.integers(ends[-1], size=count)
        envs = np.searchsorted(ends, drawn, side="right").astype(np.int64, copy=False)
        starts = choice.oldest[envs] + drawn - (ends - choice.counts)[envs]
        return Windows(envs, starts, choice.steps, choice.has_context)

    def _by_age(self, envs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Windows that are drawn with a probability of about 1 / age; the newest one of a ring has age 1.

        :param envs: the rings to draw from, (B,)
        :param rng: draws them
        :return: numbers of their first trained rows, (B,)
        """
        choice = self._choice()
        counts = choice.counts[envs]
        # Rounded down, a number whose logarithm is uniform is k with a probability of log(k + 1) − log(k)
        ages = np.minimum(np.floor((counts + 1.0) ** rng.random(len(envs))).astype(np.int64), counts)
        return choice.oldest[envs] + counts - ages

    def _choice(self) -> _Choice:
        stored = self.rows.stored()
        oldest = self.rows.added - stored
        most = int(stored.max())
        if most == 0:
            raise ValueError("Cannot sample from an empty buffer: no transition has been added")
        if most > self.batch_length:
            return _Choice(np.maximum(stored - self.batch_length, 0), oldest + 1, self.batch_length, has_context=True)
        # Too short for a full window: the whole content of the rings that hold most, one window in each
        counts = (stored == most).astype(np.int64)
        wrapped = bool((self.rows.added > self.rows.capacity).any())
        if wrapped and most > 1:
            # The oldest row has lost its predecessor, so it can only serve as context
            return _Choice(counts, oldest + 1, most - 1, has_context=True)
        return _Choice(counts, oldest, most, has_context=False)

    def _is_stored(self, env: int, start: int) -> bool:
        """Whether a window and its context have not been overwritten, even partly."""
        return bool(self.rows.holds(env, start - 1))
