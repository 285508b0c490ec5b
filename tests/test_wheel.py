"""The wheel with its extras in a clean environment, as somebody who has never seen this repository installs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th

ROOT = Path(__file__).parents[1]
TINY = "model_size:'debug' batch_size:4 batch_length:8 train_ratio:16 learning_starts:64".split()


@pytest.mark.long
def test_commands_of_the_wheel_in_a_clean_environment(tmp_path: Path) -> None:
    """Newest versions of everything that the wheel asks for, but PyTorch's, of which there are several builds."""

    def run(*command: str | Path) -> str:
        clean = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT", "VIRTUAL_ENV")
        }
        clean |= {"SDL_VIDEODRIVER": "dummy", "MPLBACKEND": "agg"}
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 1_000_000
    run(sys.executable, "-m", "venv", tmp_path / "clean")
    scripts = tmp_path / "clean" / ("Scripts" if os.name == "nt" else "bin")
    torch = f"torch=={th.__version__.split('+')[0]}"
    run(scripts / "python", "-m", "pip", "install", "-q", f"{wheel}[dmc,zoo,extra]", torch)

    dreamer = scripts / "dreamer-gpld"
    for env in ("CartPole-v1", "Pendulum-v1"):
        evaluations = ("--eval-freq", "75", "--eval-episodes", "1")
        run(dreamer, "train", "--env", env, "-n", "150", *evaluations, "-params", *TINY)
        assert "Mean reward" in run(dreamer, "enjoy", "--env", env, "--no-render", "-n", "450")
        run(dreamer, "record-video", "--env", env, "-n", "20")
        assert list((tmp_path / "logs" / "dreamer_gpld" / f"{env}_1").glob("videos/*.mp4"))
        assert "files are in" in run(dreamer, "push-to-hub", "--env", env, "--no-upload", "-n", "20")
    run(dreamer, "plot")
    assert list(tmp_path.rglob("*.png"))
    code = "import sb3_dreamer_gpld; print(sb3_dreamer_gpld.__file__, sb3_dreamer_gpld.preset('cpu')['model_size'])"
    assert str(tmp_path) in run(scripts / "python", "-c", code)
