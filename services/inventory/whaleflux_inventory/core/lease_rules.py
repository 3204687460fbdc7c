"""What is done about a lease next, from its record and what its provider lists. Pure: time comes as Unix seconds.

    INTENT -> REQUESTED -> BOOTING -> JOINED -> DRAINING -> RELEASING -> GONE

* Before each call the record says that it is made (REQUESTED, `called_s`): whoever takes over after a crash looks by tag for what may have
  come of it. A machine with the token of the lease's present attempt is its own; the first one found is adopted, others are strays.
* The token of a request is made of lease, offer and attempt: repeated word for word while the answer is unknown (a provider that keeps
  tokens makes one machine of both calls), another one for another offer or after a machine that is gone.
* A machine is gone when the provider does not list it, at a time by which it would have: new machines may be missing for `lag_s`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from whaleflux_inventory.core.rental_cost import end_by_cap_s, paid_usd

NOTICE_AHEAD_S = 3600.0  # an announced end that is further away changes nothing yet
NOTICE_SPARE_S = 10.0  # before a machine is taken away its work has to have left it
CALLS_OF_ATTEMPT = 5
BUSY_FOR_S = 60.0  # a provider that has been too busy for so long is no help: the next offer
MAX_STRAYS = 16  # that are named; the cost of further ones counts


class State(StrEnum):
    """See the module."""

    INTENT = "INTENT"
    REQUESTED = "REQUESTED"
    BOOTING = "BOOTING"
    JOINED = "JOINED"
    DRAINING = "DRAINING"
    RELEASING = "RELEASING"
    GONE = "GONE"


NEXT: dict[State, frozenset[State]] = {
    State.INTENT: frozenset({State.REQUESTED, State.GONE}),
    State.REQUESTED: frozenset({State.BOOTING, State.INTENT, State.RELEASING, State.GONE}),
    State.BOOTING: frozenset({State.JOINED, State.INTENT, State.RELEASING}),
    State.JOINED: frozenset({State.DRAINING, State.RELEASING}),
    State.DRAINING: frozenset({State.RELEASING}),
    State.RELEASING: frozenset({State.GONE}),
    State.GONE: frozenset(),
}
HAS_MACHINE = frozenset({State.BOOTING, State.JOINED, State.DRAINING})


@dataclass(frozen=True, slots=True)
class Terms:
    """What of an offer counts once it is chosen. `drain_s`: how long work is given to leave before a planned end."""

    usd_per_hour: float
    billing_unit_s: float = 60.0
    boot_s: float = 180.0
    drain_s: float = 120.0

    @property
    def boot_within_s(self) -> float:
        """When a machine that has not joined is given up."""
        return max(600.0, 3 * self.boot_s)


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease as its record says. Instants are Unix seconds, 0.0: not yet."""

    name: str
    offer: str
    terms: Terms
    created_s: float
    hard_end_s: float
    cost_cap_usd: float
    state: State = State.INTENT
    state_s: float = 0.0
    attempt: int = 1
    calls: int = 0
    provider_id: str = ""
    called_s: float = 0.0  # the last call
    asked_s: float = 0.0  # the first call of this attempt: paid for from then on
    next_call_s: float = 0.0
    joined_s: float = 0.0
    missing_s: float = 0.0
    drain_end_s: float = 0.0
    told_s: float = 0.0  # when the provider was last told to end the machine
    end_reason: str = ""
    spent_usd: float = 0.0  # by machines of earlier attempts, and by all once it is GONE
    strays: tuple[str, ...] = ()
    stray_usd: float = 0.0

    @property
    def token(self) -> str:
        """Of the present attempt: 32 hexadecimal digits."""
        return token_of(self.name, self.offer, self.attempt)

    @property
    def live(self) -> bool:
        return self.state is not State.GONE

    @property
    def end_s(self) -> float:
        """When it ends at the latest: its hard end, or the last moment that the cap pays for."""
        left_usd = self.cost_cap_usd - self.spent_usd
        return min(self.hard_end_s, end_by_cap_s(self.asked_s or self.created_s, left_usd, self.terms))

    def cost_usd(self, now_s: float) -> float:
        """What it has cost until then, strays included."""
        return self.spent_usd + self.stray_usd + self._running_usd(now_s)

    def _running_usd(self, now_s: float) -> float:
        runs = self.state in HAS_MACHINE or (self.state is State.RELEASING and self.provider_id)
        return paid_usd(now_s - self.asked_s, self.terms) if runs else 0.0


