"""``dreamer-gpld diagnose``: collects episodes, measures one model or two on the same states, and writes JSON, plots, videos.

Letters: B windows, T steps, N states, D deter, C classes, K rows, E token numbers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from sb3_dreamer_gpld.config import check_int, check_range
from sb3_dreamer_gpld.diagnostics import (
    SCALES,
    OpenLoop,
    Smoothness,
    image_key,
    log_video,
    open_loop,
    open_loop_video,
    posterior_states,
    require_moviepy,
    select,
    smoothness,
    steps_of,
    undisturbed,
    write_mp4,
)
from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.nets.world_model import Batch
from sb3_dreamer_gpld.policies import DreamerPolicy, as_dict
from sb3_dreamer_gpld.saving import check_writable, staged

SEGMENT = 64  # steps of an episode that go through the nets together
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
        help="hyperparameter file the model was trained with: the environment's wrappers are read from it",
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

    :param options: of :func:`parse`
    :param wrapper: put around the environment
    :raises ValueError, OSError, ModuleNotFoundError: what is wrong, in plain words
    """
    _check_numbers(options)
    check_writable(options.out)
    files = {"model": options.model, **({"baseline": options.baseline} if options.baseline else {})}
    models = {name: _load(file, options.device) for name, file in files.items()}
    if options.video:
        for model in models.values():
            image_key(model.policy, options.image)
        require_moviepy()
        if importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError("--video also writes for TensorBoard: pip install tensorboard")
    elif options.image:
        raise ValueError("--image chooses the picture of a video; it needs --video")
    # By a function: the id alone would make an environment that renders
    env = make_vec_env(lambda: gym.make(options.env), n_envs=1, seed=options.seed, wrapper_class=wrapper)
    wrapped = DreamerGPLD._wrap_env(env, verbose=0, monitor_wrapper=False)
    for name, model in models.items():
        try:
            check_for_correct_spaces(wrapped, model.observation_space, model.action_space)
        except ValueError as error:
            wrapped.close()
            raise ValueError(
                f"--{name} {files[name]} was trained in another environment than {options.env}: {error}. "
                "If wrappers make the difference, name the hyperparameter file with -conf"
            ) from error
    return Setup(models, wrapped)


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("episodes", "max_steps", "context", "horizon", "windows", "states", "fps"):
        check_int("--" + name.replace("_", "-"), getattr(options, name), 1)
    check_int("--seed", options.seed, 0)
    for scale in options.scales:
        check_range("--scales", scale, 0.0, float("inf"))


def _load(file: Path, device: str) -> DreamerGPLD:
    """:raises FileNotFoundError, ValueError: there is no such file, or no such model in it"""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    try:
        return DreamerGPLD.load(file, device=device)
    except Exception as error:  # whatever the file does: it is pickled data
        raise ValueError(f"{file}: this is not a saved DreamerGPLD model ({type(error).__name__}: {error})") from error


# ------------------------------------------------------------------------------------------------------------ collecting


def collect(model: DreamerGPLD, env: VecEnv, options: argparse.Namespace) -> list[Batch]:
    """Episodes of the model's policy.

    :param model: acts
    :param env: one environment
    :param options: number and length of the episodes, seed
    :return: one window (1, T) for each, from its first step to its last
    """
    env.seed(options.seed)
    with undisturbed(model.policy, options.seed):
        return [_episode(model.policy, env, options) for _ in range(options.episodes)]


