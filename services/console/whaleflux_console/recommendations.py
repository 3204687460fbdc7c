"""What would save money, for whoever asks: found in the ledger at each call; what people decided about it, and what that really saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import Aborted, FieldViolation, InvalidArgument, NotFound
from whaleflux.reasons import What
from whaleflux.rpc import auth, changes
from whaleflux.rpc.etags import etag_of
from whaleflux.rpc.paging import page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Delete, Entry, Put, Store, Unchanged, Write
from whaleflux.store.reading import read_all
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.convert import price_of
from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM, PriceKind
from whaleflux_console.core.price_book import Price
from whaleflux_console.core.recommend import tracking
from whaleflux_console.core.recommend.evidence import Window
from whaleflux_console.core.recommend.joint import Joint, joint, recommend
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.recommend.tracking import Before, Record
from whaleflux_console.costs import CLASS_OF, NUMBER_OF
from whaleflux_console.evidence import Evidence
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.manifest import DAY_MS

DEFAULT_HOURS, MOST_HOURS = 168, 840
MOST_DECIDED = 250  # the oldest decision is forgotten for a new one
DISMISSED_MS = 30 * DAY_MS
_HINT = "whaleflux cost recommendations"
_KINDS: dict[Kind, Any] = {kind: pb.RecommendationKind.Value(f"RECOMMENDATION_KIND_{kind.name}") for kind in Kind}
_KIND_OF = {number: kind for kind, number in _KINDS.items()}
_LEVELS: dict[Level, Any] = {one: pb.RecommendationLevel.Value(f"RECOMMENDATION_LEVEL_{one.name}") for one in Level}
Decided = Mapping[str, tuple[Entry, pb.Recommendation]]


@dataclass(frozen=True, slots=True)
class Recommendations:
    """See CostService."""

    store: Store
    answers: Answers
    queue_access: Callable[[str], Access]
    clock: Clock

    async def page(self, request: pb.ListRecommendationsRequest) -> pb.ListRecommendationsResponse:
        """Raises InvalidArgument naming what is wrong, Unavailable until the ledger was read once."""
        hours, first = _hours(request.window_hours), _first(request.page_token)
        size, wanted = page_size(request.page_size), _kind(request.kind)
        decided = await self._decided()
        realised = await self._realised(decided)
        records = _records(decided, realised)
        window, found = await self._found(hours, decided, records, wanted)
        shown = [_message(one, window) for one in found.found]
        if request.include_decided:
            again = {one.name for one in shown}  # dismissed long ago, and open again
            shown += [
                self._told(message, realised)
                for _, message in decided.values()
                if message.name not in again
                and self._sees(message.subject)
                and (wanted is None or message.kind == _KINDS[wanted])
            ]
        response = pb.ListRecommendationsResponse(
            recommendations=shown[first : first + size],
            next_page_token=str(first + size) if len(shown) > first + size else "",
            total_micros_per_month=window.per_month(found.total_micros),
            targeted_micros_per_month=window.per_month(found.targeted_micros),
            bill_micros_per_month=window.per_month(found.bill_micros),
            records=[_record(kind, record) for kind, record in sorted(records.items())],
        )
        response.start_time.FromMilliseconds(window.start_ms)
        response.end_time.FromMilliseconds(window.end_ms)
        return response

    async def accept(self, request: pb.AcceptRecommendationRequest) -> pb.Recommendation:
        """It is being done. Raises NotFound, PermissionDenied for what is another's."""
        return await self._decide(request.name, pb.RECOMMENDATION_STATE_ACCEPTED, "")

    async def dismiss(self, request: pb.DismissRecommendationRequest) -> pb.Recommendation:
        """It will not be done. Raises NotFound, PermissionDenied for what is another's."""
        if len(request.reason) > changes.MAX_REASON:
            limit = f"has {len(request.reason)} characters; use at most {changes.MAX_REASON}"
            raise InvalidArgument(FieldViolation("reason", limit))
        return await self._decide(request.name, pb.RECOMMENDATION_STATE_DISMISSED, request.reason)

    async def _decide(self, name: str, state: Any, reason: str) -> pb.Recommendation:
        names.split(name, "recommendations")
        ownership.note_asked()
        decided = await self._decided()
        there = decided.get(name)
        message = there[1] if there and self._counts(there[1]) else await self._open(name, decided)
        if message is None or not self._sees(message.subject):
            raise NotFound("recommendation", name, f"the ledger shows none of that name; see: {_HINT}")
        self._require_change(message)
        message.ClearField("etag")
        message.state = state
        message.decide_time.FromDatetime(self.clock.now())
        message.last_change.CopyFrom(changes.asked(What.CHANGED if there else What.CREATED, self.clock.now(), reason))
        key, value = keys.of_name(keys.RECOMMENDATIONS, name), message.SerializeToString(deterministic=True)
        oldest = _oldest(decided) if not there else []
        try:
            revision = await self.store.commit(
                Put(key, value), *oldest, when=[Unchanged(there[0]) if there else Absent(key)]
            )
        except ConditionFailed:
            raise Aborted(f"{name} changed meanwhile; read it again and repeat", retry_after_s=0.1) from None
        message.etag = etag_of(Entry(key, value, revision, there[0].created if there else revision))
        return message

    async def _open(self, name: str, decided: Decided) -> pb.Recommendation | None:
        records = _records(decided, await self._realised(decided))
        window, found = await self._found(DEFAULT_HOURS, decided, records, None)
        return next((_message(one, window) for one in found.found if f"recommendations/{one.id}" == name), None)

    async def _found(
        self, hours: int, decided: Decided, records: Mapping[Kind, Record], wanted: Kind | None
    ) -> tuple[Window, Joint]:
        """What is open, of a window: neither being done nor dismissed lately."""
        who = auth.principal()
        evidence = Evidence(
            self.answers,
            lambda queue: ownership.may_see(who, self.queue_access(queue.removeprefix("queues/"))),
            await self._reserved() if who.is_operator else (),
            who.is_operator,
        )
        ownership.note_asked()
        window = await evidence.window(hours)
        made = recommend(window, {kind: record.trust_ppm for kind, record in records.items()})
        away = {name for name, (_, message) in decided.items() if self._counts(message)}
        left = [
            one
            for one in made.found
            if f"recommendations/{one.id}" not in away and (wanted is None or one.kind is wanted)
        ]
        return window, joint(left, window)

    async def _reserved(self) -> list[Price]:
        """Reserved prices as they are declared; one that cannot be read is not offered."""
        found = read_all((await self.store.list(keys.PRICES)).entries, _price)
        return [price for _, price in found.values if price.kind is PriceKind.RESERVED]

    def _counts(self, message: pb.Recommendation) -> bool:
        """Whether it is decided still: one that was dismissed long ago is open again, by what the ledger shows now."""
        age_ms = self.clock.now().timestamp() * 1000 - message.decide_time.ToMilliseconds()
        return message.state == pb.RECOMMENDATION_STATE_ACCEPTED or age_ms < DISMISSED_MS

    async def _decided(self) -> Decided:
        found = read_all((await self.store.list(keys.RECOMMENDATIONS)).entries, _read)
        return {message.name: (entry, message) for entry, message in found.values}

    async def _realised(self, decided: Decided) -> Mapping[str, int]:
        """Of those that were accepted, as far as it is known."""
        accepted = [one for _, one in decided.values() if one.state == pb.RECOMMENDATION_STATE_ACCEPTED]
        jobs = [(one.subject, one.decide_time.ToMilliseconds()) for one in accepted if _is_job(one.subject)]
        pools = [(one.subject, one.decide_time.ToMilliseconds()) for one in accepted if not _is_job(one.subject)]
        if not accepted:
            return {}
        later = await Evidence(self.answers, lambda _: True).after(_earliest(jobs), _earliest(pools))
        found = {}
        for one in accepted:
            after = later.of(
                one.subject, one.decide_time.ToMilliseconds(), [CLASS_OF[c.cost_class] for c in one.evidence]
            )
            saved = tracking.realised_micros_per_month(_before(one), after)
            if saved is not None:
                found[one.name] = saved
        return found

    def _told(self, message: pb.Recommendation, realised: Mapping[str, int]) -> pb.Recommendation:
        if message.name in realised:
            message.realised_micros_per_month = realised[message.name]
        return message

    def _sees(self, subject: str) -> bool:
        if not _is_job(subject):
            return auth.principal().is_operator or _is_pool(subject)
        queue, _ = names.split(subject, "queues", "jobs")
        return ownership.may_see(auth.principal(), self.queue_access(queue))

    def _require_change(self, message: pb.Recommendation) -> None:
        if _is_job(message.subject):
            queue, _ = names.split(message.subject, "queues", "jobs")
            ownership.require_change(auth.principal(), message.owner, self.queue_access(queue), message.subject)
        elif not auth.principal().is_operator:
            raise ownership.not_owner(message.name, "")


