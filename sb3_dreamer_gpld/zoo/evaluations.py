"""The file in which Stable-Baselines3's EvalCallback keeps its evaluations."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np


def read_evaluations(file: Path) -> dict[str, np.ndarray] | None:
    """What an EvalCallback has written.

    :param file: "evaluations.npz"
    :return: its arrays by name; None, after a warning, if it cannot be read: SB3 writes it in place, and a run may have been
        killed in between
    """
    try:
        with np.load(file) as log:
            return {name: log[name] for name in log.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        warnings.warn(f"{file} cannot be read and is left out ({error}): a run was killed while it was written", stacklevel=3)
        return None
