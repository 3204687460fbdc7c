"""`whaleflux deploy --wait`: what becomes of a model's replicas, until all of them can take requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from whaleflux.cli import output
from whaleflux.cli.deploy_words import wanted_replicas
from whaleflux.cli.state import pages
from whaleflux.cli.waiting import look

if TYPE_CHECKING:
    from whaleflux.sdk import Client
    from whaleflux.v1 import router_pb2

_LOOK_EVERY_S = 0.3


def until_ready(client: Client, model: str) -> None:
    """Says each change of a replica's state on stderr; returns when as many are READY as the model wants.

    Goes on when the router is away for a while, as who follows a job does. Raises FailedPrecondition where a changed engine was rolled back.
    """
    from whaleflux.errors import FailedPrecondition
    from whaleflux.reasons import ErrorReason
    from whaleflux.sdk.resume import FOLLOW_OUTAGE_S, Patience
    from whaleflux.v1 import router_pb2

    under_way = {
        router_pb2.ROLLOUT_STATE_SURGING,
        router_pb2.ROLLOUT_STATE_WATCHING,
        router_pb2.ROLLOUT_STATE_SHIFTING,
    }
    shown, before, patience = dict[str, str](), None, Patience(FOLLOW_OUTAGE_S)
    patience.received()  # it has answered what declared the model
    while True:
        wanted, replicas = look(lambda: _seen(client, model), patience)
        for replica in replicas:
            line = _line(replica)
            if shown.get(replica.name) != line:
                output.note(line)
            shown[replica.name] = line
        at = wanted.rollout.state, wanted.rollout.to_version
        before = before or at
        if at != before and wanted.rollout.state == router_pb2.ROLLOUT_STATE_ROLLED_BACK:
            raise FailedPrecondition(
                f"{model}: {wanted.rollout.message}; the engine of before serves. What it said: whaleflux rollout status {model.partition('/')[2]}",
                reason=ErrorReason.WRONG_STATE,
            )
        if wanted.ready_replicas >= wanted_replicas(wanted) and wanted.rollout.state not in under_way:
            output.note(f"{model} is ready: whaleflux route {model.partition('/')[2]}")
            return
        time.sleep(_LOOK_EVERY_S)


def _seen(client: Client, model: str) -> tuple[router_pb2.Model, list[router_pb2.Replica]]:
    from whaleflux.v1 import router_pb2

    wanted = client.router.GetModel(router_pb2.GetModelRequest(name=model), timeout=10)
    return wanted, pages(client.router.ListReplicas, router_pb2.ListReplicasRequest(parent=model), "replicas")


def _line(replica: router_pb2.Replica) -> str:
    from whaleflux.v1 import router_pb2

    state = output.enum_name(router_pb2.ReplicaState, replica.state, "REPLICA_STATE_")
    place = f" on {replica.node}" if replica.node else ""
    return f"-- {replica.name} {state}{place}" + (f": {replica.message}" if replica.message else "")
