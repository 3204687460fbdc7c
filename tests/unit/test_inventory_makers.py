"""One node of each site makes a dataset's manifest."""

from datetime import UTC, datetime, timedelta

from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.dataset_makers import SILENT, note_maker

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def says(dataset, node, state=pb.DATASET_COPY_STATE_PULLING, digest="", after=timedelta(0)):
    note_maker(
        dataset,
        pb.DatasetCopy(node=f"sites/{node.replace('/', '/nodes/')}", state=state, manifest_digest=digest),
        NOW + after,
    )
    return [maker.node.removeprefix("sites/").replace("nodes/", "") for maker in dataset.makers]


def test_the_first_of_a_site_makes_it_and_the_other_sites_have_their_own():
    dataset = pb.Dataset()
    assert says(dataset, "a/n1") == ["a/n1"]
    assert says(dataset, "a/n2") == ["a/n1"]
    assert says(dataset, "b/n1") == ["a/n1", "b/n1"]


def test_one_that_is_silent_gives_way_and_one_that_speaks_does_not():
    dataset = pb.Dataset()
    says(dataset, "a/n1")
    says(dataset, "a/n1", after=SILENT)
    assert says(dataset, "a/n2", after=SILENT * 1.5) == ["a/n1"]
    assert says(dataset, "a/n2", after=SILENT * 2.5) == ["a/n2"]


def test_one_that_failed_or_knows_its_version_makes_it_no_more():
    for state, digest in ((pb.DATASET_COPY_STATE_FAILED, ""), (pb.DATASET_COPY_STATE_PULLING, "0" * 64)):
        dataset = pb.Dataset()
        says(dataset, "a/n1")
        assert says(dataset, "a/n2", state, digest) == ["a/n1"], "not its business"
        assert says(dataset, "a/n1", state, digest) == []


def test_nobody_makes_what_is_known():
    dataset = pb.Dataset()
    says(dataset, "a/n1")
    dataset.manifest_digest = "0" * 64
    assert says(dataset, "a/n2") == []
