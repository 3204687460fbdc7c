"""What `gpus` counts as held and free: by GPU, not by number."""

import pytest

from whaleflux.cli.fleet_reads import conditions, free_in_shares, held_and_free, models_of, why
from whaleflux.cli.job_commands import gpus_of
from whaleflux.v1 import health_pb2, inventory_pb2, scheduler_pb2, types_pb2

GPUS = [types_pb2.Gpu(uuid=uuid, healthy=uuid != "sick") for uuid in ("a", "b", "sick")]


@pytest.mark.parametrize(
    ("held", "ready", "counts"),
    [
        ({"a"}, True, (1, 1)),
        ({"lost", "a"}, True, (1, 1)),  # of a GPU that fell off the bus under its holder
        ({"sick"}, True, (1, 2)),
        (set(), True, (0, 2)),
        ({"a"}, False, (1, 0)),
    ],
)
def test_a_held_gpu_is_counted_where_it_is(held, ready, counts):
    assert held_and_free(GPUS, held, ready=ready) == counts


def test_what_others_leave_of_shared_gpus_is_counted_in_bytes_and_not_as_free_gpus():
    gpus = [types_pb2.Gpu(uuid=uuid, healthy=uuid != "sick", memory_bytes=100) for uuid in ("a", "b", "c", "sick")]
    held = {"a": 30, "b": 0, "sick": 10}  # b is held whole
    assert free_in_shares(gpus, held, ready=True) == 70
    assert held_and_free(gpus, held, ready=True) == (3, 1)
    assert free_in_shares(gpus, held, ready=False) == 0


@pytest.mark.parametrize(
    ("gpu", "shown"),
    [({}, "2"), ({"share_memory_bytes": 20 * 10**9}, "2 x 20 GB"), ({"mig_profile": "1g.18gb"}, "2 x 1g.18gb"),
     ({"mig_memory_bytes": 20 * 10**9}, "2 x MIG >= 20 GB")],
)  # fmt: skip
def test_a_job_shows_what_each_rank_has(gpu, shown):
    spec = scheduler_pb2.JobSpec(gpus=2, gpu=scheduler_pb2.GpuRequirement(**gpu))
    assert gpus_of(spec, 2) == shown


class TestWhatDoesNotHold:
    """A node without a working driver says so, and what is missing."""

    NODE = inventory_pb2.Node(name="sites/s/nodes/n")

    def health(self, **condition):
        found = health_pb2.NodeHealth(name=self.NODE.name, message="reports")
        if condition:
            found.conditions.add(type="DriverWorks", status=types_pb2.CONDITION_STATUS_FALSE, **condition)
        return {self.NODE.name: found}

    def test_it_is_in_the_list_and_in_words(self):
        health = self.health(
            reason="NO_DRIVER", message="2 NVIDIA device(s) are on the PCI bus: install or load the driver"
        )
        assert conditions(health, self.NODE.name) == "NO_DRIVER"
        assert why(health, self.NODE).endswith("install or load the driver")
        assert models_of(self.NODE) == "none"

    def test_a_node_that_is_well_says_why_it_is_in_its_phase(self):
        assert conditions(self.health(), self.NODE.name) == "-"
        assert why(self.health(), self.NODE) == "reports"
        assert why({}, inventory_pb2.Node(name="x", intent_reason="fan")) == "fan"
