"""The commands of ``dreamer-gpld``.

Everything after the command goes to the script of rl_zoo3, so all of its options work. The commands fill in what rl_zoo3
cannot know (the algorithm, its file of hyperparameters, the tasks of dm_control and Meta-World) and look for mistakes before a
run starts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch as th
import yaml

from sb3_dreamer_gpld.checks import unknown_name
from sb3_dreamer_gpld.envs import DM_CONTROL, METAWORLD, suite_of
from sb3_dreamer_gpld.trained import find_agent
from sb3_dreamer_gpld.zoo import enjoy, sweep
from sb3_dreamer_gpld.zoo.arguments import (
    NAME,
    asks_for_help,
    choose_entry,
    fail,
    find_config,
    find_environment,
    given_arguments,
    parse,
    recorded_env_kwargs,
    say_environment,
    take,
)
from sb3_dreamer_gpld.zoo.check import check_entry, check_file
from sb3_dreamer_gpld.zoo.environments import can_be_shown, import_packages, prepare_environment
from sb3_dreamer_gpld.zoo.register import register
from sb3_dreamer_gpld.zoo.search import tolerant_studies

EVAL_FREQ = 25_000  # Inside rl_zoo3: environment steps between two evaluations, so that shorter runs would have none
EVALUATIONS = 5  # of such a run

TRAIN_OPTIONS = """Options of dreamer-gpld, beside those of rl_zoo3 below:
  --save-run STEPS      save the whole run, model and replay buffer, every STEPS environment steps
  --run-folder FOLDER   folder of the run; one that was saved there goes on
