"""Values on their way to Stable-Baselines3's logger."""

from __future__ import annotations

from collections.abc import Mapping

from stable_baselines3.common.logger import Logger

# Inside Stable-Baselines3: letters of a name that its printed table has room for, after three of indent
PRINTED_LETTERS = 33


def record_all(logger: Logger, values: Mapping[str, float]) -> None:
    """Record values by their names. Of those that a printed table would show by the same shortened name it has the first only.

    :param logger: of Stable-Baselines3, which would raise an error in place of such a table
    :param values: by name in the log
    """
    seen = set()
    for name, value in values.items():
        group, _, shown = name.partition("/")
        if len(shown) > PRINTED_LETTERS:
            shown = f"{shown[: PRINTED_LETTERS - 3]}..."
        logger.record(name, value, exclude=("stdout", "log") if (group, shown) in seen else None)
        seen.add((group, shown))
