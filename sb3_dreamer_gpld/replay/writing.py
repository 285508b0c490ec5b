"""Writing of episodes into rows: what each observation was followed by is known one transition later.

Letters: E environments, D deter, K categoricals of the stochastic state.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_dreamer_gpld.observations import ONLY_KEY
from sb3_dreamer_gpld.replay.rows import Entries, Rows, to_numpy
from sb3_dreamer_gpld.replay.windows import WindowSampler


class Latents(NamedTuple):
    """What the agent knows about the next observations.

    :param is_first: they start an episode, bool (E,)
    :param deter: deterministic state after them, (E, D)
    :param stoch: class indices of the stochastic state after them, (E, K), in the type of the rows
    """

    is_first: np.ndarray
    deter: np.ndarray
    stoch: np.ndarray


class EpisodeWriter:
    """Turns the transitions of all environments into rows.

    The newest transition of each environment waits here: its next observation becomes a row when the following action is
    known, or when it turns out that the episode was cut.

    :param rows: writes into them
    :param windows: hears of every row written
    """

    warned = False  # of transitions that do not follow each other

    def __init__(self, rows: Rows, windows: WindowSampler) -> None:
        self.rows, self.windows = rows, windows
        self._all = np.arange(rows.n_envs)
        self.reset()

    def reset(self) -> None:
        """Forget unfinished transitions and staged latents."""
        envs = self.rows.n_envs
        self.staged: Latents | None = None
        self.pending = np.zeros(envs, dtype=bool)
        self.pending_rewards = np.zeros(envs, dtype=np.float32)
        self.pending_obs = {
            key: np.zeros((envs, *column.shape), dtype=column.dtype) for key, column in self.rows.format.observations.items()
        }

    def stage(self, is_first: np.ndarray, deter: np.ndarray | th.Tensor, stoch: np.ndarray | th.Tensor) -> None:
        """Give what belongs to the observations of the next :meth:`add`; see :meth:`SequenceReplayBuffer.stage`."""
        envs, row = self.rows.n_envs, self.rows.format
        self.staged = Latents(
            is_first=np.array(shaped("is_first", is_first, (envs,)), dtype=bool),
            deter=np.array(shaped("deter", to_numpy(deter), (envs, row.deter)), dtype=np.float32),
            stoch=shaped("stoch", to_numpy(stoch), (envs, row.stoch)).astype(row.stoch_dtype),
        )

    def add(
        self,
        obs: dict[str, Any],
        next_obs: dict[str, Any],
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        timeouts: np.ndarray,
    ) -> None:
        """Write one transition of every environment; see :meth:`SequenceReplayBuffer.add`.

        :param obs, next_obs: by key, (E, *given_shape)
        :param timeouts: an episode that ends has not come to its terminal state, bool (E,)
        :raises ValueError: a shape is wrong; nothing is written then
        :raises MemoryError: there is no room for more rows; nothing is written then
        """
        envs = self.rows.n_envs
        obs, next_obs = self._shaped_obs("obs", obs), self._shaped_obs("next_obs", next_obs)
        column = self.rows.format.action
        action = shaped("action", action, (envs, *column.shape), column.given_shape)
        reward = shaped("reward", reward, (envs,))
        done = shaped("done", done, (envs,)).astype(bool)

        # At most three rows come: one that closes a cut episode, the transition's own, one that ends its episode
        self.rows.make_room(3)
        # Whatever was staged, a row that continues nothing is a first one
        is_first = ~self.pending if self.staged is None else self.staged.is_first | ~self.pending
        if (elsewhere := ~is_first & self._begins_elsewhere(obs)).any():
            self._warn_of_other_transitions()
            is_first |= elsewhere
        cut = is_first & self.pending
        if cut.any():
            self._append_last(np.flatnonzero(cut), self.pending_obs, self.pending_rewards, np.ones(envs))

        arrival_reward = np.where(is_first, 0, self.pending_rewards)
        self._append(self._all, obs, action, arrival_reward, is_first=is_first, latents=self.staged)
        if done.any():
            self._append_last(np.flatnonzero(done), next_obs, reward, timeouts)

        self.staged = None
        self.pending = ~done
        self.pending_rewards[:] = reward
        for key, array in self.pending_obs.items():
            array[:] = next_obs[key]

    def _begins_elsewhere(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Where the observations are not those that the transitions before led to, bool (E,)."""
        differ = [
            (obs[key].astype(array.dtype) != array).reshape(len(array), -1).any(-1) for key, array in self.pending_obs.items()
        ]
        return np.any(differ, 0)

    def _warn_of_other_transitions(self) -> None:
        """Once: rows are made of transitions that follow each other."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                "A transition was added whose observation is not the next one of the transition before: the episode is cut "
                "there, and another one begins. Add the transitions of an episode in their order, those of one environment "
                "after another, and the last one with done=True",
                stacklevel=4,
            )

    def _shaped_obs(self, name: str, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        """Check an observation and return its entries as (E, *shape), in a dict of our own."""
        result = {}
        for key, column in self.rows.format.observations.items():
            label = name if key == ONLY_KEY else f"{name}[{key!r}]"
            expected = (self.rows.n_envs, *column.shape)
            if key not in obs:
                raise ValueError(f"{label}: expected shape {expected}, received no such key, only {sorted(obs)}")
            # Discrete observations come without the axis of size 1 that they are stored with
            result[key] = shaped(label, obs[key], expected, column.given_shape)
        return result

    def _append_last(self, envs: np.ndarray, obs: dict[str, np.ndarray], rewards: np.ndarray, timeouts: np.ndarray) -> None:
        """Append the row that ends an episode. No action follows it, and the agent never saw it: no latents either.

        :param envs: the environments concerned
        :param obs: last observations of all, by key, (E, ...)
        :param rewards: received on arriving there, (E,)
        :param timeouts: the row is not terminal, (E,)
        """
        obs = {key: array[envs] for key, array in obs.items()}
        self._append(envs, obs, 0, rewards[envs], is_last=True, timeouts=timeouts[envs])

    def _append(
        self,
        envs: np.ndarray,
        obs: dict[str, np.ndarray],
        actions: np.ndarray | int,
        rewards: np.ndarray,
        is_first: np.ndarray | bool = False,
        is_last: bool = False,
        timeouts: np.ndarray | int = 0,
        latents: Latents | None = None,
    ) -> None:
        """Append one row to each of the given rings; the arguments hold one entry per ring given."""
        states: dict[str, Any] = {"stoch": self.rows.format.no_latent}  # deter is not read then
        if latents is not None:
            states = {"deter": latents.deter, "stoch": latents.stoch}
        self.rows.append(
            envs, obs, actions=actions, rewards=rewards, dones=is_last, timeouts=timeouts, is_first=is_first, **states
        )
        self.windows.queue_finished(envs)


def check_shape(name: str, value: Entries, expected: tuple[int, ...]) -> None:
    """:raises ValueError: a value has another shape than expected"""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, received {tuple(value.shape)}")


def shaped(name: str, value: Any, expected: tuple[int, ...], given: tuple[int, ...] | None = None) -> np.ndarray:
    """Check a shape.

    :param name: what to call the value in the error
    :param value: an array, or what becomes one
    :param expected: the shape to return, (E, ...)
    :param given: the shape of an entry in another form that is accepted
    :return: the value as an array of the expected shape, not copied
    :raises ValueError: the value has neither shape, nor that of a single entry where E = 1
    """
    array = np.asarray(value)
    entries = [expected[1:]] if given is None else [expected[1:], given]
    single = expected[0] == 1 and (array.shape in entries or array.size == 1 == np.prod(expected))
    if not single and array.shape not in [(expected[0], *entry) for entry in entries]:
        check_shape(name, array, expected)
    return array.reshape(expected)
