"""SB3's own tests: where they come from, which of them are run, and how. See ``test_sb3_suite.py``."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"  # ignored by git
NO_NETWORK = r"Temporary failure in name resolution|Name or service not known|Network is unreachable|NameResolutionError"
NO_NETWORK += r"|NewConnectionError|ConnectTimeoutError|ReadTimeoutError|No route to host|Connection refused"

# Per file and test the algorithms for which DreamerGPLD stands in, where the test is parametrised with several: SAC, TD3
# and DDPG mean Box actions, DQN Discrete ones; A2C and PPO are those that SB3's tests give every space. Not here: tests
# without an algorithm, and those of what one algorithm alone has (its losses, its parameters, the return it reaches).
SELECTION: dict[str, dict[str, str]] = {
    "test_save_load.py": {
        "test_save_load": "SAC DQN",
        "test_set_env": "SAC DQN",
        "test_exclude_include_saved_params": "SAC",
        "test_save_load_env_cnn": "TD3",
        "test_save_load_replay_buffer": "SAC",
        "test_warn_buffer": "SAC",
        "test_save_load_policy": "DDPG DQN",
        "test_no_resource_warning": "PPO",
        "test_cast_lr_schedule": "PPO",
    },
    "test_predict.py": {
        "test_auto_wrap": "SAC DQN",
        "test_predict": "A2C",
        "test_subclassed_space_env": "SAC",
        "test_mixing_gym_vecenv_api": "PPO",
    },
    "test_callbacks.py": {
        "test_callbacks": "SAC DQN A2C",
        "test_callbacks_can_cancel_runs": "SAC A2C",
        "test_eval_callback_logs_are_written_with_the_correct_timestep": "DQN",
        "test_eval_friendly_error": "A2C",
        "test_checkpoint_additional_info": "DQN",
        "test_eval_callback_chaining": "PPO",
    },
    "test_run.py": {
        "test_deterministic_pg": "TD3",
        "test_a2c": "A2C",
        "test_dqn": "DQN",
        "test_train_freq": "SAC",
        "test_train_freq_fail": "SAC",
        "test_offpolicy_multi_env": "SAC DQN",
    },
    "test_spaces.py": {
        "test_identity_spaces": "SAC DQN",
        "test_action_spaces": "A2C",
        "test_discrete_obs_space": "DQN",
        "test_float64_action_space": "SAC",
    },
    "test_dict_env.py": {
        "test_policy_hint": "PPO",
        "test_goal_env": "A2C",
        "test_consistency": "SAC DQN",
        "test_dict_spaces": "SAC",
        "test_multiprocessing": "SAC",
        "test_dict_vec_framestack": "SAC DQN",
        "test_vec_normalize": "SAC DQN",
    },
    "test_cnn.py": {
        "test_cnn": "SAC DQN",
        "test_vec_transpose_skip": "A2C",
        "test_channel_first_env": "A2C",
        "test_image_like_input": "SAC DQN",
    },
    "test_deterministic.py": {"test_deterministic_training_common": "SAC"},
    "test_logger.py": {
        "test_fps_no_div_zero": "DQN",
        "test_ep_buffers_stats_window_size": "DQN",
        "test_rollout_success_rate_onpolicy_algo": "PPO",
    },
    "test_vec_normalize.py": {"test_offpolicy_normalization": "SAC"},
    "test_vec_monitor.py": {"test_vec_monitor_ppo": "PPO"},
    "test_tensorboard.py": {"test_tensorboard": "SAC"},
    "test_utils.py": {
        "test_env_auto_monitor_wrap": "A2C",
        "test_evaluate_policy": "A2C",
        "test_evaluate_vector_env": "A2C",
        "test_evaluate_policy_monitors": "A2C",
        "test_vec_noise": "SAC",
    },
    "test_custom_policy.py": {"test_custom_offpolicy": "SAC", "test_custom_optimizer": "SAC"},
}
# Those that take long; they run in the part "long", all others in the part "short".
LONG = {
    "test_callbacks.py::test_callbacks",
    "test_callbacks.py::test_eval_callback_chaining",
    "test_spaces.py::test_identity_spaces",
    "test_dict_env.py::test_multiprocessing",
    "test_dict_env.py::test_dict_vec_framestack",
    "test_dict_env.py::test_vec_normalize",
    "test_logger.py::test_rollout_success_rate_onpolicy_algo",
    "test_utils.py::test_evaluate_policy",
    "test_utils.py::test_evaluate_policy_monitors",
}


def selected(part: str) -> dict[str, list[str]]:
    """Tests of one part with their algorithms.

    :param part: "short", "long", or a file of SELECTION
    :return: names of the algorithms by "file::test"
    """
    names = {f"{file}::{test}": roles.split() for file, tests in SELECTION.items() for test, roles in tests.items()}
    if part in SELECTION:
        return {name: roles for name, roles in names.items() if name.startswith(f"{part}::")}
    return {name: roles for name, roles in names.items() if (name in LONG) == (part == "long")}


class NoNetwork(Exception):
    """The tests are not in the cache and cannot be fetched."""


def fetch() -> Path:
    """Folder of the source release of the installed SB3, which holds its tests; from the cache if it is there.

    :raises NoNetwork: there is no connection
    :raises RuntimeError: pip failed for another reason
    """
    version = importlib.metadata.version("stable-baselines3")
    name = f"stable_baselines3-{version}"
    folder = CACHE / name
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        pip = subprocess.run(
            [*command, "--dest", temporary, f"stable-baselines3=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if pip.returncode:
            output = pip.stdout + pip.stderr
            raise (NoNetwork if re.search(NO_NETWORK, output) else RuntimeError)(
                f"pip could not fetch {name}:\n{output[-2000:]}"
            )
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.name.startswith(f"{name}/tests/") or m.name == f"{name}/pyproject.toml"]
            tar.extractall(temporary, members, filter="data")
        os.replace(Path(temporary) / name, folder)
    return folder


class Result:
    """Outcome of one run.

    :param report: pytest's JUnit report
    """

    def __init__(self, report: Path) -> None:
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            name, module = str(case.get("name")), case.get("classname", "").rpartition(".")[2]
            if module:  # a module that cannot be imported has none
                name = f"{module}.py::{name}"
            problem = case.find("failure") if case.find("failure") is not None else case.find("error")
            if problem is not None:
                self.failed[name] = (problem.text or problem.get("message") or "").strip()
            elif case.find("skipped") is None:
                self.passed.append(name)

    def has_run(self, name: str) -> bool:
        """Whether a test passed with one set of parameters at least."""
        return any(case.partition("[")[0] == name for case in self.passed)


def run(part: str, folder: Path, timeout: float) -> Result:
    """Run one part in a process of its own.

    :param part: as in :func:`selected`
    :param folder: for the report and the working directory
    :param timeout: seconds
    :raises RuntimeError: no report was written; with the end of the output
    :raises subprocess.TimeoutExpired: it took longer
    """
    source, report = fetch(), folder / "report.xml"
    files = sorted({name.partition("::")[0] for name in selected(part)})
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "sb3_standins", "-p", "no:cacheprovider", "--durations=15"]
    command += [f"--rootdir={source}", f"--config-file={source / 'pyproject.toml'}", f"--junitxml={report}", "--tb=short"]
    output = subprocess.run(
        [*command, *(str(source / "tests" / file) for file in files)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "SB3_SUITE_PART": part, "SDL_VIDEODRIVER": "dummy", "MPLBACKEND": "Agg"},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
    print(output.stdout[-6000:])
    if not report.exists():
        raise RuntimeError(f"SB3's tests did not run:\n{(output.stdout + output.stderr)[-4000:]}")
    return Result(report)
