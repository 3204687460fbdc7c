"""A part of the machine that fails is unhealthy alone and says why; the others, and the machine's other facts, stay."""

import asyncio
from types import SimpleNamespace

import pytest

from tests.support.fake_nvml import FakeNvml, error, gpu, recovery
from whaleflux.clock import VirtualClock
from whaleflux.convert import node_from_proto
from whaleflux.errors import Unavailable
from whaleflux.fleet.xids import action_before_use, is_hardware_fault
from whaleflux.manifests.job_fields import Spec
from whaleflux.v1 import inventory_pb2
from whaleflux_agent.core.reconcile import Start, reconcile, rejection_reason
from whaleflux_agent.core.work import ActualTask, Stage, Work
from whaleflux_agent.devices import host
from whaleflux_agent.devices.nvml import NvmlSource
from whaleflux_agent.devices.source import DevicesUnreadable
from whaleflux_agent.registration import NodeDescription, Registration, facts
from whaleflux_inventory import convert as inventory_convert
from whaleflux_inventory.core.facts import check_registration

NODE = "sites/s/nodes/n"
DESCRIPTION = NodeDescription(
    node=NODE, boot_id="b", address="h:1", host_address="h", agent_version="1", runtimes=("process",)
)


def four(**of_third):
    return [gpu(0), gpu(1), gpu(2), gpu(3, **of_third)]


async def read(nvml, clock=None):
    return await NvmlSource(nvml, clock or VirtualClock()).read(NODE)


def health(machine):
    return {g.index: (g.healthy, g.unhealthy_reason.partition(":")[0]) for g in machine.node.gpus}


def registered(machine):
    """What inventory accepts of it and placement reads."""
    request = inventory_pb2.RegisterNodeRequest(name=NODE, boot_id="b", facts=facts(machine, DESCRIPTION))
    check_registration(inventory_convert.facts_of(request), inventory_convert.presence_of(request))
    return node_from_proto(inventory_pb2.Node(name=NODE, facts=request.facts))


LOST = error("GpuIsLost", "GPU is lost")
GOOD = (True, "")


@pytest.mark.parametrize(
    ("of_third", "reason"),
    [
        ({"handle": LOST}, "GPU_LOST"),
        ({"handle": error("Unknown", "Unknown Error")}, "UNREADABLE"),
        ({"memory": LOST}, "GPU_LOST"),
        ({"memory": error("Unknown", "Unknown Error")}, "UNREADABLE"),
        ({"uuid": LOST}, "GPU_LOST"),
        ({"uuid": error("NotSupported")}, "NO_UUID"),
        ({"name": error("Unknown")}, "UNREADABLE"),
        ({"pci": LOST}, "GPU_LOST"),
        ({"rows": LOST}, "GPU_LOST"),
        ({"rows": (0, 1, 0, 1)}, "ROW_REMAP_FAILED"),
        ({"handle": error("ResetRequired")}, "RESET_REQUIRED"),
        ({"fields": recovery(1)}, "RESET_GPU"),
        ({"fields": recovery(2)}, "RESTART_HOST"),
        ({"mig": (1, 1)}, "NO_MIG_INSTANCE"),
    ],
)
async def test_a_gpu_that_cannot_be_read_is_unhealthy_alone_also_when_the_agent_starts_then(of_third, reason):
    machine = await read(FakeNvml(four(**of_third)))
    assert health(machine) == {0: GOOD, 1: GOOD, 2: GOOD, 3: (False, reason)}
    node = registered(machine)
    assert [g.healthy for g in node.gpus] == [True, True, True, False]
    assert node.gpus[3].unhealthy_reason.startswith(reason)
    assert node.memory_bytes > 0


@pytest.mark.parametrize("of_third", [{"handle": LOST}, {"memory": LOST}, {"uuid": LOST}])
async def test_a_gpu_that_is_lost_later_keeps_its_place_and_name_and_is_well_again_when_it_answers(of_third):
    nvml = FakeNvml(four())
    source = NvmlSource(nvml, VirtualClock())
    before = await source.read(NODE)
    nvml.gpus = four(**of_third)
    lost = await source.read(NODE)
    assert health(lost)[3] == (False, "GPU_LOST")
    identity = [(g.index, g.uuid, g.model, g.memory_bytes) for g in lost.node.gpus]
    assert identity == [(g.index, g.uuid, g.model, g.memory_bytes) for g in before.node.gpus]
    nvml.gpus = four()
    assert await source.read(NODE) == before


