"""Learning curves and their statistics."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sb3_dreamer_gpld.zoo import main as zoo
from sb3_dreamer_gpld.zoo import plot
from sb3_dreamer_gpld.zoo.recorded import recorded


def _write_runs(folder: Path, task: str, seeds: int, final: float, evaluations: int = 4) -> None:
    for seed in range(1, seeds + 1):
        run = folder / "dreamer_gpld" / f"{task}_{seed}"
        run.mkdir(parents=True)
        steps = 100 * np.arange(1, evaluations + 1)
        returns = final * steps / steps[-1] + np.array([[-10.0, 10.0]]).T.repeat(evaluations, 1) + seed
        np.savez(run / "evaluations.npz", timesteps=steps, results=returns.T)


def test_plot_draws_tasks_and_aggregate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, final in (("a", 800.0), ("b", 600.0)):
        _write_runs(folder / name, "dm_control-walker-walk-v0", seeds=3, final=final)
        _write_runs(folder / name, "dm_control-ball_in_cup-catch-v0", seeds=2, final=final, evaluations=5)
        _write_runs(folder / name, "Pendulum-v1", seeds=1, final=-200.0)
    zoo.main(["plot", "-f", "a", "b", "-l", "GPLD", "DreamerV3", "--reps", "50", "-o", "pictures"])
    names = {path.name for path in (folder / "pictures").iterdir()}
    tasks = {"dm_control-walker-walk-v0.png", "dm_control-ball_in_cup-catch-v0.png", "Pendulum-v1.png"}
    assert names == tasks | {"aggregate.png"}
    assert all((folder / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    zoo.main(["plot", "-f", "a", "-e", "Pendulum-v1", "--reps", "10", "-o", "one"])
    assert [path.name for path in (folder / "one").iterdir()] == ["Pendulum-v1.png"]
    assert "No aggregate" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no evaluated run of Foo-v1 in a"):
        zoo.main(["plot", "-f", "a", "-e", "Foo-v1"])
    with pytest.raises(SystemExit):
        zoo.main(["plot", "-f", "a", "b", "-l", "one"])
    with pytest.raises(SystemExit):
        zoo.main(["plot", "-f", "a", "--reps", "0"])
    assert "--reps must be at least 1, not 0" in capsys.readouterr().err


def test_plot_reads_what_train_logged(trained: Path) -> None:
    runs = plot.read_runs([str(trained / "logs")], ["x"], ["dreamer_gpld"])
    ((steps, returns),) = runs["Pendulum-v1"]["x"]
    assert steps.tolist() == [75, 150] and returns.shape == (2,)


def test_plot_takes_the_mean_over_episodes(folder: Path) -> None:
    _write_runs(folder / "logs", "Pendulum-v1", seeds=2, final=-200.0)
    runs = plot.read_runs(["logs"], ["x"], ["dreamer_gpld"])["Pendulum-v1"]["x"]
    for seed, (steps, returns) in enumerate(runs, 1):
        assert steps.tolist() == [100, 200, 300, 400]
        assert returns == pytest.approx(np.array([-50.0, -100.0, -150.0, -200.0]) + seed)


def test_statistics() -> None:
    scores = np.array([[[0.0], [0.4]], [[0.2], [2.0]]])  # 2 seeds, 2 tasks, 1 step
    assert plot.mean(scores) == pytest.approx([0.65])
    assert plot.median(scores) == pytest.approx([0.65])  # of 0.1 and 1.2
    assert plot.interquartile_mean(scores) == pytest.approx([0.3])
    assert plot.optimality_gap(scores) == pytest.approx([1 - 0.4])


def test_interval_is_stratified_by_task() -> None:
    style = plot.Style(size=0.9, reps=500)
    # No spread within the tasks: however different the tasks are, there is no uncertainty
    constant = np.repeat([[[0.1], [0.9]]], 4, 0)
    assert plot.interval(constant, plot.mean, style)[:, 0] == pytest.approx([0.5, 0.5])
    normal = np.random.default_rng(0).normal(size=(100, 1, 1))
    low, high = plot.interval(normal, plot.mean, style)[:, 0]
    assert high - low == pytest.approx(2 * 1.645 * normal.std() / 10, rel=0.15)


def test_curves_end_with_the_shortest_run(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [plot.Run(np.array([10, 20, 30]), np.arange(3.0)), plot.Run(np.array([5, 15, 25, 28]), np.arange(4.0))]
    steps = plot._common_steps(runs)
    assert steps.tolist() == [10, 20]
    assert plot._at(steps, runs) == pytest.approx(np.array([[0, 1], [0.5, 1.5]]))
    assert "Drawn up to 28 steps" in capsys.readouterr().out


def test_runs_that_ended_before_others_were_evaluated_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody knows what the others would have returned there."""
    for number, steps in enumerate(([1000, 5000], [25_000, 50_000], [24_000, 25_000])):
        run = folder / "logs" / "dreamer_gpld" / f"Pendulum-v1_{number + 1}"
        run.mkdir(parents=True)
        np.savez(run / "evaluations.npz", timesteps=steps, results=[[-1000.0]] * 2)
    runs = plot.read_runs(["logs"], ["x"], ["dreamer_gpld"])["Pendulum-v1"]["x"]
    assert [steps.tolist() for steps, _ in runs] == [[25_000, 50_000], [24_000, 25_000]]
    told = "Pendulum-v1: 1 run(s) of 5,000 steps left out, since another was evaluated first after 25,000"
    assert capsys.readouterr().out.splitlines() == [told]
    (folder / "plots").mkdir()
    (folder / "plots" / "aggregate.png").touch()  # of an earlier time
    early, late = plot.Run(np.array([1000, 5000]), np.ones(2)), plot.Run(np.array([10_000, 20_000]), np.ones(2))
    plot.draw({"dm_control-a-v0": {"x": [early]}, "dm_control-b-v0": {"x": [late]}}, folder / "plots", plot.Style(reps=10))
    assert "No aggregate: runs of one task end before" in capsys.readouterr().out
    assert not (folder / "plots" / "aggregate.png").exists()


