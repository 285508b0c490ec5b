"""``dreamer-gpld enjoy --trained``: the agents that come with the repository."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import pytest

from sb3_dreamer_gpld.trained import FOLDER, TrainedAgent
from sb3_dreamer_gpld.zoo import enjoy, environments
from sb3_dreamer_gpld.zoo import main as zoo


def test_it_needs_no_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in another folder than the repository's."""
    assert zoo.main(["enjoy", "--trained", "Pendulum-v1", "-n", "450", "--no-render", "--seed", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Pendulum-v1, ") and "Recorded: " in lines[0] and "20 episodes" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["Episode reward", "Episode reward", "2 episodes", "Mean reward"]
    assert float(lines[-1].split()[2]) > -700  # a random policy's is about -1,200
    assert list(folder.iterdir()) == []


def test_each_episode_has_its_own_return(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(TrainedAgent, "make_env", lambda self, **kwargs: gym.make("CartPole-v1", max_episode_steps=20))
    zoo.main(["enjoy", "--trained", "CartPole-v1", "-n", "60", "--no-render"])
    expected = ["Episode reward: 20.00"] * 3 + ["3 episodes", "Mean reward: 20.00 +/- 0.00"]
    assert capsys.readouterr().out.splitlines()[1:] == expected


def test_it_is_shown_in_a_window(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(environments, "has_display", lambda: True)
    made: dict[str, str] = {}
    make = TrainedAgent.make_env

    def note(self: TrainedAgent, **kwargs: str) -> object:
        made.update(kwargs)
        return make(self, **kwargs)

    monkeypatch.setattr(TrainedAgent, "make_env", note)
    zoo.main(["enjoy", "--trained=CartPole-v1", "-n", "5", "--stochastic"])
    assert made == {"render_mode": "human"}
    output = capsys.readouterr().out
    assert "CartPole-v1, sampled actions" in output and "No episode ended in 5 steps; reward so far: 5.00" in output


@pytest.mark.parametrize(
    "args, message",
    [
        (["walker-wlak", "--no-render"], "--trained walker-wlak: .*'walker-wlak'"),
        (["nowhere/walker.pt", "--no-render"], "no agents.yml in nowhere"),
        (["CartPole-v1"], "there is no display to show the agent on"),
    ],
)
def test_wrong_arguments(args: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "has_display", lambda: False)
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    with pytest.raises(SystemExit, match=message):
        zoo.main(["enjoy", "--trained", *args])


@pytest.mark.parametrize(
    "content, message",
    [(b"PK damaged", "CartPole-v1.pt is no file of .* or a damaged one"), (None, "No such file .*CartPole-v1.pt")],
)
def test_an_agent_that_cannot_be_read(content: bytes | None, message: str, folder: Path) -> None:
    (folder / "agents.yml").write_bytes((FOLDER / "agents.yml").read_bytes())
    if content is not None:
        (folder / "CartPole-v1.pt").write_bytes(content)
    with pytest.raises(SystemExit, match=f"--trained ./CartPole-v1.pt: .*{message}"):
        zoo.main(["enjoy", "--trained", "./CartPole-v1.pt", "--no-render"])


@pytest.mark.parametrize("args", [["-n", "0"], ["--env", "CartPole-v1"], ["--stochastic", "--deterministic"]])
def test_options_that_do_not_exist(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        enjoy.parse(["--trained", "CartPole-v1", *args])
    assert "error: " in capsys.readouterr().err
