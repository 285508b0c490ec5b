"""Settings by name, read from the hyperparameter files that come with the package."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import yaml

from sb3_dreamer_gpld.arguments import check_names
from sb3_dreamer_gpld.checks import unknown_name
from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD

# The folder of hyperparameter files: beside this file in an installed package, at the top of a checkout
CONFIGS = next(
    (folder for parent in Path(__file__).parents[:2] if (folder := parent / "zoo_configs").is_dir()), Path("zoo_configs")
)
# The file that holds a preset, as the entry for any environment that is not named there
PRESETS = {"cpu": "dreamer_gpld_cpu.yml", "paper": "dreamer_gpld.yml"}


def preset(name: str, env_id: str | None = None, **changes: Any) -> dict[str, Any]:
    """Arguments of :class:`~sb3_dreamer_gpld.DreamerGPLD`: ``DreamerGPLD("MlpPolicy", env, **preset("cpu"))``.

    What stands in the file but is no argument (steps of the run, policy, wrappers) is left out.

    :param name: "cpu", settings found by a search for machines without a GPU (docs/learning.md), or "paper", those of Sonigra
        & Kumar (2026)
    :param env_id: an environment that the file may have settings of its own for, such as "CartPole-v1"; None, or one that it
        does not name: those for any environment
    :param changes: arguments in place of the preset's; of those that are dicts, such as ``policy_kwargs``, single entries
    :return: a new dict, which may be changed
    :raises ValueError: there is no such preset
    :raises TypeError: there is no such argument; names the closest one
    """
    check_names(DreamerGPLD, [DreamerGPLD.__init__], changes)
    if name not in PRESETS:
        raise ValueError(unknown_name("preset", name, PRESETS))
    entries = yaml.safe_load((CONFIGS / PRESETS[name]).read_text(encoding="utf-8"))
    entry = entries.get(env_id, entries["default"])
    arguments = set(inspect.signature(DreamerGPLD).parameters) - {"policy", "env"}
    settings = {key: value for key, value in entry.items() if key in arguments}
    for key, value in changes.items():
        its = settings.get(key)
        settings[key] = {**its, **value} if isinstance(its, dict) and isinstance(value, dict) else value
    return settings
