"""Who may say and hear what on the event bus: a user per service, and per site a user in an account of its own.

A service publishes events about its own kinds of resources, makes streams that are absent, and reads what it answers questions from; it
hears nothing but answers to its own questions. Only inventory changes streams, and nobody deletes or purges one that keeps what happened.

A site's server is somebody else's machine. Permissions on a shared account would not hold it: what it answers to the hub's own questions
is taken by the hub's JetStream, which then stores it under any subject that the answer names, and replies to any subject that it asks
for. So each site has an account, in which nothing is but what came from it (`taken_stream`); the fleet's account imports from there, by
a consumer that the hub itself serves and filters. (Tried by `tests/contract/test_bus_captured_leaf.py`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from whaleflux.events.subjects import ACCOUNT_ROOT, AUDIT_ROOT, HUB, ROOT, USAGE_ROOT
from whaleflux.events.topology import (
    CODE,
    EVENTS,
    HISTORY,
    deliver_prefix,
    site_api,
    site_deliver_prefix,
    taken_api,
    taken_name,
)
from whaleflux.services import BY_ROLE, Service

FLEET_ACCOUNT = "WF"


@dataclass(frozen=True, slots=True)
class Permissions:
    """Subjects that a user may publish and hear; nothing else."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shared:
    """What a site's account lends to the fleet's: `subject` there is `to` here; a stream brings messages, a service takes questions."""

    kind: str  # "stream" or "service"
    subject: str
    to: str
    many_answers: bool = False


def inbox(role: str) -> str:
    """Below which a service hears its answers; nobody else may."""
    return f"_INBOX.{role}"


def of_service(role: str, sites: Iterable[str] = ()) -> Permissions:
    """Of a service at the hub; `sites` are those with a server of their own, whose streams inventory keeps."""
    service = BY_ROLE[role]
    said = [f"{ROOT}.{HUB}.{kind}.>" for kind in service.tells]
    said += [f"{AUDIT_ROOT}.{role}.>", "$JS.API.INFO"]
    for stream in HISTORY:
        said += _api(stream, "STREAM.INFO", "STREAM.CREATE")
    said += _of_role(service)
    if service.keeps_streams:
        said += [subject for site in sites for subject in _of_site(site)]
    return Permissions(tuple(dict.fromkeys(said)), (f"{inbox(role)}.>",))


def _of_role(service: Service) -> Iterator[str]:
    if service.accounts:
        yield f"{ACCOUNT_ROOT}.>"
    if service.takes_usage:
        yield f"{USAGE_ROOT}.>"
    for stream in service.reads_streams:
        yield from _reading(stream)
    if service.keeps_streams:
        for stream in HISTORY:
            yield from _api(stream, "STREAM.UPDATE")
    if service.keeps_code:
        yield from ("code.>", f"$JS.API.DIRECT.GET.{CODE}", f"$JS.API.DIRECT.GET.{CODE}.>")
        yield from _api(CODE, *(f"STREAM.{verb}" for verb in ("INFO", "CREATE", "UPDATE", "PURGE", "MSG.GET")))


def _api(stream: str, *calls: str) -> list[str]:
    return [f"$JS.API.{call}.{stream}" for call in calls]


def _reading(stream: str) -> Iterator[str]:
    """Consumers of a stream: made, asked, acknowledged (in newer servers with domain and account in front), forgotten."""
    yield from (f"$JS.API.CONSUMER.{call}.{stream}.>" for call in ("CREATE", "INFO", "DELETE", "MSG.NEXT"))
    yield from (f"$JS.ACK.{stream}.>", f"$JS.ACK.*.*.{stream}.>")


def _of_site(site: str) -> Iterator[str]:
    """What keeps the streams of a site, at both ends of its link."""
    yield f"{site_api(site)}.INFO"
    for api, stream in ((site_api(site), EVENTS), (taken_api(site), taken_name(site))):
        yield from (f"{api}.STREAM.{call}.{stream}" for call in ("INFO", "CREATE", "UPDATE"))


def of_backup() -> Permissions:
    """Of whoever copies streams and puts copies back (`nats stream backup`); it says no event and deletes none."""
    calls = ("NAMES", "LIST", *(f"{call}.*" for call in ("INFO", "SNAPSHOT", "RESTORE")))
    asked = ("$JS.API.INFO", *(f"$JS.API.STREAM.{call}" for call in calls), "$JS.SNAPSHOT.>")
    return Permissions(asked, (f"{inbox('backup')}.>",))


def of_leaf(site: str) -> Permissions:
    """Of a site's server at the hub: it hears questions about its own streams, and says the answers and its events."""
    return Permissions(
        publish=(f"{site_deliver_prefix(site)}.>", "_R_.>", "$JSC.R.>"),
        subscribe=(f"{site_api(site)}.>", f"$JS.FC.{EVENTS}.>"),
    )


def of_agents(site: str) -> Permissions:
    """Of the agents of a site at its own server: they say what they observe, and hear that it was taken."""
    return Permissions((f"{ROOT}.{site}.node.>",), ("_INBOX.>",))


def account_of(site: str) -> str:
    """The account of a site at the hub."""
    return f"SITE-{site}"


def lent_by(site: str) -> tuple[Shared, ...]:
    """What the fleet's account has of a site's: both streams' interfaces, and what the hub delivers of the one that it keeps."""
    pace = f"$JS.FC.{taken_name(site)}.>"
    return (
        Shared("service", f"{site_api(site)}.>", f"{site_api(site)}.>"),
        Shared("service", "$JS.API.>", f"{taken_api(site)}.>", many_answers=True),
        Shared("service", pace, pace),
        Shared("stream", f"{deliver_prefix(site)}.S.>", f"{deliver_prefix(site)}.S.>"),
    )
