"""Observations by key, so that those of a Dict space and of any other take one way through the code."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

# The key of an observation whose space is no Dict
ONLY_KEY = ""


def by_key(observation: Any) -> dict[str, Any]:
    """:return: an observation of a Dict space as it is, any other as the only entry of a dict"""
    return observation if isinstance(observation, dict) else {ONLY_KEY: observation}


def spaces_by_key(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    """:return: the spaces of :func:`by_key`'s entries"""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {ONLY_KEY: space}


def like_space(entries: dict[str, Any], space: spaces.Space[Any]) -> Any:
    """:return: entries by key in the form that the space's observations have, the reverse of :func:`by_key`"""
    return entries if isinstance(space, spaces.Dict) else entries[ONLY_KEY]


def space_of(entries: dict[str, spaces.Space[Any]], like: spaces.Space[Any]) -> spaces.Space[Any]:
    """:return: a space of entries by key that is a Dict if ``like`` is one, the reverse of :func:`spaces_by_key`"""
    return spaces.Dict(entries) if isinstance(like, spaces.Dict) else entries[ONLY_KEY]


def with_boxes(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """:return: a space of the same shapes, with a Box for each MultiDiscrete of several dimensions, which SB3 takes
    for one of a single dimension
    """

    def box(entry: spaces.Space[Any]) -> spaces.Space[Any]:
        if isinstance(entry, spaces.MultiDiscrete) and len(entry.shape) > 1:
            return spaces.Box(np.zeros(entry.shape, np.int64), entry.nvec.astype(np.int64) - 1, dtype=np.int64)
        return entry

    return space_of({key: box(entry) for key, entry in spaces_by_key(space).items()}, space)


def normalized_keys(normalize: VecNormalize | None) -> tuple[str, ...]:
    """:return: keys, as in :func:`by_key`, of the observations that it normalises, if it is there"""
    if normalize is None or not normalize.norm_obs:
        return ()
    return tuple(normalize.norm_obs_keys or (ONLY_KEY,))


def with_last_observations(
    new_obs: Any, dones: np.ndarray, infos: Sequence[dict[str, Any]], normalize: VecNormalize | None
) -> Any:
    """A copy of what E environments gave, with the last observations of episodes in place of the first ones of the next.

    :param new_obs: not normalised, (E, *shape), by key if the space is a Dict
    :param dones: where an episode has ended, bool (E,)
    :param infos: with "terminal_observation" there
    :param normalize: has normalised those, if it is there. What was an integer is rounded to one again
    :return: in the form of ``new_obs``
    """
    following = deepcopy(new_obs)
    for i in map(int, np.flatnonzero(dones)):
        last = infos[i].get("terminal_observation")
        if last is None:
            continue
        if normalize is not None:
            last = normalize.unnormalize_obs(last)
        for key, entries in by_key(following).items():
            value = np.asarray(by_key(last)[key])
            if normalize is not None and entries.dtype.kind in "iu":
                limits = np.iinfo(entries.dtype)
                value = np.rint(value).clip(limits.min, limits.max)
            entries[i] = value
    return following


def called(kind: str, key: str) -> str:
    """:return: name of an entry in an error: "observation 'speed'", or "the observation" if it is the only one

    :param kind: what it is, "observation"
    :param key: as in :func:`by_key`
    """
    return f"the {kind}" if key == ONLY_KEY else f"{kind} {key!r}"
