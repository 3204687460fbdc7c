"""What the agent reads of its GPUs, and how it gets to the console."""

import asyncio
import threading
from datetime import timedelta
from http.client import BadStatusLine
from urllib.error import URLError
from urllib.request import OpenerDirector

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.counting_nvml import CountingNvml, counting
from tests.support.fake_nvml import error
from whaleflux.clock import VirtualClock
from whaleflux.errors import FieldViolation, InvalidArgument, PermissionDenied, StatusError, Unavailable
from whaleflux.fleet import activity
from whaleflux.fleet.activity import Spell
from whaleflux.fleet.profile import Profile
from whaleflux.v1 import agent_pb2, usage_pb2
from whaleflux_agent.core import usage
from whaleflux_agent.core.usage import IdlePower
from whaleflux_agent.core.work import Work
from whaleflux_agent.devices.profile import ProfileSource
from whaleflux_agent.usage import dcgm, gpm
from whaleflux_agent.usage.dcgm import Exporter
from whaleflux_agent.usage.network import NetworkCounters
from whaleflux_agent.usage.nvml import NvmlUsage
from whaleflux_agent.usage.outbox import UsageOutbox
from whaleflux_agent.usage.played import PlayedUsage
from whaleflux_agent.usage.sampler import Sampled, Sampler
from whaleflux_agent.usage.sender import NOBODY_TAKES_IT_S, UsageSender
from whaleflux_agent.usage.steps import MOST_RECORDS, StepLog, wrong

NODE = "sites/s/nodes/n"
JOB = "queues/default/jobs/train"
BUSY = {gpm.GRAPHICS: 99.0, gpm.SM: 97.0, gpm.TENSOR: 91.5, gpm.DRAM: 30.0, gpm.PCIE_SENT: 100.0}


def source_of(nvml, clock, url=""):
    return NvmlUsage(nvml, Exporter(url), clock, within_s=5)


async def interval(source, clock, devices, *, change=lambda: None, ticks=10, held=()):
    """One interval of ten seconds."""
    change()
    for _ in range(ticks):
        await clock.advance(1.0)
        await source.tick()
    return {seen.device: seen for seen in await source.sample(devices, held)}