"""


def _train(args: list[str], command: str = "train") -> None:
    register()
    from rl_zoo3.train import train

    from sb3_dreamer_gpld.zoo.runs import goes_on

    folder, args = take(args, "--run-folder")
    every, args = take(args, "--save-run", type=int)
    seed, _ = take(args, "--seed", type=int)
    if not asks_for_help(args):
        args = _prepare_training(args, evaluates=command == "train")
        if every is not None and every < 1:
            fail(f"--save-run {every}: allowed are whole numbers of steps, at least 1")
    elif command == "train":
        print(TRAIN_OPTIONS)
    with given_arguments(command, args), goes_on(folder, every, seed):
        train()


def _prepare_training(args: list[str], evaluates: bool) -> list[str]:
    """Complete the arguments of a training run.

    :param args: the command's arguments
    :param evaluates: the agent is evaluated every ``--eval-freq`` steps
    :raises SystemExit: the environment, a file or a hyperparameter is wrong
    """
    options = parse(args, "conf_file", "hyperparams", "trained_agent", "n_timesteps", "eval_freq")
    say_environment(options)
    prepare_environment(options.env, options.gym_packages, rendering=False)
    if options.trained_agent and not (options.trained_agent.endswith(".zip") and Path(options.trained_agent).is_file()):
        fail(f"-i {options.trained_agent}: this is not the .zip file of an agent")
    if (options.algo or NAME) != NAME:
        return args
    file = find_config(options.conf_file)
    if file.endswith((".yml", ".yaml")):
        name, entry = choose_entry(file, options.env)
        given = options.hyperparams or {}
        problems = [f"{file}, {name}: {problem}" for problem in check_entry({**entry, **given})]
        if problems:
            fail("\n".join(problems) + ("\n(with -params: " + ", ".join(given) + ")" if given else ""))
        steps = options.n_timesteps if options.n_timesteps > 0 else int({**entry, **given}["n_timesteps"])
        if evaluates and options.eval_freq is None and steps < EVAL_FREQ:
            args = [*args, "--eval-freq", str(max(1, steps // EVALUATIONS))]
            print(f"--eval-freq was not given, so the agent is evaluated every {args[-1]} steps")
    return [*args, "--algo", NAME, "-conf", file]


def _optimize(args: list[str]) -> None:
    register()
    if importlib.util.find_spec("pandas") is None:
        fail("rl_zoo3 writes the report of a study with pandas: pip install pandas")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fail("optimize cannot be started by torchrun: start it as often as you like, with the same --storage")
    for option in ("--run-folder", "--save-run"):
        if take(args, option)[0] is not None:
            fail(f"{option} is for train: a trial does not go on; allowed: --storage, with which the study goes on")
    jobs, device = (take(args, option)[0] for option in ("--n-jobs", "--device"))
    quiet = asks_for_help(args) or "compile:False" in args or device == "cpu"
    if jobs not in (None, "1") and not quiet and th.cuda.is_available():
        print(
            f"--n-jobs {jobs}: trials in threads of one process disturb each other's CUDA graphs. Better: start optimize "
            "several times with the same --storage, or -params compile:False",
            file=sys.stderr,
        )
    with tolerant_studies():
        _train([*args, "-optimize"], "optimize")


def _prepare_agent(args: list[str], rendering: bool) -> tuple[list[str], Path]:
    """Complete the arguments of a command that loads a trained agent.

    :param args: the command's arguments
    :param rendering: whether pictures are needed
    :return: the arguments, and the folder of the run
    :raises SystemExit: the environment or the agent does not exist
    """
    options = parse(args, "folder", "exp_id", "load_best", "load_checkpoint", "load_last_checkpoint", "env_kwargs")
    say_environment(options)
    prepare_environment(options.env, options.gym_packages, rendering)
    options.algo, options.folder = options.algo or NAME, options.folder or "logs"
    try:
        run, name = _find_run(options, options.exp_id)
    except ValueError as error:
        newest = _newest_run(options) if options.exp_id == 0 else None
        other = "" if newest is None else f", or take the newest run that has it: --exp-id {newest}"
        fail(f"{error}. Train an agent first, or name the folder of the runs with -f{other}")
    env_kwargs: dict[str, object] = {}
    if rendering and suite_of(options.env) is DM_CONTROL:
        # The tasks' own cameras follow the robot, unlike the free one that Shimmy takes
        env_kwargs["render_kwargs"] = {"camera_id": 2 if "/quadruped-" in options.env else 0}
    # Inside rl_zoo3: of its scripts only enjoy reads those of the hyperparameter file
    env_kwargs.update(recorded_env_kwargs(run / name))
    given, args = take(args, "--env-kwargs", nargs="+", default=[])
    # Inside rl_zoo3: values are evaluated, where the names of no numbers but only yaml's are known
    words = [*(f"{name}:yaml.unsafe_load({yaml.dump(value)!r})" for name, value in env_kwargs.items()), *given]
    return [*args, "--algo", options.algo, "-f", options.folder, *(["--env-kwargs", *words] if words else [])], run


def _find_run(options: argparse.Namespace, number: int) -> tuple[Path, str]:
    """The run that an agent is loaded from.

    :param options: as :func:`_prepare_agent` has completed them
    :param number: of the run; 0: the last one
    :return: its folder, and how rl_zoo3 writes the environment in names of files
    :raises ValueError: there is no such run, or no such agent in it
    """
    from huggingface_sb3 import EnvironmentName  # type: ignore[import-untyped]
    from rl_zoo3.utils import get_model_path

    name = EnvironmentName(options.env)
    which = options.load_best, options.load_checkpoint, options.load_last_checkpoint
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Inside rl_zoo3: what it returns and raises
            return Path(get_model_path(number, options.folder, options.algo, name, *which)[2]), name
    except AssertionError as error:
        raise ValueError(str(error)) from error


def _newest_run(options: argparse.Namespace) -> int | None:
    """The number of the newest run with the agent that is asked for; None if there is none."""
    from rl_zoo3.utils import get_latest_run_id

    last = get_latest_run_id(str(Path(options.folder, options.algo)), options.env.replace("/", "-"))
    for number in range(last, 0, -1):
        with contextlib.suppress(ValueError):
            _find_run(options, number)
            return number
    return None


def _enjoy(args: list[str]) -> None:
    if any(arg == "--trained" or arg.startswith("--trained=") for arg in args):
        return _enjoy_trained(args)
    register()
    import rl_zoo3.enjoy

    if not asks_for_help(args):
        options = parse(args, "no_render")
        if not options.no_render and not can_be_shown(options.env):
            fail("there is no display to show the agent on: use --no-render, or record-video")
        args, _ = _prepare_agent(args, rendering=False)
    with given_arguments("enjoy", args):
        rl_zoo3.enjoy.enjoy()


def _enjoy_trained(args: list[str]) -> None:
    options = enjoy.parse(args)
    try:
        agent = find_agent(options.trained)
        policy = agent.load()
    except (FileNotFoundError, ValueError) as error:
        fail(f"--trained {options.trained}: {error}")
    prepare_environment(agent.env, [], rendering=False)
    if not options.no_render and not can_be_shown(agent.env):
        fail("there is no display to show the agent on: use --no-render")
    enjoy.run(agent, policy, options)


def _record_video(args: list[str]) -> None:
    register()
    packages, args = take(args, "--gym-packages", nargs="+", default=[])
    import_packages(packages)
    if not asks_for_help(args):
        _require_moviepy()
        args, _ = _prepare_agent(args, rendering=True)
    with given_arguments("record-video", args):
        runpy.run_module("rl_zoo3.record_video", run_name="__main__")  # Inside rl_zoo3: a script without a function


def _require_moviepy() -> None:
    """:raises SystemExit: it is not there"""
    if importlib.util.find_spec("moviepy") is None:
        fail("Stable-Baselines3 writes videos with moviepy: pip install moviepy")


def _push_to_hub(args: list[str]) -> None:
    register()
    from sb3_dreamer_gpld.zoo import hub

    packages, args = take(args, "--gym-packages", nargs="+", default=[])
    keep, args = take(args, "--no-upload", action="store_true")
    import_packages(packages)
    run = Path()
    if not asks_for_help(args):
        options = parse(args, "no_render", "organization")
        if not options.no_render:
            _require_moviepy()
        args, run = _prepare_agent(args, rendering=not options.no_render)
        if keep and not options.organization:
            args = [*args, "-orga", "local"]
    with given_arguments("push-to-hub", args):
        hub.push(run, upload=not keep)


def _plot(args: list[str]) -> None:
    try:
        from sb3_dreamer_gpld.zoo import plot
    except ModuleNotFoundError as error:
        fail(f'plots need {error.name}: pip install "sb3-dreamer-gpld[extra]"')
    with given_arguments("plot", args):
        plot.main(NAME)


def _diagnose(args: list[str]) -> None:
    try:
        from sb3_dreamer_gpld.zoo import diagnose
    except ModuleNotFoundError as error:
        fail(f'plots need {error.name}: pip install "sb3-dreamer-gpld[extra]"')
    options = diagnose.parse(args)
    register()
    options.env_kwargs = parse(args, "env_kwargs").env_kwargs
    prepare_environment(options.env, options.gym_packages, rendering=False)
    wrapper = None
    if options.conf_file is not None:
        wrapper, env_kwargs = find_environment(options.conf_file, options.env)
        options.env_kwargs = env_kwargs if options.env_kwargs is None else options.env_kwargs
    try:
        setup = diagnose.prepare(options, wrapper)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    try:
        diagnose.run(options, setup)
    except diagnose.EpisodesTooShort as error:
        fail(str(error))


def _check(args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dreamer-gpld check", description="Look for mistakes in hyperparameter files.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a YAML file, or the name of one of the package")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments")
    options = parser.parse_args(args)
    register()
    import_packages(options.gym_packages)
    for suite in (DM_CONTROL, METAWORLD):
        with contextlib.suppress(ImportError):  # the file may be about other environments
            suite.register()
    status = 0
    for file in map(find_config, options.files):
        problems = check_file(file)
        print("\n".join(problems) if problems else f"{file}: no problem found")
        status = max(status, int(bool(problems)))
    return status


class Command(NamedTuple):
    """A command of the command line.

    :param run: takes the arguments after the command's name; returns an exit status, or None for success
    :param help: one line
    """

    run: Callable[[list[str]], int | None]
    help: str


COMMANDS: dict[str, Command] = {
    "train": Command(_train, "train an agent"),
    "enjoy": Command(_enjoy, "show a trained agent, and its returns; --trained AGENT: one that comes with the repository"),
    "record-video": Command(_record_video, "record a trained agent as mp4"),
    "optimize": Command(_optimize, "search hyperparameters with Optuna"),
    "sweep": Command(sweep.main, "train many agents with Ray: tasks, seeds and settings, on this machine or a cluster"),
    "plot": Command(_plot, "draw learning curves, and the aggregate over tasks, as PNG"),
    "diagnose": Command(_diagnose, "measure a world model's smoothness and its open-loop errors"),
    "push-to-hub": Command(_push_to_hub, "upload a trained agent to the Hugging Face hub, or only make the files"),
    "check": Command(_check, "look for mistakes in hyperparameter files"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    :param argv: name of the command and its arguments; None: those of the process
    :return: exit status
    """
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print("usage: dreamer-gpld COMMAND ...        dreamer-gpld COMMAND --help shows a command's options\n")
        print("\n".join(f"  {name:<14}{command.help}" for name, command in COMMANDS.items()))
        return 0 if args else 2
    if args[0] not in COMMANDS:
        fail(unknown_name("the command", args[0], COMMANDS, brief=True))
    return COMMANDS[args[0]].run(args[1:]) or 0
