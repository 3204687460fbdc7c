"""A plugin of pytest that writes how each test ended: `pytest -p tools.test_outcomes --outcomes FILE`.

The file holds a JSON object: the id of a test -> `passed`, `skipped` or `failed`; the worst of its set-up, call and teardown counts.
A session that is ended from outside writes none.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_WORSE = ("passed", "skipped", "failed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="write how each test ended to this file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("outcomes"):
        config.pluginmanager.register(_Outcomes(config.getoption("outcomes")))


class _Outcomes:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._of[report.nodeid] = max(self._of.get(report.nodeid, "passed"), report.outcome, key=_WORSE.index)

    def pytest_sessionfinish(self) -> None:
        self._file.write_text(json.dumps(self._of), encoding="utf-8")
