"""Observations by key, so that those of a Dict space and of any other take one way through the code."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

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


def called(kind: str, key: str) -> str:
    """:return: name of an entry in an error: "observation 'speed'", or "the observation" if it is the only one

    :param kind: what it is, "observation"
    :param key: as in :func:`by_key`
    """
    return f"the {kind}" if key == ONLY_KEY else f"{kind} {key!r}"
