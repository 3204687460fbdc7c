"""Providers of rented machines that are programs of this host."""

import asyncio
import stat

import pytest

from tests.unit.test_rentals import CA, World
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.lease_records import core_lease, core_offer
from whaleflux_inventory.providers import simulated, simulated_machine
from whaleflux_inventory.providers.api import FLEET_TAG, LEASE_TAG, NoCapacity
from whaleflux_inventory.providers.command import CommandKind


async def test_a_provider_behind_an_executable(tmp_path):
    shop = tmp_path / "shop"
    shop.write_text(
        """#!/bin/sh
case $1 in
launch) cat > "$(dirname "$0")/asked.json"; echo '{"id": "m-1"}';;
list) echo '{"machines": [{"id": "m-1", "created_s": 5, "tags": {"FLEET": "f", "LEASE": "leases/l"}}, {"id": "x", "created_s": 1, "tags": {}}]}';;
terminate) echo '{"error": "no_capacity", "message": "not today"}';;
esac
""".replace("FLEET", FLEET_TAG).replace("LEASE", LEASE_TAG)
    )
    shop.chmod(shop.stat().st_mode | stat.S_IXUSR)
    world = World(tmp_path)
    await world.offer(provider="command", machine_type="m", options={"command": "shop", "boot_s": ""})
    record = await world.lease()
    offer = core_offer(record.offer)
    provider = CommandKind(tmp_path).open(offer, {"KEY": "k"})
    asked = Launching(FrontDoor("fleet.example:7443"), CA, 60.0).request(core_lease(record), offer, "f")
    assert await provider.launch(asked) == "m-1"
    assert '"lease": "leases/' in (tmp_path / "asked.json").read_text()
    assert [(one.id, one.lease) for one in await provider.machines("f")] == [("m-1", "leases/l")]
    with pytest.raises(NoCapacity, match="not today"):
        await provider.terminate("m-1")


async def test_a_machine_that_ends_by_itself_in_this_moment_is_sent_no_signal(tmp_path, monkeypatch):
    folder, sent = tmp_path / "sim-1", []
    folder.mkdir()
    played = await asyncio.create_subprocess_exec("/bin/sh", "-c", "read _", str(folder), stdin=asyncio.subprocess.PIPE)
    pid = folder / simulated_machine.PID
    pid.write_text(str(played.pid))
    monkeypatch.setattr(simulated.Path, "touch", lambda _: pid.unlink())
    monkeypatch.setattr(simulated.os, "kill", lambda number, _: sent.append(number))
    await simulated.SimulatedCloud(tmp_path, {}).terminate("sim-1")
    await played.communicate(b"\n")
    assert sent == [played.pid], "0 is everybody of this process's group"
