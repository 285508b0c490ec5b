"""Environments of the command line: registering them, and rendering without a display."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import gymnasium as gym

from sb3_dreamer_gpld.checks import unknown_name
from sb3_dreamer_gpld.envs import DM_CONTROL, suite_of
from sb3_dreamer_gpld.zoo.arguments import fail

WITH_PYGAME = tuple(f"gymnasium.envs.{group}" for group in ("classic_control", "box2d", "toy_text"))


def has_display() -> bool:
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def can_be_shown(env_id: str) -> bool:
    """Whether an environment can be shown: not in a window of its own, where there is no display."""
    known = gym.registry.get(env_id)
    made_by = str(known.entry_point) if known is not None else ""
    if has_display():
        return True
    if suite_of(env_id) is not None or made_by.startswith("gymnasium.envs.mujoco"):
        return False
    return "SDL_VIDEODRIVER" in os.environ or not made_by.startswith(WITH_PYGAME)


def set_up_rendering() -> bool:
    """Let MuJoCo render without a display. To be called before anything imports it.

    :return: whether it can render; the user's own choice of ``MUJOCO_GL`` is trusted
    """
    if "MUJOCO_GL" in os.environ:
        return os.environ["MUJOCO_GL"].lower() not in ("disable", "disabled", "off", "false", "0")
    if has_display():
        return True
    # In a process of its own: a backend that does not work fails at import, and for good
    probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
    result = subprocess.run(probe, env={**os.environ, "MUJOCO_GL": "egl"}, capture_output=True, check=False)
    if result.returncode == 0:
        os.environ["MUJOCO_GL"] = "egl"
    return result.returncode == 0


def import_packages(packages: list[str]) -> None:
    """Import the packages that ``--gym-packages`` names: they register environments."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            fail(f"--gym-packages {package}: {error}")


def prepare_environment(env_id: str, packages: list[str], rendering: bool) -> None:
    """Register the environment if need be.

    :param env_id: its id
    :param packages: packages that register environments
    :param rendering: whether pictures are needed
    :raises SystemExit: it does not exist, or cannot be rendered
    """
    import_packages(packages)
    suite = suite_of(env_id)
    is_mujoco = env_id in gym.registry and "gymnasium.envs.mujoco" in str(gym.registry[env_id].entry_point)
    if is_mujoco or suite is not None:
        if not set_up_rendering() and rendering:
            fail(
                f"{env_id} cannot be rendered here. Without a display MuJoCo needs EGL: install the system's library "
                "(libegl1 on Debian and Ubuntu), or set MUJOCO_GL to a backend that works"
            )
    if env_id not in gym.registry:
        try:
            (suite or DM_CONTROL).register()
        except ImportError as error:  # other environments do not need them
            if suite is not None:
                fail(str(error))
    if env_id not in gym.registry:
        fail(
            unknown_name("the environment", env_id, gym.registry, brief=True)
            + " (those of other packages need --gym-packages)"
        )
