"""Files with a Ray cluster: `whaleflux ray up ray.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whaleflux import names, quantities
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.reader import Reader
from whaleflux.manifests.text_values import text
from whaleflux.manifests.yaml_text import load

if TYPE_CHECKING:
    from whaleflux.v1 import scheduler_pb2

MAX_GPUS, IDLE_S = 64, 60.0  # where the file says nothing
_IN_FILE = {
    "ray_cluster_id": "name", "ray_cluster.head_cpu_millicores": "head.cpus", "ray_cluster.head_memory_bytes": "head.memory",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RayManifest:
    """A Ray cluster as its file says it."""

    cluster_id: str
    cluster: scheduler_pb2.RayCluster


def ray_from_yaml(content: str) -> RayManifest:
    """Raises InvalidArgument naming every mistake."""
    from whaleflux.v1 import scheduler_pb2 as pb

    wrong: list[FieldViolation] = []
    file = Reader(load(content), "", wrong)
    file.require("name", "an id such as research")
    cluster_id = file.take("name", _id, "")
    cluster = pb.RayCluster(
        queue=file.take("queue", _queue, names.DEFAULT_QUEUE),
        priority=file.take("priority", _whole(1_000), 0),
        max_gpus=file.take("max_gpus", _whole(100_000), MAX_GPUS),
        sites=file.take("sites", _texts, []),
        gpu_types=file.take("gpu_types", _texts, []),
        python=file.take("python", text, ""),
        address=file.take("address", text, ""),
    )
    cluster.idle.FromNanoseconds(round(file.take("idle", quantities.seconds, IDLE_S) * 1e9))
    head = file.inner("head")
    if cluster.address and file.has("head"):
        wrong.append(FieldViolation("head", "is of a head that is started here; leave it out, or address"))
    cluster.head_cpu_millicores = head.take("cpus", _whole(1_000), 0) * 1000
    cluster.head_memory_bytes = head.take("memory", quantities.size_bytes, 0)
    head.done()
    file.done()
    if wrong:
        raise InvalidArgument(wrong)
    return RayManifest(cluster_id, cluster)


def as_in_file(error: InvalidArgument) -> InvalidArgument:
    """A refusal of the scheduler with its fields as files call them."""
    named = [(_IN_FILE.get(one.field, one.field.removeprefix("ray_cluster.")), one) for one in error.violations]
    return InvalidArgument([FieldViolation(field, one.description) for field, one in named])


def _id(value: Any) -> str:
    return names.check_id("name", text(value).removeprefix("rayClusters/"))


def _queue(value: Any) -> str:
    return names.queue(text(value).removeprefix("queues/"))


def _texts(value: Any) -> list[str]:
    return [text(one).removeprefix("sites/") for one in (value if isinstance(value, list) else [value])]


def _whole(most: int) -> Any:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"must be a whole number, 0 to {most}")
        return int(value)

    return parse
