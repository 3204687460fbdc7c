"""What owners say of the fleet and of jobs, kept as facts for the hours that they touch. Pure: whoever watches the owners calls it.

Facts of an hour are told twice: what begins or ends within a minute or so, and everything once the hour is over. So a crash loses the end of
what was going on at most, and what goes on is taken up again from what was told (`resume`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from whaleflux_console.core.facts import (
    HOUR_MS,
    Attempt,
    Facts,
    Fragmented,
    Holding,
    Outcome,
    Presence,
    PriceKind,
    PriceSpan,
)
from whaleflux_console.core.lost_work import newest, phases
from whaleflux_console.core.price_book import FOR_GOOD_MS, NODE_SAYS
from whaleflux_console.core.served_tokens import Counters, ServedTokens
from whaleflux_console.core.spans import Span, Spans

LONGEST_BACK_MS = 35 * 24 * HOUR_MS  # beyond that what turns out to be lost stays what it was taken for


@dataclass(frozen=True, slots=True)
class Device:
    """What work can hold, as its node reports it now."""

    card: str
    device: str
    node: str
    gpu_class: str  # of the card
    part_ppm: int
    available: bool
    memory_bytes: int = field(default=0, compare=False)  # no part of what is told


@dataclass(frozen=True, slots=True)
class NodePrice:
    """What a node says that its cards cost."""

    micros_per_hour: int
    kind: PriceKind


@dataclass(frozen=True, slots=True)
class JobFacts:
    """A job's attempts, all that are known, and what they hold or held."""

    name: str
    attempts: tuple[Attempt, ...]
    holdings: tuple[Holding, ...]  # those that go on end now
    outcome: Outcome | None = None
    lost_from_ms: int | None = (
        None  # from when on earlier hours are told anew, since work in them turned out to be lost
    )

    @property
    def over(self) -> bool:
        return all(attempt.end_ms is not None for attempt in self.attempts)

    def touches(self, start_ms: int, end_ms: int) -> bool:
        return any(one.allocate_ms < end_ms and (one.end_ms is None or start_ms < one.end_ms) for one in self.attempts)