def _episode(policy: DreamerPolicy, env: VecEnv, options: argparse.Namespace) -> Batch:
    observation: Any = env.reset()
    actions: list[Tensor] = []
    observations, rewards, terminal = [observation], [0.0], False
    state, is_first, done = policy.initial_state(1), th.ones(1, dtype=th.bool, device=policy.device), False
    while not done and len(actions) < options.max_steps:
        tensors, _ = policy.obs_to_tensor(observation)
        state = policy.act(tensors, state, is_first, options.deterministic)
        is_first = th.zeros_like(is_first)
        observation, reward, dones, infos = env.step(policy.to_env_action(state.action))
        done = bool(dones[0])
        if done:  # the environment has been reset already
            terminal = not infos[0].get("TimeLimit.truncated", False)
            last = infos[0]["terminal_observation"]
            observation = {k: v[None] for k, v in last.items()} if isinstance(last, dict) else np.asarray(last)[None]
        observations.append(observation)
        actions.append(state.action)
        rewards.append(float(reward[0]))
    steps = len(rewards)
    flags = th.zeros(3, 1, steps, dtype=th.bool, device=policy.device)
    flags[0, 0, 0], flags[1, 0, -1], flags[2, 0, -1] = True, True, terminal
    deter, stoch = policy.world_model.rssm.initial(1)
    return Batch(
        {key: x.unsqueeze(0) for key, x in as_dict(policy.obs_to_tensor(_joined(observations))[0]).items()},
        th.cat([th.zeros_like(actions[0]), *actions]).unsqueeze(0),
        th.tensor([rewards], device=policy.device),
        flags[0],
        flags[1],
        flags[2],
        deter,
        stoch,
    )


