"""Rendering without a display."""

import os
import sys

import gymnasium as gym
import pytest

from sb3_dreamer_gpld.zoo import environments


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems always have a display")
def test_rendering_is_set_up_without_a_display_only(monkeypatch: pytest.MonkeyPatch) -> None:
    works = [True]
    result = type("Result", (), {"returncode": property(lambda self: int(not works[0]))})()
    monkeypatch.setattr(environments.subprocess, "run", lambda *args, **kwargs: result)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert environments.set_up_rendering() and os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("DISPLAY", ":0")
    assert environments.set_up_rendering() and "MUJOCO_GL" not in os.environ
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    works[0] = False
    assert not environments.set_up_rendering() and "MUJOCO_GL" not in os.environ
    works[0] = True
    assert environments.set_up_rendering() and os.environ["MUJOCO_GL"] == "egl"


@pytest.mark.usefixtures("metaworld")
def test_metaworld_is_registered_and_can_be_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    works = [True]
    monkeypatch.setattr(environments, "set_up_rendering", lambda: works[0])
    environments.prepare_environment("metaworld/reach-v3", [], rendering=True)
    assert "metaworld/reach-v3" in gym.registry
    works[0] = False
    environments.prepare_environment("metaworld/reach-v3", [], rendering=False)
    with pytest.raises(SystemExit, match="metaworld/reach-v3 cannot be rendered here"):
        environments.prepare_environment("metaworld/reach-v3", [], rendering=True)
    with pytest.raises(SystemExit, match="'metaworld/raech-v3' does not exist. Did you mean 'metaworld/reach-v3'?"):
        environments.prepare_environment("metaworld/raech-v3", [], rendering=False)
