"""What one caller sees of queues and of the jobs in them: made for a call, kept for as long as a stream.

The rules are `ownership`'s; here they are asked once for each queue, and again when the queue is for others than before. Where a text that
somebody may read names a job that is not there for them, the name is taken out (`cleaned`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from whaleflux import names
from whaleflux.rpc.auth import Principal
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access

OTHERS_JOB, OTHERS_RESERVATION = "a job of another team", "a reservation of another team"


class Sight:
    """`access`: whom a queue is for, by its id, the same object for as long as that is so.

    `reserved_for`: the id of the queue that a reservation is for, by its name; "": for all, None: that is not known.
    """

    def __init__(
        self,
        principal: Principal,
        access: Callable[[str], Access],
        reserved_for: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self.principal, self._access, self._reserved_for = principal, access, reserved_for
        self.everything = principal.is_service or principal.is_operator
        if self.everything:
            ownership.note_asked()
        self._seen: dict[str, tuple[Access, bool]] = {}
        self._is_other = False  # a queue is seen that was not, or the other way round, since the last look

    def sees_queue(self, queue: str) -> bool:
        """Whether the queue is there for the caller; a token for some queues sees no others."""
        if self.everything:
            return True
        access, known = self._access(queue), self._seen.get(queue)
        if known is not None and known[0] is access:
            return known[1]
        sees = self._in_scope(queue) and ownership.may_see(self.principal, access)
        self._is_other |= known is not None and known[1] != sees
        self._seen[queue] = access, sees
        return sees

    def sees(self, queue: str, owner: str) -> bool:
        """Whether a job is there for the caller; who left a queue still sees their own."""
        return self.sees_queue(queue) or (self._in_scope(queue) and ownership.is_owner(self.principal, owner))

    def reads(self, queue: str, owner: str) -> bool:
        """Whether the caller may read what is private of a job: command, environment, code, output, words of its program."""
        return self._in_scope(queue) and ownership.may_read(self.principal, owner, self._access(queue))

    def changes(self, queue: str, owner: str) -> bool:
        """Whether the caller may end, hold, change, enter a job."""
        return self._in_scope(queue) and ownership.may_change(self.principal, owner, self._access(queue))

    def sees_named(self, job: str) -> bool:
        """Whether a job of that name may be told of; of its owner nothing is known."""
        return self.everything or self.sees_queue(names.top(job))

    def known(self, jobs: Iterable[str]) -> list[str]:
        """The names as they may be told, in their order."""
        return [job if self.sees_named(job) else OTHERS_JOB for job in jobs]

    def cleaned(self, text: str, own: str = "") -> str:
        """The text without the names of jobs and reservations that are not there for the caller; `own` may be named in any case."""
        if self.everything:
            return text
        jobs = names.JOB_IN_TEXT.sub(lambda found: self._told(found, own), text)
        return names.RESERVATION_IN_TEXT.sub(lambda found: self._told_of_reservation(found[0], own), jobs)

    def look_again(self, queues: Iterable[str]) -> bool:
        """Whether the caller sees others of these queues than at the last look; those that were not asked for yet are asked now."""
        for queue in queues:
            self.sees_queue(queue)
        is_other, self._is_other = self._is_other, False
        return is_other

    def asked(self) -> list[str]:
        """Ids of the queues that were asked for so far."""
        return list(self._seen)

    def _told(self, found: re.Match[str], own: str) -> str:
        return found[0] if found[0] == own or self.sees_queue(found["queue"]) else OTHERS_JOB

    def _told_of_reservation(self, name: str, own: str) -> str:
        queue = self._reserved_for(name)
        known = name == own or queue == "" or (queue is not None and self.sees_queue(queue))
        return name if known else OTHERS_RESERVATION

    def _in_scope(self, queue: str) -> bool:
        return self.principal.queues is None or queue in self.principal.queues
