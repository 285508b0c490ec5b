"""Shares a trained agent on the Hugging Face hub with rl_zoo3's script, or only makes the files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import HfApi, ModelCard

from sb3_dreamer_gpld.saving import atomic_file

STATISTICS = "vec_normalize.pkl"  # of VecNormalize

_CARD = """
# **DreamerGPLD** playing **{env}**

DreamerV3 with the GPLD penalty, trained with sb3-dreamer-gpld, Stable-Baselines3 and the RL Zoo.

Return over {results[n_eval_episodes]} episodes with {actions} actions:
**{results[mean_reward]:.2f} ± {results[std_reward]:.2f}** (standard deviation)

## Use

```python
from huggingface_sb3 import load_from_hub

from sb3_dreamer_gpld import DreamerGPLD

model = DreamerGPLD.load(load_from_hub("{repo_id}", "{model}"))
```
{normalization}
The agent is recurrent: hand the state that `predict` returns back to it.

## Training

```
{command}
```

```yaml
{config}```

{versions}
"""


_NORMALIZATION = """
It was trained with VecNormalize, and must act with its statistics:

```python
from stable_baselines3.common.vec_env import VecNormalize

env = VecNormalize.load(load_from_hub("{repo_id}", "vec_normalize.pkl"), env)  # around a vectorised environment
env.training = env.norm_reward = False
```
"""


class _NotUploaded(Exception):
    """Ends rl_zoo3's script when all files are made and none is to be sent."""


def push(run: Path, upload: bool) -> None:
    """Run rl_zoo3's script with the arguments in ``sys.argv``.

    :param run: folder of the run
    :param upload: send the files to the hub; else they are only made
    """
    # Inside rl_zoo3: what the script imports when it starts, and in which order it calls the hub's client
    helpers = importlib.import_module("huggingface_sb3.push_to_hub")  # as an attribute it is a function of the same name
    if not hasattr(helpers, "generate_metadata"):  # newer releases have it under another name, and return an object
        helpers.generate_metadata = lambda *args: helpers._generate_metadata(*args).to_dict()  # type: ignore[attr-defined]
    before = huggingface_hub.HfApi
    huggingface_hub.HfApi = _client(run, upload)  # type: ignore[misc]
    try:
        with _ffmpeg():
            runpy.run_module("rl_zoo3.push_to_hub", run_name="__main__")  # Inside rl_zoo3: a script without a function
    except _NotUploaded as folder:
        print(f"Nothing was uploaded. The files are in {folder}")
    finally:
        huggingface_hub.HfApi = before  # type: ignore[misc]


def _client(run: Path, upload: bool) -> type[HfApi]:
    """The hub's client with this package's model card, and without the network if nothing is to be uploaded."""

    class Client(HfApi):
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return super().create_repo(repo_id, **kwargs) if upload else repo_id

        def snapshot_download(self, repo_id: str, *, local_dir: str | Path, **kwargs: Any) -> Any:  # type: ignore[override]
            if upload:
                super().snapshot_download(repo_id, local_dir=local_dir, **kwargs)
            Path(local_dir).mkdir(parents=True, exist_ok=True)
            (Path(local_dir) / STATISTICS).unlink(missing_ok=True)  # of an earlier agent; rl_zoo3 writes those of this one
            return str(local_dir)

        def upload_folder(self, *, repo_id: str, folder_path: str | Path, **kwargs: Any) -> Any:
            write_model_card(Path(folder_path), run, repo_id)
            if not upload:
                raise _NotUploaded(folder_path)
            if not (Path(folder_path) / STATISTICS).exists():
                kwargs["delete_patterns"] = STATISTICS
            return super().upload_folder(repo_id=repo_id, folder_path=folder_path, **kwargs)

    return Client


@contextlib.contextmanager
def _ffmpeg() -> Iterator[None]:
    """Put the ffmpeg that moviepy brings along on the path if the system has none: the video is converted with it."""
    path = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("ffmpeg") is None and importlib.util.find_spec("imageio_ffmpeg"):
            import imageio_ffmpeg  # type: ignore[import-untyped]

            (Path(folder) / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
            os.environ["PATH"] = os.pathsep.join([folder, path])
        try:
            yield
        finally:
            os.environ["PATH"] = path


def write_model_card(folder: Path, run: Path, repo_id: str) -> None:
    """Replace the text of rl_zoo3's model card, whose commands do not know this algorithm; its metadata stays.

    :param folder: the files to upload
    :param run: folder of the run
    :param repo_id: organisation and name of the repository
    """
    # Files that rl_zoo3 wrote itself, with Python objects such as OrderedDict
    config = yaml.load((folder / "config.yml").read_text(), Loader=yaml.UnsafeLoader)
    env = yaml.load((folder / "args.yml").read_text(), Loader=yaml.UnsafeLoader)["env"]
    results = json.loads((folder / "results.json").read_text())
    command = next(iter(run.glob("*/command.txt")), None)
    card = ModelCard.load(folder / "README.md")
    normalized = (folder / STATISTICS).exists()
    card.text = _CARD.format(
        env=env,
        results=results,
        actions="deterministic" if results["is_deterministic"] else "sampled",
        repo_id=repo_id,
        model=next(folder.glob("*-*.zip")).name,
        normalization=_NORMALIZATION.format(repo_id=repo_id) if normalized else "",
        command=command.read_text().strip() if command else "not recorded",
        config=yaml.dump(dict(config)),
        versions=_versions(),
    )
    with atomic_file(folder / "README.md") as file:
        file.write(str(card).encode())


def _versions() -> str:
    ours = ("sb3-dreamer-gpld", "stable-baselines3", "rl_zoo3")
    packages = (*ours, "gymnasium", "shimmy", "dm-control", "metaworld", "mujoco", "torch", "numpy")
    lines = ["| package | version |", "| --- | --- |"]
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"| {package} | {importlib.metadata.version(package)} |")
    return "\n".join(lines)
