"""Whose events `--for` asks for."""

import pytest

from whaleflux.cli import kept_events
from whaleflux.errors import InvalidArgument

CHECKPOINT = "queues/research/jobs/j/checkpoints/s000000000010-e1-n000001"


@pytest.mark.parametrize(
    ("wanted", "resource"),
    [
        ("job/j", "queues/default/jobs/j"),
        ("job/research/j", "queues/research/jobs/j"),
        ("model/m", "models/m"),
        ("replica/m/r", "models/m/replicas/r"),
        ("checkpoint/research/j/s000000000010-e1-n000001", CHECKPOINT),
        (CHECKPOINT, CHECKPOINT),
        ("site/a", "sites/a"),
    ],
)
def test_a_type_and_a_name_are_one_resource(wanted, resource):
    assert kept_events.resource_of(None, wanted) == resource


@pytest.mark.parametrize("part", ["", "llama", "models", "jobs/llama", "default/jobs/llama", "nodes/n1"])
def test_what_has_no_type_is_a_part_of_a_name(part):
    assert kept_events.resource_of(None, part) == ""


@pytest.mark.parametrize("wrong", ["nope/x", "pod/x", "/", "/x", "x/", "onprem/n1"])
def test_an_unknown_type_is_refused_naming_those_there_are(wrong):
    with pytest.raises(InvalidArgument) as refused:
        kept_events.resource_of(None, wrong)
    assert refused.value.violations[0].field == "--for"
    for kind in ("job", "node", "model", "replica", "incident", "checkpoint", "queue", "dataset", "site"):
        assert kind in refused.value.violations[0].description
