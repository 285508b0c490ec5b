"""What rl_zoo3 records of a run in its folder: the arguments of the command, and the hyperparameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sb3_dreamer_gpld.saving import atomic_file

FINISHED = "finished.txt"  # in the folder of a run that has come to its end


class _Plain(yaml.SafeLoader):
    """Reads an OrderedDict as a dict, and a tuple; of other Python objects what they are called, and no code is run."""

    def ordered_dict(self, node: yaml.SequenceNode) -> dict[str, Any]:
        return dict(self.construct_sequence(node, deep=True)[0])

    def as_tuple(self, node: yaml.SequenceNode) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
_Plain.add_constructor("tag:yaml.org,2002:python/tuple", _Plain.as_tuple)
_Plain.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _Plain.ordered_dict)


def recorded(run: Path, name: str) -> dict[str, Any]:
    """One of the records.

    :param run: folder of the run, with a folder of the environment in it that has the records
    :param name: "args.yml", the arguments, or "config.yml", the hyperparameters
    :return: values by name; {} if nothing was recorded
    """
    for file in run.glob(f"*/{name}"):
        found = yaml.load(file.read_text(encoding="utf-8"), Loader=_Plain)
        return found if isinstance(found, dict) else {}
    return {}


class Finished(NamedTuple):
    """What a run says at its end.

    :param steps: that it has made
    :param stopped: by a callback, before it had made all that it should
    """

    steps: int
    stopped: bool

    @classmethod
    def read(cls, run: Path) -> Finished | None:
        """:return: None: it has not come to its end"""
        file = run / FINISHED
        if not file.is_file():
            return None
        steps, _, how = file.read_text(encoding="utf-8").partition(",")
        return cls(int(steps), bool(how))

    @staticmethod
    def forget(run: Path) -> None:
        """A run goes on that had come to its end."""
        (run / FINISHED).unlink(missing_ok=True)

    def write(self, run: Path) -> None:
        """:raises OSError: it could not be written"""
        with atomic_file(run / FINISHED) as file:
            file.write(f"{self.steps}{', stopped by a callback' if self.stopped else ''}\n".encode())


def equal(one: Any, other: Any) -> bool:
    """Whether two hyperparameters are the same; objects such as schedules are by what YAML says of them."""
    return bool(one == other) or yaml.dump(one) == yaml.dump(other)


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which hyperparameters differ, "gamma 0.99 -> 0.997"; the length of the run, ``n_timesteps``, may.

    :param before, now: by name; what only one of them has is None in the other
    :return: "" if none does
    """
    names = sorted((before.keys() | now.keys()) - {"n_timesteps"})
    differing = [name for name in names if not equal(before.get(name), now.get(name))]
    return ", ".join(f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in differing)
