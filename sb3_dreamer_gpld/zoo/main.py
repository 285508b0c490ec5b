"""The command line: rl_zoo3's own scripts with DreamerGPLD registered, and a checker of hyperparameter files.

Everything after the command goes to the script of rl_zoo3, so all of its options work. This module fills in what rl_zoo3
cannot know (the algorithm, its file of hyperparameters, the dm_control tasks) and looks for mistakes before a run starts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import gymnasium as gym

from sb3_dreamer_gpld.dreamer_gpld import DreamerGPLD
from sb3_dreamer_gpld.zoo.check import DM_CONTROL, check_entry, check_file, read_yaml, unknown

if TYPE_CHECKING:
    import optuna
    from rl_zoo3.exp_manager import ExperimentManager

NAME = "dreamer_gpld"
# Beside this file in an installed package, at the top of a checkout
CONFIGS = next(
    (folder for parent in Path(__file__).parents[1:3] if (folder := parent / "zoo_configs").is_dir()),
    Path("zoo_configs"),
)


def _fail(message: str) -> NoReturn:
    """End with ``message`` on the standard error and exit status 1."""
    raise SystemExit(f"dreamer-gpld: {message}")


# ------------------------------------------------------------------------------------------------ hyperparameter search


def sample_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Search space of DreamerGPLD for ``optimize``. What it leaves out, such as the model size, stays as in the file.

    :param trial: draws the values
    :param n_actions: size of a continuous action, not used
    :param n_envs: parallel environments, not used
    :param additional_args: about hindsight replay, not used
    :return: constructor arguments
    """
    return convert_params(
        {
            "learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
            "train_ratio_pow": trial.suggest_int("train_ratio_pow", 5, 9),
            "batch_length_pow": trial.suggest_int("batch_length_pow", 4, 6),
            "imagination_horizon": trial.suggest_int("imagination_horizon", 5, 30, step=5),
            "ent_coef": trial.suggest_float("ent_coef", 1e-5, 1e-2, log=True),
            # 0 is DreamerV3 without the penalty
            "posterior_penalty": trial.suggest_categorical("posterior_penalty", [0.0, 0.05, 0.1, 0.25, 0.5, 1.0]),
            "penalty_fraction": trial.suggest_float("penalty_fraction", 0.125, 1.0, step=0.125),
        }
    )


def convert_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Turn what a trial stores into constructor arguments.

    :param sampled_params: values by name; ``<name>_pow`` is an exponent of 2
    :return: constructor arguments
    """
    powers = {name.removesuffix("_pow"): 2**value for name, value in sampled_params.items() if name.endswith("_pow")}
    return {**powers, **{name: value for name, value in sampled_params.items() if not name.endswith("_pow")}}


def register() -> None:
    """Make DreamerGPLD known to rl_zoo3, whose scripts all look it up in these three tables.

    :raises SystemExit: rl_zoo3 is not installed
    """
    try:
        import rl_zoo3
        from rl_zoo3 import hyperparams_opt
    except ModuleNotFoundError as error:
        if error.name != "rl_zoo3":
            raise
        _fail('this needs rl_zoo3: pip install "sb3-dreamer-gpld[zoo]"')
    rl_zoo3.ALGOS[NAME] = DreamerGPLD
    hyperparams_opt.HYPERPARAMS_SAMPLER[NAME] = sample_params
    hyperparams_opt.HYPERPARAMS_CONVERTER[NAME] = convert_params


# --------------------------------------------------------------------------------------------------------- environments


def _has_display() -> bool:
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _set_up_rendering() -> bool:
    """Let MuJoCo render without a display. To be called before anything imports it.

    :return: whether it can render; the user's own choice of ``MUJOCO_GL`` is trusted
    """
    if "MUJOCO_GL" in os.environ:
        return os.environ["MUJOCO_GL"].lower() not in ("disable", "disabled", "off", "false", "0")
    if _has_display():
        return True
    # In a process of its own: a backend that does not work fails at import, and for good
    probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
    result = subprocess.run(probe, env={**os.environ, "MUJOCO_GL": "egl"}, capture_output=True, check=False)
    if result.returncode == 0:
        os.environ["MUJOCO_GL"] = "egl"
    return result.returncode == 0


def _import_packages(packages: list[str]) -> None:
    """Import the packages that ``--gym-packages`` names: they register environments."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            _fail(f"--gym-packages {package}: {error}")


def _register_dm_control() -> None:
    # Shimmy may be missing: other environments do not need it. GLFW warns where there is no display
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="glfw")
        import shimmy  # noqa: F401


