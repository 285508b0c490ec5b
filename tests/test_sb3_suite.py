"""SB3's own tests, run with DreamerGPLD in place of SAC, DQN, A2C and the others.

They are those of the installed version's source release, fetched with pip at the first run and kept in ``.cache``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sb3_suite


def check(part: str, folder: Path, timeout: float) -> None:
    try:
        sb3_suite.fetch()
    except sb3_suite.NoNetwork as error:
        pytest.skip(f"SB3's tests are not in {sb3_suite.CACHE.name} and there is no network to fetch them: {error}")
    result = sb3_suite.run(part, folder, timeout)
    failures = [f"{name}\n{text[-1500:]}" for name, text in result.failed.items()]
    assert not failures, f"{len(failures)} tests of SB3 failed:\n" + "\n\n".join(failures)
    missing = [name for name in sb3_suite.selected(part) if not result.has_run(name)]
    assert not missing, f"tests of SB3 that were not found, or only skipped: {missing}"


def test_short(tmp_path: Path) -> None:
    check("short", tmp_path, timeout=900)


@pytest.mark.long
def test_long(tmp_path: Path) -> None:
    check("long", tmp_path, timeout=1800)