async def test_a_gpu_that_the_driver_lists_no_more_is_lost_and_not_forgotten():
    nvml = FakeNvml(four())
    source = NvmlSource(nvml, VirtualClock())
    await source.read(NODE)
    nvml.gpus = four()[1:]  # the others move up by one place
    machine = await source.read(NODE)
    by_uuid = {g.uuid: (g.index, g.healthy) for g in machine.node.gpus}
    assert by_uuid == {
        "GPU-00000001": (0, True), "GPU-00000002": (1, True), "GPU-00000003": (2, True), "GPU-00000000": (3, False),
    }  # fmt: skip
    registered(machine)


async def test_a_gpu_without_a_memory_of_its_own_shares_the_hosts():
    part = gpu(0, "NVIDIA GB10", memory=error("NotSupported", "Not Supported"), links=0)
    machine = await read(FakeNvml([part]))
    [found] = machine.node.gpus
    assert (found.healthy, found.model, found.memory_bytes) == (True, "GB10", host.memory_bytes())
    registered(machine)


async def test_a_driver_that_fails_makes_every_gpu_unhealthy_and_says_so():
    nvml = FakeNvml(four())
    source = NvmlSource(nvml, VirtualClock())
    await source.read(NODE)
    nvml.no_driver = True
    machine = await source.read(NODE)
    assert health(machine) == dict.fromkeys(range(4), (False, "DRIVER_FAILS"))
    assert [c.reason for c in machine.conditions] == ["DRIVER_FAILS"]
    nvml.no_driver = False
    machine = await source.read(NODE)
    assert health(machine) == dict.fromkeys(range(4), GOOD) and not machine.conditions


@pytest.mark.parametrize("nvml", [FakeNvml([], no_driver=True), FakeNvml([])])
async def test_a_machine_without_gpus_joins_with_its_other_facts_and_a_condition(nvml, monkeypatch):
    monkeypatch.setattr(host, "nvidia_devices", lambda: 0)
    machine = await read(nvml)
    assert [(c.type, c.reason) for c in machine.conditions] == [("DriverWorks", "NO_GPU")]
    node = registered(machine)
    assert node.memory_bytes > 0 and node.cpu_millicores > 0 and node.network_bytes_per_s > 0
    assert facts(machine, DESCRIPTION).conditions[0].message


