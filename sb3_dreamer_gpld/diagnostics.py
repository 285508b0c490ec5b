"""How smooth a world model is and how far its predictions carry, and callbacks that log both during training.

Everything here calls the model's own nets, without gradient and in their own precision, and leaves no trace: the global random
generators, the replay buffer and the agent's recurrent state are as they were.

Letters: B windows, T steps, N states, H imagined steps, D deter, C classes, K rows, E token numbers, A action numbers.
The state of the model is s = [deter, stoch], D + C·K numbers, which is also what the heads read ("features").
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from torch import Tensor

from sb3_dreamer_gpld.buffers import SequenceReplayBuffer
from sb3_dreamer_gpld.config import ImageKey, check_int, check_range, unknown_name
from sb3_dreamer_gpld.execution import plain_steps
from sb3_dreamer_gpld.nets.distributions import categorical_kl, decode_categories
from sb3_dreamer_gpld.nets.rssm import States
from sb3_dreamer_gpld.nets.world_model import Batch, head_penalty
from sb3_dreamer_gpld.policies import DreamerPolicy

if TYPE_CHECKING:
    from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0)  # standard deviations of the perturbations δ
RATIO_SCALE = 0.01  # that of the transition ratio: small, so that the ratio is a local one
CHUNK_STATES = 64  # states whose exact Jacobian norms are computed together: it needs K·C vectors for each


@contextmanager
def undisturbed(policy: DreamerPolicy, seed: int) -> Iterator[None]:
    """Measure without a trace: no gradient, random numbers of one's own, and none of the training's compiled functions.

    :param policy: what is measured
    :param seed: of the random numbers inside the block; the generators go on afterwards as if it had not been
    """
    with plain_steps(policy), th.no_grad(), th.random.fork_rng(range(th.cuda.device_count())):
        th.manual_seed(seed)
        yield


def replay_windows(model: DreamerGPLD, count: int, generator: np.random.Generator) -> Batch:
    """Windows of the replay buffer, drawn without touching its random generator or its queue of fresh windows.

    :param model: whose buffer it is
    :param count: windows, B
    :param generator: draws them
    :raises ValueError: nothing is stored
    """
    assert isinstance(model.replay_buffer, SequenceReplayBuffer)
    return model.policy.to_batch(model.replay_buffer.peek(count, generator, model.get_vec_normalize_env()))


# --------------------------------------------------------------------------------------------------------------- states


def posterior_states(policy: DreamerPolicy, batch: Batch) -> tuple[States, Tensor]:
    """Posterior states along windows, with sampled latents.

    :param policy: the model
    :param batch: B windows of T steps
    :return: the states, and the tokens (B, T, E)
    """
    tokens = policy.world_model.encode(batch.observations, batch.rewards.shape)
    noise = th.rand(*batch.rewards.shape, policy.config.stoch, device=tokens.device)
    states = policy.world_model.rssm.observe(tokens, batch.actions, batch.is_first, batch.deter, batch.stoch, noise)
    return states, tokens


def posterior_probabilities(policy: DreamerPolicy, inputs: Tensor) -> Tensor:
    """The map that the penalty smooths.

    :param policy: the model
    :param inputs: u = [deter, tokens], (N, D + E)
    :return: class probabilities after the uniform mix, (N, C, K)
    """
    rssm, config = policy.world_model.rssm, policy.config
    return rssm.probabilities(rssm.posterior(inputs).unflatten(-1, (config.classes, config.stoch)))


# ----------------------------------------------------------------------------------------------------------- smoothness


def posterior_sensitivity(policy: DreamerPolicy, inputs: Tensor, scale: float) -> Tensor:
    """KL(q(u) ‖ q(u + δ)) of the posterior, summed over its rows, for one δ ~ N(0, scale²·I) at each u.

    :param policy: the model
    :param inputs: u, (N, D + E)
    :param scale: standard deviation of each number of δ
    :return: nats, (N,)
    """
    moved = inputs + scale * th.randn_like(inputs)
    return categorical_kl(posterior_probabilities(policy, inputs), posterior_probabilities(policy, moved))


def jacobian_norms(policy: DreamerPolicy, deter: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Exact Frobenius norms of the Jacobians ∂q/∂u of all K·C probabilities, of the posterior and of the prior.

    Their squares are K times the penalty of a state, whose mean over the rows is divided by K.

    :param policy: the model
    :param deter, tokens: (N, D), (N, E)
    :return: (N,) each
    """
    rssm, config = policy.world_model.rssm, policy.config
    posterior: list[Tensor] = []
    prior: list[Tensor] = []
    for h, x in zip(deter.split(CHUNK_STATES), tokens.split(CHUNK_STATES), strict=True):
        for norms, net, inputs in ((posterior, rssm.posterior, th.cat([h, x], -1)), (prior, rssm.prior, h)):
            squares = head_penalty(net, inputs, config.classes, config.unimix, None, None)
            norms.append(squares.clamp_min(0.0))  # rounding can make a vanishing one negative
    return (config.stoch * th.cat(posterior)).sqrt(), (config.stoch * th.cat(prior)).sqrt()


