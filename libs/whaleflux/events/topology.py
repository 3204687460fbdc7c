"""Which streams exist where, as data: a hub, and sites whose leaf servers go on alone when the link is cut.

    site a   EVENTS   wf.v1.a.>               what the site says; written locally, needs no hub
    hub      TAKEN-a  (whatever comes)        in an account of the site's own: what its server delivered
             EVENTS   wf.v1.> + each TAKEN-x  what everyone said; with no sites this is the whole backbone
             ACCOUNTING  wf.account.>         what every attempt and job cost; the newest record of each, kept for longer
             AUDIT    wf.audit.>              who changed what, and who was refused; nobody deletes of it, it ages out
             USAGE    wf.usage.>              what GPUs did, until the ledger has read it, and for as long as hours can be closed anew

No event comes twice and none goes in a circle: the site is part of the subject, EVENTS takes of TAKEN-a only the subjects of site a, and
leaf links refuse plain `wf.>` messages. A site hears nothing of the hub or of other sites: nobody there reads it, and whoever takes a
site's server would. An event keeps its subject, its order and its id at the hub; ids are compared there too, so they name the site
(`observation_id`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.events.subjects import ACCOUNT_ROOT, AUDIT_ROOT, EVERYTHING, HUB, ROOT, USAGE_ROOT
from whaleflux.names import check_id

EVENTS, ACCOUNTING, AUDIT, CODE, USAGE = "EVENTS", "ACCOUNTING", "AUDIT", "CODE", "USAGE"
HISTORY = (EVENTS, ACCOUNTING, AUDIT, USAGE)  # streams at the hub of what happened
TAKEN_BYTES = 128 << 20  # at the hub, per site, of what EVENTS has at once
DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds of a stream. At a site they must hold the longest cut, or events go before the hub has seen them."""

    max_bytes: int = 512 << 20
    max_age_s: float = 14 * DAY_S
    max_per_subject: int = 1_000  # of what comes again and again only the newest; 0: no limit
    duplicate_window_s: float = 600.0  # longer than any publisher keeps repeating itself; held in server memory
    replicas: int = 1  # servers of a cluster that keep a copy


TRAIL = StreamLimits(max_bytes=1 << 30, max_age_s=400 * DAY_S, max_per_subject=0)  # about 4 million records
ACCOUNTS = StreamLimits(max_bytes=1 << 30, max_age_s=400 * DAY_S, max_per_subject=1)  # one record per attempt or job
SAMPLES = StreamLimits(max_bytes=2 << 30, max_age_s=3 * DAY_S, max_per_subject=0)  # about 1 kB per node and interval


@dataclass(frozen=True, slots=True)
class Source:
    """Events that a stream takes from another one: those of `site`, by the interface `api`, delivered under `deliver`."""

    site: str
    stream: str
    api: str
    deliver: str

    @property
    def subjects(self) -> str:
        return f"{ROOT}.{self.site}.>"


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A stream as it should be."""

    name: str
    subjects: tuple[str, ...]
    sources: tuple[Source, ...] = ()
    limits: StreamLimits = field(default_factory=StreamLimits)
    sealed: bool = False  # messages go by age and room alone: the server refuses to delete or purge any

    def without_sources(self) -> StreamSpec:
        """The same, taking nothing from elsewhere."""
        return replace(self, sources=())


def site_api(site: str) -> str:
    """JetStream's interface of a site's own server, seen from the hub."""
    return f"$JS.{site}.API"


def taken_api(site: str) -> str:
    """JetStream's interface of the site's account at the hub, seen from the fleet's account."""
    return f"taken.{site}.API"


def taken_name(site: str) -> str:
    """The stream at the hub that holds what came from a site."""
    return f"TAKEN-{site}"


def site_deliver_prefix(site: str) -> str:
    """Under which a site's server delivers to the hub."""
    return f"from.{site}"


def deliver_prefix(site: str) -> str:
    """Under which the hub delivers a site's events to itself, from account to account."""
    return f"taken.{site}"


def hub_streams(
    sites: Iterable[str] = (),
    limits: StreamLimits | None = None,
    accounts: StreamLimits = ACCOUNTS,
    trail: StreamLimits = TRAIL,
    samples: StreamLimits = SAMPLES,
) -> tuple[StreamSpec, ...]:
    """The hub's streams; `sites` are those with a leaf server of their own."""
    sources = tuple(Source(s, taken_name(s), taken_api(s), deliver_prefix(s)) for s in _checked(sites))
    return (
        StreamSpec(EVENTS, (EVERYTHING,), sources, limits or StreamLimits()),
        StreamSpec(ACCOUNTING, (f"{ACCOUNT_ROOT}.>",), (), accounts),
        StreamSpec(AUDIT, (f"{AUDIT_ROOT}.>",), (), trail, sealed=True),
        StreamSpec(USAGE, (f"{USAGE_ROOT}.>",), (), samples),
    )


def site_streams(site: str, limits: StreamLimits | None = None) -> tuple[StreamSpec, ...]:
    """The streams of a site's own server."""
    (own,) = _checked([site])
    return (StreamSpec(EVENTS, (f"{ROOT}.{own}.>",), (), limits or StreamLimits()),)


def taken_stream(site: str, limits: StreamLimits | None = None) -> StreamSpec:
    """What the hub has taken from a site: whatever its server says, of which EVENTS then takes the site's own subjects."""
    bounds = limits or StreamLimits()
    source = Source(site, EVENTS, site_api(site), site_deliver_prefix(site))
    return StreamSpec(taken_name(site), (), (source,), replace(bounds, max_bytes=min(bounds.max_bytes, TAKEN_BYTES)))


_BY_ROOT = {ACCOUNT_ROOT: ACCOUNTING, AUDIT_ROOT: AUDIT, USAGE_ROOT: USAGE}


def streams_for(location: str, filters: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Which stream to read for these filters at `location` (the hub or a site), each with its share of the filters."""
    if location == HUB:
        shares = {stream: list[str]() for stream in HISTORY}
        for one in filters:
            shares[_BY_ROOT.get(".".join(one.split(".")[:2]), EVENTS)].append(one)
        return tuple((stream, tuple(share)) for stream, share in shares.items() if share)
    own: list[str] = []
    for one in filters:
        root, version, said, *rest = one.split(".")
        if said not in {location, "*", ">"}:
            why = f"{one!r} is not said here; a site's server has the events of {location} alone, the hub has all"
            raise InvalidArgument(FieldViolation("subjects", why))
        own.append(".".join((root, version, location, *(rest or [">"]))))
    return ((EVENTS, tuple(own)),)


def _checked(sites: Iterable[str]) -> tuple[str, ...]:
    unique = tuple(dict.fromkeys(check_id("site", site) for site in sites))
    if HUB in unique:
        raise InvalidArgument(FieldViolation("site", f"{HUB!r} is the control plane's own name; give the site another"))
    return unique
