"""Which streams exist where, as data: a hub, and sites whose leaf servers go on alone when the link is cut.

    site a   EVENTS  wf.v1.a.>               what the site says; written locally, needs no hub
    hub      EVENTS  wf.v1.> + every site's  what everyone said; with no sites this is the whole backbone
    site a   HEARD   (nothing of its own)    from the hub: what the hub and the other sites said

No event comes twice and none goes in a circle: the site is part of the subject, each link carries only the other
side's subjects, leaf links refuse plain `wf.>` messages, and HEARD is sourced by nobody. A site's event keeps its
subject, its order and its id at the hub; ids are compared there too, so they name the site (`observation_id`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from whaleflux.errors import FieldViolation, Invalid
from whaleflux.events.subjects import EVERYTHING, HUB, ROOT
from whaleflux.names import check_id

EVENTS, HEARD = "EVENTS", "HEARD"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a stream. At a site they must hold the longest cut, or events go before the hub has seen them."""

    max_bytes: int = 512 << 20
    max_age_s: float = 7 * 86400.0
    duplicate_window_s: float = 600.0  # longer than any publisher keeps repeating itself; held in server memory
    replicas: int = 1  # servers of a cluster that keep a copy


@dataclass(frozen=True, slots=True)
class Source:
    """Events that a stream takes from a stream of another domain, those under `subjects` only."""

    domain: str
    stream: str
    subjects: str


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A stream as it should be."""

    name: str
    subjects: tuple[str, ...]
    sources: tuple[Source, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def without(self, domain: str) -> StreamSpec:
        """The same without what comes from `domain`."""
        return replace(self, sources=tuple(s for s in self.sources if s.domain != domain))


def hub_streams(sites: Iterable[str] = (), limits: Limits | None = None) -> tuple[StreamSpec, ...]:
    """The hub's streams; `sites` are those with a leaf server of their own."""
    sources = tuple(Source(site, EVENTS, f"{ROOT}.{site}.>") for site in _checked(sites))
    return (StreamSpec(EVENTS, (EVERYTHING,), sources, limits or Limits()),)


def site_streams(site: str, others: Iterable[str] = (), limits: Limits | None = None) -> tuple[StreamSpec, ...]:
    """One site's streams; `others` are the further sites whose events it hears through the hub."""
    (own,) = _checked([site])
    heard = tuple(Source(HUB, EVENTS, f"{ROOT}.{said}.>") for said in (HUB, *(o for o in _checked(others) if o != own)))
    bounds = limits or Limits()
    return StreamSpec(EVENTS, (f"{ROOT}.{own}.>",), (), bounds), StreamSpec(HEARD, (), heard, bounds)


def streams_for(location: str, filters: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Which stream to read for these filters at `location` (the hub or a site), each with its share of the filters."""
    if location == HUB:
        return ((EVENTS, tuple(filters)),)
    own: list[str] = []
    heard: list[str] = []
    for one in filters:
        root, version, said, *rest = one.split(".")
        if said in {location, "*", ">"}:
            own.append(".".join((root, version, location, *(rest or [">"]))))
        if said != location:
            heard.append(one)
    return tuple((stream, tuple(f)) for stream, f in ((EVENTS, own), (HEARD, heard)) if f)


def _checked(sites: Iterable[str]) -> tuple[str, ...]:
    unique = tuple(dict.fromkeys(check_id("site", site) for site in sites))
    if HUB in unique:
        raise Invalid(FieldViolation("site", f"{HUB!r} is the control plane's own name; give the site another"))
    return unique
