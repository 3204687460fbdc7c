"""MIG instances are devices of their own; a GPU that is cut without one is nobody's; played machines have them too."""

import pytest

from tests.support.fake_nvml import FakeNvml, error, gpu, mig
from tests.unit.test_agent_gpu_faults import registered
from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument
from whaleflux.fleet.profile import Profile
from whaleflux_agent.devices.nvml import NvmlSource
from whaleflux_agent.devices.profile import ProfileSource

NODE = "sites/s/nodes/n"
CUT = gpu(0, mig=(1, 1), instances=[mig(1, "3g.20gb", 19.5), mig(2, "1g.5gb", 4.75)])


async def test_instances_stand_in_place_of_their_gpu_with_uuid_memory_and_profile():
    machine = await NvmlSource(FakeNvml([CUT, gpu(1), gpu(2)]), VirtualClock()).read(NODE)
    found = [(one.index, one.uuid, one.model, one.mig_profile, one.parent_uuid) for one in machine.node.gpus]
    assert found == [
        (1, "GPU-00000001", "A100-40GB", "", ""),
        (2, "GPU-00000002", "A100-40GB", "", ""),
        (3, "MIG-00000001", "A100-40GB 3g.20gb", "3g.20gb", "GPU-00000000"),
        (4, "MIG-00000002", "A100-40GB 1g.5gb", "1g.5gb", "GPU-00000000"),
    ]
    assert machine.node.gpus[2].part_of_gpu == pytest.approx(19.5 / 40) and all(g.healthy for g in machine.node.gpus)
    assert [(link.a, link.b) for link in machine.node.links] == [(1, 2)], "instances have no NVLink"
    assert registered(machine).gpus == machine.node.gpus, "inventory and placement know the same"


async def test_what_is_wrong_with_the_gpu_is_wrong_with_its_instances_and_they_are_not_forgotten():
    nvml = FakeNvml([dict(CUT)])
    source = NvmlSource(nvml, VirtualClock())
    await source.read(NODE)
    nvml.gpus = [gpu(0, handle=error("GpuIsLost", "GPU is lost"))]
    lost = (await source.read(NODE)).node.gpus
    assert [one.uuid for one in lost] == ["MIG-00000001", "MIG-00000002"]
    assert all(not one.healthy and one.unhealthy_reason.startswith("GPU_LOST") for one in lost)
    nvml.gpus = [gpu(0, mig=(1, 1), instances=[])]
    (bare,) = (await source.read(NODE)).node.gpus
    assert (bare.uuid, bare.healthy, bare.unhealthy_reason.partition(":")[0]) == (
        "GPU-00000000",
        False,
        "NO_MIG_INSTANCE",
    )


@pytest.mark.parametrize("silent", [
    {"mig": error("Unknown", "Unknown Error")},
    {"instances": error("Timeout")},
    {"instances": [CUT["instances"][0], CUT["instances"][1] | {"name": error("Unknown")}]},
])  # fmt: skip
async def test_a_gpu_whose_instances_are_not_known_now_is_not_offered_whole_nor_without_one(silent):
    nvml = FakeNvml([dict(CUT)])
    source = NvmlSource(nvml, VirtualClock())
    await source.read(NODE)
    nvml.gpus = [dict(CUT) | silent]
    found = (await source.read(NODE)).node.gpus
    assert [(one.uuid, one.healthy) for one in found] == [("MIG-00000001", False), ("MIG-00000002", False)]
    (alone,) = (await NvmlSource(nvml, VirtualClock()).read(NODE)).node.gpus
    assert not alone.healthy and "UNREADABLE" in alone.unhealthy_reason


async def test_an_instance_that_cannot_be_read_is_unhealthy_alone():
    sick = mig(2, "1g.5gb", 4.75, memory=error("Unknown", "Unknown Error"))
    cut = gpu(0, mig=(1, 1), instances=[mig(1, "3g.20gb", 19.5), sick])
    machine = await NvmlSource(FakeNvml([cut]), VirtualClock()).read(NODE)
    assert [(one.healthy, one.unhealthy_reason.partition(":")[0]) for one in machine.node.gpus] == [
        (True, ""),
        (False, "UNREADABLE"),
    ]
    registered(machine)


async def test_a_played_machine_may_have_mig():
    node = (await ProfileSource(Profile.load("h200x8:mig=3g.71gb,4*1g.18gb")).read(NODE)).node
    assert len(node.gpus) == 8 * 5 and all(one.uuid.startswith("MIG-simulated-") for one in node.gpus)
    assert {one.model for one in node.gpus} == {"H200 3g.71gb", "H200 1g.18gb"} and not node.links
    assert len({one.uuid for one in node.gpus}) == 40
    full = (await ProfileSource(Profile.load("h200x8:mig=7*1g.18gb")).read(NODE)).node
    assert len(full.gpus) == 56 and max(one.index for one in full.gpus) == 63, "as many as placement takes of a node"
    mixed = (await ProfileSource(Profile.load("h200x4:mig=2*3g.71gb+a100x4pcie")).read(NODE)).node
    assert [one.index for one in mixed.gpus] == list(range(4, 16)), "numbered once in the whole machine"
    bare = (await ProfileSource(Profile.load("h200x8:mig=none")).read(NODE)).node
    assert all(one.unhealthy_reason.startswith("NO_MIG_INSTANCE") for one in bare.gpus)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("h200x8:mig=2*4g.71gb", "more than one GPU has"),
        ("h200x8:mig=1g.10gb", "profiles are: 1g.18gb"),
        ("h200x8:mig=x*1g.18gb", "[N*]PROFILE"),
        ("rtx4090x1:mig=1g.18gb", "this type has no MIG"),
        ("h200x8:fans=2", "use mig=PROFILES"),
    ],
)
def test_a_profile_that_no_gpu_can_be_cut_into_is_refused(profile, words):
    with pytest.raises(InvalidArgument) as refused:
        Profile.load(profile)
    assert words in str(refused.value)
