"""One run of the main job for all tests of this folder: shortened, its spans collected."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.spans import Collector, SeenSpan, collecting
from tests.support.suite import state_folder
from whaleflux.demo.run import DemoOptions, run

STEPS, EVERY = 50, 5


@dataclass
class MainRun:
    """What `whaleflux demo` returned and wrote, and every span of the suite and its agents."""

    exit_code: int = -1
    report: dict[str, Any] = field(default_factory=dict)
    spans: list[SeenSpan] = field(default_factory=list)
    wall_s: float = 0.0


@pytest.fixture(scope="session")
def main_run() -> Iterator[MainRun]:
    with state_folder() as folder, collecting() as collector:
        yield _demo(folder, collector)


def _demo(folder, collector: Collector) -> MainRun:
    report, began = folder / "report.json", time.monotonic()
    options = DemoOptions(
        state=folder / "demo", steps=STEPS, every=EVERY, report=report, otlp_endpoint=collector.endpoint
    )
    code = run(options)  # stops the suite, which sends its last spans
    return MainRun(code, json.loads(report.read_text()), collector.spans, time.monotonic() - began)