class TestCounters:
    async def test_tensor_time_counts_by_the_clock_that_the_gpu_had(self):
        nvml, clock = CountingNvml([counting(0)]), VirtualClock()
        source = source_of(nvml, clock)
        await source.sample(["GPU-0"], ())

        def throttled():
            nvml.gpus[0] |= {"percent": BUSY, "clock": 1485}

        seen = (await interval(source, clock, ["GPU-0"], change=throttled))["GPU-0"]
        assert (seen.source, seen.clock_ppm, seen.sm_active_ppm) == ("gpm", 750_000, 970_000)
        assert seen.tensor_ppm == pytest.approx(686_250, abs=1)
        assert seen.pcie_sent_bytes == 10 * 100 * (1 << 20)
        assert seen.pcie_received_bytes is None, "the driver did not say"
        await source.close()

    async def test_every_sample_goes_back_to_the_driver_but_the_one_that_is_compared_with(self):
        nvml, clock = CountingNvml([counting(0, percent=BUSY), counting(1, percent=BUSY)]), VirtualClock()
        source = source_of(nvml, clock)
        for _ in range(5):
            await interval(source, clock, ["GPU-0", "GPU-1"])
        assert len(nvml.samples) == 2
        await interval(source, clock, ["GPU-1"])
        assert len(nvml.samples) == 1
        await source.close()
        assert nvml.samples == set()

    async def test_cumulative_counters_are_told_as_what_they_grew_by(self):
        nvml, clock = CountingNvml([counting(0, sent_kib=7, received_kib=1 << 40)]), VirtualClock()
        source = source_of(nvml, clock)
        (first,) = await source.sample(["GPU-0"], ())
        assert (first.power_mw, first.nvlink_sent_bytes) == (80_000, None)

        def work():
            nvml.gpus[0] |= {"power_mw": 500_000, "sent_kib": 7 + 1000, "received_kib": 3}

        seen = (await interval(source, clock, ["GPU-0"], change=work))["GPU-0"]
        assert (seen.power_mw, seen.nvlink_sent_bytes) == (500_000, 1_024_000)
        assert seen.nvlink_received_bytes is None, "the driver was loaded anew"

    async def test_without_performance_counters_there_is_no_word_on_tensor_cores(self):
        nvml, clock = CountingNvml([counting(0, gpm=False, busy=80)]), VirtualClock()
        source = source_of(nvml, clock)
        await source.sample(["GPU-0"], ())
        seen = (await interval(source, clock, ["GPU-0"]))["GPU-0"]
        assert (seen.source, seen.tensor_ppm, seen.sm_active_ppm, seen.busy_ppm) == ("nvml", None, None, 800_000)
        assert nvml.reads == 0

    async def test_who_may_not_read_counters_reads_the_rest(self):
        nvml, clock = (
            CountingNvml([counting(0, gpm_error=error("NoPermission")), counting(1, percent=BUSY)]),
            VirtualClock(),
        )
        source = source_of(nvml, clock)
        await source.sample(["GPU-0", "GPU-1"], ())
        seen = await interval(source, clock, ["GPU-0", "GPU-1"])
        assert [(one.source, one.tensor_ppm) for one in seen.values()] == [("nvml", None), ("gpm", 915_000)]
        assert len(nvml.samples) == 1

    async def test_a_gpu_that_is_lost_leaves_the_others_alone(self):
        nvml, clock = CountingNvml([counting(0, percent=BUSY), counting(1, percent=BUSY)]), VirtualClock()
        source = source_of(nvml, clock)
        await source.sample(["GPU-0", "GPU-1"], ())
        gone = dict.fromkeys(("clock", "max_clock", "busy", "power_mw", "memory", "gpm_error"), error("GpuIsLost"))
        seen = await interval(source, clock, ["GPU-0", "GPU-1"], change=lambda: nvml.gpus[0].update(gone))
        assert (seen["GPU-0"].tensor_ppm, seen["GPU-0"].power_mw, seen["GPU-0"].busy_ppm) == (None, None, None)
        assert seen["GPU-1"].tensor_ppm == 915_000

    async def test_mig_instances_are_read_one_by_one(self):
        parts = [
            counting(0, uuid="MIG-a", gi=3, percent=BUSY),
            counting(0, uuid="MIG-b", gi=5, percent={gpm.TENSOR: 10.0}),
        ]
        nvml, clock = CountingNvml([counting(0, instances=parts)]), VirtualClock()
        source = source_of(nvml, clock)
        await source.sample(["MIG-a", "MIG-b"], ())
        seen = await interval(source, clock, ["MIG-a", "MIG-b"])
        assert [one.tensor_ppm for one in seen.values()] == [915_000, 100_000]
        assert seen["MIG-a"].power_mw is None, "power is the whole GPU's"

    async def test_a_driver_that_hangs_leaves_the_interval_unknown(self):
        nvml, clock, answer = CountingNvml([counting(0)]), VirtualClock(), threading.Event()
        nvml.nvmlInit = answer.wait
        source = NvmlUsage(nvml, Exporter(""), clock, within_s=0.01)
        assert await source.sample(["GPU-0"], ()) == []
        assert await source.sample(["GPU-0"], ()) == [], "nobody waits behind it"
        answer.set()

    def test_idle_is_known_once_it_was_seen(self):
        power = IdlePower()
        assert power.judged(400_000, 900_000) is None
        assert [power.judged(mw, busy) for mw, busy in ((100_000, 0), (114_000, 500_000), (116_000, 500_000))] == [
            True, True, False,
        ]  # fmt: skip
        assert power.judged(None, 0) is None

    @given(st.none() | st.integers(0, 1 << 60), st.none() | st.integers(0, 1 << 60))
    def test_a_counter_never_grows_by_less_than_nothing(self, before, now):
        grown = usage.grown(before, now)
        assert grown is None or (grown >= 0 and before + grown == now)

    async def test_a_driver_that_surprises_costs_the_interval_and_not_the_agent(self, monkeypatch):
        nvml, clock = CountingNvml([counting(0)]), VirtualClock()
        source = source_of(nvml, clock)
        with monkeypatch.context() as surprising:
            surprising.setattr(nvml, "nvmlDeviceGetMemoryInfo", lambda handle: object())
            assert await source.sample(["GPU-0"], ()) == []
        assert [one.device for one in await source.sample(["GPU-0"], ())] == ["GPU-0"]


