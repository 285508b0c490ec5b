"""Set-up that all tests share: threads, headless rendering, and what is skipped on a machine without a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator

import gymnasium as gym
import metaworld_standin
import pytest
import torch as th


def _renders_with(backend: str) -> bool:
    """Try MuJoCo's rendering in a process of its own: a wrong backend fails at import, and for good."""
    probe = """if True:
        try:
            from dm_control import mujoco
        except ImportError:  # as where Meta-World is installed
            import mujoco
            mujoco.GLContext(8, 8).make_current()
        else:
            mujoco.Physics.from_xml_string('<mujoco/>').render(8, 8)
    """
    env = {**os.environ, "MUJOCO_GL": backend}
    return subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, check=False).returncode == 0


# Decided before anything imports MuJoCo, and once: the worker processes of pytest-xdist inherit it.
if "MUJOCO_GL" not in os.environ:
    os.environ["MUJOCO_GL"] = "egl" if _renders_with("egl") else "disabled"

# The workers share the cores. OMP_NUM_THREADS is kept where it asks for fewer.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
th.set_num_threads(min(th.get_num_threads(), max(1, (os.cpu_count() or 1) // _workers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``cuda`` where there is no CUDA device."""
    if th.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The order of a sum depends on the number of threads."""
    threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(threads)


@pytest.fixture(scope="session")
def rendering() -> None:
    """Skip the test where dm_control tasks cannot be rendered."""
    pytest.importorskip("dm_control")
    if os.environ["MUJOCO_GL"] == "disabled":
        pytest.skip("no OpenGL to render with: install libegl1, or set MUJOCO_GL")


@pytest.fixture
def no_metaworld(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if metaworld were not installed; what a test registers of it is forgotten."""
    for name in [name for name in gym.registry if name.startswith("metaworld/")]:
        monkeypatch.delitem(gym.registry, name)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    yield
    for name in [name for name in gym.registry if name.startswith("metaworld/")]:
        del gym.registry[name]


@pytest.fixture
def metaworld(no_metaworld: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for Meta-World."""
    monkeypatch.setitem(sys.modules, "metaworld", metaworld_standin)
    monkeypatch.setitem(sys.modules, "mujoco", metaworld_standin.MUJOCO)
