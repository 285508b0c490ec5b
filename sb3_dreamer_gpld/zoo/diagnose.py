"""``dreamer-gpld diagnose``: collects episodes, measures one model or two on the same states, and writes JSON, plots, videos.

Letters: T steps, H imagined steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import Tensor

from sb3_dreamer_gpld.checks import check_int, check_range
from sb3_dreamer_gpld.diagnostics import (
    SCALES,
    ActionSmoothness,
    OpenLoop,
    Smoothness,
    action_smoothness,
    image_key,
    log_video,
    open_loop,
    open_loop_video,
    require_moviepy,
    smoothness,
    undisturbed,
    write_mp4,
)
from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.envs import repeats
from sb3_dreamer_gpld.nets.world_model import Batch
from sb3_dreamer_gpld.saving import check_writable, staged
from sb3_dreamer_gpld.zoo.episodes import Filtered, collect, cut_windows, filtered
from sb3_dreamer_gpld.zoo.figures import draw_open_loop, draw_smoothness

WINDOWS = 8  # windows that are predicted together: decoded images need much memory
VIDEO_WINDOWS = 4  # side by side in a video


def parse(args: list[str]) -> argparse.Namespace:
    """Read the arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="dreamer-gpld diagnose",
        description="Measure how smooth a trained world model is and how far its predictions carry, alone or beside another "
        "one on the same states. Writes diagnostics.json, smoothness.png and open_loop.png, and with --video open-loop videos "
        "as mp4 and for TensorBoard.",
    )
    parser.add_argument("--model", required=True, type=Path, metavar="ZIP", help="a saved DreamerGPLD model")
    parser.add_argument("--baseline", type=Path, metavar="ZIP", help="another one, to compare it with")
    parser.add_argument("--env", required=True, help="id of the environment")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments")
    parser.add_argument(
        "-conf",
        "--conf-file",
        help="hyperparameter file the model was trained with: the environment's wrappers and env_kwargs are read from it",
    )
    parser.add_argument(
        "--env-kwargs", nargs="+", metavar="NAME:VALUE", help="arguments of the environment, in place of the file's env_kwargs"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--episodes", type=int, default=5, help="episodes that each model collects (5)")
    parser.add_argument("--max-steps", type=int, default=1000, help="steps after which an episode is cut (1000)")
    parser.add_argument("--deterministic", action="store_true", help="collect with the most probable actions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=5, help="steps that are seen before an open-loop prediction (5)")
    parser.add_argument("--horizon", type=int, default=50, help="steps that are predicted (50)")
    parser.add_argument("--windows", type=int, default=64, help="windows that are predicted (64)")
    parser.add_argument("--states", type=int, default=512, help="states at which smoothness is measured (512)")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="standard deviations of the perturbations")
    parser.add_argument("--video", action="store_true", help="write open-loop videos of an image observation")
    parser.add_argument("--image", metavar="KEY", help="which one, by its key in the Dict space (the first)")
    parser.add_argument("--fps", type=int, default=10, help="frames per second of the videos (10)")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(args)


# ---------------------------------------------------------------------------------------------------------- preparation


class Setup(NamedTuple):
    """What the command works with, once it has been checked.

    :param models: the model, and the baseline if there is one, by "model" and "baseline"
    :param env: one environment, wrapped as the models need it
    """

    models: dict[str, DreamerGPLD]
    env: VecEnv


def prepare(options: argparse.Namespace, wrapper: Callable[[gym.Env], gym.Env] | None = None) -> Setup:
    """Check everything that can be checked before anything is measured or written.

    :param options: of :func:`parse`, with ``env_kwargs`` as a dict or None
    :param wrapper: put around the environment
    :raises ValueError, OSError, ModuleNotFoundError: what is wrong, in plain words
    """
    _check_numbers(options)
    check_writable(options.out)
    files = {"model": options.model, **({"baseline": options.baseline} if options.baseline else {})}
    models = {name: _load(file, options.device) for name, file in files.items()}
    for name, model in models.items():
        if model._normalized or model._rewards_normalized:
            raise ValueError(
                f"--{name} {files[name]} was trained with VecNormalize, whose statistics are not in it; allowed: models whose "
                "environments normalise neither observations (normalize_vectors does that in the model) nor rewards"
            )
    if options.video:
        for model in models.values():
            image_key(model.policy, options.image)
        require_moviepy()
        if importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError("--video also writes for TensorBoard: pip install tensorboard")
    elif options.image:
        raise ValueError("--image chooses the picture of a video; it needs --video")
    env = _make_env(options, wrapper)
    wrapped = DreamerGPLD._wrap_env(env, verbose=0, monitor_wrapper=False)
    for name, model in models.items():
        try:
            check_for_correct_spaces(wrapped, model.observation_space, model.action_space)
        except ValueError as error:
            wrapped.close()
            raise ValueError(
                f"--{name} {files[name]} was trained in another environment than {options.env}: {error}. "
                "If wrappers or env_kwargs make the difference, name the hyperparameter file with -conf"
            ) from error
        assert isinstance(env, DummyVecEnv)
        repeat, episodes = repeats(env.envs[0]), model._episode_num + model.n_envs
        if not can_have_repeated(repeat, model.num_frames, model.num_timesteps, episodes):
            wrapped.close()
            frames = model.num_frames / model.num_timesteps
            raise ValueError(
                f"--{name} {files[name]} was trained with {frames:.3g} frames for each of its steps, and {options.env} makes "
                f"{repeat}: actions are not repeated as often. Name the hyperparameter file with -conf, or the environment's "
                "arguments with --env-kwargs"
            )
    return Setup(models, wrapped)


def can_have_repeated(repeat: int, frames: int, steps: int, episodes: int) -> bool:
    """Whether a model can have learned where actions are applied ``repeat`` times.

    :param frames, steps, episodes: that it has made; 0 frames: they were not counted. The last action of an episode may have
        been cut short, so that where episodes are short nothing tells
    """
    if frames == 0:
        return True
    long = steps > 2 * repeat * episodes
    return frames <= repeat * steps and (not long or math.ceil(frames / steps) == repeat)


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("episodes", "max_steps", "context", "horizon", "windows", "states", "fps"):
        check_int("--" + name.replace("_", "-"), getattr(options, name), 1)
    check_int("--seed", options.seed, 0)
    for scale in options.scales:
        check_range("--scales", scale, 0.0, float("inf"))


def _make_env(options: argparse.Namespace, wrapper: Callable[[gym.Env], gym.Env] | None) -> VecEnv:
    """:raises ValueError: it cannot be made"""
    kwargs = options.env_kwargs or {}
    try:
        # By a function: the id alone would make an environment that renders
        return make_vec_env(lambda: gym.make(options.env, **kwargs), n_envs=1, seed=options.seed, wrapper_class=wrapper)
    except Exception as error:  # whatever the environment and its wrappers do
        raise ValueError(f"{options.env} cannot be made: {error}") from error


def _load(file: Path, device: str) -> DreamerGPLD:
    """:raises FileNotFoundError, ValueError: there is no such file, or no such model in it"""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    try:
        return DreamerGPLD.load(file, device=device)
    except Exception as error:  # whatever the file does: it is pickled data
        raise ValueError(f"{file}: this is not a saved DreamerGPLD model ({type(error).__name__}: {error})") from error


# -------------------------------------------------------------------------------------------------------------- measuring


class EpisodesTooShort(ValueError):
    """Nothing is left to predict after the context."""


class Measured(NamedTuple):
    """What one model gave.

    :param smoothness: at the drawn states
    :param errors, teacher_forced: means over the windows by name, (H + 1,) each
    :param counts: windows in these means, (H + 1,)
    :param video: uint8 (T, height, width, 3), or None
    """

    smoothness: Smoothness
    errors: dict[str, Tensor]
    teacher_forced: dict[str, Tensor]
    counts: Tensor
    video: np.ndarray | None


def measure(model: DreamerGPLD, episodes: list[Batch], options: argparse.Namespace) -> Measured:
    """Measure one model. States and windows are drawn from the seed alone, so that they are the same for every model.

    :param model: the model
    :param episodes: of :func:`~sb3_dreamer_gpld.zoo.episodes.collect`, of both models
    :param options: of :func:`parse`
    :raises EpisodesTooShort: there is no step to predict
    """
    policy, steps = model.policy, options.context + options.horizon
    deter, stoch = policy.world_model.rssm.initial(1)  # the model that collected may have another size
    episodes = [episode._replace(deter=deter, stoch=stoch) for episode in episodes]
    lengths = [episode.rewards.shape[1] for episode in episodes]
    possible = [(i, t) for i, length in enumerate(lengths) for t in range(length - options.context)]
    if not possible:
        raise EpisodesTooShort(
            f"The longest episode has {max(lengths)} observations, so that nothing is left to predict after a context of "
            f"{options.context}; choose a smaller --context"
        )
    generator = np.random.default_rng(options.seed)
    starts = [possible[i] for i in generator.choice(len(possible), min(options.windows, len(possible)), replace=False)]
    with undisturbed(policy, options.seed):
        states = [filtered(policy, episode) for episode in episodes]
        everything = Filtered.join(states)
        drawn = generator.permutation(len(everything.deter))[: options.states]
        deter, stoch, tokens = (x[th.as_tensor(drawn, device=x.device)] for x in everything)
        found = smoothness(policy, deter, stoch, tokens, options.scales)
        batch = cut_windows(episodes, states, starts, steps)
        parts = [
            open_loop(policy, batch.select(slice(i, i + WINDOWS)), options.context, model.gamma)
            for i in range(0, len(starts), WINDOWS)
        ]
        result = OpenLoop(
            {name: th.cat([part.errors[name] for part in parts]) for name in parts[0].errors},
            {name: th.cat([part.teacher_forced[name] for part in parts]) for name in parts[0].errors},
            th.cat([part.valid for part in parts]),
            th.cat([part.features for part in parts]),
        )
        video = None
        if options.video:
            # The windows that go furthest
            best = result.valid.sum(1).argsort(descending=True, stable=True)[:VIDEO_WINDOWS]
            key = image_key(policy, options.image)
            video = open_loop_video(policy, batch.select(best), result.features[best], key)
    return Measured(found, *result.means(), video)


# ---------------------------------------------------------------------------------------------------------------- output


def run(options: argparse.Namespace, setup: Setup) -> None:
    """Collect, measure, and write the results.

    :param options: of :func:`parse`
    :param setup: of :func:`prepare`
    :raises EpisodesTooShort: there is no step to predict
    """
    try:
        collected = {
            name: collect(model, setup.env, options.episodes, options.max_steps, options.seed, options.deterministic)
            for name, model in setup.models.items()
        }
    finally:
        setup.env.close()
    episodes = [episode for each in collected.values() for episode in each]
    found = {name: measure(model, episodes, options) for name, model in setup.models.items()}
    actions = {
        name: [action_smoothness(episode) for episode in each]
        for name, each in collected.items()
        if setup.models[name].policy.action_spec.nvec is None
    }
    returns = {name: [episode.rewards.sum().item() for episode in each] for name, each in collected.items()}
    report = make_report(options, found, returns, actions)
    names = dict(zip(found, _labels(options), strict=True))
    with staged(options.out) as folder:
        text = json.dumps(report, indent=2, allow_nan=False)
        (folder / "diagnostics.json").write_text(text + "\n", encoding="utf-8")
        draw_smoothness({names[name]: x.smoothness for name, x in found.items()}).savefig(folder / "smoothness.png", dpi=120)
        draw_open_loop({names[name]: (x.errors, x.teacher_forced) for name, x in found.items()}).savefig(
            folder / "open_loop.png", dpi=120
        )
        for name, x in found.items():
            if x.video is not None:
                write_mp4(x.video, folder / f"open_loop_{name}.mp4", options.fps)
                logger = configure(str(folder / "tensorboard" / name), ["tensorboard"])
                log_video(logger, "open_loop/video", x.video, options.fps, setup.models[name].num_timesteps)
                logger.close()
    for name, x in found.items():
        print(
            f"{names[name]}: Jacobian norm of the posterior {x.smoothness.posterior_jacobian.mean():.3g}, of the prior "
            f"{x.smoothness.prior_jacobian.mean():.3g}; mean transition ratio {x.smoothness.transition_ratio.mean():.3g}"
        )
        if "observation" not in x.errors:
            print(f"{names[name]}: no errors of observations, since this model has no decoder (reconstruction='redundancy')")
    print(f"Saved the results in {options.out}")


def make_report(
    options: argparse.Namespace,
    found: dict[str, Measured],
    returns: dict[str, list[float]],
    actions: dict[str, list[ActionSmoothness]],
) -> dict[str, Any]:
    """The results as JSON has them: plain numbers, None where there is none."""
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "gym_packages")}
    settings.update({name: str(settings[name]) for name in ("model", "baseline") if settings[name] is not None})
    settings["env_kwargs"] = {name: repr(value) for name, value in (options.env_kwargs or {}).items()}
    report: dict[str, Any] = {"settings": {**settings, "scales": list(options.scales)}}
    for name, x in found.items():
        report[name] = {
            "collected_returns": returns[name],
            **{
                f"action_{field}": _numbers(th.tensor([getattr(each, field) for each in actions[name]]))
                for field in (ActionSmoothness._fields if name in actions else ())
            },
            "posterior_kl": {f"{scale:g}": _summary(kl) for scale, kl in x.smoothness.kl.items()},
            **{field: _summary(getattr(x.smoothness, field)) for field in Smoothness._fields[1:]},
            "open_loop": {
                "k": list(range(len(x.counts))),
                "windows": x.counts.tolist(),
                "not_measured": [] if "observation" in x.errors else ["observation"],
                "errors": {key: _numbers(error) for key, error in x.errors.items()},
                "teacher_forced": {key: _numbers(error) for key, error in x.teacher_forced.items()},
            },
        }
    return report


def _summary(values: Tensor) -> dict[str, float | None]:
    statistics = {"mean": values.mean(), "std": values.std(correction=0), "median": values.median(), "max": values.max()}
    return {name: _numbers(value.view(1))[0] for name, value in statistics.items()}


def _numbers(values: Tensor) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _labels(options: argparse.Namespace) -> list[str]:
    """Names for the plots: those of the files if they differ."""
    files = [file for file in (options.model, options.baseline) if file is not None]
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]