EXPORTED = """
# HELP DCGM_FI_PROF_PIPE_TENSOR_ACTIVE Ratio of cycles the tensor (HMMA) pipe is active.
# TYPE DCGM_FI_PROF_PIPE_TENSOR_ACTIVE gauge
DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{gpu="0",UUID="GPU-0",pci_bus_id="00000000:1B:00.0",modelName="NVIDIA H200"} 0.500000
DCGM_FI_PROF_SM_ACTIVE{gpu="0",UUID="GPU-0"} 0.9
DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{gpu="1",UUID="GPU-1",GPU_I_PROFILE="3g.71gb",GPU_I_ID="3"} 0.25
DCGM_FI_PROF_DRAM_ACTIVE{gpu="1",UUID="GPU-1"} nothing
DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-0"} 34
"""


class TestExporter:
    def test_profiling_fields_are_read_by_device(self):
        assert dcgm.parse(EXPORTED) == {
            ("GPU-0", None): {"DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.5, "DCGM_FI_PROF_SM_ACTIVE": 0.9},
            ("GPU-1", 3): {"DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.25},
        }
        assert dcgm.parse('DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-0"} 34') == {}

    @given(st.text())
    def test_any_text_can_be_read(self, text):
        assert isinstance(dcgm.parse(text), dict)

    async def test_where_an_exporter_has_the_counters_they_are_left_to_it(self, monkeypatch):
        monkeypatch.setattr(Exporter, "read", lambda self: dcgm.parse(EXPORTED))
        part = counting(1, uuid="MIG-a", gi=3, percent=BUSY)
        nvml, clock = (
            CountingNvml([counting(0, percent=BUSY, clock=990), counting(1, instances=[part])]),
            VirtualClock(),
        )
        source = source_of(nvml, clock, "http://127.0.0.1:9400/metrics")
        await source.sample(["GPU-0", "MIG-a"], ())
        seen = await interval(source, clock, ["GPU-0", "MIG-a"])
        assert nvml.reads == 0
        assert (seen["GPU-0"].source, seen["GPU-0"].tensor_ppm, seen["GPU-0"].sm_active_ppm) == (
            "dcgm",
            250_000,
            900_000,
        )
        assert seen["MIG-a"].tensor_ppm == 250_000

    @pytest.mark.parametrize(
        ("fault", "read"),
        [
            (URLError(ConnectionRefusedError()), {}),
            (URLError(TimeoutError()), None),
            (TimeoutError(), None),
            (BadStatusLine("SSH-2.0"), None),
        ],
    )
    def test_nobody_there_is_told_from_no_answer(self, monkeypatch, fault, read):
        def fails(*_arguments, **_named):
            raise fault

        monkeypatch.setattr(OpenerDirector, "open", fails)
        assert Exporter("http://127.0.0.1:9400/metrics").read() == read

    async def test_counters_stay_with_an_exporter_that_is_late(self, monkeypatch):
        answers = iter([dcgm.parse(EXPORTED), None, {}])
        monkeypatch.setattr(Exporter, "read", lambda self: next(answers))
        nvml, clock = CountingNvml([counting(0, percent=BUSY)]), VirtualClock()
        source = source_of(nvml, clock, "http://127.0.0.1:9400/metrics")
        reads = []
        for _ in range(3):
            await source.sample(["GPU-0"], ())
            reads.append(len(nvml.samples))
        assert reads == [0, 0, 1], "taken over once it is gone"


class TestPlayed:
    async def test_gpus_do_what_their_script_says_while_work_has_them(self):
        clock = VirtualClock()
        scripts = ProfileSource(Profile.load("h200x8:usage=40%@15s,0%@5s"), clock).scripts(NODE)
        first, second = list(scripts)[:2]
        played = PlayedUsage(scripts, clock)
        await clock.advance(10)
        idle, worked = await played.sample([first, second], {second})
        assert (idle.tensor_ppm, idle.idle_power, idle.source) == (0, True, "simulated")
        assert (worked.tensor_ppm, worked.sm_active_ppm, worked.idle_power) == (400_000, 1_000_000, False)
        await clock.advance(10)
        _, worked = await played.sample([first, second], {second})
        assert (worked.tensor_ppm, worked.busy_ppm) == (200_000, 500_000)

    async def test_without_a_script_nothing_is_known(self):
        clock = VirtualClock()
        source = ProfileSource(Profile.load("h200x8"), clock)
        assert source.scripts(NODE) == {}
        (seen,) = await PlayedUsage({}, clock).sample(["GPU-a"], {"GPU-a"})
        assert (seen.source, seen.tensor_ppm, seen.busy_ppm, seen.idle_power) == ("simulated", None, None, None)

    def test_mig_instances_do_as_their_gpu(self):
        scripts = ProfileSource(Profile.load("h200x8:mig=3g.71gb,4*1g.18gb:usage=10%@1s"), VirtualClock()).scripts(NODE)
        assert len(scripts) == 8 * 5
        assert all(uuid.startswith("MIG-") for uuid in scripts)

    @pytest.mark.parametrize(
        "text", ["", "45", "45%", "101%@1s", "-1%@1s", "4%@0s", "4%@soon", "nan%@1s", "4%@2d", "1%@1s," * 40]
    )
    def test_what_is_no_script_is_told_with_its_form(self, text):
        with pytest.raises(InvalidArgument, match=r"usage=45%@50s,0%@10s"):
            activity.parse(text)

    @given(
        st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 100)), min_size=1, max_size=5),
        st.floats(0, 1e4), st.floats(0.1, 1e3), st.floats(0.1, 1e3),
    )  # fmt: skip
    def test_an_interval_is_the_sum_of_its_parts(self, spells, start, a, b):
        spells = [Spell(share, for_s) for share, for_s in spells]
        parts = a * activity.mean_share(spells, start, start + a) + b * activity.mean_share(
            spells, start + a, start + a + b
        )
        whole = activity.mean_share(spells, start, start + a + b) * (a + b)
        assert whole == pytest.approx(parts, abs=1e-6)
        assert -1e-9 <= activity.mean_share(spells, start, start + a) <= 1 + 1e-6


