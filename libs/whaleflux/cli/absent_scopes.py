"""What prices, adjustments and budgets are for and nothing is called so far: it may come later, and a slip of the fingers looks the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from whaleflux import names
from whaleflux.cli import output
from whaleflux.errors import StatusError
from whaleflux.nearness import near

_MOST_SAID, _MOST_NAMED = 5, 8
_PAGE, _MOST_PAGES = 1_000, 20
_WITHIN_S = 5


class _TooMany(Exception):
    """Of a list that goes on, nobody knows what is not in it."""


def note_absent(client: Any, scopes: Sequence[Any]) -> None:
    """Says on stderr which node, site, class of GPU, queue or user of these messages is not there; nothing where that cannot be read."""
    for field, (said, read) in _FIELDS.items():
        asked = dict.fromkeys(value for one in scopes if (value := getattr(one, field, "")))
        try:
            there = frozenset(read(client)) if asked else frozenset[str]()
        except (StatusError, _TooMany):  # advice that nobody can give now
            continue
        for value in [value for value in asked if value not in there][:_MOST_SAID]:
            output.note(f"{said.format(_short(value))}; there are: {some_of(value, there)}")


def some_of(value: str, there: Collection[str]) -> str:
    """A few of what is there, those first that end or look like the value: a user of another role, a slip of the fingers."""
    known = sorted(there)
    alike = {one for one in known if names.last(one) == names.last(value)} | {*near(value, known[:_PAGE])}
    first = sorted(known, key=lambda one: one not in alike)
    more = f" and {len(first) - _MOST_NAMED} more" if len(first) > _MOST_NAMED else ""
    return ", ".join(map(_short, first[:_MOST_NAMED])) + more if first else "none"


def _short(name: str) -> str:
    for prefix in ("queues/", "models/", "sites/"):
        name = name.removeprefix(prefix)
    return name.replace("/nodes/", "/")


def _classes(client: Any) -> Iterator[str]:
    for node in _nodes(client):
        for gpu in node.facts.gpus:
            yield gpu.model.split(" ")[0]  # a part of a GPU is of the GPU's class


def _nodes(client: Any) -> Iterator[Any]:
    from whaleflux.v1 import inventory_pb2 as pb

    return _listed(client.inventory.ListNodes, pb.ListNodesRequest(page_size=_PAGE), "nodes")


def _node_names(client: Any) -> Iterator[str]:
    return (str(node.name) for node in _nodes(client))


def _sites(client: Any) -> Iterator[str]:
    from whaleflux.v1 import inventory_pb2 as pb

    return (str(one.name) for one in _listed(client.inventory.ListSites, pb.ListSitesRequest(page_size=_PAGE), "sites"))


def _queues(client: Any) -> Iterator[str]:
    from whaleflux.v1 import scheduler_pb2 as pb

    request = pb.ListQueuesRequest(page_size=_PAGE)
    return (str(one.name) for one in _listed(client.scheduler.ListQueues, request, "queues"))


def _users(client: Any) -> Iterator[str]:
    """Those who are known, and those for whom something ran lately: not everybody who has a certificate is known by name."""
    from whaleflux.v1 import console_pb2, identity_pb2

    request = identity_pb2.ListUsersRequest(page_size=_PAGE)
    for one in _listed(client.identity.ListUsers, request, "users"):
        yield f"{one.role}/{names.last(one.name)}"
    spent = console_pb2.GetCostRequest(group_by=[console_pb2.COST_GROUPING_USER], limit=_PAGE)
    answer = client.console.GetCost(spent, timeout=_WITHIN_S)
    if answer.HasField("others"):
        raise _TooMany
    yield from (one.keys[0] for one in answer.groups if one.keys[0])


def _listed(call: Callable[..., Any], request: Any, field: str) -> Iterator[Any]:
    for _ in range(_MOST_PAGES):
        answer = call(request, timeout=_WITHIN_S)
        if getattr(answer, "unreadable", ()):
            raise _TooMany
        yield from getattr(answer, field)
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token
    raise _TooMany


_FIELDS: dict[str, tuple[str, Callable[[Any], Iterator[str]]]] = {
    "node": ("no node {} is there now", _node_names),
    "gpu_class": ("no GPU of class {} is there now", _classes),
    "site": ("no site {} is there now", _sites),
    "queue": ("no queue {} is there now", _queues),
    "user": ("nobody is known as {} so far", _users),
}
