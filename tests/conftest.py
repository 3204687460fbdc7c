"""Unit tests and simulations have no real time: their loop's time jumps (see `tests.support.virtual_time`)."""

import asyncio
import tempfile
from pathlib import Path

import pytest

from tests.support.virtual_time import VirtualTimeLoop

_VIRTUAL = {Path(__file__).parent / "unit", Path(__file__).parent / "simulation"}


def pytest_asyncio_loop_factories(config, item):
    virtual = _VIRTUAL & {*item.path.parents}
    return {"virtual": VirtualTimeLoop} if virtual else {"real": asyncio.new_event_loop}


@pytest.fixture(autouse=True, scope="session")
def no_fleets_of_the_user(tmp_path_factory):
    """Tests neither reach the fleets that whoever runs them knows, nor become known to their commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(autouse=True, scope="session")
def own_temporary_files():
    """What tests start puts its temporary files where they go with the session: agents that are killed leave some."""
    tempfile.gettempdir()  # pytest's own folders stay where one looks for them
    with (
        tempfile.TemporaryDirectory(prefix="wf-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        yield
