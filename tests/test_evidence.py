"""The evidence about the penalty: statistics against other libraries, and the page against the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import evidence
from benchmarks.evidence import ARMS, FRAMES, NONE, PAGE, SEEDS, TASKS
from benchmarks.learning import ladder
from benchmarks.learning.ladder import Job
from benchmarks.results import write_csv
from sb3_dreamer_gpld.zoo.plot import Style, interquartile_mean

RNG = np.random.default_rng(0)


def test_the_page_is_that_of_the_results() -> None:
    """``make evidence`` would change nothing."""
    page = PAGE.read_text(encoding="utf-8")
    assert evidence.filled(page, evidence.complete()) == page
    assert page.count("<!-- table: ") == len(evidence.TABLES)


def test_the_arms_differ_in_the_penalty_alone() -> None:
    arms = ladder.read_arms()
    preset = arms["rw10-rate16-explore-normalize"].settings
    lambdas = set()
    for name in ARMS:
        own = dict(arms[name].settings)
        lambdas.add((own.pop("posterior_penalty"), own.pop("prior_penalty", 0.0)))
        assert own == {key: value for key, value in preset.items() if key not in ("posterior_penalty", "prior_penalty")}
    assert lambdas == {(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)}
    assert arms[NONE].settings["posterior_penalty"] == 0.0
    for name in set(ARMS) - {NONE}:
        for weight, other in zip(evidence.WEIGHTS, evidence.other_weights(name), strict=True):
            penalties = {key: value for key, value in arms[name].settings.items() if key.endswith("_penalty") and value}
            assert penalties and arms[other].settings == {**arms[name].settings, **dict.fromkeys(penalties, float(weight))}


def test_statistics() -> None:
    scores = RNG.random((4, 6, 1))
    assert interquartile_mean(scores)[0] == pytest.approx(stats.trim_mean(scores.ravel(), 0.25))
    pairs = np.stack([scores[..., 0], np.round(RNG.random((4, 6)), 1)], -1)
    pairs[0, 0] = pairs[1, 0] = 0.5  # equal ones count half
    expected = np.mean([stats.mannwhitneyu(*pairs[:, task].T).statistic / 16 for task in range(6)])
    assert evidence.improvement(pairs)[0] == pytest.approx(expected)
    low, high = evidence.improvement_interval(pairs)
    assert 0.0 <= low < expected < high <= 1.0
    assert evidence.improvement_interval(pairs[:1], Style(size=0.95, reps=10)).tolist() == pytest.approx(
        [evidence.improvement(pairs[:1])[0]] * 2
    )
    x, y = RNG.random((8, 3)), RNG.random((8, 3))
    expected = np.mean([stats.spearmanr(x[:, task], y[:, task]).statistic for task in range(3)])
    assert evidence.rank_correlation(x, y) == pytest.approx(expected)
    assert evidence.ratio(np.array([2.0, 8.0, np.nan]), np.array([1.0, 2.0, 1.0])) == pytest.approx(np.sqrt(8.0))


def write_run(job: Job, returns: np.ndarray, measures: float | None) -> None:
    frames = np.linspace(FRAMES / len(returns), FRAMES, len(returns)).astype(int)
    write_csv(job.file, [{"frames": int(f), "episode_return": float(r)} for f, r in zip(frames, returns, strict=True)])
    write_csv(job.evaluations, [{"frames": FRAMES, "deterministic": 0.0}])
    if measures is not None:
        write_csv(evidence.measures_file(job), [dict.fromkeys(evidence.MEASURES, measures)])


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two seeds of two tasks: both penalties return 100 more, and halve what is measured; one checkpoint was lost."""
    monkeypatch.setattr(ladder, "RESULTS", tmp_path)
    for task, base in (("walker-walk", 200.0), ("reacher-hard", 400.0)):
        for seed in SEEDS[:2]:
            for number, arm in enumerate(ARMS):
                (tmp_path / arm).mkdir(exist_ok=True)
                returns = np.full(40, base + seed)
                returns[-4:] += 100.0 * (arm == "penalty-both")
                lost = (task, seed, arm) == ("walker-walk", SEEDS[1], NONE)
                write_run(Job(arm, task, seed, FRAMES), returns, None if lost else (0.5 if number == 3 else 1.0))
    return tmp_path


def test_tables(results: Path) -> None:
    found = evidence.complete()
    assert found == (("walker-walk", "reacher-hard"), SEEDS[:2])
    returns = [line for line in evidence.returns_table(found) if "| both |" in line]
    assert "| all | area under the curve | both | 0.331 [" in returns[0] and "| 0.010 [0.010, 0.010] |" in returns[0]
    assert "| all | last tenth | both | 0.420 [" in returns[1] and "| 0.100 [0.100, 0.100] | 1.00 [1.00, 1.00] |" in returns[1]
    assert "| hard locomotion | last tenth | both | 0.321 [" in returns[3] and "| others | last tenth | both |" in returns[5]
    tasks = list(evidence.tasks_table(found))
    assert (
        tasks[0] == "| penalty on | walker-walk | reacher-hard |" and tasks[-1] == "| both | 320 (320, 321) | 520 (520, 521) |"
    )
    measures = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in evidence.measures_table(found)}
    assert measures["transition ratio"][:3] == ["1.00", "1.00", "0.50"]


