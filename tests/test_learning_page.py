"""The tables of docs/learning.md and of README are those of the committed results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("dm_control")
pytest.importorskip("rl_zoo3")

from benchmarks.learning import confirmation, draw, ladder, run  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
PUBLISHED = yaml.safe_load(confirmation.PUBLISHED.read_text(encoding="utf-8"))


def confirmed() -> list[str]:
    return list(confirmation.table(confirmation.ARM, confirmation.SEEDS, PUBLISHED))


def test_the_page_opens_with_the_confirmation() -> None:
    assert "\n".join(confirmed()) in PAGE


def test_readme_has_the_confirmation() -> None:
    """Its table has some columns of the page's."""
    names = "most probable actions", "SAC, training", "DreamerV3 by its authors", "DreamerV3 by TD-MPC2's", "SAC by TD-MPC2's"
    columns = list(map(confirmation.COLUMNS.index, names))
    rows = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            task, *cells = line.strip("| ").split(" | ")
            rows[task.partition(",")[0]] = cells
    *tasks, means = ([cell.strip() for cell in line.strip("|").split("|")] for line in confirmed()[2:])
    for cells in tasks:
        assert rows[cells[0]] == [cells[column] for column in columns]
    deterministic, sampled, training = means[2:5]
    first, *others = (means[column] for column in columns)
    assert first == deterministic and rows[means[0]] == [f"{first}, sampled {sampled}, training {training}", *others]


def test_the_higher_of_two_published_means() -> None:
    both = [
        max(confirmation.published_dreamer(PUBLISHED, task)[0], PUBLISHED["dreamer_by_others"][task]) for task in ladder.TASKS
    ]
    assert f"{np.mean(both):.0f} with the higher of the two on each task" in PAGE.replace("\n  ", " ")


@pytest.mark.parametrize("name", draw.PROTOCOLS)
def test_tables_of_a_protocol(name: str) -> None:
    protocol = draw.PROTOCOLS[name]
    returns, *difference = "\n".join(draw.return_table(name, protocol)).split("\n\n")
    assert returns in PAGE
    for text in difference:  # "λ₀ = 0.5 minus λ₀ = 0: 0, 95 % interval [-13, 13]."
        numbers = text.rpartition("[")[2].rstrip("].").replace("-", "−")
        assert f"[{numbers}]" in PAGE


@pytest.mark.parametrize(
    ("name", "shown", "told"),
    [
        ("p1", True, "Within the seeds' bare range are {} of {}"),
        ("p2", True, "Within the seeds' bare range are {} of {}"),
        ("p4-walker", False, "{} of the {} values"),
    ],
)
def test_losses_beside_those_of_the_release(name: str, shown: bool, told: str) -> None:
    """The table is in the page, or only its summary; the numbers of values within the range of the seeds are told in both."""
    table, within = "\n".join(draw.loss_table(name, draw.PROTOCOLS[name])).split("\n\n")
    assert (table in PAGE) == shown
    some, every = within.rpartition(": ")[2].rstrip(".").split(" of ")
    assert told.format(some, every) in PAGE.replace("\n", " ")


def test_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One command draws a protocol, and prints its tables and how fast the values of imagined states rise."""
    monkeypatch.setattr("sys.argv", ["draw", "p3-walker", "--out", str(tmp_path)])
    draw.main()
    assert (tmp_path / "learning_p3-walker.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| walker-walk | seeds |" in printed and "| 0.1 | DreamerV3 + GPLD | 3,000 | 2.8 to 3.1 |" in printed


def test_a_stopped_run_is_not_begun_anew_over_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    results = {"p1_gpld_0_returns.csv": 10_000, "p1_gpld_1_returns.csv": 30_000}
    for name, frames in results.items():
        lines = "".join(f"{frames},40.0,9\n" for _ in range(run.EPISODES_PER_SAVE + 1))
        (tmp_path / name).write_text(f"frames,episode_return,seconds\n{lines}")
    monkeypatch.setattr("sys.argv", ["run", "p1", "--arms", "gpld", "--seeds", "0", "1", "--runs", str(tmp_path / "runs")])
    assert run.main() == 1
    printed = capsys.readouterr().out
    assert "p1_gpld_0_returns.csv would go on, and beginning it anew would overwrite its results. Allowed:" in printed
    assert "p1 gpld 1: is finished" in printed
    assert {path.name: int(path.read_text().split()[1].split(",")[0]) for path in tmp_path.glob("*.csv")} == results


def test_every_result_is_in_the_confirmation() -> None:
    """No seed of the arm that is confirmed is left out, but those that settings were chosen by."""
    for task in ladder.TASKS:
        shown = next(line for line in confirmed() if line.startswith(f"| {task} |")).split(" | ")[1]
        finished = [seed for seed in ladder.results(confirmation.ARM, task, None, confirmation.FRAMES) if seed >= 3]
        assert shown == ", ".join(map(str, finished)), task
