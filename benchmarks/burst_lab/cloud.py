"""A cloud in memory that fails as clouds do, in the time of the loop. Simulated: no provider's code is in here.

Faults are drawn for each call from a plan's shares: replies lost before or after a machine was made, machines made late, lists that lag,
no stock for a while, throttling, two machines of one call, machines that stay alive after their end was acknowledged, notices.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from whaleflux.clock import Clock
from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.providers.api import LaunchRequest, MachineNotFound, NoCapacity, Throttled

NOTICE_S = 120.0


@dataclass(frozen=True, slots=True)
class Faults:
    """Shares of calls that meet each fault."""

    no_stock: float = 0.0
    throttled: float = 0.0
    lost_before: float = 0.0  # the request never arrives
    lost_after: float = 0.0  # the machine is there, its answer is not
    late: float = 0.0  # no answer, and the machine is made up to `late_s` later
    duplicate: float = 0.0
    zombie: float = 0.0  # of ends: acknowledged, and alive for up to ten minutes more
    lists_fail: float = 0.0
    notice: float = 0.0  # of machines: taken away, with notice, within an hour
    dies: float = 0.0  # of machines: gone without a word within an hour
    never_boots: float = 0.0
    late_s: float = 90.0
    lag_s: float = 20.0  # at most, until a new machine is listed
    keeps_tokens: bool = True  # the same token makes the same machine


HARSH = Faults(0.15, 0.15, 0.08, 0.08, 0.05, 0.05, 0.15, 0.1, 0.2, 0.1, 0.05)


@dataclass(slots=True)
class Asked:
    """A call: when it came, for which lease, and when it was answered that there is no stock. Seconds of the clock; 0.0: it was not."""

    at_s: float
    lease: str
    refused_s: float = 0.0


@dataclass(slots=True)
class Real:
    """A machine as it is, whatever lists say. Seconds of the clock."""

    id: str
    request: LaunchRequest
    made_s: float
    listed_s: float
    boots_s: float
    taken_s: float
    dies_s: float
    ended_s: float = float("inf")
    told_s: float = float("inf")  # when it was first told to end
    joined: bool = False


@dataclass
class Cloud:
    """One account. `joins` is asked once a machine has booted, with its request; whether it was admitted."""

    clock: Clock
    rng: random.Random
    faults: Faults
    joins: Callable[[Real], bool]
    lag_s: float = 30.0  # what it tells: no list lags longer
    there: dict[str, Real] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    _empty_until_s: dict[str, float] = field(default_factory=dict)
    _tokens: dict[str, str] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def launch(self, request: LaunchRequest) -> str:
        asked = Asked(self.clock.monotonic(), request.lease)
        self.asked.append(asked)
        await self.clock.sleep(self.rng.uniform(0.2, 3.0))
        now_s, chance = self.clock.monotonic(), self.rng.random
        if chance() < self.faults.throttled:
            raise Throttled("request limit exceeded")
        offer = request.offer.name
        if now_s < self._empty_until_s.get(offer, 0.0) or chance() < self.faults.no_stock:
            self._empty_until_s.setdefault(offer, now_s + self.rng.uniform(0, 600))
            asked.refused_s = now_s
            raise NoCapacity("insufficient capacity")
        if chance() < self.faults.lost_before:
            raise TimeoutError
        if chance() < self.faults.late:
            self._later(self.rng.uniform(0, self.faults.late_s), request)
            raise TimeoutError
        made = self._made(request)
        if chance() < self.faults.duplicate:
            self._new(request)
        if chance() < self.faults.lost_after:
            raise TimeoutError
        return made

    async def machines(self, fleet: str) -> Sequence[Machine]:
        await self.clock.sleep(self.rng.uniform(0.1, 1.0))
        if self.rng.random() < self.faults.lists_fail:
            raise Throttled("request limit exceeded")
        now_s = self.clock.monotonic()
        return [self._listed(real, now_s) for real in self.there.values() if self._is_listed(real, now_s)]

    async def terminate(self, machine_id: str) -> None:
        await self.clock.sleep(self.rng.uniform(0.1, 1.0))
        real, now_s = self.there.get(machine_id), self.clock.monotonic()
        if real is None or now_s < real.listed_s:
            raise MachineNotFound(machine_id)
        if self.rng.random() < self.faults.throttled:
            raise Throttled("request limit exceeded")
        if real.told_s > now_s and self.rng.random() < self.faults.zombie:
            real.told_s = now_s
            return  # acknowledged, and nothing happens
        real.told_s = min(real.told_s, now_s)
        real.ended_s = min(real.ended_s, now_s + self.rng.uniform(1, 20))

    def alive(self) -> list[Real]:
        now_s = self.clock.monotonic()
        return [real for real in self.there.values() if now_s < self._end_s(real)]

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def later(self, delay_s: float, request: LaunchRequest) -> None:
        """A request that a paused leader sends after it was replaced."""
        self._later(delay_s, request)

    def _later(self, delay_s: float, request: LaunchRequest) -> None:
        async def make() -> None:
            await self.clock.sleep(delay_s)
            self._made(request)

        task = asyncio.ensure_future(make())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _made(self, request: LaunchRequest) -> str:
        if self.faults.keeps_tokens and request.token in self._tokens:
            return self._tokens[request.token]
        return self._tokens.setdefault(request.token, self._new(request))

    def _new(self, request: LaunchRequest) -> str:
        now_s, draw = self.clock.monotonic(), self.rng
        boots_s = now_s + request.offer.terms.boot_s * draw.uniform(0.5, 1.5)
        real = Real(
            f"m-{len(self.there)}",
            request,
            now_s,
            now_s + draw.uniform(0, self.faults.lag_s),
            float("inf") if draw.random() < self.faults.never_boots else boots_s,
            now_s + draw.uniform(60, 3600) if draw.random() < self.faults.notice else float("inf"),
            now_s + draw.uniform(1, 3600) if draw.random() < self.faults.dies else float("inf"),
        )
        self.there[real.id] = real
        task = asyncio.ensure_future(self._boots(real))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return real.id

    async def _boots(self, real: Real) -> None:
        if real.boots_s == float("inf"):
            return
        await self.clock.sleep(real.boots_s - self.clock.monotonic())
        if self.clock.monotonic() < self._end_s(real):
            real.joined = self.joins(real)

    def _end_s(self, real: Real) -> float:
        return min(real.ended_s, real.taken_s, real.dies_s)

    def _is_listed(self, real: Real, now_s: float) -> bool:
        """Ended machines stay in the list for a while, as ended."""
        return real.listed_s <= now_s < self._end_s(real) + 300.0

    def _listed(self, real: Real, now_s: float) -> Machine:
        noticed = now_s >= real.taken_s - NOTICE_S
        unix_s = self.clock.now().timestamp() - now_s
        return Machine(
            id=real.id,
            lease=real.request.lease,
            token=real.request.token,
            created_s=unix_s + real.made_s,
            offer=real.request.offer.name,
            ended=now_s >= self._end_s(real),
            taken_s=unix_s + real.taken_s if noticed else 0.0,
            taken_why="spot notice" if noticed else "",
        )


@dataclass(frozen=True, slots=True)
class CloudKind:
    """The kind of provider that has one account: the cloud."""

    cloud: Cloud

    def problems(self, offer: Offer) -> dict[str, str]:
        return {}

    def open(self, offer: Offer, keys: object) -> Cloud:
        return self.cloud
