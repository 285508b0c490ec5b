"""VecNormalize for observations and rewards that lie on the device, with its statistics of the moment.

What it computes is what VecNormalize computes: in float64, clipped, and then rounded to float32.
"""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from sb3_dreamer_gpld.transfer import to_device

_METHODS = ("normalize_obs", "_normalize_obs", "normalize_reward")


def normalized_observations(observations: dict[str, Tensor], env: VecNormalize | None) -> dict[str, Tensor]:
    """Normalise the observations that VecNormalize would.

    :param observations: by key, (B, T, *shape)
    :param env: None: none
    :return: those in float32, the others as they are
    :raises ValueError: a subclass of VecNormalize computes something else
    """
    if env is None or not env.norm_obs:
        return observations
    _check(env)
    if isinstance(env.obs_rms, dict):
        assert env.norm_obs_keys is not None
        statistics = {key: env.obs_rms[key] for key in env.norm_obs_keys}
    else:
        statistics = dict.fromkeys(observations, env.obs_rms)
    return observations | {key: _normalized(observations[key], env, rms) for key, rms in statistics.items()}


def _normalized(values: Tensor, env: VecNormalize, rms: RunningMeanStd) -> Tensor:
    """Normalise observations (B, T, *shape)."""
    mean, scale = to_device(np.stack([rms.mean, np.sqrt(rms.var + env.epsilon)]), values.device)  # (*shape), (*shape)
    return ((values.double() - mean) / scale).clamp(-env.clip_obs, env.clip_obs).float()


def normalized_rewards(rewards: Tensor, env: VecNormalize | None) -> Tensor:
    """Normalise rewards.

    :param rewards: float32 (B, T)
    :param env: None: none
    :return: float32 (B, T)
    :raises ValueError: a subclass of VecNormalize computes something else
    """
    if env is None or not env.norm_reward:
        return rewards
    _check(env)
    scale = float(np.sqrt(env.ret_rms.var + env.epsilon))
    return (rewards.double() / scale).clamp(-env.clip_reward, env.clip_reward).float()


def _check(env: VecNormalize) -> None:
    for name in _METHODS:
        if getattr(type(env), name) is not getattr(VecNormalize, name):
            raise ValueError(
                f"storage='device' normalises as VecNormalize does, and {type(env).__name__} has a {name} of its own; "
                "allowed: replay_buffer_kwargs=dict(storage='host')"
            )
