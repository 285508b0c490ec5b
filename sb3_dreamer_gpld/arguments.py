"""Arguments that users of Stable-Baselines3 know from its other algorithms, and what does their work here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from sb3_dreamer_gpld.config import unknown_name

Function = TypeVar("Function", bound=Callable[..., Any])

_NO_SDE = "actions have no state-dependent noise here; exploration_noise adds noise that lasts"
_CLIP = "gradients are clipped per tensor, policy_kwargs=dict(optimizer_kwargs=dict(clip=...))"
_NO_CLIP = f"there is no surrogate objective to clip; {_CLIP}"
# By name: what does it here, or that there is none
KNOWN_ELSEWHERE = {
    "tau": "the slow value follows at policy_kwargs=dict(slow_value_rate=...)",
    "target_update_interval": "the slow value follows after every update, at policy_kwargs=dict(slow_value_rate=...)",
    "use_sde": _NO_SDE,
    "use_sde_at_warmup": _NO_SDE,
    "sde_sample_freq": _NO_SDE,
    "policy_delay": "actor and critic are updated together",
    "target_policy_noise": "targets are imagined returns, without noise",
    "target_noise_clip": "targets are imagined returns, without noise",
    "exploration_fraction": "the policy's samples explore, see ent_coef and exploration_noise",
    "exploration_initial_eps": "the policy's samples explore, see ent_coef and exploration_noise",
    "exploration_final_eps": "the policy's samples explore, see ent_coef and exploration_noise",
    "n_steps": "returns are mixed over all lengths up to imagination_horizon, see return_lambda",
    "n_epochs": "the number of updates follows from train_ratio, or gradient_steps",
    "gae_lambda": "the mixture of returns is return_lambda",
    "vf_coef": "the value's losses are weighed by policy_kwargs=dict(value_weight=..., replay_value_weight=...)",
    "max_grad_norm": _CLIP,
    "clip_range": _NO_CLIP,
    "clip_range_vf": _NO_CLIP,
    "target_kl": "there is no trust region",
    "normalize_advantage": "advantages are divided by the range of the returns, always",
    "n_quantiles": "the value has policy_kwargs=dict(bins=...)",
    "top_quantiles_to_drop_per_net": "there is one value net",
}


def naming_unknown(init: Function) -> Function:
    """An ``__init__`` whose error for an unknown argument says what does its work here, or names the closest one."""
    allowed = [name for name in inspect.signature(init).parameters if name != "self" and not name.startswith("_")]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in allowed and not name.startswith("_"):
                if name in KNOWN_ELSEWHERE:
                    raise TypeError(f"{type(self).__name__} has no argument {name!r}: {KNOWN_ELSEWHERE[name]}")
                raise TypeError(unknown_name("argument", name, allowed))
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]
