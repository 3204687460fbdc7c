"""Machines that are played break as real ones do."""

import asyncio

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument
from whaleflux.fleet import sickness
from whaleflux.fleet.model import LinkKind
from whaleflux.fleet.profile import Profile
from whaleflux.fleet.sickness import Fault
from whaleflux_agent.devices.profile import ProfileSource, event_of


@pytest.mark.parametrize(
    ("kind", "text", "fault"),
    [
        ("lost", "3", Fault(3, 0)),
        ("lost", "3@60s", Fault(3, 60)),
        ("xid", "79", Fault(0, 0, 79)),
        ("xid", "79/2@5 min", Fault(2, 300, 79)),
        ("ecc", "1@1s", Fault(1, 1, 48)),
    ],
)
def test_faults_are_read(kind, text, fault):
    assert sickness.parse(kind, text, 8) == fault


@pytest.mark.parametrize(
    ("kind", "text"),
    [("lost", "8"), ("lost", "-1"), ("lost", ""), ("xid", ""), ("xid", "0"), ("xid", "x/1"), ("xid", "79/9"),
     ("ecc", "1@soon"), ("ecc", "one"), ("lost", "0@400 d")],
)  # fmt: skip
def test_what_is_no_fault_is_told_with_its_form(kind, text):
    with pytest.raises(InvalidArgument, match=rf"{kind}=.*0 to 7"):
        sickness.parse(kind, text, 8)


def test_what_an_xid_asks_for_takes_the_gpu_out_of_use_and_says_that_it_is_simulated():
    assert Fault(0, 0, 79).unhealthy_reason == "XID_79: restart the host (simulated)"
    assert Fault(0, 0, 94).unhealthy_reason == ""
    assert Fault(0, 0).unhealthy_reason.startswith("GPU_LOST: ")
    assert "simulated" in event_of(Fault(0, 0, 94)).detail


NODE = "sites/s/nodes/n"


class TestPlayedMachines:
    async def test_a_gpu_breaks_when_its_time_has_come_and_the_driver_says_so(self):
        clock = VirtualClock()
        source = ProfileSource(Profile.load("h200x8:lost=3@60s:xid=79/0@30s"), clock)
        assert all(gpu.healthy for gpu in (await source.read(NODE)).node.gpus)
        told = []

        async def listen():
            while len(told) < 2:
                told.extend(await source.next_events())

        listening = asyncio.ensure_future(listen())
        for _ in range(70):
            await asyncio.sleep(0)
            await clock.advance(1)
        await listening
        assert [(event.kind, event.gpu_index, event.code) for event in told] == [("XID", 0, 79), ("GPU_LOST", 3, 0)]
        broken = {gpu.index: gpu.unhealthy_reason for gpu in (await source.read(NODE)).node.gpus if not gpu.healthy}
        assert broken == {0: "XID_79: restart the host (simulated)", 3: sickness.Fault(3, 0).unhealthy_reason}

    async def test_gpus_of_several_kinds_are_in_one_machine(self):
        machine = await ProfileSource(Profile.load("h200x4+a100x4pcie:lost=1")).read(NODE)
        gpus = machine.node.gpus
        assert [gpu.model for gpu in gpus] == ["H200"] * 4 + ["A100-80GB"] * 4
        assert [gpu.index for gpu in gpus] == list(range(8))
        assert [gpu.index for gpu in gpus if not gpu.healthy] == [5]
        kinds = {(link.a, link.b): link.kind for link in machine.node.links}
        assert len(kinds) == 28
        assert kinds[0, 3] is LinkKind.NVLINK
        assert kinds[4, 5] is LinkKind.PCIE_SWITCH
        assert kinds[0, 4] is LinkKind.SYSTEM
        assert machine.node.price.usd_per_gpu_hour == pytest.approx((2.6 + 1.1) / 2)
        assert machine.node.simulated

    async def test_gpus_are_spread_over_numa_nodes(self):
        machine = await ProfileSource(Profile.load("h200x8:numa=2")).read(NODE)
        assert [gpu.numa_node for gpu in machine.node.gpus] == [0] * 4 + [1] * 4

    async def test_options_go_together(self):
        machine = await ProfileSource(Profile.load("h200x4:mig=7*1g.18gb:numa=1+rtx4090x1")).read(NODE)
        assert len(machine.node.gpus) == 4 * 7 + 1
        assert len({gpu.uuid for gpu in machine.node.gpus}) == 29

    @pytest.mark.parametrize("text", ["h200x8:", "h200x8:fast=1", "h200x8:numa=0", "h200x8+", "h200x8:mig=9g.1gb"])
    def test_what_is_no_option_is_told(self, text):
        with pytest.raises(InvalidArgument) as wrong:
            Profile.load(text)
        assert wrong.value.violations[0].field == "profile"
