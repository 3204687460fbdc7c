"""Files with a Ray cluster, `whaleflux ray up ray.yaml`: one table of fields, as for jobs (`manifests.job_fields`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whaleflux import names, quantities
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.field import Field, name_in_file, read_into
from whaleflux.manifests.model_fields import QueueName
from whaleflux.manifests.reader import Reader, quoted
from whaleflux.manifests.text_values import Id, Text, Texts, text, texts
from whaleflux.manifests.values import Scaled, Schema, Seconds, Size, Whole
from whaleflux.manifests.yaml_text import load

if TYPE_CHECKING:
    from whaleflux.v1 import scheduler_pb2

MAX_GPUS, IDLE_S = 64, 60.0  # where the file says nothing
MOST_ID_CHARS = 36  # so that the names of its jobs are ids, too
MOST_GPUS, MOST_NAMED, MOST_PRIORITY = 100_000, 64, 1_000
LEAST_IDLE_S, MOST_IDLE_S = 1.0, 7 * 86_400.0
LEAST_HEAD_MILLICORES, MOST_HEAD_MILLICORES = 1_000, 1_000_000
LEAST_HEAD_BYTES = 2 << 30  # Ray's own processes there take more than one GiB


@dataclass(frozen=True)
class ClusterId(Id):
    """The id of a Ray cluster; its jobs are called after it."""

    def words(self) -> str:
        return f"id of at most {MOST_ID_CHARS} characters"

    def parse(self, value: object, base: Path) -> Any:
        given = names.check_id("name", text(value).removeprefix("rayClusters/"))
        if len(given) > MOST_ID_CHARS:
            raise ValueError(f"has {len(given)} characters; at most {MOST_ID_CHARS}: its jobs are called after it")
        return given

    def schema(self) -> Schema:
        return super().schema() | {"maxLength": MOST_ID_CHARS}


@dataclass(frozen=True)
class Listed(Texts):
    """Names, of which a few are enough."""

    def parse(self, value: object, base: Path) -> Any:
        given = [one.removeprefix("sites/") for one in texts(value)]
        if len(given) > self.most:
            raise ValueError(f"are {len(given)}; name at most {self.most}, or none for all")
        return given


@dataclass(frozen=True)
class Idle(Seconds):
    """A time within bounds."""

    def parse(self, value: object, base: Path) -> Any:
        seconds = quantities.seconds(value)
        if not self.least <= seconds <= self.most:
            raise ValueError(f"is {seconds:g} s; give {self.least:g} s to 7 days, such as 60 s")
        return seconds


@dataclass(frozen=True)
class HeadSize(Size):
    """Bytes for Ray's own processes, which take more than one GiB."""

    def parse(self, value: object, base: Path) -> Any:
        size = super().parse(value, base)
        if not LEAST_HEAD_BYTES <= size <= self.most:
            raise ValueError(f"is {quoted(value)}; give 2 GiB to 1 PiB, such as 4 GiB, or leave it out for no limit")
        return size


NAME = Field(
    "name", "", ClusterId(), "How the cluster is called.", required="an id such as research", example="research"
)
RAY_FIELDS: tuple[Field, ...] = (
    NAME,
    Field("queue", "queue", QueueName(), "Of its jobs; it never changes.", default="default", absent=names.DEFAULT_QUEUE, example="research"),
    Field("priority", "priority", Whole(0, MOST_PRIORITY), "Of its jobs: higher goes first and may preempt lower.", default="0", example="50"),
    Field("max_gpus", "max_gpus", Whole(0, MOST_GPUS), "GPUs of all its workers together.", default=str(MAX_GPUS), absent=MAX_GPUS, example="16"),
    Field(
        "gpu_types", "gpu_types", Listed(shown="GPU type, or a list of them", most=MOST_NAMED), "Only GPUs of these types.", default="any",
        example="[H200, H100-80GB]",
    ),
    Field("sites", "sites", Listed(shown="site, or a list of them", most=MOST_NAMED), "Only nodes of these sites.", default="any", example="[onprem]"),
    Field(
        "idle", "idle", Idle(least=LEAST_IDLE_S, most=MOST_IDLE_S), "A worker leaves after it was idle so long; sooner where others wait for its GPUs.",
        default="60 s", absent=IDLE_S, example="2 min",
    ),
    Field(
        "python", "python", Text(500, "path of a program"), "The interpreter on the nodes that has Ray; its version is the cluster's. It never changes.",
        default="python3", example="/opt/ray/bin/python",
    ),
    Field("head.cpus", "head_cpu_millicores", Scaled(1_000, MOST_HEAD_MILLICORES, "number from 1 on", LEAST_HEAD_MILLICORES), "CPUs of the head's job; they never change.", default="2", example="4"),
    Field("head.memory", "head_memory_bytes", HeadSize(), "Memory of the head's job, 2 GiB at least; it never changes.", default="no limit", example="8 GiB"),
    Field(
        "address", "address", Text(300, "`HOST:PORT`"), "Of a head that somebody else has started: a small job reads it, and none is started here.",
        default="a head is started", example="10.0.0.5:6379", apart=True,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RayManifest:
    """A Ray cluster as its file says it."""

    cluster_id: str
    cluster: scheduler_pb2.RayCluster


def ray_from_yaml(content: str) -> RayManifest:
    """Raises InvalidArgument naming every mistake."""
    from whaleflux.v1 import scheduler_pb2 as pb

    wrong: list[FieldViolation] = []
    file, cluster = Reader(load(content), "", wrong), pb.RayCluster()
    cluster_id = NAME.value.take(file, "name", Path(), "")
    file.require("name", NAME.required)
    read_into(cluster, file, [field for field in RAY_FIELDS if field is not NAME], Path())
    if cluster.address and file.has("head"):
        wrong.append(FieldViolation("head", "is of a head that is started here; leave it out, or address"))
    file.done()
    if wrong:
        raise InvalidArgument(wrong)
    return RayManifest(cluster_id, cluster)


def as_in_file(error: InvalidArgument) -> InvalidArgument:
    """A refusal of the scheduler with its fields as files call them."""
    return InvalidArgument([FieldViolation(_in_file(one.field), one.description) for one in error.violations])


def as_written(path: str, value: Any) -> str:
    """What the contract's field `path` of a cluster holds, as a file would say it."""
    return next(field.value.written(value) for field in RAY_FIELDS if field.path == path)


def _in_file(path: str) -> str:
    if path == "ray_cluster_id":
        return NAME.file
    return name_in_file((field for field in RAY_FIELDS if field is not NAME), path.removeprefix("ray_cluster."))
