"""The benchmarks of docs/performance.md, at a size at which they only show that they run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import learn_time, planning, update_time
from benchmarks.results import read_csv, write_csv

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


def test_time_of_the_training_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase was there."""
    file = tmp_path / "results.json"
    options = ["--size", "debug", "--envs", "2", "--steps", "8", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["learn_time", *options])
    learn_time.main()
    (result,) = json.loads(file.read_text())
    assert result["updates"] == 8 * 512 // (16 * 64)
    assert {"update", "acting", "environment", "replay: add", "replay: sample"} <= set(result["shares"])
    assert all(0.0 < share < 1.0 for share in result["shares"].values())


def test_the_page_of_planning_has_what_was_found() -> None:
    page = planning.RESULTS.parents[1] / "docs" / "planning.md"
    for file in (planning.RESULTS, planning.STAGES):
        assert "\n".join(planning.table([file])) in page.read_text(encoding="utf-8")


def test_planning_has_a_column_for_each_kind_of_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns that are there are not found again; a column has the most probable actions first, and what is missing."""
    file, asked = tmp_path / "results.csv", []

    def returns(policy: str, task: str, way: str, deterministic: bool, episodes: int) -> dict[str, float]:
        asked.append((policy, way, deterministic))
        return {"return": float(len(asked)), "std": 0.4}

    monkeypatch.setattr(planning, "returns", returns)
    monkeypatch.setattr(planning, "policy_of", lambda file: file)
    for model, way, actions in [
        ("late, b", "policy", ["sampled", "most probable"]),
        ("late, a", "small", ["sampled"]),
        ("early, a", "policy", ["most probable"]),
        ("late, b", "policy", ["most probable"]),
    ]:
        planning.run(Path(model), "x", model, [way], actions, 3, file)
    late, early = Path("late, b"), Path("early, a")
    expected = [(late, "policy", False), (late, "policy", True), (Path("late, a"), "small", False), (early, "policy", True)]
    assert asked == expected
    assert list(planning.table([file])) == [
        "| task | model | policy, a | small, a | policy, b |",
        "| --- | --- | --- | --- | --- |",
        "| x | late |  | – / 3 ± 0 | 2 ± 0 / 1 ± 0 |",
        "| x | early | 4 ± 0 / – |  |  |",
    ]
    write_csv(file, [row for row in read_csv(file) if row["actions"] == "sampled"], 4)
    assert list(planning.table([file]))[2:] == ["| x | late | 3 ± 0 | 1 ± 0 |"]
