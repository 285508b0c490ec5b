"""Callbacks that measure on replayed windows from time to time during training, and log what they find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat

from sb3_dreamer_gpld.checks import check_int, check_range
from sb3_dreamer_gpld.diagnostics.measures import (
    OpenLoop,
    action_smoothness,
    open_loop,
    posterior_states,
    replay_windows,
    smoothness,
    undisturbed,
)
from sb3_dreamer_gpld.diagnostics.video import image_key, log_video, open_loop_video
from sb3_dreamer_gpld.logs import record_all
from sb3_dreamer_gpld.nets.world_model import Batch
from sb3_dreamer_gpld.policies import DreamerPolicy, uncompiled

if TYPE_CHECKING:
    from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD


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
        if not isinstance(uncompiled(self.model.policy), DreamerPolicy):
            raise TypeError(f"{type(self).__name__} measures a DreamerGPLD model, not a {type(self.model).__name__}")

    def _on_step(self) -> bool:
        model: Any = self.model
        if self.n_calls % self.eval_freq == 0 and model.replay_buffer.has_window():
            batch = replay_windows(model, self.n_windows, self.generator)
            with undisturbed(model.policy, int(self.generator.integers(2**31))):
                values = self._measure(model, batch)
            record_all(self.logger, {name: value for name, value in values.items() if np.isfinite(value)})
            if self.verbose >= 1:
                print(f"{type(self).__name__}: measured at step {self.num_timesteps}")
            # The same way as EvalCallback: the values belong to this step, not to the end of an episode later on
            self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
            self.logger.dump(self.num_timesteps)
        return True

    def _measure(self, model: DreamerGPLD, batch: Batch) -> dict[str, float]:
        raise NotImplementedError


class SmoothnessCallback(_ReplayCallback):
    """Logs how smooth the world model is on replayed states, and for a Box the replayed actions, as ``smoothness/...``; see
    :func:`smoothness` and :func:`action_smoothness`.

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
            **(_of_actions(batch) if model.policy.action_spec.nvec is None else {}),
        }


def _of_actions(batch: Batch) -> dict[str, float]:
    return {f"smoothness/action_{name}": value for name, value in action_smoothness(batch)._asdict().items()}


class OpenLoopCallback(_ReplayCallback):
    """Logs errors of open-loop predictions on replayed windows as ``open_loop/...``, and a video of image observations.

    Logged are the means over k = 1 to the horizon, ``open_loop/reward`` and so on, and the errors at the horizon itself,
    ``open_loop/reward_last``; see :func:`prediction_errors` for what they are. Without a decoder
    (``reconstruction="redundancy"``) there are those of reward and continuation only, and no video.

    :param eval_freq: calls between two measurements (steps of each environment)
    :param n_windows: replayed windows
    :param context: steps that the model sees first
    :param horizon: steps imagined after them; None: 50, or as many as a replayed window has
    :param video: write a video to TensorBoard; None: if there are image observations, a decoder and a TensorBoard log
    :param video_windows: windows side by side in the video
    :param fps: frames per second of the video
    :param seed: of the windows and of all random numbers of the measurement
    :param verbose: 1 prints when something is measured
    :raises ValueError: a value is not allowed; when training starts: the model's windows are too short, or a video is asked
        for and there are no images, no decoder, or no TensorBoard log
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
        steps = self._window_steps()
        room = steps - self.context
        if room < 1 or (self.horizon is not None and self.horizon > room):
            raise ValueError(
                f"Replayed windows have batch_length={steps} steps, but context={self.context} and "
                f"horizon={self.horizon} were asked for; context + horizon must not be more, and horizon at least 1"
            )
        if self.video:
            image_key(self.model.policy)  # type: ignore[arg-type]  # raises its own message

    def _window_steps(self) -> int:
        """Steps of a replayed window: the buffer may have been given others than the model."""
        model: Any = self.model
        return model.replay_buffer.batch_length

    def _on_training_start(self) -> None:
        if self.video and not self._has_tensorboard():
            raise ValueError("video=True needs a TensorBoard log: give the model tensorboard_log")

    def _has_tensorboard(self) -> bool:
        return any(isinstance(output, TensorBoardOutputFormat) for output in self.logger.output_formats)

    def _measure(self, model: DreamerGPLD, batch: Batch) -> dict[str, float]:
        horizon = min(50, self._window_steps() - self.context) if self.horizon is None else self.horizon
        batch = batch.steps(slice(self.context + horizon))
        result = open_loop(model.policy, batch, self.context, model.gamma)
        self._write_videos(model, batch, result)
        errors, _, _ = result.means()
        values = {f"open_loop/{name}": x[1:].nanmean().item() for name, x in errors.items()}
        return {**values, **{f"open_loop/{name}_last": x[-1].item() for name, x in errors.items()}}

    def _write_videos(self, model: DreamerGPLD, batch: Batch, result: OpenLoop) -> None:
        whole = result.valid[:, -1].nonzero().flatten()[: self.video_windows]
        if self.video is False or not model.policy.world_model.has_decoder or not self._has_tensorboard() or not len(whole):
            return
        for key in model.policy.observation_spec.images:
            frames = open_loop_video(model.policy, batch.select(whole), result.features[whole], key)
            name = f"open_loop/video/{key.name}" if key.name else "open_loop/video"
            log_video(self.logger, name, frames, self.fps, self.num_timesteps)