def test_curves_are_labelled_by_algorithm_and_file(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = str(trained / "logs")
    assert list(plot.read_runs([logs], None, ["dreamer_gpld"])["Pendulum-v1"]) == ["dreamer_gpld, small.yml"]
    _write_runs(folder / "other", "Pendulum-v1", seeds=2, final=-200.0)  # without a record of how they were trained
    runs = plot.read_runs([logs, "other"], None, ["dreamer_gpld"])["Pendulum-v1"]
    assert {label: len(of_label) for label, of_label in runs.items()} == {
        f"{logs}: dreamer_gpld, small.yml": 1,
        "other: dreamer_gpld": 2,
    }
    assert list(plot.read_runs([logs], ["mine"], ["dreamer_gpld"])["Pendulum-v1"]) == ["mine"]


def test_runs_of_different_settings_are_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_runs(folder / "logs", "Pendulum-v1", seeds=3, final=-200.0)
    first, second, third = sorted((folder / "logs" / "dreamer_gpld").iterdir())
    for run, hyperparams in ((first, None), (second, {"train_ratio": 512}), (third, None)):
        (run / "Pendulum-v1").mkdir()
        arguments = {"conf_file": "a/b.yml", "hyperparams": hyperparams, "env_kwargs": {"g": 5.0} if run == third else None}
        (run / "Pendulum-v1" / "args.yml").write_text(yaml.dump(OrderedDict(arguments)))
    file = "dreamer_gpld, b.yml"
    assert set(plot.read_runs(["logs"], None, ["dreamer_gpld"])["Pendulum-v1"]) == {
        file,
        f"{file}, train_ratio=512",
        f"{file}, g=5.0",
    }
    assert capsys.readouterr().out == ""
    plot.read_runs(["logs"], ["mine"], ["dreamer_gpld"])
    expected = "the curve 'mine' joins runs of different settings: b.yml; b.yml, g=5.0; b.yml, train_ratio=512"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, expected",
    [
        ("!!python/object/apply:collections.OrderedDict\n- - - conf_file\n    - a/b.yml\n", {"conf_file": "a/b.yml"}),
        ("!!python/object/apply:collections.OrderedDict\n- - - conf_file\n    - null\n", {"conf_file": None}),
        ("!!python/object/apply:os.mkdir [ran]\n", {}),
        (
            "!!python/object/apply:collections.OrderedDict\n- - - x\n    - !!python/object/apply:os.mkdir [ran]\n",
            {"x": "object/apply:os.mkdir"},
        ),
        ("train_freq: !!python/tuple [4, step]\n", {"train_freq": (4, "step")}),
    ],
)
def test_recorded_arguments_run_no_code(folder: Path, text: str, expected: dict[str, Any]) -> None:
    (folder / "run" / "Pendulum-v1").mkdir(parents=True)
    (folder / "run" / "Pendulum-v1" / "args.yml").write_text(text)
    assert recorded(folder / "run", "args.yml") == expected
    assert not (folder / "ran").exists()
