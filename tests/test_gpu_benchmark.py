"""The benchmark of a GPU machine, tried on the processor: what breaks in one part leaves the others."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch as th

from benchmarks import gpu

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--sizes", "debug", "--to", str(tmp_path)]
    done = subprocess.run([*command, "--only", "packages", "loop"], cwd=ROOT, capture_output=True, text=True, check=False)
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed == json.loads((tmp_path / "results.json").read_text())
    packages, *loops = printed
    assert packages["part"] == "packages" and "torch" in packages["versions"] and "torch" not in packages["missing"]
    assert [each["part"] for each in loops] == ["loop debug 1 host", "loop debug 1 device", "loop debug 16 host"]
    assert all(each["steps_per_s"] > 1 and each["updates_per_s"] > 0 for each in loops)
    assert not (tmp_path / "part.json").exists()


def test_a_part_that_breaks_or_hangs_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [
        gpu.Part("loop", {"size": "no such size", "environments": 1, "storage": "host"}, 60.0),
        gpu.Part("update", {"size": "debug", "penalty": "off", "modes": ["uncompiled"]}, 0.5),
        gpu.Part("walk", {"size": "debug"}, 60.0, reserve=1e6),
        gpu.Part("packages", {}, 60.0),
    ]
    assert gpu.run_all(parts, "cpu", tmp_path, 5) == 3
    broken, hanging, late, packages = json.loads((tmp_path / "results.json").read_text())
    assert broken["status"] == "failed" and "no such size" in broken["output"]
    assert packages["compilers"].keys() == {"gcc", "triton"}
    assert hanging["status"] == "stopped" and packages["status"] == "ok" and late["status"] == "no time left"


def test_a_part_that_is_stopped_takes_its_processes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they had printed by then is kept."""
    held = tmp_path / "held"
    script = f"import fcntl, time; file = open({str(held)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); " + (
        "print('began', flush=True); time.sleep(999)"
    )
    popen = subprocess.Popen

    def started(command: list[str], **kwargs: object) -> subprocess.Popen:
        inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}])"
        return popen([sys.executable, "-c", inner], **kwargs)

    monkeypatch.setattr(gpu.subprocess, "Popen", started)
    found = gpu.run_part(gpu.Part("tests", {"chosen": "x"}, 10.0), "cpu", tmp_path, 10.0)
    assert found["status"] == "stopped" and found["output"] == "began\n" and found["s"] < 100
    with held.open() as file:  # which one that lived on would hold
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.long
def test_walking_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("dm_control")
    pytest.importorskip("shimmy")
    first = gpu.walk("cpu", tmp_path, gpu.LAST_SECONDS + 10, "debug")
    second = gpu.walk("cpu", tmp_path, gpu.LAST_SECONDS + 10, "debug")
    assert 0 < first["frames"] < second["frames"]


def test_the_order() -> None:
    parts = list(gpu.plan(["1m", "12m"]))
    names = list(dict.fromkeys(part.name for part in parts))
    assert names == ["packages", "tests", "parity", "update", "loop", "walk"] == list(gpu.PARTS)
    updates = [part.options for part in parts if part.name == "update"]
    assert len(updates) == 2 * 2 * 3 and [each["penalty"] for each in updates[:4]] == ["hutchinson"] * 4
    ways = {mode for each in updates for mode in each["modes"]}
    assert ways == {"uncompiled", "uncompiled, recorded", "compiled", "compiled, recorded"}


def test_nothing_is_tried_without_what_all_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run needs a simulator, too."""
    names = ["packages", "loop", "walk"]
    for missing, made in ((["gymnasium"], names[:1]), (["mujoco"], names[:2]), ([], names)):
        begun: list[str] = []

        def run_part(part: gpu.Part, *args: object, missing: list[str] = missing, begun: list[str] = begun) -> dict:
            begun.append(part.name)
            return {"part": part.title, "status": "ok", **({"missing": missing} if part.name == "packages" else {})}

        monkeypatch.setattr(gpu, "run_part", run_part)
        parts = [part for part in gpu.plan(["debug"]) if part.name in names]
        status = gpu.run_all(parts, "cpu", tmp_path, 30)
        assert list(dict.fromkeys(begun)) == made and status == bool(missing)


def test_parity_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled; what was found before a part breaks is kept."""
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", th.backends.cudnn.allow_tf32)  # which it changes
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = gpu.parity("cpu", tmp_path, 60.0, ["cont0", "disc0"], ["uncompiled"])
    assert list(found) == ["cont0", "disc0"]
    assert all(each["uncompiled"]["loss"] < 1e-5 and each["uncompiled"]["gradient"] < 1e-3 for each in found.values())
    assert json.loads((tmp_path / "part.json").read_text()) == found
    found = gpu.update("cpu", tmp_path, 60.0, "debug", "off", ["uncompiled", "no such way"])
    assert 0 < found["uncompiled"]["ms"] and not found["uncompiled"]["recorded"]

    def broken(model: object) -> dict:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(gpu, "launched", broken)
    with pytest.raises(RuntimeError, match="no profiler"):
        gpu.update("cpu", tmp_path, 60.0, "debug", "off", ["uncompiled"])
    assert json.loads((tmp_path / "part.json").read_text())["uncompiled"]["ms"] > 0
