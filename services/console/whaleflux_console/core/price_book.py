"""What each card costs at each time: of the prices that people and nodes give, the narrowest one that holds.

A card and a time without price is a gap: no span, so that its bill is 0 and its rows say so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from whaleflux_console.core.facts import WHOLE_PPM, Facts, PriceKind, PriceSpan

HOURS_PER_MONTH = 730  # 8,760 a year, by 12
MONTHS_PER_YEAR = 12
NODE_SAYS = "the node itself"  # the source of a price that a node gives
FOR_GOOD_MS = 4_102_444_800_000  # 2100-01-01: the end of what has none


@dataclass(frozen=True, slots=True)
class Ownership:
    """What owning a GPU with its share of node, network and cabling costs, or a node of `gpus`: see `whaleflux.v1.Ownership`."""

    capex_micros: int
    months: int  # over which it is written off, at least 1
    residual_ppm: int = 0  # of capex, what it is worth then
    power_w: int = 0
    pue_ppm: int = 0  # what the building takes for each watt; 0: as 1,000,000
    electricity_micros_per_kwh: int = 0
    colocation_micros_per_kw_month: int = 0
    support_ppm_per_year: int = 0  # of capex
    gpus: int = 0  # of the node whose costs these are; 0: they are one GPU's


@dataclass(frozen=True, slots=True)
class Component:
    """One part of what an owned GPU costs."""

    name: str
    micros_per_hour: int


def components(owned: Ownership) -> tuple[Component, ...]:
    """What each GPU costs per hour whether it works or not, part by part, each rounded down; their sum is its price."""
    fallen_ppm = WHOLE_PPM - owned.residual_ppm
    pue_ppm = owned.pue_ppm or WHOLE_PPM
    hours = owned.months * HOURS_PER_MONTH
    year = MONTHS_PER_YEAR * HOURS_PER_MONTH
    power, room = owned.power_w * pue_ppm, owned.power_w * owned.colocation_micros_per_kw_month
    gpus = owned.gpus or 1
    return (
        Component("depreciation", owned.capex_micros * fallen_ppm // (WHOLE_PPM * hours * gpus)),
        Component("electricity", power * owned.electricity_micros_per_kwh // (1000 * WHOLE_PPM * gpus)),
        Component("colocation", room // (1000 * HOURS_PER_MONTH * gpus)),
        Component("support", owned.capex_micros * owned.support_ppm_per_year // (WHOLE_PPM * year * gpus)),
    )


@dataclass(frozen=True, slots=True)
class Price:
    """What cards of a node, of a site, of a class or of all three cost while it holds. What is empty is any."""

    name: str  # prices/{price}
    kind: PriceKind
    micros_per_hour: int  # of a GPU
    start_ms: int
    end_ms: int | None  # None: for good
    source: str  # whose figure
    source_date: str  # when it was read there, YYYY-MM-DD
    node: str = ""  # sites/{site}/nodes/{node}
    site: str = ""  # sites/{site}
    gpu_class: str = ""
    by_node: bool = False  # what the node itself says: counts where nobody declared one

    @property
    def narrowness(self) -> tuple[bool, bool, bool, bool]:
        """The highest counts: a node's, a site's and class's, a class's, a site's, everybody's; last what nodes say."""
        return (not self.by_node, bool(self.node), bool(self.gpu_class), bool(self.site))

    @property
    def until_ms(self) -> int:
        return FOR_GOOD_MS if self.end_ms is None else self.end_ms


@dataclass(frozen=True, slots=True)
class Priced:
    """A card as far as prices tell cards apart."""

    card: str
    node: str
    site: str
    gpu_class: str


class PriceBook:
    """All prices, found by node first, so that a price of each of thousands of nodes costs no card more than its own."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self._of_node: dict[str, list[Price]] = defaultdict(list)
        for price in prices:
            self._of_node[price.node].append(price)
        self._known: dict[tuple[str, str, str], list[tuple[int, int, Price]]] = {}

    def spans(self, card: Priced, start_ms: int, end_ms: int) -> tuple[PriceSpan, ...]:
        """What the card costs within [start_ms, end_ms), in order of time; each span with its own beginning and end, which may lie outside."""
        return tuple(
            PriceSpan(card.card, start, end, price.micros_per_hour, price.kind, said(price))
            for start, end, price in self._timeline(card)
            if start < end_ms and start_ms < end
        )

    def _timeline(self, card: Priced) -> list[tuple[int, int, Price]]:
        key = (card.node, card.site, card.gpu_class)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _winners([p for p in self._candidates(card) if _is_for(p, card)])
        return found

    def _candidates(self, card: Priced) -> list[Price]:
        own = self._of_node.get(card.node, []) if card.node else []
        return [*own, *self._of_node.get("", [])]


def said(price: Price) -> str:
    """Whose figure it is, and of which day."""
    return f"{price.source}, {price.source_date}" if price.source_date else price.source


def _is_for(price: Price, card: Priced) -> bool:
    return price.site in {"", card.site} and price.gpu_class in {"", card.gpu_class}


def _winners(prices: Sequence[Price]) -> list[tuple[int, int, Price]]:
    """Which price holds from when to when. A price that goes on is one span, whatever else begins meanwhile."""
    ordered = sorted(prices, key=lambda p: (p.narrowness, p.start_ms, p.name), reverse=True)
    edges = sorted({edge for price in prices for edge in (price.start_ms, price.until_ms)})
    found: list[tuple[int, int, Price]] = []
    for start, end in pairwise(edges):
        winner = next((p for p in ordered if p.start_ms <= start and end <= p.until_ms), None)
        if winner is None:
            continue
        if found and found[-1][1] == start and found[-1][2] is winner:
            found[-1] = (found[-1][0], end, winner)
        else:
            found.append((start, end, winner))
    return found


def priced(facts: Facts, prices: Iterable[Price], start_ms: int, end_ms: int) -> Facts:
    """The facts with what each card costs: as declared, else as its node says."""
    said = [price for price in facts.prices if price.source == NODE_SAYS]
    node_of = {one.card: one.node for one in facts.presences}
    book = PriceBook([*prices, *_of_nodes(said, node_of)])
    cards = {(one.card, one.node): _site(one.node) for one in facts.presences}
    classes = {one.card: one.gpu_class for one in facts.presences}
    spans = [
        span
        for (card, node), site in sorted(cards.items())
        for span in book.spans(Priced(card, node, site, classes[card]), start_ms, end_ms)
    ]
    return replace(facts, prices=tuple(spans))


def _of_nodes(said: Iterable[PriceSpan], node_of: Mapping[str, str]) -> Iterator[Price]:
    """What nodes say, once for each node and time."""
    found: dict[str, dict[int, PriceSpan]] = defaultdict(dict)
    for one in said:
        if one.card in node_of:
            found[node_of[one.card]][one.start_ms] = one
    for node, spans in found.items():
        for start_ms, end_ms in pairwise([*sorted(spans), FOR_GOOD_MS]):
            one = spans[start_ms]
            yield Price(node, one.kind, one.micros_per_hour, start_ms, end_ms, NODE_SAYS, "", node=node, by_node=True)


def price_from(fields: Mapping[str, Any]) -> Price:
    """Of its fields as JSON has them, without what a newer version noted beside it."""
    known = {name: fields[name] for name in Price.__dataclass_fields__ if name in fields}
    return Price(**known | {"kind": PriceKind(fields["kind"])})


def _site(node: str) -> str:
    """sites/{site} of sites/{site}/nodes/{node}."""
    return node.partition("/nodes/")[0]
