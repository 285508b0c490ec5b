"""SB3's own tests, run with DreamerGPLD in place of SAC, DQN, A2C and the others.

They are those of the installed version's source release, fetched with pip at the first run and kept in ``.cache``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sb3_suite

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_run" name="test_dqn"/>
<testcase classname="tests.test_run" name="test_train_freq[4]"><failure message="no">E  it broke</failure></testcase>
<testcase classname="tests.test_cnn" name="test_cnn[SAC]"><skipped message="no GPU"/></testcase>
<testcase classname="" name="tests.test_gone"><error message="collection failure">ImportError</error></testcase>
</testsuite></testsuites>"""


def check(part: str, folder: Path, timeout: float) -> None:
    try:
        sb3_suite.fetch()
    except sb3_suite.NoNetwork as error:
        problem = f"SB3's tests are not in {sb3_suite.CACHE.name} and there is no network to fetch them: {error}"
        pytest.fail(problem) if os.environ.get("CI") else pytest.skip(problem)
    result = sb3_suite.run(part, folder, timeout)
    failures = [f"{name}\n{text[-1500:]}" for name, text in result.failed.items()]
    if failures:
        pytest.fail(f"{len(failures)} tests of SB3 failed:\n" + "\n\n".join(failures), pytrace=False)
    missing = [name for name in sb3_suite.selected(part) if not result.has_run(name)]
    if missing:
        pytest.fail(f"tests of SB3 that were not found, or only skipped: {missing}", pytrace=False)


def test_failures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of SB3 that failed, could not be imported, or was only skipped is not taken for one that passed."""
    (tmp_path / "report.xml").write_text(REPORT)
    result = sb3_suite.Result(tmp_path / "report.xml")
    assert result.passed == ["test_run.py::test_dqn"]
    assert result.failed["tests.test_gone"] == "ImportError"
    assert result.failed["test_run.py::test_train_freq[4]"] == "E  it broke" and len(result.failed) == 2
    assert result.has_run("test_run.py::test_dqn") and not result.has_run("test_cnn.py::test_cnn")
    monkeypatch.setattr(sb3_suite, "fetch", lambda: tmp_path)
    monkeypatch.setattr(sb3_suite, "run", lambda *args: result)
    with pytest.raises(
        pytest.fail.Exception, match=r"(?s)2 tests of SB3 failed.*test_run.py::test_train_freq\[4\]\nE  it broke"
    ):
        check("short", tmp_path, 1.0)
    result.failed.clear()
    with pytest.raises(pytest.fail.Exception, match="only skipped.*test_cnn.py::test_cnn'"):
        check("short", tmp_path, 1.0)


def test_every_long_test_is_selected() -> None:
    assert set(sb3_suite.selected("long")) == sb3_suite.LONG
    assert not set(sb3_suite.selected("short")) & sb3_suite.LONG


def test_short(tmp_path: Path) -> None:
    check("short", tmp_path, timeout=900)


@pytest.mark.long
def test_long(tmp_path: Path) -> None:
    check("long", tmp_path, timeout=1800)
