"""Noise of collected actions that goes on in one direction for a while, so that the agent gets somewhere with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from stable_baselines3.common.noise import ActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise

RETURN_RATE = 0.15  # share of the noise that is lost in a step: it lasts for about seven


class SomeEpisodes(ActionNoise):
    """Noise in a share of the episodes, evenly spread, and zeros in the others.

    :param noise: gives (A,)
    :param share: of the episodes, in (0, 1]; the first ones have none if it is less than 1
    """

    def __init__(self, noise: ActionNoise, share: float) -> None:
        super().__init__()
        self.noise, self.share = noise, share
        self.episode = 0  # number of the present one

    @property
    def noisy(self) -> bool:
        """Whether this episode has noise."""
        return math.floor((self.episode + 1) * self.share) > math.floor(self.episode * self.share)

    def __call__(self) -> np.ndarray:
        return self.noise() * self.noisy

    def reset(self) -> None:
        """Another episode begins."""
        self.episode += 1
        self.noise.reset()


def correlated_noise(
    std: float, size: int, n_envs: int, share: float = 1.0, episodes: Sequence[int] | None = None
) -> ActionNoise:
    """Ornstein-Uhlenbeck noise, which starts at 0 in each episode (Lillicrap et al., "Continuous control with deep
    reinforcement learning", ICLR 2016).

    :param std: standard deviation of each number after the first steps, in the scaled range [−1, 1]
    :param size: numbers in an action, A
    :param n_envs: environments, each with noise of its own, E
    :param share: of the episodes that have noise, in (0, 1]
    :param episodes: number of the first episode of each environment, see :func:`episodes_of`; None: 0 to E − 1, so that
        environments take turns
    :return: gives (A,) for one environment, (E, A) for more
    """
    step = std * math.sqrt(1.0 - (1.0 - RETURN_RATE) ** 2)  # of an autoregressive process with that deviation
    process = OrnsteinUhlenbeckActionNoise(np.zeros(size), step * np.ones(size), theta=RETURN_RATE, dt=1.0)
    first = SomeEpisodes(process, share)
    noise = first if n_envs == 1 else VectorizedActionNoise(first, n_envs)
    for each, episode in zip(_each(noise), range(n_envs) if episodes is None else episodes, strict=True):
        each.episode = episode
    return noise


def episodes_of(noise: ActionNoise | None) -> list[int]:
    """Number of the present episode of each environment, with which :func:`correlated_noise` goes on."""
    return [] if noise is None else [each.episode for each in _each(noise)]


def _each(noise: ActionNoise) -> list[SomeEpisodes]:
    """The noise of each environment."""
    every = noise.noises if isinstance(noise, VectorizedActionNoise) else [noise]
    return [each for each in every if isinstance(each, SomeEpisodes)]
