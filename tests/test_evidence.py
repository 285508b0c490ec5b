"""The evidence about the penalty: statistics against other libraries, and the page against the committed results."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence import coverage, measuring, page, protocol, running, scores
from benchmarks.evidence.measuring import EPISODES_OF, MEASURES
from benchmarks.evidence.protocol import ARMS, FRAMES, GROUPS, NONE, PENALTIES, SEEDS, TASKS
from benchmarks.evidence.scores import AREA, LARGEST_RETURN, LAST, STYLE, scores_of
from benchmarks.learning import ladder
from benchmarks.learning.ladder import Job
from benchmarks.results import read_csv, write_csv
from sb3_dreamer_gpld import preset
from sb3_dreamer_gpld.zoo.plot import Style, interquartile_mean, interval, mean

BOTH = "penalty-both"


def test_the_page_is_that_of_the_results() -> None:
    """``make evidence`` would change nothing."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, protocol.complete()) == text
    assert text.count("<!-- table: ") == len(page.TABLES)


def test_the_figure_and_the_text_are_those_of_the_results() -> None:
    """What is written by hand names the blocks and seeds that it is about; the figure has a digest of its numbers."""
    found = protocol.complete()
    done = sum(all(job.finished for job in jobs) for jobs in protocol.every_block())
    known = page.PAGE.read_text(encoding="utf-8").split("## The answer\n")[1].split("\n## ")[0]
    words = ["no", "one", "two", "three", "four"][len(found.seeds)]
    assert f"{done} of 24 blocks, {words} seed" in known
    readme = (page.PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"after {words} seed" in readme.split("- **GPLD**")[1].split("- **Spaces**")[0]
    image = pytest.importorskip("PIL.Image")
    with image.open(page.FIGURE) as figure:
        assert figure.info["Description"] == page.drawn_from(found)


def test_the_numbers_of_the_text_are_those_of_the_results() -> None:
    """Those that decide, on the page and in README."""
    found = protocol.complete()
    arm, hard = PENALTIES[0], GROUPS["hard locomotion"]

    def of(name: str, score: scores.Score, tasks: Any) -> np.ndarray:
        return LARGEST_RETURN * scores_of(name, score, tasks, found.seeds)

    def bounds(pair: Any) -> str:
        return " to ".join(f"{float(x):.0f}" for x in np.ravel(pair)).replace("-", "−")

    def told(score: scores.Score, tasks: Any) -> tuple[str, str, str]:
        """Ahead or behind by how much; the bootstrap's interval; Student's."""
        differences = of(arm, score, tasks) - of(NONE, score, tasks)
        middle = mean(differences)[0]
        side = "ahead" if middle > 0 else "behind"
        return (
            f"{side} by {abs(middle):.0f}",
            bounds(interval(differences, mean, STYLE)),
            bounds(scores.students_interval(differences)),
        )

    text, readme = (
        re.sub(r"\s+", " ", path.read_text(encoding="utf-8")) for path in (page.PAGE, page.PAGE.parents[1] / "README.md")
    )
    none = f"{of(NONE, AREA, TASKS).mean():.0f}"
    pairs = np.concatenate([of(arm, AREA, TASKS), of(NONE, AREA, TASKS)], -1)
    share = f"{scores.relative(pairs)[0]:.0f} % ({bounds(interval(pairs, scores.relative, STYLE))})"
    side, boot, student = told(AREA, TASKS)
    points = side.removeprefix("ahead by ")
    assert f"The score that decides** is {points} points of {none}, {share}" in text
    low, high = student.split(" to ")
    assert f"anything from a loss of {low.removeprefix('−')} to a gain of {high} points remains possible" in text
    assert f"none by {points} points of {none} over whole runs ({student} by Student's t)" in readme
    side, boot, student = told(AREA, hard)
    assert f"{side} points over whole runs." in text and f"({boot}; by Student's t {student})" in text
    assert f"{side} ({student}) on the four of locomotion" in readme
    side, boot, student = told(LAST, hard)
    assert f"in the last tenth by {side.removeprefix('behind by ')} points ({boot}; by Student's t {student})" in text
    side, boot, student = told(scores.EVALUATED, hard)
    assert f"most probable actions by {side.removeprefix('behind by ')} ({boot}; {student})" in text
    weak, strong = (
        [(of(name, score, TASKS) - of(NONE, score, TASKS)) for score in (AREA, LAST, scores.EVALUATED)]
        for name in protocol.other_weights(arm)
    )
    at = [f"{differences.mean():+.0f}".replace("-", "−") for differences in (*weak, *strong)]
    boot, student = bounds(interval(weak[0], mean, STYLE)), bounds(scores.students_interval(weak[0]))
    assert f"with λ₀ = 0.05 the published penalty is at {at[0]} over whole runs ({boot}; by Student's t {student})" in text
    assert f"level with none at the end: {at[1]} in the last tenth, {at[2]} evaluated" in text
    assert f"A tenth of its weight cannot be told from none ({at[0]}, {student})" in readme
    both = [f"({bounds(interval(x, mean, STYLE))}; {bounds(scores.students_interval(x))})" for x in strong]
    assert f"With λ₀ = 5 it is at {at[3]} {both[0]}" in text
    last, end = (each.removeprefix("−") for each in at[4:])
    assert f"behind at the end: by {last} points in the last tenth {both[1]}, by {end} evaluated {both[2]}" in text
    with_it, without = (measuring.measured(name, *found, tuple(ARMS)) for name in (arm, NONE))
    jacobians, transitions = (scores.ratios(with_it[key], without[key]) for key in ("posterior_jacobian", "transition_ratio"))
    assert f"({min(jacobians):.2f} to {max(jacobians):.2f} of that without, task by task)" in text
    assert f"mean sensitivity of imagined transitions falls by {100 * (1 - stats.gmean(transitions)):.0f} %" in readme


def test_the_arms_differ_in_the_penalty_alone() -> None:
    arms = ladder.read_arms()
    shared = arms["rw10-rate16-explore-normalize"].settings
    lambdas = set()
    for name in ARMS:
        own = dict(arms[name].settings)
        lambdas.add((own.pop("posterior_penalty"), own.pop("prior_penalty", 0.0)))
        assert own == {key: value for key, value in shared.items() if key not in ("posterior_penalty", "prior_penalty")}
    assert lambdas == {(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)}
    assert arms[NONE].settings["posterior_penalty"] == 0.0
    for name in set(ARMS) - {NONE}:
        for weight, other in zip(protocol.WEIGHTS, protocol.other_weights(name), strict=True):
            penalties = {key: value for key, value in arms[name].settings.items() if key.endswith("_penalty") and value}
            assert penalties and arms[other].settings == {**arms[name].settings, **dict.fromkeys(penalties, float(weight))}


def test_the_arms_are_those_of_the_preset() -> None:
    published, known = ladder.read_arms()["penalty-posterior"].settings, preset("cpu")
    assert known["actor_gradient"] == "auto"  # which is that of the dynamics for the actions of dm_control
    known |= {"actor_gradient": "dynamics", "buffer_size": published["buffer_size"]}  # that no run fills
    assert {key: known.get(key) for key in published} == published


def test_statistics() -> None:
    generator = np.random.default_rng(0)
    some = generator.random((4, 6, 1))
    assert interquartile_mean(some)[0] == pytest.approx(stats.trim_mean(some.ravel(), 0.25))
    pairs = np.stack([some[..., 0], np.round(generator.random((4, 6)), 1)], -1)
    pairs[0, 0] = pairs[1, 0] = 0.5  # equal ones count half
    expected = np.mean([stats.mannwhitneyu(*pairs[:, task].T).statistic / 16 for task in range(6)])
    assert scores.improvement(pairs)[0] == pytest.approx(expected)
    (low,), (high,) = scores.improvement_interval(pairs)
    assert 0.0 <= low < expected < high <= 1.0
    assert scores.improvement_interval(pairs[:1], Style(size=0.95, reps=10)).ravel().tolist() == pytest.approx(
        [scores.improvement(pairs[:1])[0]] * 2
    )
    assert scores.relative(np.array([[[3.0, 2.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 0.0]]]))[0] == pytest.approx(50.0)


def test_students_interval() -> None:
    """Of one task, and of two, whose mean is half a difference that Welch's test knows."""
    one, other = np.random.default_rng(0).normal(size=(2, 4)) * [[1.0], [3.0]]
    expected = stats.ttest_1samp(one, 0.0).confidence_interval(0.95)
    assert scores.students_interval(one[:, None, None]) == pytest.approx(expected)
    low, high = stats.ttest_ind(one, -other, equal_var=False).confidence_interval(0.95)
    assert scores.students_interval(np.stack([one, other], 1)[..., None]) == pytest.approx((low / 2, high / 2))
    assert scores.students_interval(np.full((2, 3, 1), 4.0)) == (4.0, 4.0)


def test_the_interval_of_the_probability_of_improvement() -> None:
    """Seeds are drawn for each task and each arm by itself: all draws of two seeds on two tasks, one after another."""
    pairs = np.array([[[1.0, 0.0], [5.0, 2.0]], [[3.0, 2.0], [1.0, 4.0]]])  # (seeds, tasks, arms)
    draws = list(itertools.product(range(2), repeat=2))
    by_task = [
        [np.mean([np.sign(pairs[i, task, 0] - pairs[j, task, 1]) / 2 + 0.5 for i in one for j in other])
         for one in draws for other in draws]
        for task in range(2)
    ]  # fmt: skip
    every = sorted(np.add.outer(*by_task).ravel() / 2)
    for size in (0.95, 0.5):
        low, high = scores.improvement_interval(pairs, Style(size=size, reps=4000)).ravel()
        # Between the quantiles a little to either side, since 4000 draws are not all of them
        assert np.quantile(every, 0.49 - size / 2 + 0.005) <= low <= np.quantile(every, 0.51 - size / 2 + 0.005)
        assert np.quantile(every, 0.49 + size / 2 - 0.005) <= high <= np.quantile(every, 0.51 + size / 2 - 0.005)


def test_how_often_intervals_hold_the_truth() -> None:
    """More often with more seeds, and less often than they say."""
    few, many = (coverage.coverage(seeds, [1.0, 1.0], 60) for seeds in (2, 8))
    assert 0.4 < few[0] < many[0] <= 1.0 and few[0] < 0.9 and min(*few[1:], *many[1:]) > 0.8
    uneven = coverage.coverage(3, [1.0] + 5 * [0.01], 60)  # as if there were one task
    assert uneven[0] < coverage.coverage(3, 6 * [1.0], 60)[0]
    seen = coverage.noise_seen(protocol.complete())
    assert set(seen) == set(TASKS) and max(seen, key=seen.__getitem__) == "reacher-hard"


def test_ratios_and_correlations_leave_out_what_was_not_measured() -> None:
    x, y = np.random.default_rng(0).random((2, 8, 3))
    expected = [stats.spearmanr(x[:, task], y[:, task]).statistic for task in range(3)]
    assert scores.rank_correlations(x, y) == pytest.approx(expected)
    assert page.correlation((x, y)) == f"{np.mean(expected):.2f} (3)"
    x[2, 0], y[:, 1], x[:, 2] = np.nan, 0.0, np.nan
    assert scores.rank_correlations(x, y) == pytest.approx([stats.spearmanr(np.delete(x[:, 0], 2), np.delete(y[:, 0], 2))[0]])
    assert page.correlation((x[:, 2:], y[:, 2:])) == "–"
    one, other = np.array([[2.0, np.nan, 3.0], [8.0, np.nan, np.nan]]), np.ones((2, 3))
    assert scores.ratios(one, other) == pytest.approx([4.0, np.nan, 3.0], nan_ok=True)
    assert scores.ratio(one, other) == pytest.approx(np.sqrt(12.0)) and page.number(scores.ratio(one[:, 1:2], other)) == "–"
    one[0, 0] = 0.0  # no number has a logarithm there
    assert scores.ratios(one, other)[0] == pytest.approx(8.0)
    alike = scores.within_arms(np.array([[[1.0], [3.0]], [[10.0], [14.0]], [[5.0], [np.nan]]]))  # (3, 2, 1): arms far apart
    np.testing.assert_equal(alike.ravel(), [-1.0, 1.0, -2.0, 2.0, 0.0, np.nan])


def write_run(job: Job, returns: np.ndarray, measures: float | None) -> None:
    """A finished run, its actions and its measures, which are a tenth on the episodes of no penalty."""
    job.file.parent.mkdir(exist_ok=True)
    frames = np.linspace(FRAMES / len(returns), FRAMES, len(returns)).astype(int)
    write_csv(job.file, [{"frames": int(f), "episode_return": float(r)} for f, r in zip(frames, returns, strict=True)])
    write_csv(job.evaluations, [{"frames": FRAMES, "deterministic": 700.0}])
    if measures is not None:
        rows = [{EPISODES_OF: arm, **dict.fromkeys(MEASURES, measures * (0.1 if arm == NONE else 1.0))} for arm in ARMS]
        write_csv(protocol.measures_file(job), rows)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two seeds of two tasks: both penalties return 100 more at the end and halve what is measured; one was not measured."""
    monkeypatch.setattr(ladder, "RESULTS", tmp_path)
    for task, base in (("walker-walk", 200.0), ("reacher-hard", 400.0)):
        for seed in SEEDS[:2]:
            for arm in ARMS:
                returns = np.full(40, base + seed)
                returns[-4:] += 100.0 * (arm == BOTH)
                lost = (task, seed, arm) == ("walker-walk", SEEDS[1], NONE)
                write_run(Job(arm, task, seed, FRAMES), returns, None if lost else (0.5 if arm == BOTH else 1.0))
    return tmp_path


def test_tables(results: Path) -> None:
    found = protocol.complete()
    assert found == (("walker-walk", "reacher-hard"), SEEDS[:2])
    returns = [line for line in page.returns_table(found) if "| both |" in line]
    assert "| all | area under the curve | both | 0.331 [" in returns[0] and "| 0.010 [0.010, 0.010] |" in returns[0]
    assert "| all | last tenth | both | 0.420 [" in returns[1] and returns[1].endswith("| 1.00 [1.00, 1.00] |")
    assert returns[1].count("| 0.100 [0.100, 0.100] |") == 1 and "| 31.2 [" in returns[1]  # 2 · 100 more than 2 · 320.5
    assert "| hard locomotion | last tenth | both | 0.321 [" in returns[3] and "| others | last tenth | both |" in returns[5]
    answer = [line.split(" | ") for line in page.answer_table(found)]
    assert answer[2] == [
        "| whole runs (area under the curve), all tasks",
        *2 * ["+0 [+0, +0] / [+0, +0]"],
        "+10 [+10, +10] / [+10, +10] |",
    ]
    assert answer[6][0] == "| last tenth, hard locomotion" and answer[6][3] == "+100 [+100, +100] / [+100, +100] |"
    assert answer[7][0] == "| evaluated at the end, all tasks" and answer[7][3] == "+0 [+0, +0] / [+0, +0] |"
    assert len(answer) == 9
    tasks = list(page.tasks_table(found))
    assert tasks[0] == "| score | penalty on | walker-walk | reacher-hard |"
    assert tasks[5] == "| last tenth | both | 320 (320, 321) | 520 (520, 521) |"
    assert tasks[-1] == "| evaluated, most probable actions | both | 700 (700, 700) | 700 (700, 700) |"
    differences = list(page.differences_table(found))
    assert differences[-1] == "| last tenth | both | +100 (+100, +100) | +100 (+100, +100) |"
    for arm in ARMS:  # a third seed of one task
        write_run(Job(arm, "walker-walk", SEEDS[2], FRAMES), np.full(40, 100.0 + 7.0 * (arm == BOTH)), None)
    assert protocol.complete() == found
    assert list(page.differences_table(found))[-1] == "| last tenth | both | +100 (+100, +100; +7) | +100 (+100, +100) |"
    assert list(page.tasks_table(found))[5] == "| last tenth | both | 320 (320, 321; 107) | 520 (520, 521) |"
    measures = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in page.measures_table(found)}
    assert measures["transition ratio"][:3] == ["1.00", "1.00", "0.50"]
    assert "| transition ratio | both | 0.50 | 0.50 |" in list(page.measures_by_task_table(found))


def test_one_seed_has_no_interval(results: Path) -> None:
    one = protocol.Seeds(("walker-walk", "reacher-hard"), SEEDS[:1])
    lines = [line for line in page.returns_table(one) if "| all | last tenth | both |" in line]
    assert lines == ["| all | last tenth | both | 0.420 | 0.100 | 0.100 | 31.2 | 1.00 |"]
    lines = list(page.answer_table(one))
    assert len(lines) == 9 and lines[5].endswith("| +100 |")


def test_the_page_says_what_is_left_out(results: Path) -> None:
    write_run(Job(NONE, "hopper-hop", SEEDS[0], FRAMES), np.zeros(40), None)
    write_run(Job("penalty-prior-5", "hopper-hop", SEEDS[0], FRAMES), np.zeros(40), 1.0)
    blocks, tables, left, unmeasured = page.finished_table(protocol.complete())
    assert blocks == "**4 of 24 blocks are finished**; the question is decided once, when all are."
    assert tables == "The tables have seeds 20, 21 of walker-walk, reacher-hard."
    assert left.endswith(f"finished on all tasks: none, hopper-hop, {SEEDS[0]}; prior 5, hopper-hop, {SEEDS[0]}.")
    assert unmeasured.endswith(f"not measured: none, hopper-hop, {SEEDS[0]}; none, walker-walk, {SEEDS[1]}.")
    assert len(list(page.finished_table(protocol.Seeds((), ())))) == 3


def test_all_tasks_have_as_many_seeds(results: Path) -> None:
    for arm in ARMS:
        write_run(Job(arm, "hopper-hop", SEEDS[0], FRAMES), np.zeros(40), 1.0)
    assert protocol.complete() == (("walker-walk", "hopper-hop", "reacher-hard"), SEEDS[:1])


def test_frames_beyond_the_end_do_not_count(results: Path) -> None:
    job = Job(NONE, "hopper-hop", SEEDS[0], FRAMES)
    write_run(job, np.full(40, 100.0), 1.0)
    rows = [{"frames": row["frames"], "episode_return": row["episode_return"]} for row in read_csv(job.file)]
    write_csv(job.file, [*rows, {"frames": FRAMES + 1000, "episode_return": 900.0}])
    assert scores.AREA.of(job) == scores.LAST.of(job) == pytest.approx(0.1)


def test_an_unfinished_seed_waits(results: Path) -> None:
    Job("penalty-prior", "reacher-hard", SEEDS[0], FRAMES).evaluations.unlink()
    assert protocol.complete() == (("walker-walk",), SEEDS[:2])
    for task in TASKS:
        Job("penalty-prior", task, SEEDS[0], FRAMES).evaluations.unlink(missing_ok=True)
    assert protocol.complete() == ((), ())


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_figure(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int) -> None:
    monkeypatch.setattr(page, "FIGURE", tmp_path / "evidence.png")
    found = protocol.complete()
    page.draw(found._replace(seeds=found.seeds[:seeds]))
    assert (tmp_path / "evidence.png").stat().st_size > 10_000
    assert page.drawn_from(found) != page.drawn_from(found._replace(seeds=found.seeds[:1]))


def test_blocks_in_their_order(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What is finished is left alone, and counts for nothing where its checkpoint is lost."""
    made: list[Any] = []
    measured: list[Any] = []
    monkeypatch.setattr(running, "run_all", lambda jobs, workers, runs: made.append((jobs[0].task, jobs[0].seed)) or 0)
    monkeypatch.setattr(running, "measure", lambda jobs, runs: measured.append(len(jobs)))
    assert running.run(2, tmp_path, most=6) == 0 and not measured  # there are no checkpoints
    first = [(task, SEEDS[0]) for task in TASKS if task not in ("walker-walk", "reacher-hard")]
    rest = [(task, SEEDS[1]) for task in TASKS if task not in ("walker-walk", "reacher-hard")]
    assert made == [*first, *rest[:2]]
    assert capsys.readouterr().out == f"walker-walk {SEEDS[1]}: not measured, since a checkpoint is lost\n"
    monkeypatch.setattr(running, "can_be_measured", lambda jobs, runs: True)
    made.clear()
    assert running.run(2, tmp_path, most=6) == 0 and len(measured) == 6 and made[4] == ("walker-walk", SEEDS[1])
    monkeypatch.setattr(running, "run_all", lambda *args: 2)
    assert running.run(2, tmp_path, most=1) == 2 and len(measured) == 6


def test_other_weights_of_the_better_penalty(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin when all arms are finished, and are compared over what they have finished, on episodes of other models."""
    assert scores.better() is None and list(page.weights_table(protocol.complete())) == [page.NO_BLOCK]
    for module in (protocol, scores):
        monkeypatch.setattr(module, "TASKS", ("walker-walk", "reacher-hard"))
        monkeypatch.setattr(module, "SEEDS", SEEDS[:2])
    assert scores.better() == BOTH
    assert list(page.weights_table(protocol.complete())) == [page.NO_BLOCK]
    made: list[Any] = []
    monkeypatch.setattr(running, "run_all", lambda jobs, workers, runs: made.append([job.arm for job in jobs]) or 0)
    running.run(2, tmp_path, most=9)
    assert made == [["penalty-both-0.05", "penalty-both-5"]] * 4
    for arm, base in (("penalty-both-0.05", 400.0), ("penalty-both-5", 600.0)):
        for seed in SEEDS[:2]:
            write_run(Job(arm, "reacher-hard", seed, FRAMES), np.full(40, base + seed), 0.25 if base < 500.0 else 0.75)
    lines = list(page.weights_table(protocol.complete()))
    assert lines[0] == f"Seeds {SEEDS[0]}, {SEEDS[1]} of reacher-hard."
    assert lines[2] == "| points more than without | λ₀ on both: 0.05 | λ₀ on both: 0.5 | λ₀ on both: 5 |"
    assert lines[4].endswith("| +0 [+0, +0] / [+0, +0] | +10 [+10, +10] / [+10, +10] | +200 [+200, +200] / [+200, +200] |")
    lines = lines[lines.index("", 2) - 1 :]
    assert [line.split(" | ")[0] for line in lines[4:10]] == ["| 0.05", "| 0.5", "| 5"] * 2
    assert lines[10] == "" and lines[13] == "| Jacobian norm, posterior | 0.25 | 0.50 | 0.75 |"
    assert "| 0.420 [" in lines[4] and "| 0.000 [0.000, 0.000] |" in lines[4] and "| 0.50 [" in lines[4]
    assert "| 0.430 [" in lines[5] and "| 0.621 [" in lines[6] and lines[6].endswith("| 1.00 [1.00, 1.00] |")


def test_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of a block, on the episodes of all; those with other weights on the same, when the first are long lost."""
    from gymnasium import spaces
    from test_dreamer_gpld import RandomSpaces, tiny

    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    monkeypatch.setattr(ladder, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measuring, "make_env", lambda *args: RandomSpaces(box, box))
    monkeypatch.setattr(measuring, "STEPS_AHEAD", (1, 2))
    expected = {name: title for name, title in MEASURES.items() if not name.endswith(("_5", "_15", "_50"))}
    expected |= {f"{name}_2": "" for name in ("observation", "reward")}
    monkeypatch.setattr(measuring, "MEASURES", expected)
    block = protocol.jobs_of("walker-walk", 20)
    others = protocol.jobs_of("walker-walk", 20, protocol.other_weights(BOTH))
    runs = tmp_path / "runs"
    for number, job in enumerate([*block, *others]):
        job.file.parent.mkdir(parents=True)
        protocol.checkpoint(job, runs).parent.mkdir(parents=True)
        tiny(RandomSpaces(box, box), seed=number).save(protocol.checkpoint(job, runs))
    assert measuring.can_be_measured(block, runs) and not any(map(measuring.is_measured, block))
    measuring.measure(block, runs)
    assert all(map(measuring.is_measured, block))
    rows = [read_csv(protocol.measures_file(job)) for job in block]
    assert [row[EPISODES_OF] for row in rows[0]] == list(ARMS)
    assert len({row["observation_2"] for each in rows for row in each}) == 16  # every model on every episode
    assert all(np.isfinite(float(value)) for each in rows for row in each for value in list(row.values())[1:])
    before = protocol.measures_file(block[1]).read_bytes()
    protocol.checkpoint(block[0], runs).unlink()
    measuring.measure(block[1:2], runs)
    assert protocol.measures_file(block[1]).read_bytes() == before  # played again, the episodes are the same
    assert measuring.can_be_measured(others, runs) and not measuring.can_be_measured(block, runs)
    measuring.measure(others, runs)
    assert all(map(measuring.is_measured, others))
    protocol.actions_file(block[0]).unlink()
    assert not measuring.can_be_measured(others, runs)
    with pytest.raises(FileNotFoundError):
        measuring.measure(others, runs)