class TestNetwork:
    def test_ports_are_summed_and_told_as_what_they_grew_by(self, tmp_path):
        def port(path, **values):
            folder = tmp_path / "class" / path
            folder.mkdir(parents=True, exist_ok=True)
            for name, value in values.items():
                (folder / name).write_text(f"{value}\n")

        port("infiniband/mlx5_0/ports/1/counters", port_xmit_data=10, port_rcv_data=20)
        port("infiniband/mlx5_1/ports/1/counters", port_xmit_data=1, port_rcv_data=2)
        port("net/eth0/statistics", tx_bytes=5, rx_bytes=6)
        port("net/eth0/device")
        port("net/lo/statistics", tx_bytes=1 << 40, rx_bytes=1 << 40)
        counters = NetworkCounters(tmp_path)
        assert not counters.take().HasField("rdma_sent_bytes")
        port("infiniband/mlx5_0/ports/1/counters", port_xmit_data=110, port_rcv_data=20)
        port("net/eth0/statistics", tx_bytes=1, rx_bytes=60)
        seen = counters.take()
        assert (seen.rdma_sent_bytes, seen.rdma_received_bytes, seen.kernel_received_bytes) == (400, 0, 54)
        assert not seen.HasField("kernel_sent_bytes"), "the counter began anew"

    def test_a_node_without_ports_says_nothing(self, tmp_path):
        counters = NetworkCounters(tmp_path)
        counters.take()
        assert counters.take() == usage_pb2.NetworkUsage()


