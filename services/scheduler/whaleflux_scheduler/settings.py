"""The scheduler's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from whaleflux import names
from whaleflux.code.retention import SHORTEST_GRACE_S
from whaleflux.config import ServiceSettings
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux_scheduler.core.burst import ENDS_WITHIN_S, BurstRules
from whaleflux_scheduler.core.observed import Timeouts
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.core.queue_shares import HALF_LIFE_S
from whaleflux_scheduler.core.rebalance import RebalanceRules
from whaleflux_scheduler.core.soon_over import MOST_S

_DEFAULTS, _RULES, _PROMISES, _BURST = Timeouts(), RebalanceRules(), PromiseRules(), BurstRules()

_BUDGETS = ("queues", "sites")


class Settings(ServiceSettings):
    """Who runs where, and why."""

    accept_s: float = Field(
        _DEFAULTS.accept_s, gt=0, description="Seconds that agents have to accept the tasks of a gang."
    )
    start_s: float = Field(_DEFAULTS.start_s, gt=0, description="Seconds from allocation until all ranks must run.")
    fetch_s: float = Field(
        _DEFAULTS.fetch_s, gt=0, description="The same while images are pulled or data is fetched, seconds."
    )
    partition_wait_s: float = Field(
        _DEFAULTS.partition_wait_s, ge=0, description="How long jobs wait for a silent site, seconds."
    )
    avoid_s: float = Field(
        _DEFAULTS.avoid_s, ge=0, description="How long a job avoids a node that refused or failed it, seconds."
    )
    keep_ended_jobs: int = Field(
        10_000,
        ge=0,
        description="Ended jobs that are kept; the oldest are deleted, and later their checkpoints (deleted_job_grace_s).",
    )

    queue_half_life_s: float = Field(
        HALF_LIFE_S,
        ge=0,
        description="After how long what a queue held counts half when queues take turns, seconds; 0: only what it holds now counts.",
    )

    calibrations: str = Field(
        "",
        max_length=4096,
        description="Folder of the files that whaleflux calibrate wrote, one for each type of GPU; plans of trainings count with them.",
    )

    code_grace_s: float = Field(
        7 * 86_400.0,
        ge=SHORTEST_GRACE_S,
        description="How long code is kept that no job names any more, seconds; submitting it again begins anew.",
    )
    code_store_bytes: int = Field(
        2 << 30, ge=128 << 20, description="Most bytes of code that the event bus keeps (its stream CODE)."
    )

    promised_starts: int = Field(
        _PROMISES.large,
        ge=0,
        le=256,
        description=(
            "Large jobs, the first ones in line, that are promised GPUs and a start while they wait; and a quarter as many of "
            "others that wait for long. Their GPUs are used by work that is over in time. 0: nobody is promised anything."
        ),
    )
    promise_horizon_s: float = Field(
        _PROMISES.horizon_s,
        gt=0,
        description="Nothing is promised for later than that, seconds: GPUs would be kept for too long.",
    )

    promise_let_pass_s: float = Field(
        _PROMISES.let_pass_s,
        gt=0,
        description=(
            "Seconds that a large job waits before work that began meanwhile, has run for an hour and saves checkpoints may be "
            "suspended for its start."
        ),
    )

    preemption_let_end_s: float = Field(
        MOST_S,
        ge=0,
        le=3600,
        description=(
            "Seconds that a job waits at most for others that are about to end instead of having them stopped, where that costs less "
            "GPU time than to stop them and start them again. 0: others are stopped at once."
        ),
    )

    rebalance: Literal["off", "plan", "on"] = Field(
        "plan",
        description=(
            "Moves of running jobs to make room for jobs that wait, or to run closer or cheaper: nothing, proposals in events, "
            "or moves. They restart work of others from its checkpoints."
        ),
    )
    rebalance_budget: float = Field(
        _RULES.budget, ge=0.0, le=0.1, description="The share of the fleet's GPU time that moves of a day may cost."
    )

    burst: Literal["off", "plan", "on"] = Field(
        "plan",
        description=(
            "Machines that are rented for jobs that wait, by the offers that operators declared: nothing, proposals in events, or leases, "
            "which cost money. What was rented by itself is given back whatever this says."
        ),
    )
    burst_usd_per_gpu_hour: float = Field(
        _BURST.usd_per_gpu_hour,
        ge=0.0,
        le=1_000.0,
        description=(
            "US dollars that it is worth when a job waits an hour less for a GPU; it is rented for when that is more than the price. 0: for "
            "deadlines alone."
        ),
    )
    burst_budgets: dict[str, float] = Field(
        {},
        description=(
            'Most US dollars that the fleet rents for in 24 hours, as JSON: {"queues/research": 200, "sites/cloud": 500, "all": 1000}. What '
            "is not named has no bound."
        ),
    )
    burst_after_s: float = Field(
        _BURST.after_s,
        ge=0.0,
        le=30 * 86_400.0,
        description="Nothing is rented for jobs that have waited for less, seconds.",
    )
    burst_every_s: float = Field(10.0, ge=1.0, le=3600.0, description="Seconds between looks at what to rent.")
    burst_lease_s: float = Field(
        _BURST.lease_s,
        ge=600.0,
        le=30 * 86_400.0,
        description="The hard end of what the fleet rents by itself, seconds: it is given back then whatever runs on it.",
    )

    def burst_rules(self) -> BurstRules:
        """As the core wants them. Raises InvalidArgument for a budget of what there is not."""
        for scope, usd in self.burst_budgets.items():
            if not _is_budget(scope) or not 0 <= usd < 1e9:
                wanted = "use queues/Q, sites/S or all, and dollars from 0 on"
                raise InvalidArgument(FieldViolation("burst_budgets", f"{scope[:80]!r}: {usd}; {wanted}"))
        return BurstRules(
            usd_per_gpu_hour=self.burst_usd_per_gpu_hour,
            budgets_usd={"" if scope == "all" else scope: usd for scope, usd in self.burst_budgets.items()},
            after_s=self.burst_after_s,
            lease_s=self.burst_lease_s,
            lead_s=self.burst_every_s + ENDS_WITHIN_S,
        )

    def rebalance_rules(self) -> RebalanceRules:
        """As the core wants them."""
        return RebalanceRules(budget=self.rebalance_budget)

    def promise_rules(self) -> PromiseRules:
        """As the core wants them."""
        return PromiseRules(
            self.promised_starts,
            self.promised_starts // 4,
            let_pass_s=self.promise_let_pass_s,
            horizon_s=self.promise_horizon_s,
        )

    def timeouts(self) -> Timeouts:
        """As the core wants them."""
        return Timeouts(self.accept_s, self.start_s, self.fetch_s, self.partition_wait_s, self.avoid_s)


def _is_budget(scope: str) -> bool:
    """Whether it names a queue, a site, or all: one that names nothing would bound nothing."""
    kind = scope.partition("/")[0]
    try:
        return scope == "all" or (kind in _BUDGETS and bool(names.split(scope, kind)))
    except InvalidArgument:
        return False