def _prepare_environment(env_id: str, packages: list[str], rendering: bool) -> None:
    """Register the environment if need be.

    :param env_id: its id
    :param packages: packages that register environments
    :param rendering: whether pictures are needed
    :raises SystemExit: it does not exist, or cannot be rendered
    """
    _import_packages(packages)
    is_mujoco = env_id in gym.registry and "gymnasium.envs.mujoco" in str(gym.registry[env_id].entry_point)
    if is_mujoco or env_id.startswith(DM_CONTROL):
        if not _set_up_rendering() and rendering:
            _fail(
                f"{env_id} cannot be rendered here. Without a display MuJoCo needs EGL: install the system's library "
                "(libegl1 on Debian and Ubuntu), or set MUJOCO_GL to a backend that works"
            )
    if env_id not in gym.registry:
        _register_dm_control()
    if env_id not in gym.registry:
        if env_id.startswith(DM_CONTROL) and not _knows_dm_control():
            _fail('dm_control tasks need Shimmy and dm_control: pip install "sb3-dreamer-gpld[dmc]"')
        _fail(unknown("the environment", env_id, gym.registry) + " (those of other packages need --gym-packages)")


def _knows_dm_control() -> bool:
    return f"{DM_CONTROL}walker-walk-v0" in gym.registry


# -------------------------------------------------------------------------------------------------------------- options


def _parse(args: list[str], *names: str) -> argparse.Namespace:
    """Read some of rl_zoo3's options; the others are left to rl_zoo3. What is not given is None.

    :param args: the command's arguments
    :param names: further options to read, by their name in the result
    """
    from rl_zoo3.utils import StoreDict

    known: dict[str, tuple[list[str], dict[str, Any]]] = {
        "folder": (["-f", "--folder"], {}),
        "conf_file": (["-conf", "--conf-file"], {}),
        "hyperparams": (["-params", "--hyperparams"], dict(nargs="+", action=StoreDict)),
        "trained_agent": (["-i", "--trained-agent"], {}),
        "env_kwargs": (["--env-kwargs"], dict(nargs="+", action=StoreDict)),
        "exp_id": (["--exp-id"], dict(type=int, default=0)),
        "load_best": (["--load-best"], dict(action="store_true")),
        "load_checkpoint": (["--load-checkpoint"], dict(type=int)),
        "load_last_checkpoint": (["--load-last-checkpoint"], dict(action="store_true")),
        "no_render": (["--no-render"], dict(action="store_true")),
        "organization": (["-orga", "--organization"], {}),
    }
    parser = argparse.ArgumentParser(prog="dreamer-gpld", add_help=False)
    parser.add_argument("--algo")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--gym-packages", nargs="+", default=[])
    for name in names:
        flags, settings = known[name]
        parser.add_argument(*flags, dest=name, **settings)
    try:
        return parser.parse_known_args(args)[0]
    except Exception as error:  # whatever the values do: rl_zoo3 evaluates them
        _fail(f"{error}. -params and --env-kwargs take name:value, the value in Python: train_ratio:64 model_size:\"'1m'\"")


