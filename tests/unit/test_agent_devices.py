"""Facts about machines: recorded NVML answers through the real reader, links, names, profiles."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from whaleflux.errors import InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.fleet.model import LinkKind
from whaleflux.fleet.profile import Profile
from whaleflux_agent.core.topology import GpuWires, NvLinkReading, best_links
from whaleflux_agent.devices.nvml import NvmlSource
from whaleflux_agent.devices.profile import ProfileSource

NODE = "sites/s/nodes/n"
RECORDINGS = Path(__file__).parents[3] / "shared" / "data" / "nvml"
PROFILES = CATALOGUE.profiles()


class NVMLError(Exception):
    pass


class NotSupported(NVMLError):
    pass


class Recorded:
    """Answers like pynvml from one recording; what was not supported there raises here."""

    NVMLError = NVMLError

    def __init__(self, path: Path):
        self._data = json.loads(path.read_text())

    def nvmlInit(self):
        """Nothing to do."""

    def nvmlShutdown(self):
        """Nothing to do."""

    def nvmlSystemGetDriverVersion(self):
        return self._data["driver"]

    def nvmlDeviceGetCount(self):
        return self._data["count"]

    def nvmlDeviceGetHandleByIndex(self, index):
        return self._data["gpus"][index]

    def nvmlDeviceGetTopologyCommonAncestor(self, a, b):
        return self._answer(self._data["topology_common_ancestor"][a["index"]][b["index"]])

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(**self._answer(gpu["memory"]))

    def nvmlDeviceGetPciInfo(self, gpu):
        return SimpleNamespace(**self._answer(gpu["pci"]))

    def nvmlDeviceGetNvLinkState(self, gpu, link):
        return self._answer(self._link(gpu, link)["state"])

    def nvmlDeviceGetNvLinkVersion(self, gpu, link):
        return self._answer(self._link(gpu, link)["version"])

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, gpu, link):
        return self._answer(self._link(gpu, link)["remote_type"])

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu, link):
        return SimpleNamespace(**self._answer(self._link(gpu, link)["remote_pci"]))

    def _link(self, gpu, link):
        if link >= len(gpu["nvlinks"]):
            raise NotSupported
        return gpu["nvlinks"][link]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu):
        return 0

    def nvmlDeviceGetFieldValues(self, gpu, ids):
        raise NotSupported

    def __getattr__(self, name):
        fields = {
            "nvmlDeviceGetName": "name",
            "nvmlDeviceGetUUID": "uuid",
            "nvmlDeviceGetCudaComputeCapability": "compute_capability",
            "nvmlDeviceGetNumaNodeId": "numa",
            "nvmlDeviceGetMigMode": "mig",
            "nvmlDeviceGetRemappedRows": "remapped_rows",
            "nvmlDeviceGetMaxPcieLinkGeneration": "pcie_gen_max",
            "nvmlDeviceGetMaxPcieLinkWidth": "pcie_width_max",
        }
        if name not in fields:
            raise AttributeError(name)
        return lambda gpu: self._answer(gpu[fields[name]])

    @staticmethod
    def _answer(value):
        if isinstance(value, dict) and "error" in value:
            raise NotSupported(value["error"])
        return value


@pytest.mark.parametrize(
    ("recording", "model", "kinds", "bandwidth"),
    [
        ("h200x4", "H200", {LinkKind.NVLINK: 6}, 346.5e9),
        ("h100x1", "H100-80GB", {}, 0),
        ("rtx4090x2", "RTX4090", {LinkKind.PCIE_HOST: 1}, 12.9e9),
        ("a100_80gb_x8", "A100-80GB", {LinkKind.NVLINK: 28}, 231e9),
        ("h100_x8", "H100-80GB", {LinkKind.NVLINK: 28}, 346.5e9),
    ],
)
async def test_recorded_machines_are_read_right(recording, model, kinds, bandwidth):
    path = RECORDINGS / f"{recording}.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    machine = await NvmlSource(Recorded(path)).read(NODE)
    assert {gpu.model for gpu in machine.node.gpus} == {model}
    assert [gpu.index for gpu in machine.node.gpus] == list(range(len(machine.node.gpus)))
    assert all(gpu.uuid.startswith("GPU-") and gpu.memory_bytes > 20e9 and gpu.healthy for gpu in machine.node.gpus)
    found = {kind: sum(link.kind is kind for link in machine.node.links) for kind in LinkKind}
    assert {kind: count for kind, count in found.items() if count} == kinds
    assert all(link.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=0.01) for link in machine.node.links)
    assert not machine.node.simulated
    assert machine.driver_version != "simulated"


def wires(index, *links, bus="", generation=4, width=16):
    return GpuWires(index, bus or f"00000000:0{index}:00.0", tuple(links), generation, width)


SWITCH = NvLinkReading(4, to_switch=True, remote_bus_id="FFFFFFFF:FF:FF.0")


def test_a_gpu_with_fewer_working_links_limits_its_pairs():
    whole, lame, none = wires(0, *[SWITCH] * 18), wires(1, *[SWITCH] * 9), wires(2)
    by_pair = {(link.a, link.b): link for link in best_links([whole, lame, none], {(0, 2): 50, (1, 2): 50})}
    assert by_pair[0, 1].kind is LinkKind.NVLINK
    assert by_pair[0, 1].bandwidth_bytes_per_s == pytest.approx(9 * 25e9 * 0.77)
    assert by_pair[0, 2].kind is LinkKind.SYSTEM


def test_direct_links_count_for_their_own_pair_only():
    def to(bus):
        return NvLinkReading(3, to_switch=False, remote_bus_id=bus)

    a = wires(0, to("0000:02:00.0"), to("0000:02:00.0"), bus="00000000:01:00.0")
    b = wires(1, to("0000:01:00.0"), to("0000:01:00.0"), bus="00000000:02:00.0")
    c = wires(2, bus="00000000:03:00.0")
    links = {(link.a, link.b): link for link in best_links([a, b, c], {(0, 2): 20, (1, 2): 30})}
    assert links[0, 1].kind is LinkKind.NVLINK
    assert links[0, 1].bandwidth_bytes_per_s == pytest.approx(2 * 25e9 * 0.77)
    assert links[0, 2].kind is LinkKind.PCIE_SWITCH
    assert links[1, 2].kind is LinkKind.PCIE_HOST


@pytest.mark.parametrize(
    ("ancestor", "kind"),
    [(0, LinkKind.PCIE_SWITCH), (10, LinkKind.PCIE_SWITCH), (20, LinkKind.PCIE_SWITCH), (30, LinkKind.PCIE_HOST),
     (40, LinkKind.PCIE_HOST), (50, LinkKind.SYSTEM), (None, LinkKind.SYSTEM)],
)  # fmt: skip
def test_pcie_levels_follow_the_common_ancestor(ancestor, kind):
    known = {} if ancestor is None else {(0, 1): ancestor}
    assert [link.kind for link in best_links([wires(0), wires(1)], known)] == [kind]


@pytest.mark.parametrize(
    ("product", "gib", "name"),
    [
        ("NVIDIA H200", 140.4, "H200"),
        ("NVIDIA H200 NVL", 140.4, "H200"),
        ("NVIDIA H100 80GB HBM3", 79.6, "H100-80GB"),
        ("NVIDIA H100 PCIe", 79.6, "H100-80GB"),
        ("NVIDIA H100 NVL", 93.6, "H100-94GB"),
        ("NVIDIA A100-SXM4-80GB", 80.0, "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 40.0, "A100-40GB"),
        ("NVIDIA A100-PCIE-40GB", 40.0, "A100-40GB"),
        ("A100-SXM4-80GB", 80.0, "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", 24.0, "RTX4090"),
        ("NVIDIA L40S", 45.0, "L40S"),
        ("Tesla V100-SXM2-16GB", 16.0, "V100-16GB"),
        ("Tesla T4", 15.0, "T4"),
        ("NVIDIA B200", 179.0, "B200"),
        ("NVIDIA RTX A6000", 48.0, "RTXA6000"),
    ],
)
def test_products_get_the_names_that_jobs_ask_for(product, gib, name):
    assert CATALOGUE.name_of(product, int(gib * (1 << 30))) == name


@pytest.mark.parametrize("name", PROFILES)
async def test_every_profile_is_a_machine_and_says_that_it_is_played(name):
    machine = await ProfileSource(Profile.load(name)).read(NODE)
    gpus = machine.node.gpus
    assert machine.node.simulated
    assert machine.driver_version == "simulated"
    assert all("simulated" in gpu.uuid for gpu in gpus)
    assert len({gpu.uuid for gpu in gpus}) == len(gpus)
    assert name.startswith(machine.node.gpus[0].model.split("-")[0].lower())
    assert len(machine.node.links) == len(gpus) * (len(gpus) - 1) // 2
    assert all(link.bandwidth_bytes_per_s > 1e9 for link in machine.node.links)


async def test_two_nodes_that_play_the_same_machine_have_different_gpus():
    source = ProfileSource(Profile.load("h200x8"))
    one, other = await source.read(NODE), await source.read("sites/s/nodes/m")
    assert {g.uuid for g in one.node.gpus}.isdisjoint(g.uuid for g in other.node.gpus)
    assert (await source.read(NODE)) == one


@pytest.mark.parametrize("content", ["{", "[]", '{"model": "X"}', '{"count": "many"}'])
def test_a_malformed_profile_is_refused_by_name(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=r"mine\.json"):
        Profile.load(str(path))


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 100_000, '{"model": "x", "memory_bytes": 1e999, "compute_capability": [9, 0]}', " " * (2 << 20)]
)  # fmt: skip
def test_a_file_that_is_no_machine_is_refused_in_plain_words(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(
        InvalidArgument, match=r"mine\.json is no profile; give JSON of a machine: model, memory_bytes"
    ) as refused:
        Profile.load(str(tmp_path / "mine.json"))
    assert "Error(" not in str(refused.value)


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(InvalidArgument, match="h200x8"):
        Profile.load("h900x8")


class Hanging(Recorded):
    """A driver that stops answering, as when a GPU falls off the bus."""

    def __init__(self, loop):
        self.asked, self.may_go_on = asyncio.Event(), asyncio.Event()
        self._loop = loop

    def nvmlDeviceGetCount(self):
        self._loop.call_soon_threadsafe(self.asked.set)
        asyncio.run_coroutine_threadsafe(self.may_go_on.wait(), self._loop).result()
        return 0

    def nvmlSystemGetDriverVersion(self):
        return b"1.2"


async def test_a_question_that_comes_while_another_is_answered_waits_its_turn():
    """As a task that starts asks who computes on its GPUs while the machine is read: that is no fault of the driver."""
    driver = Hanging(asyncio.get_running_loop())
    source = NvmlSource(driver)
    first, second = (asyncio.create_task(source.read(NODE)) for _ in range(2))
    await driver.asked.wait()
    driver.may_go_on.set()
    assert [(await read).driver_version for read in (first, second)] == ["1.2", "1.2"]
    await source.close()


async def test_a_driver_that_hangs_is_told_apart_and_may_come_back():
    driver = Hanging(asyncio.get_running_loop())
    source = NvmlSource(driver, answer_within_s=0.05)
    assert "did not answer" in (await source.read(NODE)).conditions[0].message
    assert "earlier question" in (await source.read(NODE)).conditions[0].message
    driver.may_go_on.set()
    async with asyncio.timeout(5):
        while not (machine := await source.read(NODE)).driver_version:
            await asyncio.sleep(0)
    assert machine.driver_version == "1.2"
    assert machine.node.gpus == ()
    await source.close()