async def test_nvidia_devices_without_a_driver_are_told_from_a_machine_that_has_none(tmp_path, monkeypatch):
    for name, vendor, kind in (
        ("gpu", "0x10de", "0x030200"),
        ("audio", "0x10de", "0x040300"),
        ("nic", "0x15b3", "0x02"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    count = host.nvidia_devices(tmp_path)
    assert count == 1 and host.nvidia_devices(tmp_path / "absent") == 0
    monkeypatch.setattr(host, "nvidia_devices", lambda: count)
    [condition] = (await read(FakeNvml([], no_driver=True))).conditions
    assert condition.reason == "NO_DRIVER" and "1 NVIDIA device" in condition.message


async def xid(source, nvml, index, code):
    nvml.events = [(index, code)]
    while not (events := await source.next_events()):
        pass
    [event] = events
    assert (event.kind, event.gpu_index, event.code) == ("XID", index, code)


async def opened(nvml):
    clock = Rushing()
    source = NvmlSource(nvml, clock)
    await source.read(NODE)
    return source, clock


class Rushing(VirtualClock):
    """Time that passes whenever somebody sleeps; what was asked for is kept."""

    def __init__(self):
        super().__init__()
        self.asked_s = []

    async def sleep(self, seconds):
        self.asked_s.append(seconds)
        waiting = asyncio.ensure_future(super().sleep(seconds))
        await self.advance(max(0.0, seconds))
        await waiting


async def test_a_gpu_that_must_be_reset_is_out_of_use_until_the_driver_says_that_it_was():
    nvml = FakeNvml(four(fields=recovery(0)))
    source, clock = await opened(nvml)
    await xid(source, nvml, 3, 48)
    assert health(await source.read(NODE))[3] == (False, "XID_48")  # the driver has not yet summed it up
    nvml.gpus = four(fields=recovery(1))
    await clock.sleep(6)
    assert health(await source.read(NODE))[3] == (False, "RESET_GPU")
    nvml.gpus = four(fields=recovery(0))
    assert health(await source.read(NODE))[3] == GOOD


async def test_where_the_driver_says_nothing_a_fatal_xid_stays():
    nvml = FakeNvml(four())
    source, clock = await opened(nvml)
    await xid(source, nvml, 3, 79)
    await clock.sleep(3600)
    assert health(await source.read(NODE)) == {0: GOOD, 1: GOOD, 2: GOOD, 3: (False, "XID_79")}


@pytest.mark.parametrize("code", [13, 31, 43, 45, 63, 92, 94, 74, 9999])
async def test_an_error_of_the_program_or_of_one_link_leaves_the_gpu_in_use(code):
    nvml = FakeNvml(four())
    source, _ = await opened(nvml)
    await xid(source, nvml, 3, code)
    assert health(await source.read(NODE))[3] == GOOD


def test_the_table_of_xids_tells_hardware_from_programs():
    assert all(is_hardware_fault(code) for code in (48, 62, 64, 74, 79, 94, 95, 119, 120, 140, 149))
    assert not any(is_hardware_fault(code) for code in (8, 13, 31, 32, 43, 45, 63, 68, 92, 137, 9999))
    assert all(is_hardware_fault(code) for code in range(200) if action_before_use(code))


async def rounds(source, clock, seconds):
    """Rounds of waiting for events, and events, in so much virtual time."""
    count, events, end_s = 0, 0, clock.monotonic() + seconds
    while clock.monotonic() < end_s and count < 5000:
        events += len(await source.next_events())
        count += 1
    return count, events


async def test_without_a_driver_waiting_for_events_pauses():
    clock = Rushing()
    source = NvmlSource(FakeNvml([], no_driver=True), clock)
    await source.read(NODE)
    count, events = await rounds(source, clock, 60)
    assert count <= 20 and events == 0


async def test_gpus_that_report_no_events_are_asked_once_a_minute():
    nvml = FakeNvml(four())
    nvml.reports_events = False
    source, clock = await opened(nvml)
    count, events = await rounds(source, clock, 600)
    assert count <= 15 and events == 0


@pytest.mark.parametrize(("failure", "most_events"), [(LOST, 1), (error("Unknown"), 0)])
async def test_waiting_that_fails_at_once_pauses_longer_each_time_and_a_loss_is_said_once(failure, most_events):
    nvml = FakeNvml(four())
    nvml.events = [failure]
    source, clock = await opened(nvml)
    count, events = await rounds(source, clock, 600)
    assert count <= 25 and events == most_events


async def test_a_lost_gpu_does_not_hide_the_errors_of_the_others():
    nvml = FakeNvml(four())
    nvml.events = [LOST, (1, 48)]
    source, _ = await opened(nvml)
    seen = []
    while len(seen) < 2:
        seen += await source.next_events()
    assert [(event.kind, event.code) for event in seen] == [("GPU_LOST", 0), ("XID", 48)]


class Asked(FakeNvml):
    """Says who computes: a GPU's `computing` are pids, or an exception; `used` are bytes by pid."""

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return next(gpu for gpu in self.gpus if gpu["uuid"] == uuid)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        used = handle.get("used", {})
        return [SimpleNamespace(pid=pid, usedGpuMemory=used.get(pid)) for pid in self._answer(handle, "computing", ())]


async def test_nobody_computes_on_a_gpu_that_is_lost_and_others_are_asked_all_the_same():
    nvml = Asked(four())
    nvml.gpus[1]["computing"] = LOST
    nvml.gpus[2]["computing"] = [77]
    source, _ = await opened(nvml)
    assert await source.computing(["GPU-00000001", "GPU-00000002"]) == frozenset({77})


async def test_memory_is_told_by_process_where_the_driver_knows_it():
    nvml = Asked(four())
    nvml.gpus[1] |= {"computing": [7, 8], "used": {7: 5}}
    source, _ = await opened(nvml)
    assert await source.memory_used(["GPU-00000001", "GPU-00000002"]) == {"GPU-00000001": {7: 5}, "GPU-00000002": {}}
    nvml.gpus[1]["computing"] = error("Unknown")
    with pytest.raises(DevicesUnreadable):
        await source.memory_used(["GPU-00000001"])


@pytest.mark.parametrize("kind", ["Unknown", "ResetRequired"])
async def test_a_gpu_that_fails_to_say_who_computes_is_not_free(kind):
    nvml = Asked(four())
    nvml.gpus[1]["computing"] = error(kind)
    source, _ = await opened(nvml)
    with pytest.raises(DevicesUnreadable):
        await source.computing(["GPU-00000001"])


async def test_a_driver_that_cannot_say_who_computes_names_nobody():
    source, _ = await opened(FakeNvml(four()))
    assert await source.computing(["GPU-00000001"]) == frozenset()


class Inventory:
    def __init__(self, failures=0):
        self.failures, self.requests = failures, []

    async def RegisterNode(self, request, timeout):
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        self.requests.append(request)


async def running(nvml, inventory, clock):
    registration = Registration(NvmlSource(nvml, clock), inventory, DESCRIPTION, clock)
    await registration.read()
    return registration, asyncio.create_task(registration.run())


async def until(clock, done, step_s=0.1, most_s=120):
    """Lets virtual time pass until `done`; returns how much. The reader's own thread answers in real time."""
    begun_s = clock.monotonic()
    while not done():
        await clock.advance(step_s)
        await asyncio.sleep(0.001)
        assert clock.monotonic() - begun_s < most_s
    return clock.monotonic() - begun_s


async def test_a_gpu_that_is_lost_is_registered_at_once_and_refused_to_work():
    nvml, inventory, clock = FakeNvml(four()), Inventory(), VirtualClock()
    registration, loop = await running(nvml, inventory, clock)
    await until(clock, lambda: len(inventory.requests) == 1)
    await clock.advance(2)
    nvml.gpus = four(memory=LOST)
    registration.read_soon()
    assert await until(clock, lambda: len(inventory.requests) == 2) < 2
    assert [g.healthy for g in inventory.requests[-1].facts.gpus] == [True, True, True, False]
    assert registration.healthy_gpus() == {f"GPU-{i:08d}" for i in range(3)}
    loop.cancel()


async def test_while_inventory_is_away_the_machine_is_read_on_and_the_newest_reading_is_registered():
    nvml, inventory, clock = FakeNvml(four()), Inventory(failures=8), VirtualClock()
    registration, loop = await running(nvml, inventory, clock)
    await until(clock, lambda: inventory.failures < 6)
    nvml.gpus = four(memory=LOST)
    await until(clock, lambda: registration.healthy_gpus() == {f"GPU-{i:08d}" for i in range(3)})
    await until(clock, lambda: inventory.requests)
    assert [g.healthy for g in inventory.requests[0].facts.gpus] == [True, True, True, False]
    loop.cancel()


async def test_an_agent_that_starts_on_fewer_gpus_takes_tasks_by_identity():
    """GPU 0 fell off the bus, so the driver counts the others from 0: what was 3 is 2 now, and is held by an adopted task."""
    machine = await read(FakeNvml([gpu(1), gpu(2), gpu(3)]))
    assert [(g.index, g.uuid) for g in machine.node.gpus] == [(i, f"GPU-{i + 1:08d}") for i in range(3)]
    healthy = {g.uuid for g in machine.node.gpus if g.healthy}

    def work(name, number):
        spec = Spec(command=("x",))
        job = f"queues/q/jobs/{name}"
        return Work(name, job, 1, (f"GPU-{number:08d}",), start=True, rendezvous="h:1", spec=spec)

    assert "GPU-00000000 is not there" in rejection_reason(work("lost", 0), healthy, {"process"})
    tasks = [work(f"of{number}", number) for number in (2, 3)]
    assert [rejection_reason(task, healthy, {"process"}) for task in tasks] == ["", ""]
    adopted = ActualTask("adopted", "queues/q/jobs/adopted", 1, ("GPU-00000003",), Stage.RUNNING)
    known = {t.task: ActualTask(t.task, t.job, 1, t.gpu_uuids, Stage.ACCEPTED) for t in tasks} | {"adopted": adopted}
    wanted = {t.task: t for t in tasks} | {"adopted": work("adopted", 3)}
    assert reconcile(wanted, known, {}, fresh=True) == [Start("of2")]
