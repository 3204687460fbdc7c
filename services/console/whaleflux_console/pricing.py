"""What is declared of prices, as the ledger's hours need it: the newest records, and which closed hours they change."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from whaleflux import telemetry
from whaleflux.errors import InvalidArgument
from whaleflux.store import keys
from whaleflux.store.api import Entry, Put, Store
from whaleflux.store.election import Leader
from whaleflux.store.reading import read_all
from whaleflux.telemetry import Event
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console import convert
from whaleflux_console.core.chronicle import NODE_SAYS
from whaleflux_console.core.facts import Facts, PriceKind, PriceSpan
from whaleflux_console.core.price_book import FOR_GOOD_MS, Price, PriceBook, Priced

_log = telemetry.get_logger("whaleflux.console.pricing")


@dataclass(frozen=True, slots=True)
class Window:
    """Milliseconds since 1970; the end is not in it."""

    start_ms: int
    end_ms: int


class Pricing:
    """Prices are of the records as they were last read. Which of them hours were closed by lies in the store, so that no change is missed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._prices: tuple[Price, ...] = ()
        self._seen: tuple[str, dict[str, Price]] | None = None

    async def read(self) -> None:
        """The declared prices of now. One that cannot be read stays as it was known."""
        read = read_all((await self._store.list(keys.PRICES)).entries, _price)
        known = {**await self._read_seen(), **{price.name: price for price in self._prices}}
        unread = [known[name] for name in map(keys.name_of, read.unreadable) if name in known]
        self._prices = (*(price for _, price in read.values if price is not None), *unread)

    def priced(self, facts: Facts, start_ms: int, end_ms: int) -> Facts:
        """The facts with what each card costs: as declared, else as its node says."""
        said = [price for price in facts.prices if price.source == NODE_SAYS]
        node_of = {one.card: one.node for one in facts.presences}
        book = PriceBook([*self._prices, *_of_nodes(said, node_of)])
        cards = {(one.card, one.node): _site(one.node) for one in facts.presences}
        classes = {one.card: one.gpu_class for one in facts.presences}
        spans = [
            span
            for (card, node), site in sorted(cards.items())
            for span in book.spans(Priced(card, node, site, classes[card]), start_ms, end_ms)
        ]
        return replace(facts, prices=tuple(spans))

    async def changed(self) -> tuple[Window, ...]:
        """Windows whose prices are others than hours were closed by."""
        seen = await self._read_seen()
        now = {price.name: price for price in self._prices}
        touched = [name for name in {*seen, *now} if seen.get(name) != now.get(name)]
        found = [each for name in touched for each in (seen.get(name), now.get(name)) if each is not None]
        return tuple(Window(price.start_ms, price.until_ms) for price in found)

    async def note(self, leader: Leader) -> None:
        """Hours are closed by these from now on."""
        value = json.dumps({price.name: asdict(price) for price in self._prices}, sort_keys=True).encode()
        if hashlib.sha256(value).hexdigest() != (self._seen[0] if self._seen else ""):
            await self._store.commit(Put(keys.LEDGER_PRICES, value), when=[leader.held])
            self._seen = None

    async def _read_seen(self) -> Mapping[str, Price]:
        if self._seen is None:
            entry = await self._store.get(keys.LEDGER_PRICES)
            value = entry.value if entry else b"{}"
            found = {name: _seen_price(fields) for name, fields in json.loads(value).items()}
            self._seen = (hashlib.sha256(value).hexdigest(), found)
        return self._seen[1]


def _seen_price(fields: Mapping[str, Any]) -> Price:
    """Without what a newer version noted beside it."""
    known = {name: fields[name] for name in Price.__dataclass_fields__ if name in fields}
    return Price(**known | {"kind": PriceKind(fields["kind"])})


def _price(entry: Entry) -> Price | None:
    try:
        return convert.price_of(pb.GpuPrice.FromString(entry.value))
    except InvalidArgument as strange:
        _log.error(Event.FEED_BROKEN, feed="prices", reason=str(strange))
        return None


def _of_nodes(said: list[PriceSpan], node_of: Mapping[str, str]) -> Iterator[Price]:
    """What nodes say, once for each node and time."""
    found: dict[str, dict[int, PriceSpan]] = defaultdict(dict)
    for one in said:
        if one.card in node_of:
            found[node_of[one.card]][one.start_ms] = one
    for node, spans in found.items():
        for start_ms, end_ms in pairwise([*sorted(spans), FOR_GOOD_MS]):
            one = spans[start_ms]
            yield Price(node, one.kind, one.micros_per_hour, start_ms, end_ms, NODE_SAYS, "", node=node, by_node=True)


def _site(node: str) -> str:
    """sites/{site} of sites/{site}/nodes/{node}."""
    return node.partition("/nodes/")[0]
