"""A made-up fleet and its bills: many jobs side by side, other ones each week, classes drawn at random. Nothing of it was measured."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from whaleflux import names
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.rows import CLASSES, Basis, CostClass, LedgerRow
from whaleflux_console.ledger.manifest import DAY_MS

BEGIN_MS = 1_735_689_600_000  # 2025-01-01T00:00:00Z
MICROS_PER_HOUR = 2_950_000
CARDS_PER_NODE = 8
_WEEK_MS = 7 * DAY_MS


@dataclass(frozen=True, slots=True)
class MadeFleet:
    """`jobs` at a time on `cards` cards of two sites; a tenth of the cards is idle."""

    cards: int = 2_048
    jobs: int = 1_000
    queues: int = 12
    users: int = 80
    seed: int = 42

    def rows(self, hour_ms: int) -> Iterator[LedgerRow]:
        """The bill of one hour, summing exactly."""
        week = (hour_ms - BEGIN_MS) // _WEEK_MS
        chance = random.Random(f"{self.seed}/{week}")
        for card in range(self.cards):
            worker = chance.randrange(self.jobs) if chance.random() < 0.9 else None
            yield replace(self._row(card, week, worker, chance), hour_ms=hour_ms)

    def _row(self, card: int, week: int, worker: int | None, chance: random.Random) -> LedgerRow:
        site = f"site-{card * 2 // self.cards}"
        held = worker is not None
        queue = names.queue(f"queue-{worker % self.queues}") if worker is not None else ""
        micros = _divided(chance, held=held)
        return LedgerRow(
            hour_ms=0,
            card=f"GPU-{card:032x}",
            node=names.node(site, f"node-{card // CARDS_PER_NODE}"),
            site=site,
            gpu_class="H200" if card % 3 else "H100",
            queue=queue,
            user=f"user/person-{worker % self.users}" if worker is not None else "",
            job=names.job(f"queue-{(worker or 0) % self.queues}", f"job-{week}-{worker}") if held else "",
            uid=f"uid-{week}-{worker}" if held else "",
            attempt=1 if held else 0,
            model=names.model(f"model-{worker % 20}") if worker is not None and worker % 4 == 0 else "",
            gpu_ms=HOUR_MS,
            bill_micros=MICROS_PER_HOUR,
            micros=micros,
            basis=Basis.MEASURED if card % 5 else Basis.MODELLED,
            price_kind="reserved",
            price_source="made up",
        )


def _divided(chance: random.Random, *, held: bool) -> tuple[int, ...]:
    if not held:
        return tuple(MICROS_PER_HOUR if kind is CostClass.IDLE else 0 for kind in CLASSES)
    parts = {kind: chance.randrange(100_000) for kind in chance.sample(CLASSES[1:9], 4)}
    useful = MICROS_PER_HOUR - sum(parts.values())
    return tuple(useful if kind is CostClass.USEFUL else parts.get(kind, 0) for kind in CLASSES)
