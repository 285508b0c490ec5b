"""The agents that come with the repository: they load, and do what is written of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from test_dreamer_gpld import tiny

from sb3_dreamer_gpld import DreamerGPLD, trained
from sb3_dreamer_gpld.trained import FOLDER, LIST, find_agent, read_agents

AGENTS = read_agents()
MAX_BYTES = 4_000_000
EPISODES = 3


def test_there_are_at_least_five_and_no_file_without_an_entry() -> None:
    assert len(AGENTS) >= 5
    assert {path.stem for path in FOLDER.glob("*.pt")} == set(AGENTS)


@pytest.mark.parametrize("name", AGENTS)
def test_they_return_what_is_written(name: str) -> None:
    """The mean of a few episodes is at most two standard deviations of one, or 5 %, below the mean of those in the list."""
    agent = AGENTS[name]
    if agent.env.startswith("dm_control/"):
        pytest.importorskip("dm_control")
        pytest.importorskip("shimmy")
    assert agent.file.stat().st_size <= MAX_BYTES
    assert {"command", "seed", "frames", "versions"} <= set(agent.made_by)
    policy, env = agent.load(), Monitor(agent.make_env())
    assert policy.observation_space == env.observation_space and policy.action_space == env.action_space
    th.manual_seed(0)
    env.reset(seed=3)
    mean, _ = evaluate_policy(policy, env, EPISODES, agent.deterministic)  # type: ignore[arg-type]
    recorded = agent.returns["most probable" if agent.deterministic else "sampled"]
    margin = max(2 * recorded["std"], 0.05 * abs(recorded["mean"]))  # other processors round otherwise
    assert mean >= recorded["mean"] - margin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of one agent that knows nothing."""
    entry = dict(env="Pendulum-v1", action_repeat=2, deterministic=False, made_by={})
    returns = {kind: dict(mean=-1000.0, std=200.0, episodes=5) for kind in ("most probable", "sampled")}
    (tmp_path / LIST).write_text(yaml.safe_dump({"beginner": {**entry, "returns": returns}}))
    tiny("Pendulum-v1").policy.save(tmp_path / "beginner.pt")
    return tmp_path


def test_agents_of_another_folder(folder: Path) -> None:
    agent = find_agent(str(folder / "beginner.pt"))
    env = agent.make_env(max_episode_steps=20)
    assert agent == find_agent(str(folder / "beginner")) and agent.file == folder / "beginner.pt"
    steps = 0
    obs, _ = env.reset(seed=0)
    while True:
        obs, _, _, truncated, info = env.step(agent.load().predict(obs, episode_start=np.array([True]))[0])
        steps += info["frames"]
        if truncated:
            break
    assert steps == 20


def test_wrong_names(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match="'Pendulun-v1'.*Pendulum-v1"):
        find_agent("Pendulun-v1")
    with pytest.raises(ValueError, match="'other'.*beginner"):
        find_agent(str(folder / "other.pt"))
    with pytest.raises(FileNotFoundError, match=f"no {LIST} in .*come with the repository"):
        find_agent(str(tmp_path_factory.mktemp("empty") / "beginner.pt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "PLACES", (tmp_path_factory.mktemp("no checkout"), Path("trained_agents")))
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        with pytest.raises(FileNotFoundError, match=f"no {LIST} in .* or trained_agents"):
            find_agent("Pendulum-v1")
        patch.chdir(FOLDER.parent)  # the package is installed, and the command given in a checkout
        assert find_agent("Pendulum-v1").load().action_space.shape == (1,)
    (folder / "beginner.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="beginner.pt is no file of DreamerPolicy.save"):
        find_agent(str(folder / "beginner.pt")).load()


def test_a_model_becomes_an_agent(tmp_path: Path) -> None:
    """With the benchmark that made those of the repository."""
    from benchmarks import trained_agents

    model = tiny("CartPole-v1", seed=7).learn(40)
    model.save(tmp_path / "model.zip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_agents, "EPISODES", 2)
        for name in ("b", "a"):
            trained_agents.add(name, tmp_path / "model.zip", "CartPole-v1", 1, "train it", tmp_path / "agents")
    agents = read_agents(tmp_path / "agents")
    assert list(agents) == ["a", "b"]
    made_by = agents["a"].made_by
    assert (made_by["command"], made_by["seed"], made_by["frames"]) == ("train it", 7, 40)
    assert made_by["updates"] == DreamerGPLD.load(tmp_path / "model.zip")._n_updates > 0
    assert all(9 <= found["mean"] <= 500 and found["episodes"] == 2 for found in agents["a"].returns.values())
    policy, weights = agents["a"].load(), model.policy.state_dict()
    assert all(th.equal(value, weights[key]) for key, value in policy.state_dict().items())