class Chronicle:
    """See the module. Instants are the caller's; `now_ms` never goes back."""

    def __init__(self) -> None:
        self._devices: Spans[Device] = Spans()
        self._prices: Spans[NodePrice] = Spans()  # by node
        self._fragmented: Spans[bool] = Spans()
        self._of_node: dict[str, tuple[str, ...]] = {}
        self._jobs: dict[str, JobFacts] = {}
        self._fresh_jobs: dict[str, None] = {}
        self._served = ServedTokens()
        self._resumed_ms = 0  # what was over by then is told
        self._models: dict[str, str] = {}  # job's uid -> its model, which nobody says any more once the replica is gone

    def copied(self) -> Chronicle:
        """As it is now, for a thread that looks through it meanwhile."""
        found = Chronicle()
        found._devices, found._prices = self._devices.copied(), self._prices.copied()
        found._fragmented = self._fragmented.copied()
        found._of_node, found._jobs, found._fresh_jobs = dict(self._of_node), dict(self._jobs), dict(self._fresh_jobs)
        found._served = self._served.copied()
        return found

    def taken(self, now_ms: int) -> Chronicle:
        """A copy that has what is `fresh` now; here that begins anew."""
        found = self.copied()
        found._devices, found._prices = self._devices.taken(), self._prices.taken()
        found._fragmented, self._fresh_jobs = self._fragmented.taken(), {}
        found._served = self._served.taken(now_ms)
        return found

    def node(self, node: str, devices: Sequence[Device], price: NodePrice | None, now_ms: int, since_ms: int) -> None:
        """A node is so now; of devices that are new since it joined. None of them and no price: it is gone."""
        gone = set(self._of_node.get(node, ())) - {one.device for one in devices}
        for device in gone:
            self._devices.set(device, None, now_ms)
        for one in devices:
            self._devices.set(one.device, one, now_ms, since_ms)
        self._of_node[node] = tuple(one.device for one in devices)
        self._prices.set(node, price, now_ms, since_ms)

    def nodes_are(self, nodes: Iterable[str], now_ms: int) -> None:
        """All others are gone: the first listing is complete."""
        for node in set(self._of_node) - set(nodes):
            self.node(node, (), None, now_ms, now_ms)

    def job(self, facts: JobFacts) -> None:
        """A job is so now."""
        facts = self._with_models(facts)
        before = self._jobs.get(facts.name)
        if before != facts and self.is_news(facts):
            self._jobs[facts.name] = replace(facts, lost_from_ms=_newly_lost(before, facts))
            self._fresh_jobs[facts.name] = None

    def _with_models(self, facts: JobFacts) -> JobFacts:
        self._models.update({one.uid: one.model for one in facts.attempts if one.model})
        known = (replace(one, model=one.model or self._models.get(one.uid, "")) for one in facts.attempts)
        return replace(facts, attempts=tuple(known))

    def is_news(self, facts: JobFacts) -> bool:
        """Whether anything of it goes on, or went on when nobody had told of it yet."""
        known = facts.name in self._jobs
        return bool(facts.attempts) and (known or not facts.over or facts.touches(self._resumed_ms, FOR_GOOD_MS))

    def job_gone(self, name: str, now_ms: int) -> None:
        """Its record is deleted: what it held it holds no more."""
        job = self._jobs.get(name)
        if job is not None and not job.over:
            ended = {one.attempt: replace(one, end_ms=one.end_ms or now_ms) for one in job.attempts}
            held = [replace(one, end_ms=ended[one.attempt].end_ms or now_ms) for one in job.holdings]
            self.job(replace(job, attempts=tuple(ended.values()), holdings=tuple(held)))

    def served(self, uid: str, attempt: int, counters: Counters, now_ms: int, began_ms: int) -> None:
        """The counters of a replica's engine are so now."""
        self._served.read(uid, attempt, counters, now_ms, began_ms)

    def fragmented(self, devices: Iterable[str], now_ms: int) -> None:
        """Exactly these free devices are of no use to those that wait."""
        found = set(devices)
        self._fragmented.keep_only(found, now_ms)
        for device in found:
            self._fragmented.set(device, True, now_ms)

    def resume(self, told: Facts) -> None:
        """Takes up what was going on when it was last told."""
        self._served.resume(told.served)
        newest: dict[str, Presence] = {}
        for one in told.presences:
            if one.device not in newest or newest[one.device].start_ms < one.start_ms:
                newest[one.device] = one
        self._resumed_ms = max(self._resumed_ms, *(one.end_ms for one in told.presences), 0)
        for device, one in newest.items():
            if one.goes_on:
                value = Device(one.card, one.device, one.node, one.gpu_class, one.part_ppm, one.available)
                self._devices.resume(device, value, one.start_ms)
                self._of_node[one.node] = (*self._of_node.get(one.node, ()), device)
        self._models.update({one.uid: one.model for one in told.attempts if one.model})
        node_of = {one.card: one.node for one in newest.values()}
        for price in sorted(told.prices, key=lambda price: price.start_ms):
            if price.source == NODE_SAYS and price.card in node_of:
                self._prices.resume(node_of[price.card], NodePrice(price.micros_per_hour, price.kind), price.start_ms)

    def begin_ms(self, now_ms: int) -> int:
        """Since when anything is known of."""
        return min((span.start_ms for span in self._devices.touching(0, now_ms + 1, now_ms)), default=now_ms)

    def devices(self) -> tuple[Device, ...]:
        """Those that are there now."""
        found = (self._devices.known(key) for key in self._devices.keys)
        return tuple(device for device in found if device is not None)

    def held(self) -> dict[str, int]:
        """Device -> parts per million of it that attempts hold now."""
        found: dict[str, int] = {}
        for job in self._jobs.values():
            running = {one.attempt for one in job.attempts if one.end_ms is None}
            for one in job.holdings:
                if one.attempt in running:
                    found[one.device] = found.get(one.device, 0) + one.share_ppm
        return found

    def fresh(self, now_ms: int) -> dict[int, Facts]:
        """Hour -> what is new to tell of it, since this was last asked."""
        hours: dict[int, list[Facts]] = {}
        presences, prices = self._devices.fresh(now_ms), self._prices.fresh(now_ms)
        broken = self._fragmented.fresh(now_ms)
        spans: tuple[Span[object], ...] = (*presences, *prices, *broken)
        touched = {hour for span in spans for hour in _hours(max(span.start_ms, now_ms - HOUR_MS), span.end_ms)}
        for hour in touched:
            of_hour = [tuple(s for s in found if _touches(s, hour)) for found in (presences, prices, broken)]
            hours.setdefault(hour, []).append(self._spans_told(*of_hour))  # type: ignore[arg-type]
        asked, self._fresh_jobs = self._fresh_jobs, {}
        for name in asked:
            job = self._jobs[name]
            for hour in _hours(_told_from(job, now_ms), now_ms):
                hours.setdefault(hour, []).append(_job_told([job], hour, now_ms, corrects=True))
        for hour, served in self._served.fresh(now_ms).items():
            hours.setdefault(hour, []).append(Facts(served=served))
        return {hour: joined(found) for hour, found in hours.items()}

    def whole_hour(self, hour_ms: int, now_ms: int) -> Facts:
        """Everything that touches the hour."""
        end_ms = hour_ms + HOUR_MS
        found = (each.touching(hour_ms, end_ms, now_ms) for each in (self._devices, self._prices, self._fragmented))
        jobs = [job for job in self._jobs.values() if job.touches(hour_ms, end_ms)]
        spans = self._spans_told(*found)  # type: ignore[arg-type]
        return joined([spans, _job_told(jobs, hour_ms, now_ms), Facts(served=self._served.of_hour(hour_ms))])

    def known_of(self, hour_ms: int, jobs: Sequence[JobFacts], now_ms: int) -> Facts:
        """The hour with these jobs, which may be over for long."""
        return joined([self.whole_hour(hour_ms, now_ms), _job_told(jobs, hour_ms, now_ms)])

    def forget(self, before_ms: int) -> None:
        """Lets go what was over before: its hours are told."""
        for each in (self._devices, self._prices, self._fragmented):
            each.forget(before_ms)
        self._served.forget(before_ms)
        gone = [
            job.name for job in self._jobs.values() if job.over and not job.touches(before_ms, before_ms + FOR_GOOD_MS)
        ]
        for name in gone:
            for one in self._jobs.pop(name).attempts:
                self._models.pop(one.uid, None)

    def _spans_told(
        self,
        presences: Sequence[Span[Device]],
        prices: Sequence[Span[NodePrice]],
        fragmented: Sequence[Span[bool]],
    ) -> Facts:
        cards: dict[str, set[str]] = {}
        for device in (span.value for span in presences):
            cards.setdefault(device.node, set()).add(device.card)
        for known in self.devices():
            cards.setdefault(known.node, set()).add(known.card)
        return Facts(
            presences=tuple(_presence(span) for span in presences),
            fragmented=tuple(Fragmented(span.key, span.start_ms, span.end_ms) for span in fragmented),
            prices=tuple(
                PriceSpan(card, s.start_ms, s.end_ms, s.value.micros_per_hour, s.value.kind, NODE_SAYS)
                for s in prices
                for card in sorted(cards.get(s.key, ()))
            ),
        )