def _read(entry: Entry) -> pb.Recommendation:
    message = pb.Recommendation.FromString(entry.value)
    if message.kind not in _KIND_OF or any(part.cost_class not in CLASS_OF for part in message.evidence):
        raise DecodeError("of a newer console")
    message.etag = etag_of(entry)
    return message


def _message(one: Recommendation, window: Window) -> pb.Recommendation:
    expected = window.per_month(one.saved_micros)
    made = pb.Recommendation(
        name=f"recommendations/{one.id}",
        kind=_KINDS[one.kind],
        subject=one.subject,
        change=one.change,
        command=one.command,
        low_micros_per_month=expected * one.low_ppm // WHOLE_PPM,
        expected_micros_per_month=expected,
        cash_ppm=one.cash_ppm,
        risk=_LEVELS[one.risk],
        effort=_LEVELS[one.effort],
        evidence=[pb.ClassCost(cost_class=NUMBER_OF[kind], micros=micros) for kind, micros in one.evidence.items()],
        bill_micros=one.bill_micros,
        state=pb.RECOMMENDATION_STATE_OPEN,
        owner=one.owner,
    )
    made.start_time.FromMilliseconds(window.start_ms)
    made.end_time.FromMilliseconds(window.end_ms)
    made.valid_until.FromMilliseconds(window.end_ms + DAY_MS)
    return made