def transition_ratios(policy: DreamerPolicy, deter: Tensor, stoch: Tensor, actions: Tensor, scale: float) -> Tensor:
    """‖f(s + δ, a) − f(s, a)‖ / ‖δ‖ of the imagined transition f, for one δ ~ N(0, scale²·I) at each s.

    f(s, a) = [deter', q'], the next deter and the prior's probabilities there. The largest ratio is a lower bound of the
    Lipschitz constant of f, with which the error of an imagined trajectory can grow from step to step (Asadi, Misra &
    Littman, "Lipschitz Continuity in Model-based Reinforcement Learning", ICML 2018, arXiv 1804.07193, Theorem 1).

    :param policy: the model
    :param deter, stoch: s, (N, D), (N, C, K)
    :param actions: a, (N, A)
    :param scale: standard deviation of each number of δ
    :return: (N,)
    """
    rssm = policy.world_model.rssm

    def transition(deter: Tensor, stoch: Tensor) -> Tensor:
        _, after = rssm.imagine(deter, stoch, lambda features, step: actions, None, 1)
        deter = after[:, : deter.shape[-1]]
        return th.cat([deter, rssm.probabilities(rssm.prior_logits(deter)).flatten(1)], -1)  # (N, D + C·K)

    moves = scale * th.randn_like(deter), scale * th.randn_like(stoch)
    change = transition(deter + moves[0], stoch + moves[1]) - transition(deter, stoch)
    return change.norm(dim=-1) / th.cat([moves[0], moves[1].flatten(1)], -1).norm(dim=-1)


def imagined_ratios(policy: DreamerPolicy, deter: Tensor, stoch: Tensor, horizon: int, scale: float = RATIO_SCALE) -> Tensor:
    """:func:`transition_ratios` along rollouts that the policy imagines from N states.

    :param policy: the model
    :param deter, stoch: starts, (N, D), (N, C, K)
    :param horizon: transitions of each rollout, H
    :param scale: of the perturbations
    :return: (H·N,)
    """
    actions: list[Tensor] = []
    distribution, config = policy.actor_critic.distribution, policy.config

    def act(features: Tensor, step: int) -> Tensor:
        draws = distribution.draw((len(features),), features.device)
        actions.append(distribution.sample(policy.actor_critic.policy_outputs(features), draws))
        return actions[-1]

    noise = th.rand(horizon, len(deter), config.stoch, device=deter.device)
    features = policy.world_model.rssm.imagine(deter, stoch, act, noise, horizon)
    starts, stochs = th.cat(features[:-1]).split([config.deter, config.stoch_size], -1)  # (H·N, ·)
    stochs = stochs.unflatten(-1, (config.classes, config.stoch))
    return transition_ratios(policy, starts, stochs, th.cat(actions), scale)


class Smoothness(NamedTuple):
    """What :func:`smoothness` measures at N states.

    :param kl: :func:`posterior_sensitivity` by scale, (N,) each
    :param posterior_jacobian, prior_jacobian: :func:`jacobian_norms`, (N,) each
    :param transition_ratio: :func:`imagined_ratios`, (H·min(N, rollouts),)
    :param input_rms: root mean square of the numbers in u, (N,): inputs that are only spread out more make the
        other numbers smaller, too
    """

    kl: dict[float, Tensor]
    posterior_jacobian: Tensor
    prior_jacobian: Tensor
    transition_ratio: Tensor
    input_rms: Tensor


