"""What the whole fleet could ever give: every registered node but those retired, empty, open and with all its GPUs in order. Pure.

Nodes that are cordoned, lost or sick are there and may come back; nodes that never registered are not known, so a fleet without any
says nothing about what is possible.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from whaleflux import names
from whaleflux.errors import InvalidArgument
from whaleflux.fleet.model import Node
from whaleflux_scheduler.core.placement.api import Goal, NoPlacement, Placement, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.placement.explain import LARGEST_SHARE

RETIRED = "retired"  # why a node that is gone for good takes no work
_MOST_KNOWN = 2_000
_MOST_NAMED = 20


class Capacity:
    """Answers are kept for as long as the nodes allow it: more nodes never make less possible."""

    def __init__(self) -> None:
        self._engine = Engine()
        self._retired: dict[str, Node] = {}
        self._enough: set[PlaceRequest] = set()
        self._short: dict[PlaceRequest, NoPlacement] = {}

    def upsert(self, node: Node) -> None:
        """A node's facts. Raises InvalidArgument when placement can never take them."""
        if node.name in self._retired:
            self._retired[node.name] = node
            return
        if node.name in self._engine.nodes:
            self._enough.clear()
        self._short.clear()
        self._engine.upsert_node(replace(node, gpus=tuple(replace(gpu, healthy=True) for gpu in node.gpus)))

    def remove(self, name: str) -> None:
        self._retired.pop(name, None)
        if name in self._engine.nodes:
            self._engine.remove_node(name)
            self._enough.clear()
            self._short.clear()

    def close(self, node: Node, why: str) -> None:
        """Why the node takes no work; only one that is retired never will."""
        if why == RETIRED and node.name not in self._retired:
            self.remove(node.name)
            self._retired[node.name] = node
        elif why != RETIRED and self._retired.pop(node.name, None) is not None:
            self.upsert(node)

    @property
    def gpus(self) -> int:
        """Of all registered nodes but those retired."""
        return self._engine.free_gpus()

    def known_enough(self, request: PlaceRequest) -> bool:
        """Whether it is known already that the fleet could hold it; of any thread."""
        return _shape(request) in self._enough

    def short_of(self, request: PlaceRequest) -> NoPlacement | None:
        """What stands in the way of the request even in the empty fleet; None: nothing, or there are no nodes to say it of."""
        asked = _shape(request)
        if not self._engine.nodes or asked in self._enough:
            return None
        if asked not in self._short:
            self._ask(asked)
        return self._short.get(asked)

    def cheapest(self, request: PlaceRequest) -> Placement | None:
        """Where the request would cost least in the empty fleet, for its work or else per hour; None: nowhere, or it cannot be asked."""
        asked = _shape(replace(request, preference=replace(request.preference, goal=Goal.CHEAPEST, deadline_s=None)))
        try:
            return self._engine.fits(asked)
        except InvalidArgument:  # what cannot be asked is refused elsewhere
            return None

    def unknown_sites(self, request: PlaceRequest) -> str:
        """What to say of sites that are asked for and have no node; "" when all have one, or no nodes are known."""
        known = {row.node.site for row in self._engine.nodes.values()}
        missing = [site for site in request.sites if site not in known]
        if not known or not missing:
            return ""
        return f"no registered node is in {_listed(missing)}; sites with nodes: {_listed(sorted(known))}"

    def unknown_types(self, request: PlaceRequest) -> str:
        """What to say of GPU types, or MIG instances, that are asked for and that no node has; "" when there is one, or any will do."""
        need, known = request.requirement, self._models()
        asked = [option.model for option in need.any_of if option.model]
        there = f"there are: {_few(known)}" if known else "there are no GPUs"
        if need.mig_profile and not any(model.endswith(f" {need.mig_profile}") for model in known):
            return f"gpu.mig: no registered node has instances {need.mig_profile}; {there}"
        if asked and known.isdisjoint(asked):
            return f"gpu: no registered node has {_few(asked)} GPUs; {there}"
        return ""

    def _models(self) -> set[str]:
        return {model for row in self._engine.nodes.values() for model in row.shape.model_names if model}

    def _ask(self, asked: PlaceRequest) -> None:
        if len(self._enough) + len(self._short) >= _MOST_KNOWN:
            self._enough.clear()
            self._short.clear()
        try:
            answer = self._engine.place(asked)
        except InvalidArgument:  # what cannot be asked is refused elsewhere
            return
        if isinstance(answer, NoPlacement):
            self._short[asked] = answer
        else:
            self._enough.add(asked)


def _few(models: Collection[str]) -> str:
    return ", ".join(sorted(models)[:_MOST_NAMED])


def _listed(sites: Sequence[str]) -> str:
    """The first twenty, as files name them."""
    more = len(sites) - _MOST_NAMED
    return ", ".join(map(names.last, sites[:_MOST_NAMED])) + (f" and {more} more" if more > 0 else "")


def _shape(request: PlaceRequest) -> PlaceRequest:
    """Without what says nothing about the size of the fleet: names, priority, and where data lies at present."""
    return replace(
        request, id="?", priority=0, exclude_nodes=(), near_nodes=(), datasets=(), hard_locality=False, reservation=""
    )


def in_words(short: NoPlacement) -> str:
    """Numbers, and the smallest change that would make it possible."""
    if not short.wanted_gpus:
        return f"of all registered nodes together, cordoned and lost ones included, {short.nearest_miss}" + (
            f"; it {short.smallest_change}" if short.smallest_change else ""
        )
    fleet = "all registered nodes together, cordoned and lost ones included,"
    if short.total_matching_gpus < short.wanted_gpus:
        why = f"{short.wanted_gpus} GPUs are asked for, and {fleet} have {short.total_matching_gpus} that match"
    else:
        why = f"{fleet} have {short.total_matching_gpus} GPUs that match, but not {short.wanted_gpus} in the shape asked for"
        if short.nearest_miss.startswith(LARGEST_SHARE):
            why += f"; {short.nearest_miss}"
    return why + (f"; it {short.smallest_change}" if short.smallest_change else "")
