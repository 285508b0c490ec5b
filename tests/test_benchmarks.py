"""The benchmarks of docs/performance.md, at a size at which they only show that they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import update_time

DEBUG = ["--size", "debug", "--batch", "2", "--length", "8", "--horizon", "2", "--repeats", "1"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--image", "16", "--reconstruction", "redundancy"],
        ["--actor-gradient", "dynamics", "--starts", "4", "--penalty", "0"],
    ],
)
def test_time_of_an_update(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["update_time", *DEBUG, *options, "--json", str(file)])
    update_time.main()
    phases = json.loads(file.read_text())["phases_ms"]
    assert phases["total"] > 0 and all(ms >= 0 for name, ms in phases.items() if name != "backward and rest")
    assert {"sample", "refresh latents", "observe", "random numbers", "optimiser", "backward and rest"} <= set(phases)
