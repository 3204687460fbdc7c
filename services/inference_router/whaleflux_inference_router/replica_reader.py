"""Replicas as one caller reads them: those of models that are there for them, with the load that this router knows of."""

from __future__ import annotations

from collections.abc import Iterator

from whaleflux.store import keys
from whaleflux.trust.sight import Sight
from whaleflux.trust.watched import Rules
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import convert, rights
from whaleflux_inference_router.routing_state import RoutingState


class ReplicaReader:
    """`sight`: the caller's."""

    def __init__(self, routing: RoutingState, sight: Sight) -> None:
        self.sight, self._routing = sight, routing

    def hides(self, replica: pb.Replica) -> bool:
        """Whether the replica is not there for the caller."""
        return not self.sight.sees(rights.queue_of(replica), self._owner(replica))

    def shown(self, replica: pb.Replica) -> pb.Replica:
        """As the caller may read it. Changes `replica` itself."""
        load = self._routing.load_tracker.loads.get(replica.name)
        replica.in_flight = load.in_flight if load else 0
        return rights.shown_replica(replica, self.sight, self._owner(replica))

    def rules(self, *, resumed: bool) -> Rules[pb.Replica]:
        """Of a watch; `resumed`: one that goes on where an earlier one broke, which may have told of any replica."""
        return Rules(self.hides, lambda key: self._may_name(key, resumed=resumed), self._queues)

    def _owner(self, replica: pb.Replica) -> str:
        model = self._routing.model(convert.model_of(replica.name))
        return model.owner if model is not None else replica.owner

    def _may_name(self, key: str, *, resumed: bool) -> bool | None:
        model = self._routing.model(convert.model_of(keys.name_of(key)))
        if model is None:  # deleted before its replicas ended
            return None if resumed else False
        return rights.sees(self.sight, model)

    def _queues(self) -> Iterator[str]:
        return (rights.queue_of(model) for model in self._routing.models.values.values())
