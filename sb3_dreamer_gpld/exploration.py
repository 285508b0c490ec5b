"""Noise of collected actions that goes on in one direction for a while, so that the agent gets somewhere with it."""

from __future__ import annotations

import math

import numpy as np
from stable_baselines3.common.noise import ActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise

RETURN_RATE = 0.15  # share of the noise that is lost in a step: it lasts for about seven


def correlated_noise(std: float, size: int, n_envs: int) -> ActionNoise:
    """Ornstein-Uhlenbeck noise, which starts at 0 in each episode (Lillicrap et al., "Continuous control with deep
    reinforcement learning", ICLR 2016).

    :param std: standard deviation of each number after the first steps, in the scaled range [−1, 1]
    :param size: numbers in an action, A
    :param n_envs: environments, each with noise of its own, E
    :return: gives (A,) for one environment, (E, A) for more
    """
    step = std * math.sqrt(1.0 - (1.0 - RETURN_RATE) ** 2)  # of an autoregressive process with that deviation
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(size), step * np.ones(size), theta=RETURN_RATE, dt=1.0)
    return noise if n_envs == 1 else VectorizedActionNoise(noise, n_envs)