def _joined(observations: list[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {key: np.concatenate([x[key] for x in observations]) for key in observations[0]}
    return np.concatenate(observations)


# -------------------------------------------------------------------------------------------------------------- measuring


class Filtered(NamedTuple):
    """Posterior states of an episode: deter (T, D), stoch (T, C, K), tokens (T, E)."""

    deter: Tensor
    stoch: Tensor
    tokens: Tensor


def filtered(policy: DreamerPolicy, episode: Batch) -> Filtered:
    """Posterior states of a whole episode (1, T), some steps at a time."""
    parts = []
    for start in range(0, episode.rewards.shape[1], SEGMENT):
        states, tokens = posterior_states(policy, steps_of(episode, slice(start, start + SEGMENT)))
        parts.append((states.deter[0], states.stoch[0], tokens[0]))
        episode = episode._replace(deter=states.deter[:, -1], stoch=states.stoch[:, -1])
    return Filtered(*(th.cat(x) for x in zip(*parts, strict=True)))


def cut_windows(episodes: list[Batch], states: list[Filtered], starts: list[tuple[int, int]], steps: int) -> Batch:
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
        at = rows.clamp_max(length - 1)
        actions, rewards, is_first, is_last, is_terminal = (x[0][at] for x in episode[1:6])
        deter, stoch = (before.deter[start - 1], before.stoch[start - 1]) if start else (episode.deter[0], episode.stoch[0])
        return Batch(
            {key: x[0][at] for key, x in episode.observations.items()},
            actions,
            rewards,
            is_first | (rows >= length),
            is_last,
            is_terminal,
            deter,
            stoch,
        )

    windows = [window(*start) for start in starts]
    observations = {key: th.stack([x.observations[key] for x in windows]) for key in windows[0].observations}
    return Batch(observations, *(th.stack(parts) for parts in list(zip(*windows, strict=True))[1:]))


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
    :param episodes: of :func:`collect`
    :param options: of :func:`parse`
    :raises ValueError: the episodes are too short
    """
    policy, steps = model.policy, options.context + options.horizon
    lengths = [episode.rewards.shape[1] for episode in episodes]
    possible = [(i, t) for i, length in enumerate(lengths) for t in range(length - options.context)]
    if not possible:
        raise ValueError(
            f"The longest episode has {max(lengths)} observations, so that nothing is left to predict after a context of "
            f"{options.context}; choose a smaller --context"
        )
    generator = np.random.default_rng(options.seed)
    starts = [possible[i] for i in generator.choice(len(possible), min(options.windows, len(possible)), replace=False)]
    with undisturbed(policy, options.seed):
        states = [filtered(policy, episode) for episode in episodes]
        everything = Filtered(*(th.cat(x) for x in zip(*states, strict=True)))
        drawn = generator.permutation(len(everything.deter))[: options.states]
        deter, stoch, tokens = (x[th.as_tensor(drawn, device=x.device)] for x in everything)
        found = smoothness(policy, deter, stoch, tokens, options.scales)
        batch = cut_windows(episodes, states, starts, steps)
        parts = [
            open_loop(policy, select(batch, slice(i, i + WINDOWS)), options.context, model.gamma)
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
            video = open_loop_video(policy, select(batch, best), result.features[best], key)
    return Measured(found, *result.means(), video)


# ---------------------------------------------------------------------------------------------------------------- output


def run(options: argparse.Namespace, setup: Setup) -> None:
    """Collect, measure, and write the results.

    :param options: of :func:`parse`
    :param setup: of :func:`prepare`
    :raises ValueError: the episodes are too short
    """
    try:
        collected = {name: collect(model, setup.env, options) for name, model in setup.models.items()}
    finally:
        setup.env.close()
    episodes = [episode for each in collected.values() for episode in each]
    found = {name: measure(model, episodes, options) for name, model in setup.models.items()}
    returns = {name: [episode.rewards.sum().item() for episode in each] for name, each in collected.items()}
    report = make_report(options, found, returns)
    names = dict(zip(found, _labels(options), strict=True))
    with staged(options.out) as folder:
        text = json.dumps(report, indent=2, allow_nan=False)
        (folder / "diagnostics.json").write_text(text + "\n", encoding="utf-8")
        draw_smoothness({names[name]: x.smoothness for name, x in found.items()}).savefig(folder / "smoothness.png", dpi=120)
        draw_open_loop({names[name]: x for name, x in found.items()}).savefig(folder / "open_loop.png", dpi=120)
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
    print(f"Saved the results in {options.out}")


def make_report(options: argparse.Namespace, found: dict[str, Measured], returns: dict[str, list[float]]) -> dict[str, Any]:
    """The results as JSON has them: plain numbers, None where there is none."""
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "gym_packages")}
    settings.update({name: str(settings[name]) for name in ("model", "baseline") if settings[name] is not None})
    report: dict[str, Any] = {"settings": {**settings, "scales": list(options.scales)}}
    for name, x in found.items():
        report[name] = {
            "collected_returns": returns[name],
            "posterior_kl": {f"{scale:g}": _summary(kl) for scale, kl in x.smoothness.kl.items()},
            **{field: _summary(getattr(x.smoothness, field)) for field in Smoothness._fields[1:]},
            "open_loop": {
                "k": list(range(len(x.counts))),
                "windows": x.counts.tolist(),
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


def draw_smoothness(found: dict[str, Smoothness]) -> Figure:
    """KL against the size of the perturbation, Jacobian norms, and transition ratios."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    kl, posterior, prior, ratio = figure.subplots(1, 4, width_ratios=[1.6, 1, 1, 1])
    for label, x in found.items():
        kl.plot(list(x.kl), [value.mean().item() for value in x.kl.values()], marker=".", label=label)
    kl.set_xscale("log")
    kl.set_yscale("log")
    kl.set_xlabel("standard deviation of δ")
    kl.set_title("KL(q(u) ‖ q(u + δ)) of the posterior, nats")
    _boxes(posterior, {label: x.posterior_jacobian for label, x in found.items()}, "‖∂q/∂u‖ of the posterior")
    _boxes(prior, {label: x.prior_jacobian for label, x in found.items()}, "‖∂q/∂u‖ of the prior")
    _boxes(ratio, {label: x.transition_ratio for label, x in found.items()}, "‖f(s+δ) − f(s)‖ / ‖δ‖, imagined")
    kl.grid(alpha=0.3)
    kl.legend()
    return figure


def _boxes(axes: Axes, values: dict[str, Tensor], title: str) -> None:
    axes.boxplot([x.cpu().numpy() for x in values.values()], showfliers=False)
    axes.set_xticklabels(list(values))
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)


def draw_open_loop(found: dict[str, Measured]) -> Figure:
    """Errors of observations, reward and continuation against the number of imagined steps."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    titles = {
        "observation": "observation: squared error",
        "reward": "reward: absolute error",
        "continue": "continue: absolute error",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for number, (label, x) in enumerate(found.items()):
            axes.plot(x.errors[name].cpu().numpy(), color=f"C{number}", label=label)
            axes.plot(x.teacher_forced[name].cpu().numpy(), color=f"C{number}", ls=":", label=f"{label}, seeing every step")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("imagined steps k")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    axes.legend()
    return figure
