"""Episodes of a trained agent, recorded as the replay buffer keeps them, and windows of them with the model's own states.

Letters: B sequences, T steps, D deter, C classes, K rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from sb3_dreamer_gpld.buffers import SequenceReplayBuffer
from sb3_dreamer_gpld.diagnostics import posterior_states, undisturbed
from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.nets.world_model import Batch
from sb3_dreamer_gpld.policies import DreamerPolicy

SEGMENT = 64  # steps of an episode that go through the nets together


def collect(
    model: DreamerGPLD,
    env: VecEnv,
    episodes: int,
    max_steps: int,
    seed: int = 0,
    deterministic: bool = False,
    actions: Sequence[np.ndarray] | None = None,
) -> list[Batch]:
    """Episodes of the model's policy, or with actions that are known.

    :param model: acts
    :param env: one environment
    :param episodes: how many
    :param max_steps: steps after which an episode is cut, as by a time limit
    :param seed: of the environment and of the policy's random numbers
    :param deterministic: take the most probable actions
    :param actions: in a Box, as the nets see them, (steps, A) for each episode, which ends with them: an episode is played
        again with those of its window, ``batch.actions[0, 1:]``, and the same seed
    :return: one window (1, T) for each, from its first step to its last
    """
    config = model.policy.config
    buffer = SequenceReplayBuffer(
        max_steps + 1,  # rows: every observation has one, the last one, too
        model.observation_space,
        model.action_space,
        device=model.device,
        batch_length=max_steps + 1,  # so that a window is all that is stored
        deter=config.deter,
        stoch=config.stoch,
        classes=config.classes,
        seed=seed,
    )
    recorded = []
    env.seed(seed)
    with undisturbed(model.policy, seed):
        for number in range(episodes):
            buffer.reset()
            known = None if actions is None else th.as_tensor(actions[number], dtype=th.float32, device=model.device)
            _record(model.policy, env, buffer, max_steps if known is None else len(known), deterministic, known)
            recorded.append(model.policy.to_batch(buffer.peek(1, buffer.rng)))
    return recorded


def _record(
    policy: DreamerPolicy, env: VecEnv, buffer: SequenceReplayBuffer, max_steps: int, deterministic: bool, known: Tensor | None
) -> None:
    """Play one episode into an empty buffer; with actions (steps, A) that are known, if there are any."""
    observation: Any = env.reset()
    state, is_first = policy.initial_state(1), th.ones(1, dtype=th.bool, device=policy.device)
    for step in range(1, max_steps + 1):
        tensors, _ = policy.obs_to_tensor(observation)
        if known is None:
            state = policy.act(tensors, state, is_first, deterministic, planned=policy.planner is not None)
        else:
            state = state._replace(action=known[step - 1 : step])
        is_first = th.zeros_like(is_first)
        action = policy.to_env_action(state.action)
        following, reward, dones, infos = env.step(action)
        last: Any = following
        info = infos[0]
        if dones[0]:  # the environment has been reset already
            terminal = info["terminal_observation"]
            last = {k: v[None] for k, v in terminal.items()} if isinstance(terminal, dict) else np.asarray(terminal)[None]
        elif step == max_steps:
            info = {"TimeLimit.truncated": True}
        ends = np.array([bool(dones[0]) or step == max_steps])
        stored = state.action.cpu().numpy() if policy.action_spec.nvec is None else action
        buffer.add(observation, last, stored, reward, ends, [info])
        if ends[0]:
            return
        observation = following


class Filtered(NamedTuple):
    """Posterior states of T steps: deter (T, D), stoch (T, C, K), tokens (T, tokens)."""

    deter: Tensor
    stoch: Tensor
    tokens: Tensor

    @classmethod
    def join(cls, parts: Iterable[Filtered]) -> Filtered:
        """:return: the states of all parts in a line"""
        return cls(*(th.cat(tensors) for tensors in zip(*parts, strict=True)))


def filtered(policy: DreamerPolicy, episode: Batch) -> Filtered:
    """Posterior states of a whole episode (1, T), some steps at a time."""
    parts = []
    for start in range(0, episode.rewards.shape[1], SEGMENT):
        states, tokens = posterior_states(policy, episode.steps(slice(start, start + SEGMENT)))
        parts.append(Filtered(states.deter[0], states.stoch[0], tokens[0]))
        episode = episode._replace(deter=states.deter[:, -1], stoch=states.stoch[:, -1])
    return Filtered.join(parts)


def cut_windows(episodes: Sequence[Batch], states: Sequence[Filtered], starts: Sequence[tuple[int, int]], steps: int) -> Batch:
    """Windows of episodes, with the model's own states before them. After an episode's end the last step is repeated, as the
    first one of another episode.

    :param episodes: (1, T) each
    :param states: of the model, of each episode
    :param starts: episode and first step of each window
    :param steps: steps of a window
    :return: (B, steps)
    """

    def window(number: int, start: int) -> Batch:
        episode, before = episodes[number], states[number]
        rows = th.arange(start, start + steps, device=episode.rewards.device)
        length = episode.rewards.shape[1]
        taken = episode.steps(rows.clamp_max(length - 1))
        if start:
            taken = taken._replace(deter=before.deter[start - 1 : start], stoch=before.stoch[start - 1 : start])
        return taken._replace(is_first=taken.is_first | (rows >= length))

    return Batch.join([window(*start) for start in starts])
