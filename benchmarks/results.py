"""Files of results, each written in one step."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sb3_dreamer_gpld.saving import atomic_file


def write_json(path: Path, results: Any) -> None:
    """Write results as JSON."""
    with atomic_file(path) as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())


def write_csv(path: Path, rows: Sequence[dict[str, Any]], digits: int = 6) -> None:
    """Write rows of equal keys; floats with that many significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.{digits}g}" if isinstance(value, float) else value for key, value in row.items()})
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file of numbers; an empty cell is NaN."""
    rows = read_csv(path)
    return {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}
