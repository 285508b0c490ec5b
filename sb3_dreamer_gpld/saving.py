"""Files that are never half-written, what a model file must contain, and spaces as plain data.

Everything is written to a neighbour of its final place (``.NAME.part``) and moved there in one step, so a name that
exists is a whole file, whatever happens to the process.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import random
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.save_util import open_path
from torch import Tensor

FORMAT_VERSION = 1  # of model files; raise it when older code could not read a new file rightly

# Modules of the policy that can be loaded alone, by the names that users know them by.
MODULES = {
    "encoder": ("world_model.encoder", "world_model.normalizer"),  # with the units of what it sees
    "rssm": ("world_model.rssm",),
    "decoder": ("world_model.vector_decoder", "world_model.image_decoders"),
    "projector": ("world_model.projector",),
    "reward": ("world_model.reward",),
    "continue": ("world_model.cont",),
    "actor": ("actor_critic.policy",),
    "critic": ("actor_critic.value", "actor_critic.slow_value"),
}


def final_path(path: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    """Where SB3 saves to: ``path`` with the suffix if it has none, beside a folder of that name, in a folder that exists.

    :param path: as given by the user
    :param suffix: without the dot; "" for none
    """
    final = pathlib.Path(path)
    if final.suffix == "" and suffix:
        final = pathlib.Path(f"{final}.{suffix}")
    if final.is_dir():
        warnings.warn(f"Path '{final}' is a folder. Will save instead to {final}_2", stacklevel=4)
        final = pathlib.Path(f"{final}_2")
    if not final.parent.exists():
        warnings.warn(f"Path '{final.parent}' does not exist. Will create it.", stacklevel=4)
        final.parent.mkdir(parents=True, exist_ok=True)
    return final


@contextmanager
def atomic_file(path: str | os.PathLike[str] | io.BufferedIOBase, suffix: str = "") -> Iterator[IO[bytes]]:
    """A file to write that appears under its name only when it is complete and on the disk.

    :param path: its name; an open file is handed through as it is
    :param suffix: added if the name has none, without the dot
    :raises OSError: it could not be written; names the file. One that was there before is unchanged
    """
    if isinstance(path, io.BufferedIOBase):
        yield path  # type: ignore[misc]
        return
    final = final_path(path, suffix)
    if final.is_symlink():
        final = final.resolve()  # the file that it leads to is written anew, and the link stays
    part = final.with_name(f".{final.name}.part")
    try:
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, final)
        except (OSError, RuntimeError) as error:  # torch wraps an error of the file into a RuntimeError
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            there = "The file that was there before is unchanged" if final.exists() else "Nothing was saved"
            raise OSError(cause.errno, f"{cause.strerror or cause}. {there}", str(final)) from error
    finally:
        part.unlink(missing_ok=True)


def check_writable(folder: pathlib.Path) -> None:
    """
    :param folder: exists, or is to be made
    :raises NotADirectoryError, PermissionError: nothing can be written there
    """
    existing = _existing(folder)
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: no permission to write in {existing}")


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


@contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder whose files are moved into ``folder`` at the end; after an error ``folder`` is as it was.

    :param folder: exists, or is made
    :return: where to write
    :raises NotADirectoryError, PermissionError: nothing can be written there
    """
    check_writable(folder)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished-", dir=_existing(folder)))  # on the same disk
    try:
        yield temporary
        for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------- model files


def check_model_file(path: str | os.PathLike[str] | io.BufferedIOBase) -> frozenset[str]:
    """Check that a file is a whole model of DreamerGPLD, before any of it is used.

    :param path: as given to ``DreamerGPLD.load``
    :return: names of the attributes in it
    :raises FileNotFoundError: there is no such file
    :raises ValueError: it is truncated, a file of a policy, of another algorithm, or of a later version; says which
    """
    file = open_path(path, "r", suffix="zip")  # type: ignore[arg-type]
    name = getattr(file, "name", "the given stream")
    start = file.tell()
    try:
        try:
            with zipfile.ZipFile(file) as archive:
                # In a model there is one of torch.save, which is all that is found at the end of a truncated one
                of_torch = any(part.filename.endswith("/data.pkl") for part in archive.infolist())
                of_torch = of_torch and min(part.header_offset for part in archive.infolist()) == 0
                broken = archive.testzip()
                data = json.loads(archive.read("data")) if broken is None and not of_torch else {}
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(
                f"{name} wasn't a zip-file: it is no model, or a truncated one ({error}). Use another one, or copy it again"
            ) from error
        if broken is not None:
            raise ValueError(
                f"{name} is damaged: its part {broken!r} cannot be read. Use another checkpoint, or copy it again"
            )
        if of_torch:
            raise ValueError(
                f"{name} is a file of torch.save, no model. One that policy.save wrote is loaded by MlpPolicy.load, or the "
                "class that it is of; allowed here: a file that model.save wrote"
            )
    finally:
        if isinstance(path, io.BufferedIOBase):
            file.seek(start)
        else:
            file.close()
    version = data.get("format_version")
    if version is None:
        kind = str(data.get("policy_class", {}).get("__module__", "an unknown algorithm"))
        raise ValueError(f"{name} was not saved by DreamerGPLD: its policy is of {kind}. Load it with the class that saved it")
    check_version(name, version)
    return frozenset(data)


