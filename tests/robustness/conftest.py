"""One suite with three machines for all tests of this folder: each test leaves it whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.suite import RunningSuite, running_suite
from whaleflux.demo.fleet import Machine

MACHINES = (
    Machine("onprem", "a", "h200x8"),
    Machine("onprem", "b", "h200x8"),
    Machine("cloud", "c", "h200x8"),
)


@pytest.fixture(scope="session")
def suite() -> Iterator[RunningSuite]:
    with running_suite(
        settings={"WHALEFLUX_AVOID_S": "5"}
    ) as started:  # a job waits so long for nodes that all failed it
        asyncio.run(started.join(MACHINES))
        yield started