def report(first=1, last=10, start_ms=0, end_ms=1000, rank=0, **times):
    request = agent_pb2.ReportStepsRequest(
        rank=rank, times=usage_pb2.StepTimes(first_step=first, last_step=last, **times)
    )
    request.start_time.FromMilliseconds(1_800_000_000_000 + start_ms)
    request.end_time.FromMilliseconds(1_800_000_000_000 + end_ms)
    return request


WORK = Work("t", JOB, 2, ("GPU-0", "GPU-1"), first_rank=4, job_uid="u")


class TestSteps:
    def test_reports_that_follow_one_another_become_one_record_with_the_device_of_their_rank(self):
        log = StepLog()
        log.add(WORK, report(rank=5, data_us=5, tokens=100, flops=1e9))
        log.add(WORK, report(11, 20, 1000, 2500, rank=5, data_us=7, tokens=100, flops=1e9))
        (record,), dropped = log.take()
        assert (record.device, record.rank, record.epoch, record.job_uid, dropped) == ("GPU-1", 5, 2, "u", 0)
        times = record.times
        assert (times.first_step, times.last_step, times.data_us, times.tokens, times.flops) == (1, 20, 12, 200, 2e9)
        assert record.end_time.ToMilliseconds() - record.start_time.ToMilliseconds() == 2500
        assert log.take() == ([], 0)

    @pytest.mark.parametrize(
        "after",
        [report(12, 20, 1000, 2500, data_us=1), report(11, 20, 1001, 2500, data_us=1), report(11, 20, 1000, 2500)],
        ids=["a step is missing", "time is missing", "the wait for data is missing"],
    )
    def test_what_does_not_follow_is_a_record_of_its_own(self, after):
        log = StepLog()
        log.add(WORK, report(data_us=5))
        log.add(WORK, after)
        assert len(log.take()[0]) == 2

    def test_records_are_bounded_and_what_found_no_room_is_counted(self):
        log = StepLog()
        for at in range(MOST_RECORDS + 3):
            log.add(WORK, report(1 + 2 * at, 1 + 2 * at, 10 * at, 10 * at + 5))
        records, dropped = log.take()
        assert (len(records), dropped) == (MOST_RECORDS, 3)

    @pytest.mark.parametrize(
        ("request_", "said"),
        [
            (report(0, 5), "first_step 0"),
            (report(6, 5), "first_step 6"),
            (report(1, 5, end_ms=-1), "end_time"),
            (report(data_us=-1), "data_us is -1; use 0 to 1000000"),
            (report(data_us=1_000_001), "data_us is 1000001"),
            (report(data_us=600_000, save_us=600_000), "together"),
            (report(tokens=-1), "tokens"),
            (report(flops=float("nan")), "flops is nan"),
            (report(flops=1e30), "flops"),
        ],
    )
    def test_what_cannot_be_true_is_told_with_its_field(self, request_, said):
        assert said in wrong(request_)
        assert wrong(report(data_us=600_000, save_us=400_000, tokens=10, flops=1e12)) == ""


def batch(start="01aaaaaaaaaaaaaaaaaaaaaaaa", fill=0):
    return usage_pb2.UsageBatch(node=NODE, boot_id="b" * fill or "b")