def _take(args: list[str], flag: str, **settings: Any) -> tuple[Any, list[str]]:
    """Take an option that rl_zoo3's script does not have out of the arguments.

    :return: its value, and the other arguments in their order
    """
    parser = argparse.ArgumentParser(prog="dreamer-gpld", add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value", **settings)
    found, rest = parser.parse_known_args(args)
    return found.value, rest


def _asks_for_help(args: list[str]) -> bool:
    return "-h" in args or "--help" in args


@contextlib.contextmanager
def _arguments(command: str, args: list[str]) -> Iterator[None]:
    """Let the scripts of rl_zoo3 find ``args`` where they look for them."""
    before = sys.argv
    sys.argv = [f"dreamer-gpld {command}", *args]
    try:
        yield
    finally:
        sys.argv = before


def _find_config(given: str | None) -> str:
    """File of hyperparameters: as given, or one that comes with the package, by its name.

    :raises SystemExit: there is no such file
    """
    if given is None:
        return str(CONFIGS / f"{NAME}.yml")
    shipped = CONFIGS / Path(given).with_suffix(".yml").name
    if Path(given).is_file():
        return given
    if Path(given).parent.name in ("", "zoo_configs") and Path(given).suffix in ("", ".yml") and shipped.is_file():
        return str(shipped)
    if not given.endswith((".yml", ".yaml", ".py")):
        return given  # rl_zoo3 also takes the name of a Python module
    _fail(unknown("the file", given, sorted(path.name for path in CONFIGS.glob("*.yml"))))


def _choose_entry(file: str, env_id: str) -> tuple[str, dict[str, Any]]:
    """The entry of a YAML file that rl_zoo3 will use for an environment.

    :raises SystemExit: the file cannot be read, or has none
    """
    from rl_zoo3.exp_manager import ExperimentManager

    entries, problems = read_yaml(file)
    if problems:
        _fail("\n".join(problems))
    is_atari = ExperimentManager.is_atari(env_id)
    name = next((name for name in (env_id, "atari" if is_atari else "default") if name in entries), None)
    if name is None:
        hint = ". For Atari games it can also be 'atari'" if is_atari else ""
        _fail(unknown(f"{file}: the entry", env_id, entries) + hint)
    if not isinstance(entries[name], dict):
        _fail(f"{file}, {name}: an entry is a list of 'key: value' lines, not {entries[name]!r}")
    return name, dict(entries[name])


# ------------------------------------------------------------------------------------------------------------- commands


def _train(args: list[str], command: str = "train") -> None:
    register()
    from rl_zoo3.train import train

    if not _asks_for_help(args):
        args = _prepare_training(args)
    with _arguments(command, args):
        train()


def _prepare_training(args: list[str]) -> list[str]:
    """Complete the arguments of a training run.

    :raises SystemExit: the environment, a file or a hyperparameter is wrong
    """
    options = _parse(args, "conf_file", "hyperparams", "trained_agent")
    _prepare_environment(options.env, options.gym_packages, rendering=False)
    if options.trained_agent and not (options.trained_agent.endswith(".zip") and Path(options.trained_agent).is_file()):
        _fail(f"-i {options.trained_agent}: this is not the .zip file of an agent")
    if (options.algo or NAME) != NAME:
        return args
    file = _find_config(options.conf_file)
    if file.endswith((".yml", ".yaml")):
        name, entry = _choose_entry(file, options.env)
        given = options.hyperparams or {}
        problems = [f"{file}, {name}: {problem}" for problem in check_entry({**entry, **given})]
        if problems:
            _fail("\n".join(problems) + ("\n(with -params: " + ", ".join(given) + ")" if given else ""))
    return [*args, "--algo", NAME, "-conf", file]


def _optimize(args: list[str]) -> None:
    register()
    import rl_zoo3.train as script

    if importlib.util.find_spec("pandas") is None:
        _fail("rl_zoo3 writes the report of a study with pandas: pip install pandas")
    before = script.ExperimentManager
    script.ExperimentManager = _tolerant(before)  # type: ignore[misc]
    try:
        _train([*args, "-optimize"], "optimize")
    finally:
        script.ExperimentManager = before  # type: ignore[misc]


def _tolerant(manager: type[ExperimentManager]) -> type[ExperimentManager]:
    """The ExperimentManager of rl_zoo3, but a trial that fails, for whatever reason, is pruned and the study goes on."""
    import optuna

    class TolerantManager(manager):  # type: ignore[misc, valid-type]
        last_error: Exception | None = None

        def objective(self, trial: optuna.Trial) -> float:
            try:
                return super().objective(trial)
            except optuna.TrialPruned:
                raise
            except Exception as error:
                self.last_error = error
                print(f"Trial {trial.number} failed and is pruned: {type(error).__name__}: {error}", file=sys.stderr)
                raise optuna.TrialPruned from error

        def hyperparameters_optimization(self) -> None:
            try:
                super().hyperparameters_optimization()
            except ValueError as error:
                if "No trials are completed" not in str(error):
                    raise
                _fail(f"every trial was pruned, so there is no best one. The last failure: {self.last_error or 'none'}")

    return TolerantManager


def _prepare_agent(args: list[str], rendering: bool) -> tuple[list[str], Path]:
    """Complete the arguments of a command that loads a trained agent.

    :param args: the command's arguments
    :param rendering: whether pictures are needed
    :return: the arguments, and the folder of the run
    :raises SystemExit: the environment or the agent does not exist
    """
    from huggingface_sb3 import EnvironmentName  # type: ignore[import-untyped]
    from rl_zoo3.utils import get_model_path

    options = _parse(args, "folder", "exp_id", "load_best", "load_checkpoint", "load_last_checkpoint", "env_kwargs")
    _prepare_environment(options.env, options.gym_packages, rendering)
    algo, folder = options.algo or NAME, options.folder or "logs"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _, _, run = get_model_path(
                options.exp_id,
                folder,
                algo,
                EnvironmentName(options.env),
                options.load_best,
                options.load_checkpoint,
                options.load_last_checkpoint,
            )
    except (AssertionError, ValueError) as error:
        _fail(f"{error}. Train an agent first, or name the folder of the runs with -f")
    args = [*args, "--algo", algo, "-f", folder]
    if rendering and options.env_kwargs is None and options.env.startswith(DM_CONTROL):
        # The tasks' own cameras follow the robot, unlike the free one that Shimmy takes
        camera = 2 if "/quadruped-" in options.env else 0
        args += ["--env-kwargs", f"render_kwargs:dict(camera_id={camera})"]
    return args, Path(run)


def _enjoy(args: list[str]) -> None:
    register()
    from rl_zoo3.enjoy import enjoy

    if not _asks_for_help(args):
        options = _parse(args, "no_render")
        if options.env.startswith(DM_CONTROL) and not options.no_render and not _has_display():
            _fail("there is no display to show the agent on: use --no-render, or record-video")
        args, _ = _prepare_agent(args, rendering=False)
    with _arguments("enjoy", args):
        enjoy()


def _record_video(args: list[str]) -> None:
    register()
    packages, args = _take(args, "--gym-packages", nargs="+", default=[])
    _import_packages(packages)
    if not _asks_for_help(args):
        if importlib.util.find_spec("moviepy") is None:
            _fail("Stable-Baselines3 writes videos with moviepy: pip install moviepy")
        args, _ = _prepare_agent(args, rendering=True)
    with _arguments("record-video", args):
        runpy.run_module("rl_zoo3.record_video", run_name="__main__")  # a script without a function


def _push_to_hub(args: list[str]) -> None:
    register()
    from sb3_dreamer_gpld.zoo import hub

    packages, args = _take(args, "--gym-packages", nargs="+", default=[])
    keep, args = _take(args, "--no-upload", action="store_true")
    _import_packages(packages)
    run = Path()
    if not _asks_for_help(args):
        options = _parse(args, "no_render", "organization")
        args, run = _prepare_agent(args, rendering=not options.no_render)
        if keep and not options.organization:
            args = [*args, "-orga", "local"]
    with _arguments("push-to-hub", args):
        hub.push(run, upload=not keep)


def _plot(args: list[str]) -> None:
    try:
        from sb3_dreamer_gpld.zoo import plot
    except ModuleNotFoundError as error:
        _fail(f'plots need {error.name}: pip install "sb3-dreamer-gpld[extra]"')
    with _arguments("plot", args):
        plot.main(NAME)


def _diagnose(args: list[str]) -> None:
    try:
        from sb3_dreamer_gpld.zoo import diagnose
    except ModuleNotFoundError as error:
        _fail(f'plots need {error.name}: pip install "sb3-dreamer-gpld[extra]"')
    options = diagnose.parse(args)
    wrapper = None
    _prepare_environment(options.env, options.gym_packages, rendering=False)
    if options.conf_file is not None:
        wrapper = _find_wrapper(options.conf_file, options.env)
    try:
        setup = diagnose.prepare(options, wrapper)
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))
    diagnose.run(options, setup)


