"""Pytest plugin: DreamerGPLD in place of SB3's algorithms, for SB3's own tests. See ``test_sb3_suite.py``.

Loaded with ``-p sb3_standins`` before any test module is imported, so that ``from stable_baselines3 import SAC`` in a
test gives the stand-in. There is one class per name, since SB3's tests choose environments and arguments by it.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import stable_baselines3
from sb3_suite import selected

from sb3_dreamer_gpld import DreamerGPLD

# A small model that learns seldom; what a test passes itself has precedence.
DEFAULTS: dict[str, Any] = dict(
    model_size="debug",
    batch_size=4,
    batch_length=8,
    imagination_horizon=3,
    train_ratio=2,
    learning_starts=40,
    buffer_size=5000,
)
# Arguments that only some of SB3's algorithms have. Any other one must be known to DreamerGPLD.
OTHERS_ARGUMENTS = {
    "A2C": {"n_steps", "gae_lambda", "normalize_advantage"},
    "PPO": {"n_steps", "n_epochs", "gae_lambda", "clip_range", "clip_range_vf", "normalize_advantage"},
    "SAC": {"use_sde", "sde_sample_freq", "ent_coef"},
    "TD3": {"policy_delay"},
    "DDPG": set(),
    "DQN": {"target_update_interval"},
}
OTHERS_POLICY_KWARGS = {"n_critics", "share_features_extractor"}


class StandIn(DreamerGPLD):
    """Base of the stand-ins."""

    @classmethod
    def own_arguments(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = {name: value for name, value in kwargs.items() if name not in OTHERS_ARGUMENTS[cls.__name__]}
        if isinstance(kwargs.get("policy_kwargs"), dict):
            own = {name: value for name, value in kwargs["policy_kwargs"].items() if name not in OTHERS_POLICY_KWARGS}
            kwargs["policy_kwargs"] = own
        return kwargs

    def __init__(self, policy: Any, env: Any, **kwargs: Any) -> None:
        super().__init__(policy, env, **{**DEFAULTS, **self.own_arguments(kwargs)})

    @classmethod
    def load(cls, path: Any, env: Any = None, device: Any = "auto", **kwargs: Any) -> Any:
        return super().load(path, env, device, **cls.own_arguments(kwargs))

    def learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> Any:
        """The name of the TensorBoard run is that of the algorithm, as SB3's tests expect it."""
        bound = inspect.signature(DreamerGPLD.learn).bind(self, total_timesteps, *args, **kwargs)
        bound.arguments.setdefault("tb_log_name", type(self).__name__)
        return super().learn(*bound.args[1:], **bound.kwargs)


STANDINS = {name: type(name, (StandIn,), {"__module__": __name__}) for name in OTHERS_ARGUMENTS}
globals().update(STANDINS)  # so that they can be pickled
for _name, _standin in STANDINS.items():
    setattr(stable_baselines3, _name, _standin)


def _algorithm(item: pytest.Item) -> str | None:
    """Name of the algorithm that the test is parametrised with."""
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        if isinstance(value, type) and issubclass(value, StandIn):
            return value.__name__
        if isinstance(value, str) and value.upper() in STANDINS:
            return value.upper()
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what ``sb3_suite.SELECTION`` names."""
    wanted = selected(os.environ["SB3_SUITE_PART"])
    kept, dropped = [], []
    for item in items:
        assert isinstance(item, pytest.Function)
        for name, standin in STANDINS.items():  # the test would pass with SB3's own class
            assert getattr(item.module, name, standin) is standin, f"{item.path.name} got another {name}"
        choice = wanted.get(f"{item.path.name}::{item.originalname}")
        callspec = getattr(item, "callspec", None)
        unsupported = callspec is not None and any(
            callspec.params.get(name) is True for name in ("use_sde", "optimize_memory_usage", "share_features_extractor")
        )
        keep = choice is not None and not unsupported and (_algorithm(item) or choice[0]) in choice
        (kept if keep else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