def check_version(name: object, version: int) -> None:
    """:raises ValueError: the file ``name`` has a format that this release cannot read yet"""
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{name} has format version {version}, and this release of sb3-dreamer-gpld reads up to {FORMAT_VERSION}. "
            "Install a later release"
        )


def rng_states(device: th.device) -> dict[str, Any]:
    """States of the global random generators: Python's, NumPy's, torch's, and the device's if it has its own."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = th.cuda.get_rng_state(device)
    return states


def restore_rng(states: Mapping[str, Any], device: th.device) -> None:
    """Put back what :func:`rng_states` returned; a state of a device that is not used now is left out."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "cuda" in states:
        th.cuda.set_rng_state(states["cuda"].cpu(), device)


def module_tensors(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor], modules: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of some modules of a saved policy, checked against those of another one.

    :param state_dict: of the saved policy
    :param own: of the policy that takes them
    :param modules: names in :data:`MODULES`
    :raises ValueError: an unknown name, a module that one of them does not have, or a shape that differs; names all
    """
    unknown = [name for name in modules if name not in MODULES]
    if unknown or not modules:
        raise ValueError(f"modules must name some of {', '.join(MODULES)}, not {', '.join(unknown) or 'none'}")
    tensors, problems = {}, []
    normalized = any(key.startswith("world_model.normalizer.") for key in state_dict)
    if normalized and "decoder" in modules and "encoder" not in modules:
        problems.append("with normalize_vectors the decoder predicts in units that come with the encoder, so take both")
    for name in modules:
        prefixes = tuple(f"{prefix}." for prefix in MODULES[name])
        saved = {key: tensor for key, tensor in state_dict.items() if key.startswith(prefixes)}
        mine = {key: tensor for key, tensor in own.items() if key.startswith(prefixes)}
        if not saved and not mine:
            problems.append(f"neither the file nor the model has a {name}")
        for key in sorted(saved.keys() | mine.keys()):
            if key not in mine or key not in saved:
                problems.append(f"{key} is only in the {'file' if key in saved else 'model'}")
            elif saved[key].shape != mine[key].shape:
                problems.append(f"{key} is {tuple(saved[key].shape)} in the file and {tuple(mine[key].shape)} in the model")
        tensors.update(saved)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"The modules {', '.join(modules)} do not fit: {'; '.join(problems[:5])}{more}. Nothing was loaded")
    return tensors


# ------------------------------------------------------------------------------- arguments and spaces as plain data


def without_numpy(value: Any) -> Any:
    """An argument with Python's numbers in place of NumPy's, which ``torch.load(weights_only=True)`` does not read.

    :param value: a number, anything else that has no numbers in it, or a dict, list or tuple of such
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: without_numpy(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_numpy(part) for part in value)
    return value


def space_to_plain(space: spaces.Space) -> dict[str, Any]:
    """A space as strings, numbers, lists and tensors, which ``torch.load(weights_only=True)`` reads.

    :param space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    :raises TypeError: any other space
    """
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "spaces": {key: space_to_plain(part) for key, part in space.spaces.items()}}
    if isinstance(space, spaces.Box):
        bounds = {name: th.from_numpy(np.array(getattr(space, name))) for name in ("low", "high")}
        return {"kind": "Box", "dtype": space.dtype.name, **bounds}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": space.dtype.name}
    if isinstance(space, spaces.MultiDiscrete):
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist(), "dtype": space.dtype.name}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "shape": list(space.shape)}
    raise TypeError(f"{space} cannot be saved; allowed: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these")


def plain_to_space(plain: Mapping[str, Any]) -> spaces.Space:
    """Inverse of :func:`space_to_plain`."""
    kind = plain["kind"]
    if kind == "Dict":
        return spaces.Dict({key: plain_to_space(part) for key, part in plain["spaces"].items()})
    if kind == "Box":
        return spaces.Box(plain["low"].numpy(), plain["high"].numpy(), dtype=np.dtype(plain["dtype"]).type)
    if kind == "Discrete":
        # Earlier files do not name the type, and earlier releases of Gymnasium have int64 alone
        dtype = np.dtype(plain.get("dtype", "int64")).type
        return spaces.Discrete(plain["n"], start=plain["start"], **({} if dtype is np.int64 else {"dtype": dtype}))
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(plain["nvec"], dtype=np.dtype(plain["dtype"]).type, start=plain["start"])
    return spaces.MultiBinary(plain["shape"][0] if len(plain["shape"]) == 1 else plain["shape"])
