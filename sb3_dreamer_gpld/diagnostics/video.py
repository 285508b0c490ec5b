"""Open-loop predictions of image observations as videos: drawn, and written as mp4 and for TensorBoard.

Letters: B sequences, T steps, D deter, C classes, K rows.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat
from torch import Tensor

from sb3_dreamer_gpld.checks import unknown_name
from sb3_dreamer_gpld.config import ImageKey
from sb3_dreamer_gpld.nets.world_model import NO_DECODER, Batch
from sb3_dreamer_gpld.policies import DreamerPolicy


def image_key(policy: DreamerPolicy, name: str | None = None) -> ImageKey:
    """An image observation of the model.

    :param policy: the model
    :param name: its key; None: the first one
    :raises ValueError: there is none, or none of that name, or no decoder
    """
    images = policy.observation_spec.images
    if not images:
        raise ValueError("A video needs image observations, and this model has none: it cannot draw what it predicts")
    if not policy.world_model.has_decoder:
        raise ValueError(f"A video needs a decoder. {NO_DECODER}")
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
    :raises ValueError: there is no decoder
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