def _before(one: pb.Recommendation) -> Before:
    hours = max(1, (one.end_time.ToMilliseconds() - one.start_time.ToMilliseconds()) // HOUR_MS)
    paid = sum(part.micros for part in one.evidence)
    return Before(_KIND_OF[one.kind], hours, one.bill_micros, paid, one.expected_micros_per_month)


def _records(decided: Decided, realised: Mapping[str, int]) -> Mapping[Kind, Record]:
    return tracking.records(
        (_KIND_OF[decided[name][1].kind], decided[name][1].expected_micros_per_month, saved)
        for name, saved in realised.items()
    )


def _record(kind: Kind, record: Record) -> pb.RecommendationRecord:
    return pb.RecommendationRecord(
        kind=_KINDS[kind],
        cases=record.cases,
        promised_micros_per_month=record.promised_micros_per_month,
        realised_micros_per_month=record.realised_micros_per_month,
        trust_ppm=record.trust_ppm,
    )


def _earliest(subjects: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for name, at in subjects:
        found[name] = min(at, found.get(name, at))
    return list(found.items())


def _oldest(decided: Decided) -> list[Write]:
    by_age = sorted(decided.values(), key=lambda pair: pair[1].decide_time.ToMilliseconds())
    return [Delete(entry.key) for entry, _ in by_age[: max(0, len(by_age) - MOST_DECIDED + 1)]]


def _price(entry: Entry) -> Price:
    try:
        return price_of(pb.GpuPrice.FromString(entry.value))
    except InvalidArgument as strange:
        raise DecodeError(str(strange)) from None


def _is_pool(subject: str) -> bool:
    """What nobody held: of others is said what the jobs of queues cost that not everybody may see."""
    return subject.count("/") == 1


def _is_job(subject: str) -> bool:
    return subject.startswith("queues/")


def _hours(asked: int) -> int:
    if not 0 <= asked <= MOST_HOURS:
        limit = f"{asked}: use 1 to {MOST_HOURS}, or 0 for {DEFAULT_HOURS}"
        raise InvalidArgument(FieldViolation("window_hours", limit))
    return asked or DEFAULT_HOURS


def _first(token: str) -> int:
    if token and not (token.isascii() and token.isdigit() and len(token) < 7):
        raise InvalidArgument(FieldViolation("page_token", "is not from an answer; leave it out for the first page"))
    return int(token or 0)


def _kind(asked: int) -> Kind | None:
    if asked and asked not in _KIND_OF:
        raise InvalidArgument(FieldViolation("kind", f"{asked} is none of: {', '.join(Kind)}; leave it out for all"))
    return _KIND_OF[asked] if asked else None
