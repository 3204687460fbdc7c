"""Which machine an agent says it is, and what it does when its node's name belongs to another one."""

import asyncio
import shutil

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import FailedPrecondition
from whaleflux.fleet.profile import Profile
from whaleflux.reasons import ErrorReason
from whaleflux_agent.devices.profile import ProfileSource
from whaleflux_agent.machine_id import host_id_file, machine_id
from whaleflux_agent.registration import NodeDescription, Registration


def host(folder, text):
    path = folder / "machine-id"
    path.write_text(text)
    return path


def test_one_installation_is_the_same_machine_at_each_start(tmp_path):
    here = host(tmp_path, "host-1\n")
    first = machine_id(tmp_path / "state", here)
    assert len(first) == 32 and machine_id(tmp_path / "state", here) == first
    assert (tmp_path / "state" / "identity" / "installation").stat().st_mode & 0o777 == 0o600


def test_another_state_directory_and_a_copy_on_another_host_are_other_machines(tmp_path):
    here = host(tmp_path, "host-1")
    first = machine_id(tmp_path / "a", here)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    ids = {first, machine_id(tmp_path / "b", here), machine_id(tmp_path / "copy", host(tmp_path, "host-2"))}
    assert len(ids) == 3


def test_a_host_without_an_id_of_its_own_has_one_by_its_installation(tmp_path):
    absent = tmp_path / "absent"
    assert (
        machine_id(tmp_path / "a", absent) == machine_id(tmp_path / "a", absent) != machine_id(tmp_path / "b", absent)
    )


def test_in_a_container_only_the_installation_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert host_id_file() is None
    assert machine_id(tmp_path / "a", None) == machine_id(tmp_path / "a", tmp_path / "absent")


class Taken:
    calls = 0

    async def RegisterNode(self, request, timeout):
        self.calls += 1
        assert request.machine_id == "m"
        raise FailedPrecondition("belongs to another machine", reason=ErrorReason.NODE_NAME_TAKEN)


async def test_an_agent_whose_name_belongs_to_another_machine_stops_and_does_not_try_again():
    inventory = Taken()
    description = NodeDescription(
        node="sites/s/nodes/n",
        boot_id="b",
        address="",
        host_address="h",
        agent_version="1",
        runtimes=(),
        machine_id="m",
    )
    source = ProfileSource(Profile.load("rtx4090x1"))
    registration = Registration(source, inventory, description, VirtualClock())
    await registration.read()
    with pytest.raises(FailedPrecondition, match="another machine"):
        async with asyncio.timeout(5):
            await registration.run()
    assert inventory.calls == 1
