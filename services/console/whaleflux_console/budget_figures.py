"""What this replica shows of budgets to Prometheus."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import DeadlineExceeded, Unavailable
from whaleflux.store import keys
from whaleflux.store.api import Entry, Store
from whaleflux.store.reading import read_all
from whaleflux.telemetry import Event, Metric
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.core.budget_rules import Outlook, outlook
from whaleflux_console.forecasts import Forecasts, scope_of

EVERY_S = 60.0
REST = 20  # times as long as a look took, at least: a thousand budgets take a twentieth of a core at most
_log = telemetry.get_logger("whaleflux.console.budgets")


@dataclass(frozen=True, slots=True)
class BudgetFigures:
    """How many budgets will hold, of all that there are; which ones is for `whaleflux budget ls`."""

    store: Store
    forecasts: Forecasts
    clock: Clock

    async def run(self) -> None:
        """For ever; until the ledger was read once nothing is shown."""
        while True:
            begun_s = self.clock.monotonic()
            try:
                await self.show()
            except (Unavailable, DeadlineExceeded) as trouble:
                _log.warning(Event.LEDGER_TROUBLE, reason=str(trouble))
            await self.clock.sleep(max(EVERY_S, REST * (self.clock.monotonic() - begun_s)))

    async def show(self) -> None:
        """One question to the ledger for each budget, one after the other."""
        found = Counter[Outlook]()
        for _, budget in read_all((await self.store.list(keys.BUDGETS)).entries, _budget).values:
            foretold = await self.forecasts.of(scope_of(budget))
            expected = foretold.expected_micros if foretold.HasField("expected_micros") else None
            found[outlook(foretold.spent_micros, expected, budget.micros_per_month)] += 1
        for one in Outlook:
            telemetry.gauge(Metric.BUDGETS).labels(one.value).set(found[one])


def _budget(entry: Entry) -> pb.Budget:
    return pb.Budget.FromString(entry.value)
