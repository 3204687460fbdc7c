"""Which records of the audit trail somebody asks for. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from whaleflux.errors import FieldViolation, InvalidArgument

SKEW = timedelta(minutes=5)  # by which the clock of a writer may be ahead of the bus
LATEST = timedelta(days=7)  # by which a record may be late, as the bus was away, and is still found below a given end
OK = "OK"
_MOST_CHARS = 300


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """See `whaleflux.v1.AuditFilter`; instants are UTC. `only`: what the asker may see is of this subject; "": all."""

    since: datetime | None = None
    until: datetime | None = None
    who: str = ""
    what: str = ""
    object: str = ""
    denied: bool = False
    only: str = ""

    def admits(self, subject: str, method: str, thing: str, result: str, at: datetime) -> bool:
        """Whether a record is one of those asked for."""
        return (
            (not self.only or subject == self.only)
            and (not self.who or subject == self.who or subject.partition("/")[0] == self.who)
            and (not self.what or self.what.lower() in {method.lower(), method.rpartition("/")[2].lower()})
            and (not self.object or thing == self.object or thing.startswith(f"{self.object}/"))
            and not (self.denied and result == OK)
            and (self.since is None or at >= self.since)
            and (self.until is None or at < self.until)
        )

    def is_over(self, stored: datetime) -> bool:
        """Whether nothing that was stored from then on can have happened before the end asked for."""
        return self.until is not None and stored > self.until + LATEST

    def is_before(self, stored: datetime) -> bool:
        """Whether all that was stored until then happened before the beginning asked for."""
        return self.since is not None and stored < self.since - SKEW

    @property
    def first_stored(self) -> datetime | None:
        """What is asked for was not stored before this."""
        return self.since - SKEW if self.since is not None else None


def checked(wanted: AuditFilter) -> AuditFilter:
    """The filter; raises InvalidArgument naming each wrong field."""
    texts = (("who", wanted.who), ("what", wanted.what), ("object", wanted.object))
    wrong = [
        FieldViolation(f"filter.{field}", f"has {len(text)} characters; use at most {_MOST_CHARS}")
        for field, text in texts
        if len(text) > _MOST_CHARS
    ]
    if wanted.since is not None and wanted.until is not None and wanted.since >= wanted.until:
        wrong.append(FieldViolation("filter.until", "is not after filter.since"))
    if wrong:
        raise InvalidArgument(wrong)
    return wanted
