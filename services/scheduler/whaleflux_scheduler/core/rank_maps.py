"""Which rank of a job runs on which of the GPUs that it is given: along the links, where the job says how its program splits the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from whaleflux.errors import InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.fleet.links import Fabric
from whaleflux.fleet.model import Node
from whaleflux.manifests.job_fields import Spec
from whaleflux.planning.fleet_cluster import cluster_of
from whaleflux.planning.group_links import Split
from whaleflux.planning.job_map import Trained, map_of_job
from whaleflux.planning.known_models import model_said
from whaleflux.planning.machine import Machine
from whaleflux.planning.training import Training
from whaleflux_scheduler.core.lifecycle import GpuAssignment

_Gpu = tuple[str, str]  # node, UUID


def laid(assignment: GpuAssignment, spec: Spec, nodes: Mapping[str, Node], fabric: Fabric) -> GpuAssignment:
    """The same GPUs with the ranks of a map; as it is where the job says nothing of its split, or nobody knows how fast its GPUs are."""
    split, machine = _split(assignment, spec), _machine(assignment)
    if split is None or machine is None or not all(node in nodes for node, _ in assignment.nodes):
        return assignment
    cluster = cluster_of([(nodes[node], _indices(nodes[node], uuids)) for node, uuids in assignment.nodes], fabric)
    found = map_of_job(cluster, split, machine, spec.parallel_model, _trained(spec))
    gpus = [(node, uuid) for node, uuids in assignment.nodes for uuid in uuids]
    places = [gpus[at] for at in cluster.position[found.gpus].tolist()]
    return _by_rank(assignment, places, found.words)


def _split(assignment: GpuAssignment, spec: Spec) -> Split | None:
    """Of the ranks that it gets; None where they hold no whole models."""
    if (planned := assignment.split) is not None:
        return Split(tp=planned.tensor, cp=planned.context, dp=planned.data, pp=planned.pipeline, ep=1)
    copy, ranks = spec.model_parallel, sum(len(uuids) for _, uuids in assignment.nodes)
    if not copy or not ranks or ranks % copy or assignment.gpu_parts or assignment.share_bytes:
        return None
    split = Split(
        tp=max(1, spec.tensor_parallel),
        cp=max(1, spec.context_parallel),
        dp=ranks // copy,
        pp=max(1, spec.pipeline_parallel),
        ep=max(1, spec.expert_parallel),
    )
    return None if split.data % split.ep else split


def _trained(spec: Spec) -> Trained | None:
    """The model that was planned, where one was."""
    if not spec.train_model:
        return None
    try:
        shape = model_said(spec.train_model)
    except InvalidArgument:  # a record from before a rule that is stricter now: it is laid as a usual model's
        return None
    sequence = spec.train_sequence
    batch = spec.train_batch or (round(spec.train_batch_tokens / sequence) if sequence else 0)
    return Trained(shape, batch, sequence, Training(frozen=spec.train_adapters, fp8=float(spec.train_fp8)))


def _machine(assignment: GpuAssignment) -> Machine | None:
    """Of its first GPU type: all of a gang are alike."""
    known = CATALOGUE.types.get(assignment.gpus_by_model[0][0]) if assignment.gpus_by_model else None
    return Machine.of(known) if known is not None and known.speed is not None else None


def _indices(node: Node, uuids: tuple[str, ...]) -> list[int]:
    index = {gpu.uuid: gpu.index for gpu in node.gpus}
    return [index[uuid] for uuid in uuids]


def _by_rank(assignment: GpuAssignment, places: list[_Gpu], words: str) -> GpuAssignment:
    """Nodes in the order of their lowest ranks: rank 0 is where the others meet. On each node GPUs in the order of ranks."""
    ranks: dict[str, list[tuple[int, str]]] = {}
    for rank, (node, uuid) in enumerate(places):
        ranks.setdefault(node, []).append((rank, uuid))
    before = {node: at for at, (node, _) in enumerate(assignment.nodes)}
    parts = assignment.gpu_parts
    return replace(
        assignment,
        nodes=tuple((node, tuple(uuid for _, uuid in there)) for node, there in ranks.items()),
        gpu_parts=tuple(parts[before[node]] for node in ranks) if parts else (),
        ranks=tuple(tuple(rank for rank, _ in there) for there in ranks.values()),
        laid=words,
    )
