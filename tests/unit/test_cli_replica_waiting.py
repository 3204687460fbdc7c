"""`whaleflux deploy --wait`: states of replicas are said once, and it comes back when all can take requests."""

import itertools
from types import SimpleNamespace

import pytest

from whaleflux.cli import replica_waiting
from whaleflux.errors import NotFound, Unavailable
from whaleflux.v1 import router_pb2

MODEL = "models/echo"


class Router:
    """A model whose replica gets on by one state with each look."""

    def __init__(self, wanted, *looks):
        self._wanted, self._looks = wanted, iter(looks)

    def GetModel(self, request, timeout):
        self._states = next(self._looks)
        if isinstance(self._states, Exception):
            raise self._states
        self._wanted.ready_replicas = self._states.count(router_pb2.REPLICA_STATE_READY)
        return self._wanted

    def ListReplicas(self, request, timeout):
        assert request.parent == MODEL
        listed = [
            router_pb2.Replica(name=f"{MODEL}/replicas/echo-{i}", state=state, node="sites/a/nodes/n")
            for i, state in enumerate(self._states)
        ]
        return router_pb2.ListReplicasResponse(replicas=listed)


def waited(monkeypatch, router):
    pauses = []
    monkeypatch.setattr(replica_waiting.time, "sleep", pauses.append)
    replica_waiting.until_ready(SimpleNamespace(router=router), MODEL)
    return pauses


def test_it_comes_back_when_as_many_are_ready_as_are_wanted(monkeypatch, capsys):
    starting, ready = router_pb2.REPLICA_STATE_STARTING, router_pb2.REPLICA_STATE_READY
    wanted = router_pb2.Model(name=MODEL, replicas=router_pb2.ReplicaCount(min=2))
    pauses = waited(monkeypatch, Router(wanted, [starting], [starting, starting], [ready, starting], [ready, ready]))
    assert len(pauses) == 3
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "-- models/echo/replicas/echo-0 STARTING on sites/a/nodes/n",
        "-- models/echo/replicas/echo-1 STARTING on sites/a/nodes/n",
        "-- models/echo/replicas/echo-0 READY on sites/a/nodes/n",
        "-- models/echo/replicas/echo-1 READY on sites/a/nodes/n",
        "models/echo is ready: whaleflux route echo",
    ]


def test_servers_that_run_elsewhere_are_counted_by_their_addresses(monkeypatch, capsys):
    ready = router_pb2.REPLICA_STATE_READY
    wanted = router_pb2.Model(name=MODEL, engine=router_pb2.Engine(addresses=["http://a:1", "http://b:1"]))
    assert waited(monkeypatch, Router(wanted, [ready], [ready, ready])) != []
    assert "is ready" in capsys.readouterr().err


def test_the_wait_goes_on_while_the_router_is_away(monkeypatch, capsys):
    starting, ready = router_pb2.REPLICA_STATE_STARTING, router_pb2.REPLICA_STATE_READY
    wanted = router_pb2.Model(name=MODEL, replicas=router_pb2.ReplicaCount(min=1))
    away = Unavailable("the service behind the front door does not answer")
    waited(monkeypatch, Router(wanted, away, [starting], away, away, [ready]))
    assert "is ready" in capsys.readouterr().err


def test_the_wait_ends_with_a_model_that_is_no_more_and_with_a_router_that_stays_away(monkeypatch):
    wanted = router_pb2.Model(name=MODEL, replicas=router_pb2.ReplicaCount(min=1))
    with pytest.raises(NotFound):
        waited(monkeypatch, Router(wanted, [], NotFound("model", MODEL)))
    times = itertools.count(0, 100)
    monkeypatch.setattr(replica_waiting.time, "monotonic", lambda: float(next(times)))
    with pytest.raises(Unavailable):
        waited(monkeypatch, Router(wanted, *[Unavailable("away")] * 20))
