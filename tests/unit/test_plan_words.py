"""Plans in words: which term decided, what stands in the way as job files say it, and when work of others stops for it."""

from datetime import UTC, datetime

import pytest

from tests.unit.fleets import GB, node
from whaleflux_scheduler.core import wait_reasons
from whaleflux_scheduler.core.placement.api import Blocked, GroupRequest, NoPlacement, Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def placement(fleet, gpus=1, busy=(), **more):
    """Where a job goes, once the first GPUs of some nodes are busy: {node: GPUs}."""
    made = Engine()
    for one in fleet:
        made.upsert_node(one)
    for at, (name, count) in enumerate(busy):
        elsewhere = tuple(other for other in made.nodes if other != name)
        made.apply(made.place(PlaceRequest(f"busy{at}", GroupRequest(gpus=count), exclude_nodes=elsewhere)))
    answer = made.place(PlaceRequest("job", GroupRequest(gpus=gpus), **more))
    assert isinstance(answer, Placement)
    return answer


H200 = node("h200", model="H200", usd=2.6, memory=141 * GB)
RTX = node("rtx", model="RTX4090", usd=0.35, gpus=2, links=())


def test_a_dear_gpu_beside_a_cheap_one_says_which_term_decided():
    found = placement([H200, RTX], busy=[("sites/a/nodes/h200", 1)])
    assert found.node_names == ("sites/a/nodes/h200",)
    (other,) = found.alternatives
    assert "sites/a/nodes/rtx" in other.where
    assert other.why_not.startswith("it would break into a node that is wholly free")
    assert other.why_not.endswith("though $2.25 less per hour")


def test_the_price_decides_among_places_that_lose_no_time():
    found = placement([H200, RTX])
    assert found.node_names == ("sites/a/nodes/rtx",)
    assert [other.why_not for other in found.alternatives] == ["$2.25 more per hour"]


def test_communication_decides_for_gangs():
    found = placement([H200, RTX], gpus=2)
    assert found.node_names == ("sites/a/nodes/h200",)
    assert "x the communication" in found.alternatives[0].why_not


def test_the_place_that_was_taken_is_no_alternative_to_itself():
    found = placement([H200, RTX, node("h201", model="H200", usd=2.6)], gpus=2)
    named = [other.where for other in found.alternatives]
    assert len(set(named)) == len(named)
    assert not [where for where in named if where.startswith("H200") and f"nodes/{found.node_names[0]}" in where]


@pytest.mark.parametrize(
    ("engines", "files"),
    [
        ("would fit without exclude_nodes", "would fit on a node that it avoids for a while after a failure"),
        ("would fit without min_memory_bytes", "would fit without gpu.memory"),
        ("would fit without max_nodes", "would fit without nodes.max"),
        ("would fit within one spine (level)", "would fit within one spine (place)"),
        ("would fit with soft data locality", "would fit without require_local_data"),
        ("would fit with 9 GPUs", "would fit with 9 GPUs"),
    ],
)
def test_what_would_help_is_said_in_the_words_of_the_file(engines, files):
    refused = NoPlacement("job", (Blocked("excluded by name", 2, "exclude_nodes"),), "", engines, False, 1, 0, 0)
    told = wait_reasons.does_not_fit(refused, NOW, ["sites/a/nodes/x"])
    assert told.smallest_change == files
    assert "exclude" not in str((told.summary, told.exclusions))


def test_a_plan_that_stops_others_does_not_say_that_it_waits():
    refused = NoPlacement("job", (), "", "would fit with 9 GPUs", True, 10, 9, 10)
    waits = wait_reasons.does_not_fit(refused, NOW)
    told = wait_reasons.with_victims(waits, ["queues/q/jobs/a", "queues/q/jobs/b"])
    assert told.summary == "starts when 2 jobs of lower priority have stopped"
    assert told.preempts == ("queues/q/jobs/a", "queues/q/jobs/b")
    assert told.smallest_change == ""
    assert wait_reasons.with_victims(waits, []) == waits
