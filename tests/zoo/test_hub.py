"""Sharing an agent."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from sb3_dreamer_gpld.zoo import main as zoo


def test_push_to_hub_makes_the_files_without_network(
    trained: Path, folder: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    from sb3_dreamer_gpld.zoo import hub

    pytest.importorskip("moviepy")
    connections: list[Any] = []  # an error alone would be swallowed

    def refuse(*args: Any, **kwargs: Any) -> None:
        connections.append(args)
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    client = huggingface_hub.HfApi
    args = ["--env", "Pendulum-v1", "-f", str(trained / "logs"), "--no-upload", "-n", "5", "--device", "cpu"]
    args += ["--env-kwargs", "max_episode_steps:20"]
    zoo.main(["push-to-hub", *args])
    assert huggingface_hub.HfApi is client
    assert "Nothing was uploaded" in capsys.readouterr().out
    files = folder / "hub" / "dreamer_gpld-Pendulum-v1"
    assert (files / "dreamer_gpld-Pendulum-v1.zip").is_file() and (files / "config.yml").is_file()
    results = json.loads((files / "results.json").read_text())
    card = (files / "README.md").read_text()
    assert (files / "replay.mp4").stat().st_size > 0 and connections == []
    assert card.startswith("---\n") and "value: " in card
    for text in (f"{results['mean_reward']:.2f} ± ", "DreamerGPLD.load(", "train_ratio: 16", "| torch | "):
        assert text in card
    assert "VecNormalize" not in card
    (files / "vec_normalize.pkl").touch()  # as of an agent that was pushed before
    zoo.main(["push-to-hub", *args, "--no-render"])
    assert not (files / "vec_normalize.pkl").exists() and "VecNormalize" not in (files / "README.md").read_text()
    (files / "vec_normalize.pkl").touch()
    hub.write_model_card(files, next((trained / "logs" / "dreamer_gpld").glob("Pendulum-v1_*")), "me/agent")
    card = (files / "README.md").read_text()
    assert 'VecNormalize.load(load_from_hub("me/agent", "vec_normalize.pkl"), env)' in card


def test_push_to_hub_sends_the_folder_with_our_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    from sb3_dreamer_gpld.zoo import hub

    calls: list[tuple[str, dict[str, Any]]] = []
    for name in ("create_repo", "snapshot_download", "upload_folder"):
        monkeypatch.setattr(HfApi, name, lambda self, *args, _name=name, **kwargs: calls.append((_name, kwargs)))
    monkeypatch.setattr(hub, "write_model_card", lambda *args: calls.append(("card", {"args": args})))
    client = hub._client(folder, upload=True)()
    client.create_repo(repo_id="me/agent", private=False)
    client.snapshot_download(repo_id="me/agent", local_dir=folder)
    client.upload_folder(repo_id="me/agent", folder_path=folder, commit_message="hello")
    assert [name for name, _ in calls] == ["create_repo", "snapshot_download", "card", "upload_folder"]
    expected = {"repo_id": "me/agent", "folder_path": folder, "commit_message": "hello"}
    assert calls[-1][1] == {**expected, "delete_patterns": "vec_normalize.pkl"}
    (folder / "vec_normalize.pkl").touch()
    client.upload_folder(repo_id="me/agent", folder_path=folder, commit_message="hello")
    assert calls[-1][1] == expected


def test_push_to_hub_without_moviepy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="writes videos with moviepy"):
        zoo.main(["push-to-hub", "--env", "Pendulum-v1"])