class TestOutbox:
    async def opened(self, tmp_path, most_bytes=1 << 20, start="start1"):
        outbox = UsageOutbox(tmp_path / "usage", most_bytes, start)
        await outbox.open()
        return outbox

    async def test_batches_are_numbered_and_outlive_the_agent(self, tmp_path):
        outbox = await self.opened(tmp_path)
        for _ in range(3):
            await outbox.put(batch())
        again = await self.opened(tmp_path, start="start2")
        await again.put(batch())
        found = [(one.start, one.sequence) for _, one in await again.first(10, 1 << 20)]
        assert found == [("start1", 1), ("start1", 2), ("start1", 3), ("start2", 1)]
        assert again.filled.is_set()

    async def test_a_full_outbox_drops_the_oldest_and_the_next_batch_says_how_many(self, tmp_path):
        outbox = await self.opened(tmp_path, most_bytes=3 * 4096)
        for _ in range(6):
            await outbox.put(batch())
        found = [one for _, one in await outbox.first(10, 1 << 20)]
        assert [one.sequence for one in found] == [4, 5, 6]
        assert sum(one.dropped_batches for one in found) + outbox.dropped == 3
        assert len(list((tmp_path / "usage").iterdir())) == 3

    async def test_a_message_holds_what_fits(self, tmp_path):
        outbox = await self.opened(tmp_path)
        for _ in range(4):
            await outbox.put(batch(fill=90))
        size = batch(fill=90).ByteSize() + 40
        assert len(await outbox.first(10, 2 * size)) == 2
        assert len(await outbox.first(10, 1)) == 1, "one goes whatever its size"
        assert len(await outbox.first(3, 1 << 20)) == 3

    async def test_a_disk_that_takes_nothing_loses_batches_and_says_so(self, tmp_path):
        outbox = await self.opened(tmp_path)
        (tmp_path / "usage").rmdir()
        await outbox.put(batch())
        assert (len(outbox), outbox.dropped) == (0, 1)
        (tmp_path / "usage").mkdir()
        await outbox.put(batch())
        ((_, told),) = await outbox.first(10, 1 << 20)
        assert (told.sequence, told.dropped_batches, outbox.dropped) == (2, 1, 0)

    async def test_a_file_that_is_no_batch_keeps_nothing_back(self, tmp_path):
        outbox = await self.opened(tmp_path)
        await outbox.put(batch())
        next((tmp_path / "usage").glob("*.pb")).write_bytes(b"\xff\xff")
        await outbox.put(batch())
        console = Console()
        await UsageSender(outbox, console, NODE, VirtualClock()).deliver()
        assert [one.sequence for one in console.taken] == [2]
        assert len(outbox) == 0


class Console:
    """UsageService as a stub: raises `error` while it is set."""

    def __init__(self):
        self.taken, self.error, self.calls, self.refused = [], None, 0, set()

    async def ReportUsage(self, request, timeout):
        self.calls += 1
        if self.error is not None:
            raise self.error
        if self.refused & {one.sequence for one in request.batches}:
            raise InvalidArgument(FieldViolation("batches", "one is wrong"))
        self.taken.extend(request.batches)
        return usage_pb2.ReportUsageResponse()


class Unimplemented(StatusError):
    code = "UNIMPLEMENTED"