def smoothness(
    policy: DreamerPolicy,
    deter: Tensor,
    stoch: Tensor,
    tokens: Tensor,
    scales: Sequence[float] = SCALES,
    horizon: int = 15,
    rollouts: int = 64,
) -> Smoothness:
    """Measure the smoothness of the model at posterior states.

    :param policy: the model
    :param deter, stoch, tokens: (N, D), (N, C, K), (N, E)
    :param scales: standard deviations of δ
    :param horizon: steps of the imagined rollouts
    :param rollouts: how many of the states they start from, the first ones
    """
    inputs = th.cat([deter, tokens], -1)
    return Smoothness(
        {scale: posterior_sensitivity(policy, inputs, scale) for scale in scales},
        *jacobian_norms(policy, deter, tokens),
        imagined_ratios(policy, deter[:rollouts], stoch[:rollouts], horizon),
        inputs.square().mean(-1).sqrt(),
    )


# ------------------------------------------------------------------------------------------------------------ open loop


class OpenLoop(NamedTuple):
    """Predictions without seeing, against what happened. Step k = 0 is the last one that was seen, k = H the last imagined.

    :param errors: by name, (B, H + 1); see :func:`prediction_errors`
    :param teacher_forced: the same for the posterior states, which see every step
    :param valid: the episode has not ended between the window's start and step k, bool (B, H + 1)
    :param features: posterior states up to k = 0, imagined ones after it, (B, T, D + C·K)
    """

    errors: dict[str, Tensor]
    teacher_forced: dict[str, Tensor]
    valid: Tensor
    features: Tensor

    def means(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """:return: means over the valid windows (NaN where there is none), (H + 1,) by name: open loop and teacher-forced;
        and the number of these windows, (H + 1,)
        """
        count = self.valid.sum(0)

        def mean(errors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.where(self.valid, x.new_zeros(())).sum(0) / count for name, x in errors.items()}

        return mean(self.errors), mean(self.teacher_forced), count


def open_loop(policy: DreamerPolicy, batch: Batch, context: int, gamma: float) -> OpenLoop:
    """See ``context`` steps of each window, then imagine the others with the actions that were really taken.

    :param policy: the model
    :param batch: B windows of T steps
    :param context: steps seen, from 1 to T; H = T − context
    :param gamma: discount that the continue head learns
    :raises ValueError: there are not that many steps
    """
    steps = batch.rewards.shape[1]
    if not 1 <= context <= steps:
        raise ValueError(f"context must be from 1 to {steps}, the steps of a window, not {context}")
    states, _ = posterior_states(policy, batch)
    noise = th.rand(steps - context, len(batch.rewards), policy.config.stoch, device=batch.rewards.device)
    last = context - 1
    imagined = policy.world_model.rssm.imagine(
        states.deter[:, last],
        states.stoch[:, last],
        lambda features, step: batch.actions[:, context + step],
        noise,
        steps - context,
    )
    seen = states.features  # (B, T, D + C·K)
    features = th.cat([seen[:, :last], th.stack(imagined, 1)], 1)  # (B, T, D + C·K)
    future = steps_of(batch, slice(last, None))
    ended = batch.is_first.clone()
    ended[:, 0] = False
    return OpenLoop(
        prediction_errors(policy, features[:, last:], future, gamma),
        prediction_errors(policy, seen[:, last:], future, gamma),
        ended.cumsum(1)[:, last:] == 0,
        features,
    )


def prediction_errors(policy: DreamerPolicy, features: Tensor, batch: Batch, gamma: float) -> dict[str, Tensor]:
    """Errors of what the heads predict from features.

    :param policy: the model
    :param features: (B, T, D + C·K)
    :param batch: what happened at the same steps
    :param gamma: discount that the continue head learns
    :return: by name, (B, T) each: "reward" and "continue" (absolute errors; the truth of the latter is γ, or 0 at a terminal
        step), "observation/<key>" (mean squared error of symlog numbers or of pixels in [0, 1]; for categories the share that
        is wrong), and "observation", the mean over the keys
    """
    world_model = policy.world_model
    targets = world_model.targets(batch.observations, features.shape[:2])
    predictions = world_model.decode(features)
    by_key: dict[str, Tensor] = {}
    for key, prediction, target in zip(world_model.spec.vectors, predictions[0], targets[0], strict=True):
        if key.nvec is None:
            by_key[key.name] = (prediction - target).square().mean(-1)
        else:
            wrong = decode_categories(prediction, key.nvec) != decode_categories(target, key.nvec)
            by_key[key.name] = wrong.to(prediction.dtype).mean(-1)
    for group, image, target in zip(world_model.spec.image_groups.values(), predictions[1], targets[1], strict=True):
        squares = (image - target).square().split([key.channels for key in group], -1)
        by_key.update({key.name: square.mean((-3, -2, -1)) for key, square in zip(group, squares, strict=True)})
    reward = world_model.predict_reward(world_model.reward(features))
    cont = th.sigmoid(world_model.cont(features).squeeze(-1))
    lives = gamma * (1.0 - batch.is_terminal.to(cont.dtype))
    return {
        "observation": th.stack(list(by_key.values())).mean(0),
        **({} if "" in by_key else {f"observation/{name}": by_key[name] for name in sorted(by_key)}),
        "reward": (reward - batch.rewards).abs(),
        "continue": (cont - lives).abs(),
    }


# --------------------------------------------------------------------------------------------------------------- videos


def image_key(policy: DreamerPolicy, name: str | None = None) -> ImageKey:
    """An image observation of the model.

    :param policy: the model
    :param name: its key; None: the first one
    :raises ValueError: there is none, or none of that name
    """
    images = policy.observation_spec.images
    if not images:
        raise ValueError("A video needs image observations, and this model has none: it cannot draw what it predicts")
    if name is None:
        return images[0]
    for key in images:
        if key.name == name:
            return key
    raise ValueError(unknown_name("The image observation", name, [key.name for key in images]))


def open_loop_video(policy: DreamerPolicy, batch: Batch, features: Tensor, key: ImageKey) -> np.ndarray:
    """Truth, prediction and difference (grey where there is none) below each other, the windows side by side.

    :param policy: the model
    :param batch: B windows
    :param features: of :class:`OpenLoop`, (B, T, D + C·K)
    :param key: the image; of stacked frames the newest is shown
    :return: uint8 (T, 3·height, B·width, 3)
    """
    world_model = policy.world_model
    sizes = list(world_model.spec.image_groups)
    group = world_model.spec.image_groups[key.size]
    channels = [image.channels for image in group]

    def pick(images: Sequence[Tensor]) -> Tensor:
        image = images[sizes.index(key.size)].split(channels, -1)[group.index(key)]  # (B, T, h, w, channels)
        image = image[..., -3:] if key.channels % 3 == 0 else image[..., -1:]
        return image.expand(*image.shape[:-1], 3)

    truth = pick(world_model.targets(batch.observations, batch.rewards.shape)[1])
    model = th.cat([pick(world_model.decode(window.unsqueeze(0))[1]) for window in features])  # few at a time: big layers
    stacked = th.cat([truth, model, (model - truth + 1) / 2], 2)  # (B, T, 3h, w, 3)
    frames = th.cat(stacked.unbind(0), 2)  # (T, 3h, B·w, 3)
    return (frames * 255).round().clamp(0, 255).byte().cpu().numpy()


def write_mp4(frames: np.ndarray, file: Path, fps: int) -> None:
    """Write a video; a side of odd length gets a black line, which the codec needs.

    :param frames: uint8 (T, height, width, 3)
    :param file: ends with .mp4
    :param fps: frames per second
    :raises ModuleNotFoundError: moviepy is missing
    """
    require_moviepy()
    from moviepy.video.io.ImageSequenceClip import ImageSequenceClip

    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)])
    ImageSequenceClip(list(frames), fps=fps).write_videofile(str(file), logger=None)