def test_an_unfinished_seed_waits(results: Path) -> None:
    Job("penalty-prior", "reacher-hard", SEEDS[0], FRAMES).evaluations.unlink()
    assert evidence.complete() == (("walker-walk",), SEEDS[:2])
    for task in TASKS:
        Job("penalty-prior", task, SEEDS[0], FRAMES).evaluations.unlink(missing_ok=True)
    assert evidence.complete() == ((), ())


def test_the_figure(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "FIGURE", tmp_path / "evidence.png")
    evidence.draw(evidence.complete())
    assert (tmp_path / "evidence.png").stat().st_size > 10_000


def test_blocks_in_their_order(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished and measured is left alone, a block that was not measured is gone through again."""
    made: list[Any] = []
    measured: list[Any] = []
    monkeypatch.setattr(evidence, "run_all", lambda jobs, workers, runs: made.append((jobs[0].task, jobs[0].seed)) or 0)
    monkeypatch.setattr(evidence, "measure", lambda jobs, runs: measured.append(len(jobs)))
    assert evidence.run(2, tmp_path, most=6) == 0
    first = [(task, SEEDS[0]) for task in TASKS if task not in ("walker-walk", "reacher-hard")]
    assert made == [*first, ("walker-walk", SEEDS[1]), ("cheetah-run", SEEDS[1])] and measured == [4] * 6
    monkeypatch.setattr(evidence, "run_all", lambda *args: 2)
    assert evidence.run(2, tmp_path, most=1) == 2 and len(measured) == 6


def test_other_weights_of_the_better_penalty(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin when all arms are finished, and are compared over what they have finished."""
    assert evidence.better() is None and list(evidence.weights_table(evidence.complete())) == [evidence.NO_BLOCK]
    monkeypatch.setattr(evidence, "TASKS", ("walker-walk", "reacher-hard"))
    monkeypatch.setattr(evidence, "SEEDS", SEEDS[:2])
    assert evidence.better() == "penalty-both"
    assert list(evidence.weights_table(evidence.complete())) == [evidence.NO_BLOCK]
    made: list[Any] = []
    monkeypatch.setattr(evidence, "run_all", lambda jobs, workers, runs: made.append([job.arm for job in jobs]) or 0)
    monkeypatch.setattr(evidence, "measure", lambda jobs, runs: None)
    evidence.run(2, tmp_path, most=9)
    assert made == [list(ARMS), *[["penalty-both-0.05", "penalty-both-5"]] * 4]  # the first has a lost measure
    for arm, base in (("penalty-both-0.05", 400.0), ("penalty-both-5", 600.0)):
        (tmp_path / arm).mkdir()
        for seed in SEEDS[:2]:
            write_run(Job(arm, "reacher-hard", seed, FRAMES), np.full(40, base + seed), 0.25 if base < 500.0 else 0.75)
    lines = list(evidence.weights_table(evidence.complete()))
    assert [line.split(" | ")[0] for line in lines[2:8]] == ["| 0.05", "| 0.5", "| 5"] * 2
    assert lines[8] == "" and lines[11] == "| Jacobian norm, posterior | 0.25 | 0.50 | 0.75 |"
    assert "| 0.420 [" in lines[2] and "| 0.000 [0.000, 0.000] | 0.50 [" in lines[2]
    assert "| 0.430 [" in lines[3] and "| 0.621 [" in lines[4] and "| 0.200 [0.200, 0.200] | 1.00 [1.00, 1.00] |" in lines[4]


def test_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of a block, on the episodes of all; those with other weights, on the same; a lost checkpoint is told."""
    from gymnasium import spaces
    from test_dreamer_gpld import RandomSpaces, tiny

    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    made: list[Any] = []

    def env_of(*args: Any) -> RandomSpaces:
        made.append(args)
        return RandomSpaces(box, box)

    monkeypatch.setattr(ladder, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "make_env", env_of)
    monkeypatch.setattr(evidence, "STEPS_AHEAD", (1, 2))
    block = evidence.jobs_of("walker-walk", 20)
    others = evidence.jobs_of("walker-walk", 20, evidence.other_weights("penalty-both"))
    for number, job in enumerate([*block, *others]):
        (tmp_path / "results" / job.arm).mkdir(parents=True)
        folder = tmp_path / "runs" / job.arm / "walker-walk_20"
        folder.mkdir(parents=True)
        tiny(RandomSpaces(box, box), seed=number).save(folder / "model.zip")
    evidence.measure(block, tmp_path / "runs")
    rows = [ladder.read_csv(evidence.measures_file(job))[0] for job in block]
    assert len(made) == 4 and rows[0] != rows[1]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    assert {"observation_2", "reward_1", "posterior_jacobian", "action_change"} <= set(rows[0])
    evidence.measure(others, tmp_path / "runs")
    assert len(made) == 10 and all(evidence.measures_file(job).exists() for job in others)
    (tmp_path / "runs" / block[1].arm / "walker-walk_20" / "model.zip").unlink()
    with pytest.raises(FileNotFoundError):
        evidence.measure(others, tmp_path / "runs")