class TestSender:
    @pytest.fixture
    async def outbox(self, tmp_path):
        outbox = UsageOutbox(tmp_path / "usage", 1 << 20, "start1")
        await outbox.open()
        for _ in range(3):
            await outbox.put(batch())
        return outbox

    async def test_what_was_taken_leaves_the_disk(self, outbox):
        console = Console()
        assert await UsageSender(outbox, console, NODE, VirtualClock()).deliver() == 0
        assert [one.sequence for one in console.taken] == [1, 2, 3]
        assert (len(outbox), outbox.filled.is_set()) == (0, False)

    async def test_a_cut_keeps_everything_and_is_waited_out_longer_and_longer(self, outbox):
        console = Console()
        console.error = Unavailable("cut")
        sender = UsageSender(outbox, console, NODE, VirtualClock())
        pauses = [await sender.deliver() for _ in range(12)]
        assert len(outbox) == 3
        assert pauses[0] <= 1 < pauses[3]
        assert 30 <= pauses[-1] <= 60
        console.error = None
        assert await sender.deliver() == 0
        assert len(console.taken) == 3

    async def test_a_suite_without_a_console_is_asked_rarely_and_said_once(
        self,
        outbox,
    ):
        console = Console()
        console.error = Unimplemented("the server does not know this call")
        sender = UsageSender(outbox, console, NODE, VirtualClock())
        assert [await sender.deliver() for _ in range(3)] == [NOBODY_TAKES_IT_S] * 3
        assert len(outbox) == 3

    async def test_who_may_not_speak_now_keeps_everything(self, outbox):
        """A certificate that ended while the node was cut off is renewed a moment later."""
        console = Console()
        console.error = PermissionDenied("of another node")
        sender = UsageSender(outbox, console, NODE, VirtualClock())
        assert await sender.deliver() > 0
        assert await sender.deliver() > 0
        assert len(outbox) == 3

    async def test_what_is_refused_keeps_nothing_back(self, outbox):
        for _ in range(7):
            await outbox.put(batch())
        console = Console()
        console.refused = {3, 8}
        sender = UsageSender(outbox, console, NODE, VirtualClock())
        while len(outbox):
            await sender.deliver()
        assert [one.sequence for one in console.taken] == [1, 2, 4, 5, 6, 7, 9, 10], "nor takes it others with it"
        assert console.calls < 20


class TestSampler:
    def sampler(self, tmp_path, clock, source, works=(), interval_s=10.0, steps=None):
        of = Sampled(NODE, "boot", lambda: False, lambda: ["GPU-0", "GPU-1", ""], lambda: works)
        outbox = UsageOutbox(tmp_path / "usage", 1 << 20, "start1")
        sampler = Sampler(of, source, NetworkCounters(tmp_path), steps or StepLog(), outbox, clock, interval_s)
        return sampler, outbox

    async def test_a_batch_says_what_each_device_did_and_who_had_it(self, tmp_path):
        nvml, clock = CountingNvml([counting(0, percent=BUSY), counting(1)]), VirtualClock()
        steps = StepLog()
        work = Work("t", JOB, 2, ("GPU-0",), job_uid="u")
        sampler, _ = self.sampler(tmp_path, clock, source_of(nvml, clock), [work], steps=steps)
        await sampler.sample()
        steps.add(work, report())
        await clock.advance(10)
        batch = await sampler.sample()
        assert [(one.device, [h.job for h in one.holders]) for one in batch.gpus] == [("GPU-0", [JOB]), ("GPU-1", [])]
        assert batch.gpus[0].tensor_ppm == 915_000
        assert not batch.gpus[1].HasField("tensor_ppm"), "what is not known is not 0"
        assert batch.end_time.ToDatetime() - batch.start_time.ToDatetime() == timedelta(seconds=10)
        assert len(batch.steps) == 1

    async def test_batches_come_interval_by_interval_and_leave_no_gap(self, tmp_path):
        nvml, clock = CountingNvml([counting(0), counting(1)]), VirtualClock()
        sampler, outbox = self.sampler(tmp_path, clock, source_of(nvml, clock))
        await outbox.open()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(sampler.run())
            while len(outbox) < 4:
                await asyncio.sleep(0)
                await clock.advance(0.5)
            running.cancel()
        found = [one for _, one in await outbox.first(4, 1 << 20)]
        assert [a.end_time for a in found[:-1]] == [b.start_time for b in found[1:]]
