"""What is declared of prices, as the ledger's hours need it: the newest records, and which closed hours they change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from whaleflux import telemetry
from whaleflux.errors import InvalidArgument
from whaleflux.store import keys
from whaleflux.store.api import Entry, Put, Store
from whaleflux.store.election import Leader
from whaleflux.store.reading import read_all
from whaleflux.telemetry import Event
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console import convert
from whaleflux_console.core.price_book import Price, price_from

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

    @property
    def prices(self) -> tuple[Price, ...]:
        """All that are declared, as last read."""
        return self._prices

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
            found = {name: price_from(fields) for name, fields in json.loads(value).items()}
            self._seen = (hashlib.sha256(value).hexdigest(), found)
        return self._seen[1]


def _price(entry: Entry) -> Price | None:
    try:
        return convert.price_of(pb.GpuPrice.FromString(entry.value))
    except InvalidArgument as strange:
        _log.error(Event.FEED_BROKEN, feed="prices", reason=str(strange))
        return None