def require_moviepy() -> None:
    """:raises ModuleNotFoundError: moviepy is missing"""
    if importlib.util.find_spec("moviepy") is None:
        raise ModuleNotFoundError("mp4 files are written with moviepy, as by Stable-Baselines3: pip install moviepy")


def log_video(logger: Logger, key: str, frames: np.ndarray, fps: int, step: int) -> None:
    """Write a video to TensorBoard, as an animated picture. Without a TensorBoard log nothing happens.

    SB3's ``Video`` goes through PyTorch's ``add_video``, which finds no codec in moviepy 2 and then writes an empty entry.

    :param logger: of the model
    :param key: name in TensorBoard
    :param frames: uint8 (T, height, width, 3)
    :param fps: frames per second
    :param step: environment steps made
    """
    writers = [output.writer for output in logger.output_formats if isinstance(output, TensorBoardOutputFormat)]
    if not writers:
        return
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    first, *others = [Image.fromarray(frame) for frame in frames]
    encoded = io.BytesIO()
    first.save(encoded, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
    for writer in writers:
        assert writer is not None
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=key, image=image)]), step)
        writer.flush()


# ------------------------------------------------------------------------------------------------------------ callbacks


class _ReplayCallback(BaseCallback):
    """Measures on replayed windows from time to time.

    :param eval_freq: calls between two measurements, as in SB3's EvalCallback: steps of each environment
    :param n_windows: replayed windows to measure on
    :param seed: of the windows and of all random numbers of the measurement
    :param verbose: 1 prints when something is measured
    """

    def __init__(self, eval_freq: int, n_windows: int, seed: int, verbose: int) -> None:
        super().__init__(verbose)
        check_int("eval_freq", eval_freq, 1)
        check_int("n_windows", n_windows, 1)
        self.eval_freq, self.n_windows = eval_freq, n_windows
        self.generator = np.random.default_rng(seed)

    def _init_callback(self) -> None:
        if not isinstance(self.model.policy, DreamerPolicy):
            raise TypeError(f"{type(self).__name__} measures a DreamerGPLD model, not a {type(self.model).__name__}")

    def _on_step(self) -> bool:
        model: Any = self.model
        if self.n_calls % self.eval_freq == 0 and model.replay_buffer.has_window():
            batch = replay_windows(model, self.n_windows, self.generator)
            with undisturbed(model.policy, int(self.generator.integers(2**31))):
                values = self._measure(model, batch)
            for name, value in values.items():
                if np.isfinite(value):
                    self.logger.record(name, value)
            if self.verbose >= 1:
                print(f"{type(self).__name__}: measured at step {self.num_timesteps}")
            # The same way as EvalCallback: the values belong to this step, not to the end of an episode later on
            self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
            self.logger.dump(self.num_timesteps)
        return True

    def _measure(self, model: DreamerGPLD, batch: Batch) -> dict[str, float]:
        raise NotImplementedError


