"""What tests of a real agent share: a control plane in their process, and a folder whose agent it has admitted."""

import signal

import pytest

from tests.support.fake_control_plane import ControlPlane, admit, ranks_of
from whaleflux.embedded.processes import forget_secrets


@pytest.fixture
async def control(tmp_path):
    plane = ControlPlane(tmp_path)
    await plane.start()
    yield plane
    await plane.stop()


@pytest.fixture
def state(control, tmp_path):
    folder = tmp_path / "state"
    admit(control, folder)
    yield folder
    for process in ranks_of(folder):
        process.signal(signal.SIGKILL)
    forget_secrets(tmp_path)  # of agents that a test has killed