def _newly_lost(before: JobFacts | None, now: JobFacts) -> int | None:
    """The beginning of work that turned out to be lost since; None: none did."""
    was, now_is = ({} if job is None else phases(newest(job.attempts), {}) for job in (before, now))
    found = []
    for key, phase in now_is.items():
        earlier = (
            was[key].lost_from_ms if key in was else None
        )  # of a job that is seen again after a restart nothing is known
        if earlier != phase.lost_from_ms:
            found += [start for start in (earlier, phase.lost_from_ms) if start is not None]
    return min(found, default=None)


def joined(parts: Iterable[Facts]) -> Facts:
    """All of them together."""
    found = list(parts)
    return Facts(
        presences=tuple(one for part in found for one in part.presences),
        holdings=tuple(one for part in found for one in part.holdings),
        attempts=tuple(one for part in found for one in part.attempts),
        fragmented=tuple(one for part in found for one in part.fragmented),
        prices=tuple(one for part in found for one in part.prices),
        served=tuple(one for part in found for one in part.served),
        outcomes=tuple(one for part in found for one in part.outcomes),
    )


def _presence(span: Span[Device]) -> Presence:
    one = span.value
    return Presence(
        one.card,
        one.device,
        one.node,
        one.gpu_class,
        one.part_ppm,
        span.start_ms,
        span.end_ms,
        one.available,
        span.goes_on,
    )


def _job_told(jobs: Iterable[JobFacts], hour_ms: int, now_ms: int, *, corrects: bool = False) -> Facts:
    """All attempts of the jobs, and what they held in the hour.

    `corrects`: also what the newest attempt held no more, in place of what was told while nobody knew that it had ended.
    """
    jobs = list(jobs)
    end_ms = hour_ms + HOUR_MS
    newest_of = {job.name: max((one.attempt for one in job.attempts), default=0) for job in jobs if corrects}
    return Facts(
        attempts=tuple(one for job in jobs for one in job.attempts),
        outcomes=tuple(job.outcome for job in jobs if job.outcome is not None),
        holdings=tuple(
            one
            for job in jobs
            for one in _until_now(job, now_ms)
            if one.start_ms < end_ms and (hour_ms < one.end_ms or one.attempt == newest_of.get(job.name))
        ),
    )


def _until_now(job: JobFacts, now_ms: int) -> Iterator[Holding]:
    running = {one.attempt for one in job.attempts if one.end_ms is None}
    for one in job.holdings:
        told = replace(one, end_ms=now_ms) if one.attempt in running else one
        if told.start_ms < told.end_ms:
            yield told


def _told_from(job: JobFacts, now_ms: int) -> int:
    """From which hour on a change of the job is told: from the one before now, from its end, or from where its work turned out to be lost.

    Hours that nobody has told yet are told whole (`whole_hour`).
    """
    recent = max(now_ms - HOUR_MS, *(one.allocate_ms for one in job.attempts))
    recent = min(recent, max(one.end_ms or now_ms for one in job.attempts) - 1)
    since = recent if job.lost_from_ms is None else min(recent, job.lost_from_ms)
    return max(since, now_ms - LONGEST_BACK_MS)


def _hours(start_ms: int, end_ms: int) -> range:
    return range(start_ms // HOUR_MS * HOUR_MS, end_ms, HOUR_MS)


def _touches(span: Span[object], hour_ms: int) -> bool:
    return span.start_ms < hour_ms + HOUR_MS and hour_ms < span.end_ms