def _find_wrapper(conf_file: str, env_id: str) -> Callable[[gym.Env], gym.Env] | None:
    """Wrappers of the environment in a hyperparameter file.

    :raises SystemExit: the file is wrong, or has wrappers around the vectorised environment too
    """
    register()
    from rl_zoo3.utils import get_wrapper_class

    name, entry = _choose_entry(_find_config(conf_file), env_id)
    for key in ("frame_stack", "normalize", "vec_env_wrapper"):
        if entry.get(key):
            _fail(f"{conf_file}, {name}: diagnose knows env_wrapper only, not {key}")
    return get_wrapper_class(entry)


def _check(args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dreamer-gpld check", description="Look for mistakes in hyperparameter files.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a YAML file, or the name of one of the package")
    parser.add_argument("--gym-packages", nargs="+", default=[], help="packages that register environments")
    options = parser.parse_args(args)
    register()
    _import_packages(options.gym_packages)
    _register_dm_control()
    status = 0
    for file in map(_find_config, options.files):
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
    "enjoy": Command(_enjoy, "show a trained agent, and its returns"),
    "record-video": Command(_record_video, "record a trained agent as mp4"),
    "optimize": Command(_optimize, "search hyperparameters with Optuna"),
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
        _fail(unknown("the command", args[0], COMMANDS))
    return COMMANDS[args[0]].run(args[1:]) or 0
