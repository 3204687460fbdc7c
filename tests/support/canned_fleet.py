"""A fleet that answers every call of the command line with messages of the contract, each list with two items: for tests of what is printed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from whaleflux.context import Context
from whaleflux.sdk.client import Client

NAMES = {
    "Job": "queues/default/jobs/x", "Queue": "queues/default", "Reservation": "reservations/x", "RayCluster": "rayClusters/x", "Node": "sites/a/nodes/x",
    "NodeHealth": "sites/a/nodes/x", "Site": "sites/a", "Incident": "incidents/x", "Model": "models/x", "Replica": "models/x/replicas/x",
    "Checkpoint": "queues/default/jobs/x/checkpoints/s000000000001-e1-n000001", "Dataset": "datasets/x", "Offer": "offers/x", "Lease": "leases/x", "Secret": "secrets/x",
    "Principal": "users/x", "Group": "groups/x", "Token": "tokens/x", "JoinToken": "joinTokens/x", "ApiKey": "apiKeys/x",
}  # fmt: skip
_TEXTS = {
    "job": "queues/default/jobs/x", "node": "sites/a/nodes/x", "resource": "queues/default/jobs/x", "queue": "queues/default",
    "user": "users/x", "model": "models/x", "replica": "models/x/replicas/x", "subject": "user/x", "site": "sites/a",
}  # fmt: skip
_DEPTH = 4


def filled(message: Any, depth: int = 0) -> Any:
    """The message with two items in each list, names where they belong, and no page behind it."""
    for field in message.DESCRIPTOR.fields:
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            continue
        if inner is None:
            if field.type == field.TYPE_STRING and not field.is_repeated and not field.containing_oneof:
                setattr(message, field.name, _text(message.DESCRIPTOR.name, field.name))
            elif field.type == field.TYPE_BYTES and not field.is_repeated and not field.containing_oneof:
                setattr(message, field.name, b"a line\nand another\n")
        elif depth < _DEPTH and inner.file.package.startswith("whaleflux") and not field.containing_oneof:
            if field.is_repeated:
                for _ in range(2):
                    filled(getattr(message, field.name).add(), depth + 1)
            elif inner.name != message.DESCRIPTOR.name:
                filled(getattr(message, field.name), depth + 1)
    return message


def _text(message: str, field: str) -> str:
    return NAMES.get(message, "x") if field == "name" else _TEXTS.get(field, "")


class Channel:
    """What generated stubs are built on; `asked` are the methods that were called."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def unary_unary(self, method: str, response_deserializer: Callable[[bytes], Any], **_: Any) -> Any:
        return lambda _, **_options: self._answer(method, response_deserializer)

    stream_unary = unary_unary

    def unary_stream(self, method: str, response_deserializer: Callable[[bytes], Any], **_: Any) -> Any:
        return lambda _, **_options: iter([self._answer(method, response_deserializer)])

    stream_stream = unary_stream

    def _answer(self, method: str, answer: Callable[[bytes], Any]) -> Any:
        self.asked.append(method)
        return filled(answer(b""))

    def close(self) -> None:
        """Nothing is open."""


@contextlib.contextmanager
def canned_fleet(monkeypatch: Any) -> Iterator[Channel]:
    """Every command asks it instead of a fleet."""
    channel = Channel()
    client = Client(channel, Context(server="localhost:1", key="k", cert="c", ca="a"))
    for name, module in list(sys.modules.items()):
        if name.startswith("whaleflux.cli.") and hasattr(module, "fleet"):
            monkeypatch.setattr(module, "fleet", lambda *_: contextlib.nullcontext(client))
    yield channel