class SmoothnessCallback(_ReplayCallback):
    """Logs how smooth the world model is on replayed states, as ``smoothness/...``; see :func:`smoothness`.

    :param eval_freq: calls between two measurements (steps of each environment)
    :param n_windows: replayed windows
    :param n_states: states among theirs that are measured
    :param scales: standard deviations of the perturbations of the posterior's input
    :param horizon: steps imagined from each state for the transition ratio
    :param seed: of the windows and of all random numbers of the measurement
    :param verbose: 1 prints when something is measured
    :raises ValueError: a value is not allowed
    """

    def __init__(
        self,
        eval_freq: int = 10_000,
        n_windows: int = 8,
        n_states: int = 128,
        scales: Sequence[float] = (0.1, 1.0),
        horizon: int = 5,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(eval_freq, n_windows, seed, verbose)
        check_int("n_states", n_states, 1)
        check_int("horizon", horizon, 1)
        for scale in scales:
            check_range("scales", scale, 0.0, float("inf"))
        self.n_states, self.scales, self.horizon = n_states, tuple(scales), horizon

    def _measure(self, model: DreamerGPLD, batch: Batch) -> dict[str, float]:
        states, tokens = posterior_states(model.policy, batch)
        chosen = th.randperm(batch.rewards.numel(), device=tokens.device)[: self.n_states]
        at = [x.flatten(0, 1)[chosen] for x in (states.deter, states.stoch, tokens)]
        found = smoothness(model.policy, at[0], at[1], at[2], self.scales, self.horizon)
        return {
            **{f"smoothness/posterior_kl_{scale:g}": kl.mean().item() for scale, kl in found.kl.items()},
            "smoothness/posterior_jacobian": found.posterior_jacobian.mean().item(),
            "smoothness/prior_jacobian": found.prior_jacobian.mean().item(),
            "smoothness/transition_ratio": found.transition_ratio.mean().item(),
            "smoothness/transition_ratio_max": found.transition_ratio.max().item(),
            "smoothness/input_rms": found.input_rms.mean().item(),
        }


class OpenLoopCallback(_ReplayCallback):
    """Logs errors of open-loop predictions on replayed windows as ``open_loop/...``, and a video of image observations.

    Logged are the means over k = 1 to the horizon, ``open_loop/reward`` and so on, and the errors at the horizon itself,
    ``open_loop/reward_last``; see :func:`prediction_errors` for what they are.

    :param eval_freq: calls between two measurements (steps of each environment)
    :param n_windows: replayed windows
    :param context: steps that the model sees first
    :param horizon: steps imagined after them; None: 50, or as many as a replayed window has
    :param video: write a video to TensorBoard; None: if there are image observations and a TensorBoard log
    :param video_windows: windows side by side in the video
    :param fps: frames per second of the video
    :param seed: of the windows and of all random numbers of the measurement
    :param verbose: 1 prints when something is measured
    :raises ValueError: a value is not allowed; when training starts: the model's windows are too short, or a video is asked
        for and there are no images, or no TensorBoard log
    """

    def __init__(
        self,
        eval_freq: int = 10_000,
        n_windows: int = 16,
        context: int = 5,
        horizon: int | None = None,
        video: bool | None = None,
        video_windows: int = 4,
        fps: int = 10,
        seed: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(eval_freq, n_windows, seed, verbose)
        check_int("context", context, 1)
        if horizon is not None:
            check_int("horizon (or None)", horizon, 1)
        check_int("video_windows", video_windows, 1)
        check_int("fps", fps, 1)
        self.context, self.horizon, self.video, self.video_windows, self.fps = context, horizon, video, video_windows, fps

    def _init_callback(self) -> None:
        super()._init_callback()
        model: Any = self.model
        room = model.batch_length - self.context
        if room < 1 or (self.horizon is not None and self.horizon > room):
            raise ValueError(
                f"Replayed windows have batch_length={model.batch_length} steps, but context={self.context} and "
                f"horizon={self.horizon} were asked for; context + horizon must not be more, and horizon at least 1"
            )
        if self.video:
            image_key(model.policy)  # raises its own message

    def _on_training_start(self) -> None:
        if self.video and not self._has_tensorboard():
            raise ValueError("video=True needs a TensorBoard log: give the model tensorboard_log")

    def _has_tensorboard(self) -> bool:
        return any(isinstance(output, TensorBoardOutputFormat) for output in self.logger.output_formats)

    def _measure(self, model: DreamerGPLD, batch: Batch) -> dict[str, float]:
        horizon = min(50, model.batch_length - self.context) if self.horizon is None else self.horizon
        batch = steps_of(batch, slice(self.context + horizon))
        result = open_loop(model.policy, batch, self.context, model.gamma)
        self._write_videos(model, batch, result)
        errors, _, _ = result.means()
        values = {f"open_loop/{name}": x[1:].nanmean().item() for name, x in errors.items()}
        return {**values, **{f"open_loop/{name}_last": x[-1].item() for name, x in errors.items()}}

    def _write_videos(self, model: DreamerGPLD, batch: Batch, result: OpenLoop) -> None:
        whole = result.valid[:, -1].nonzero().flatten()[: self.video_windows]
        if self.video is False or not self._has_tensorboard() or not len(whole):
            return
        for key in model.policy.observation_spec.images:
            frames = open_loop_video(model.policy, select(batch, whole), result.features[whole], key)
            name = f"open_loop/video/{key.name}" if key.name else "open_loop/video"
            log_video(self.logger, name, frames, self.fps, self.num_timesteps)


def steps_of(batch: Batch, steps: slice) -> Batch:
    """Some steps of each window, with the state before the first of all."""
    return batch._replace(
        observations={key: x[:, steps] for key, x in batch.observations.items()},
        actions=batch.actions[:, steps],
        rewards=batch.rewards[:, steps],
        is_first=batch.is_first[:, steps],
        is_last=batch.is_last[:, steps],
        is_terminal=batch.is_terminal[:, steps],
    )


def select(batch: Batch, indices: Tensor | slice) -> Batch:
    """Some of the windows."""
    observations, actions, rewards, is_first, is_last, is_terminal, deter, stoch = batch
    return Batch(
        {key: x[indices] for key, x in observations.items()},
        actions[indices],
        rewards[indices],
        is_first[indices],
        is_last[indices],
        is_terminal[indices],
        deter[indices],
        stoch[indices],
    )
