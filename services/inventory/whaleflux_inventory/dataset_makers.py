"""Which node of a site reads a dataset first and makes its manifest, while the others wait for it. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from whaleflux import names
from whaleflux.v1 import inventory_pb2 as pb

SILENT = timedelta(seconds=45)  # without a word: another node may


def note_maker(dataset: pb.Dataset, copy: pb.DatasetCopy, now: datetime) -> None:
    """What a report of a copy says of it: who pulls without a version is the one of its site, unless another one is heard.

    Goes in the transaction of the report, so that two who ask at once are not both told that they are.
    """
    others = [maker for maker in dataset.makers if names.top(maker.node) != names.top(copy.node)]
    theirs = [maker for maker in dataset.makers if names.top(maker.node) == names.top(copy.node)]
    if dataset.manifest_digest:
        others, theirs = [], []
    elif copy.state == pb.DATASET_COPY_STATE_PULLING and not copy.manifest_digest:
        if not theirs or theirs[0].node == copy.node or theirs[0].said_time.ToDatetime(UTC) + SILENT < now:
            theirs = [_maker(copy.node, now)]
    else:
        theirs = [maker for maker in theirs if maker.node != copy.node]
    del dataset.makers[:]
    dataset.makers.extend(sorted([*others, *theirs], key=lambda maker: maker.node))


def _maker(node: str, now: datetime) -> pb.DatasetMaker:
    made = pb.DatasetMaker(node=node)
    made.said_time.FromDatetime(now)
    return made
