"""Providers of rented machines that are programs of this host."""

import asyncio
import contextlib
import os
import stat
from pathlib import Path

import pytest

from tests.unit.test_rentals import CA, World
from whaleflux_inventory.core.lease_rules import Terms
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.lease_records import core_lease, core_offer
from whaleflux_inventory.providers import command, simulated, simulated_machine
from whaleflux_inventory.providers.api import FLEET_TAG, LEASE_TAG, AuthFailed, NoCapacity
from whaleflux_inventory.providers.command import CommandKind
from whaleflux_inventory.providers.user_data import user_data


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


async def test_an_agent_that_dies_on_a_rented_machine_is_started_again_and_one_that_ends_is_not(tmp_path):
    world = World(tmp_path)
    await world.offer()
    record = await world.lease()
    asked = Launching(FrontDoor("fleet.example:7443"), CA, 60.0).request(
        core_lease(record), core_offer(record.offer), "f"
    )
    for name, does in (
        ("whaleflux", f"echo $1 >> {tmp_path}/ran; test $(wc -l < {tmp_path}/ran) -ge 3"),
        ("sleep", ":"),
    ):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{does}\n")
        program.chmod(0o755)
    last = user_data(asked).splitlines()[-1]
    shell = await asyncio.create_subprocess_exec("/bin/bash", "-c", last, env={"PATH": str(tmp_path)})
    assert await shell.wait() == 0
    assert (tmp_path / "ran").read_text().split() == ["agent"] * 3


def shop_that(tmp_path, does):
    shop = tmp_path / "shop"
    shop.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{does}\n")
    shop.chmod(shop.stat().st_mode | stat.S_IXUSR)
    offer = Offer("offers/o", "command", "m", "sites/s", Terms(1.0), options={"command": "shop"})
    return CommandKind(tmp_path).open(offer, {})


def listing(*, id_='"m"', created_s="5", taken_s="0"):
    machine = f'{{"id": {id_}, "created_s": {created_s}, "taken_s": {taken_s}, "tags": {{"{FLEET_TAG}": "f"}}}}'
    return f"""echo '{{"machines": [{machine}]}}'"""


def group_of(tmp_path):
    """Processes that are left of it, with a dead child that we have not waited for."""
    number, left = (tmp_path / "pid").read_text().strip(), []
    for stat_file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat_file.read_text().rpartition(")")[2].split()
            left += [fields[:3]] if fields[2] == number and (fields[0] != "Z" or fields[1] == str(os.getpid())) else []
    return left


async def test_an_answer_without_end_is_read_no_further_than_an_answer_may_be_long(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "MAX_ANSWER_BYTES", 1 << 20)
    provider = shop_that(tmp_path, "exec yes")
    async with asyncio.timeout(20):
        with pytest.raises(OSError, match="more than 1048576 bytes"):
            await provider.machines("f")
    assert group_of(tmp_path) == []


async def test_what_does_not_answer_in_time_is_ended_with_all_that_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CALL_WITHIN_S", 2.0)
    provider = shop_that(tmp_path, "sleep 600 & sleep 600")
    with pytest.raises(TimeoutError):
        await provider.machines("f")
    assert group_of(tmp_path) == []


async def test_what_it_leaves_behind_holding_its_answer_open_is_ended_too(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CALL_WITHIN_S", 2.0)
    provider = shop_that(tmp_path, "sleep 600 & exit 0")
    with pytest.raises(TimeoutError):
        await provider.machines("f")
    async with asyncio.timeout(10):  # nobody waits for a grandchild but the kernel
        while group_of(tmp_path):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("kill -9 $$", "code -9"),
        ("echo nothing; exit 3", "code 3 and no JSON"),
        ("echo '[]'", "no JSON object"),
        ("""echo '{"machines": 7}'""", "did not list machines"),
        (listing(created_s="1e300"), "lacks id, tags or created_s"),
        (listing(created_s="1" + "0" * 400), "lacks id, tags or created_s"),
        (listing(created_s="-5"), "lacks id, tags or created_s"),
        (listing(created_s="NaN"), "lacks id, tags or created_s"),
        (listing(id_='""'), "lacks id, tags or created_s"),
        (listing(id_='"' + "m" * 300 + '"'), "lacks id, tags or created_s"),
        (listing(id_="7"), "lacks id, tags or created_s"),
        (listing(taken_s="1e40"), "lacks id, tags or created_s"),
    ],
)
async def test_an_answer_that_is_none_leaves_what_is_there_unknown(tmp_path, does, says):
    with pytest.raises(OSError, match=says):
        await shop_that(tmp_path, does).machines("f")


async def test_the_parts_of_a_secret_are_no_variables_that_a_shell_or_a_loader_obeys(tmp_path):
    """Whoever may declare offers and secrets runs nothing of theirs as inventory, which has the fleet's authority."""
    made = tmp_path / "made"
    shop = tmp_path / "shop"
    shop.write_text("""#!/bin/bash\nprintf '{"id": "%s"}' "$SECRET_TOKEN"\n""")
    shop.chmod(shop.stat().st_mode | stat.S_IXUSR)
    world = World(tmp_path)
    await world.offer(provider="command", machine_type="m", options={"command": "shop", "boot_s": ""})
    record = await world.lease()
    offer = core_offer(record.offer)
    keys = {"TOKEN": "t-1", "BASH_ENV": f"$(touch {made})", "PATH": "/nowhere", "LD_PRELOAD": "/nowhere.so"}
    asked = Launching(FrontDoor("fleet.example:7443"), CA, 60.0).request(core_lease(record), offer, "f")
    assert await CommandKind(tmp_path).open(offer, keys).launch(asked) == "t-1"
    assert not made.exists()


async def test_who_reads_nothing_of_a_long_question_is_still_heard(tmp_path):
    provider = shop_that(tmp_path, """echo '{"error": "auth", "message": "no"}'""")
    with pytest.raises(AuthFailed):
        await provider.terminate("m" * (4 << 20))


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