def token_of(lease: str, offer: str, attempt: int) -> str:
    """Of the request that an attempt of a lease makes: 32 hexadecimal digits."""
    return hashlib.sha256(f"{lease}\n{offer}\n{attempt}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as its provider lists it: which of our tags it carries, and since when it is paid for (Unix seconds).

    `taken_s`: when the provider takes it away, which it has announced; 0.0: it has not. `ended`: listed, and not running any more.
    """

    id: str
    lease: str
    token: str
    created_s: float
    offer: str = ""
    ended: bool = False
    taken_s: float = 0.0
    taken_why: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a lease's surroundings. `machines`: with its tag; None: its provider was not asked, or did not answer.

    `elsewhere`: with its tag in other accounts, where it had an offer before: what a call made there that was not answered.
    `held`: GPUs of its node that jobs hold; None: not known. `notice`: what its own agent has heard of its end: when, why.
    """

    machines: Sequence[Machine] | None = None
    elsewhere: Sequence[Machine] = ()
    joined: bool = False
    held: int | None = None
    lag_s: float = 60.0
    notice: tuple[float, str] | None = None

    @property
    def alive(self) -> tuple[Machine, ...]:
        return tuple(machine for machine in self.machines or () if not machine.ended)


@dataclass(frozen=True, slots=True)
class Step:
    """The record as it is to be, and what is done once that is stored: a call, machines that end, a node that is drained.

    `taken`: the provider has taken its machine away, or says that it will: why its offer is not believed for a while.
    """

    lease: Lease
    launch: bool = False
    end: tuple[str, ...] = ()
    drain: bool = False
    next_offer: str = ""  # why another offer is needed; the caller knows which there are
    taken: str = ""


def step(lease: Lease, seen: Seen, now_s: float) -> Step:
    """What is done next. Called again with the new record until it changes no more and asks for nothing."""
    lease, strays = _with_strays(lease, seen, now_s)
    decided = _RULES[lease.state](lease, seen, now_s)
    return replace(decided, end=(*decided.end, *(one for one in strays if one not in decided.end)))


def end(lease: Lease, why: str) -> Lease:
    """It is to end; what was said first stays."""
    return lease if lease.end_reason or not lease.live else replace(lease, end_reason=why)


def launched(lease: Lease, provider_id: str, now_s: float) -> Lease:
    """The call was answered by a machine."""
    return _to(replace(lease, provider_id=provider_id), State.BOOTING, now_s)


def no_answer(lease: Lease, now_s: float, lag_s: float) -> Lease:
    """The call may have made a machine or not: asked again once the provider would list it."""
    return replace(lease, next_call_s=now_s + lag_s)


def busy(lease: Lease, now_s: float, pause_s: float) -> Lease:
    """The provider was too busy to make anything."""
    return replace(lease, next_call_s=now_s + pause_s)


def is_busy_too_long(lease: Lease, now_s: float) -> bool:
    """Whether another offer is a better idea than one more call."""
    return now_s - lease.asked_s >= BUSY_FOR_S


def other_offer(lease: Lease, offer: str, terms: Terms, now_s: float) -> Lease:
    """Begins anew with another offer, or the same once more."""
    spent = lease.spent_usd + (paid_usd(now_s - lease.asked_s, lease.terms) if lease.provider_id else 0.0)
    fresh = replace(
        lease,
        offer=offer,
        terms=terms,
        attempt=lease.attempt + 1,
        spent_usd=spent,
        provider_id="",
        calls=0,
        called_s=0.0,
    )
    return _to(replace(fresh, asked_s=0.0, next_call_s=0.0, missing_s=0.0), State.INTENT, now_s)


def no_offer(lease: Lease, why: str, now_s: float) -> Lease:
    """None of the offers has a machine. What an unanswered call may have made is looked for first."""
    ended = end(lease, why)
    unsure = lease.calls > 1 or lease.provider_id
    return _to(ended, State.RELEASING if unsure else State.GONE, now_s)


def _of_intent(lease: Lease, seen: Seen, now_s: float) -> Step:
    if lease.end_reason or now_s >= lease.end_s:
        return Step(_to(end(lease, _why_over(lease)), State.GONE, now_s))
    return _call(lease, now_s, seen.lag_s)


def _of_requested(lease: Lease, seen: Seen, now_s: float) -> Step:
    own = _own(lease, seen)
    if own is not None:
        return Step(_to(replace(lease, provider_id=own.id), State.BOOTING, now_s))
    if seen.machines is None or now_s < lease.next_call_s:
        return Step(lease)
    if lease.end_reason or now_s >= lease.end_s:
        return Step(_to(end(lease, _why_over(lease)), State.RELEASING, now_s))
    if any(machine.ended and machine.token == lease.token for machine in seen.machines):
        why = "its machine ended before it was known"
        return Step(lease, next_offer=why, taken=why)
    if lease.calls >= CALLS_OF_ATTEMPT:
        return Step(lease, next_offer=f"{lease.calls} calls had no answer")
    return _call(lease, now_s, seen.lag_s)


def _of_booting(lease: Lease, seen: Seen, now_s: float) -> Step:
    if seen.joined:
        return Step(_to(replace(lease, joined_s=now_s, missing_s=0.0), State.JOINED, now_s))
    if (over := _over(lease, seen, now_s)) is not None:
        return Step(_to(end(lease, over), State.RELEASING, now_s), taken=_notice(lease, seen, now_s))
    lease, gone = _presence(lease, seen, now_s)
    if gone:
        why = "its machine is gone before it joined"
        return Step(lease, next_offer=why, taken=why)
    if now_s - lease.asked_s > lease.terms.boot_within_s:
        why = f"its machine has not joined within {lease.terms.boot_within_s:.0f} s"
        return Step(_to(end(lease, why), State.RELEASING, now_s))
    return Step(lease)


def _of_joined(lease: Lease, seen: Seen, now_s: float) -> Step:
    lease, gone = _presence(lease, seen, now_s)
    if gone:
        why = "its machine is gone: the provider does not list it any more"
        return Step(_to(end(lease, why), State.RELEASING, now_s), taken=why)
    if (over := _over(lease, seen, now_s)) is not None:
        until_s = min(now_s + max(lease.terms.drain_s, 0.0), _taken(lease, seen)[0] - NOTICE_SPARE_S, lease.end_s)
        drains = _to(replace(end(lease, over), drain_end_s=max(now_s, until_s)), State.DRAINING, now_s)
        return Step(drains, drain=True, taken=_notice(lease, seen, now_s))
    return Step(lease)


def _of_draining(lease: Lease, seen: Seen, now_s: float) -> Step:
    lease, gone = _presence(lease, seen, now_s)
    until_s = min(lease.drain_end_s, _taken(lease, seen)[0] - NOTICE_SPARE_S, lease.end_s)
    if gone or seen.held == 0 or now_s >= until_s:
        return Step(_to(lease, State.RELEASING, now_s))
    return Step(lease, drain=True)


def _of_releasing(lease: Lease, seen: Seen, now_s: float) -> Step:
    alive = [machine.id for machine in seen.alive]
    wanted = [lease.provider_id] if lease.provider_id and (seen.machines is None or not lease.told_s) else []
    if (
        seen.machines is not None
        and not alive
        and now_s >= lease.called_s + seen.lag_s
        and (lease.told_s or not wanted)
    ):
        cost = paid_usd(now_s - lease.asked_s, lease.terms) if lease.provider_id else 0.0
        return Step(_to(replace(lease, spent_usd=lease.spent_usd + cost), State.GONE, now_s))
    told = tuple(dict.fromkeys([*wanted, *alive]))
    return Step(replace(lease, told_s=now_s) if told and not lease.told_s else lease, end=told)


def _of_gone(lease: Lease, seen: Seen, now_s: float) -> Step:
    return Step(lease)


_RULES = {
    State.INTENT: _of_intent,
    State.REQUESTED: _of_requested,
    State.BOOTING: _of_booting,
    State.JOINED: _of_joined,
    State.DRAINING: _of_draining,
    State.RELEASING: _of_releasing,
    State.GONE: _of_gone,
}


def _call(lease: Lease, now_s: float, lag_s: float) -> Step:
    """The record says so first. Whoever finds it after a crash waits for the lag before it calls again."""
    called = replace(
        lease, calls=lease.calls + 1, called_s=now_s, asked_s=lease.asked_s or now_s, next_call_s=now_s + lag_s
    )
    return Step(_to(called, State.REQUESTED, now_s), launch=True)


def _own(lease: Lease, seen: Seen) -> Machine | None:
    """The machine that an unanswered call of this attempt made: the first, if there are several."""
    made = [machine for machine in seen.alive if machine.token == lease.token]
    return min(made, key=lambda machine: (machine.created_s, machine.id), default=None)


def _presence(lease: Lease, seen: Seen, now_s: float) -> tuple[Lease, bool]:
    """The record with since when its machine is missing, and whether it is gone: for longer than lists may lag, or listed as ended."""
    if seen.machines is None:
        return lease, False
    listed = next((machine for machine in seen.machines if machine.id == lease.provider_id), None)
    if listed is not None:
        return replace(lease, missing_s=0.0), listed.ended
    since_s = lease.missing_s or now_s
    return replace(lease, missing_s=since_s), now_s >= max(since_s, lease.called_s) + seen.lag_s


def _taken(lease: Lease, seen: Seen) -> tuple[float, str]:
    """When its machine is taken away and why, as its provider lists it or its agent has heard; infinite: nobody has said so."""
    own = next((machine for machine in seen.alive if machine.id == lease.provider_id), None)
    said = [(own.taken_s, own.taken_why)] if own is not None and own.taken_s else []
    return min([*said, *([seen.notice] if seen.notice else [])], default=(float("inf"), ""))


def _over(lease: Lease, seen: Seen, now_s: float) -> str | None:
    """Why the lease ends now, in words; None: it goes on."""
    if lease.end_reason:
        return lease.end_reason
    if now_s >= lease.end_s - lease.terms.drain_s:
        return _why_over(lease)
    return _notice(lease, seen, now_s) or None


def _notice(lease: Lease, seen: Seen, now_s: float) -> str:
    """Why the machine is taken away soon; "": it is not."""
    taken_s, why = _taken(lease, seen)
    return (why or "the provider takes the machine away") if taken_s - now_s <= NOTICE_AHEAD_S else ""


def _why_over(lease: Lease) -> str:
    if lease.end_reason:
        return lease.end_reason
    return (
        "its time is over" if lease.end_s >= lease.hard_end_s else f"its cap of {lease.cost_cap_usd:.2f} USD is reached"
    )


def _with_strays(lease: Lease, seen: Seen, now_s: float) -> tuple[Lease, tuple[str, ...]]:
    """Machines with the lease's tag that are not its own: counted once, at the price of its offer, and ended as long as they are listed."""
    strays = [machine for machine in seen.alive if _is_stray(lease, machine, seen)]
    strays += [machine for machine in seen.elsewhere if not machine.ended]
    new = [machine for machine in strays if machine.id not in lease.strays]
    if new:
        usd = sum(paid_usd(now_s - _unpaid_s(lease, machine), lease.terms) for machine in new)
        known = (*lease.strays, *(machine.id for machine in new))[-MAX_STRAYS:]
        lease = replace(lease, strays=known, stray_usd=lease.stray_usd + usd)
    return lease, tuple(machine.id for machine in strays)


def _unpaid_s(lease: Lease, machine: Machine) -> float:
    """Since when a stray's cost is in no other sum: one that is alive after the lease was over, since then."""
    return max(machine.created_s, lease.state_s) if machine.id == lease.provider_id else machine.created_s


def _is_stray(lease: Lease, machine: Machine, seen: Seen) -> bool:
    if machine.id == lease.provider_id and lease.live:
        return False
    if lease.state is State.REQUESTED:
        own = _own(lease, seen)
        return own is None or machine.id != own.id
    return True


def _to(lease: Lease, state: State, now_s: float) -> Lease:
    return lease if lease.state is state else replace(lease, state=state, state_s=now_s)
