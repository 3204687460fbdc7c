"""One attempt of somebody hostile, what became of it, and whether the audit trail tells of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc

from benchmarks.authz.contract import Method, call, methods

# Who notices an attempt.
TRAIL = "trail"  # the control plane, or an agent that tells it: it is in the audit trail
KERNEL = "kernel"  # no program of ours: the kernel refuses
HANDSHAKE = "handshake"  # TLS, before anybody is known: of Envoy, etcd, NATS, a service
DOOR = "door"  # Envoy, which refuses what is no proper request, before it knows of what
NOTHING = "nothing"  # it is answered, without what was wanted: a list without the others' things, a header that went no further

OPEN_S = 8.0  # a stream that says nothing for so long was let in: a busy machine refuses late

METHODS: dict[str, Method] = {one.path.rpartition("v1.")[2].replace("Service/", "/"): one for one in methods()}
CLOSED = "CLOSED"  # no answer: the connection was refused or closed


@dataclass(frozen=True, slots=True)
class Reply:
    """`code`: name of a gRPC status, an HTTP status, or the name of the error that stood in the way; `words`: all else that was said."""

    code: str
    words: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """`refused`: the codes that are right. `who` and `what`: as the trail has to tell it; `result` "": the code."""

    name: str
    do: Callable[[], Awaitable[Reply]]
    refused: frozenset[str]
    seen_by: str = TRAIL
    who: str = ""
    what: str = ""
    result: str = ""
    must_not_tell: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What became of it. `recorded`: how many attempts of this kind the trail tells of."""

    attempt: Attempt
    reply: Reply
    gained: str = ""
    recorded: int = 0

    @property
    def kind(self) -> tuple[str, str, str]:
        """Attempts of one kind are counted together in the trail: who, what, result."""
        return self.attempt.who, self.attempt.what, self.attempt.result or self.reply.code


@dataclass(slots=True)
class Attacker:
    """One of the five, and what they did."""

    name: str
    outcomes: list[Outcome] = field(default_factory=list)

    async def run(self, attempts: Iterable[Attempt], canaries: Iterable[str]) -> None:
        """One after another."""
        secret = tuple(canaries)
        for attempt in attempts:
            reply = await attempt.do()
            self.outcomes.append(Outcome(attempt, reply, _gained(attempt, reply, secret)))

    def kinds(self) -> Counter[tuple[str, str, str]]:
        """How often the trail has to tell of each kind."""
        return Counter(one.kind for one in self.outcomes if one.attempt.seen_by == TRAIL)

    def table(self) -> str:
        """For people: what was tried, what it got, who noticed."""
        rows = [f"a hostile {self.name}: {len(self.outcomes)} attempts"]
        for one in self.outcomes:
            seen = f"trail x{one.recorded}" if one.attempt.seen_by == TRAIL else one.attempt.seen_by
            rows.append(f"  {one.attempt.name[:70]:70} {one.reply.code[:22]:22} {seen:12} {one.gained}".rstrip())
        return "\n".join(rows)


def _gained(attempt: Attempt, reply: Reply, canaries: tuple[str, ...]) -> str:
    if reply.code not in attempt.refused:
        return f"wanted {'/'.join(sorted(attempt.refused))}, got {reply.code}: {reply.words[:300]}"
    leaked = [word for word in (*canaries, *attempt.must_not_tell) if word in reply.words]
    return f"was told {leaked}: {reply.words[:300]}" if leaked else ""


DENIED, ABSENT, UNKNOWN = "PERMISSION_DENIED", "NOT_FOUND", "UNAUTHENTICATED"


class Calls:
    """Attempts at the gRPC door over one connection, as one subject."""

    def __init__(self, channel: grpc.aio.Channel, who: str) -> None:
        self.channel, self._who = channel, who

    def attempt(
        self,
        name: str,
        method: str,
        request: Any,
        *refused: str,
        seen_by: str = TRAIL,
        metadata: tuple[tuple[str, str], ...] = (),
        must_not_tell: tuple[str, ...] = (),
    ) -> Attempt:
        """A call of `method` ("Scheduler/CancelJob")."""
        known = METHODS[method]

        async def do() -> Reply:
            said = await call(self.channel, known, request, metadata, open_s=OPEN_S)
            return Reply(said.code.name, f"{said.details} {said.response or ''}")

        return Attempt(name, do, frozenset(refused), seen_by, self._who, known.path, "", must_not_tell)

    def stream(self, name: str, method: str, requests: list[Any], *refused: str, unheeded: str = "") -> Attempt:
        """A stream that says all of these; its end counts. `unheeded`: it goes on, and this is what the trail has for a message of it."""
        known = METHODS[method]

        async def do() -> Reply:
            ask = self.channel.stream_stream(
                known.path, lambda message: message.SerializeToString(), known.response.FromString
            )
            asking = ask(timeout=5)
            try:
                for request in requests:
                    await asking.write(request)
                if unheeded:
                    await asking.done_writing()
                words = ""
                while (answer := await asking.read()) is not grpc.aio.EOF:
                    words += str(answer)
                return Reply((await asking.code()).name, words + (await asking.details() or ""))
            except grpc.aio.AioRpcError as error:
                return Reply(error.code().name, error.details() or "")
            except Exception as error:  # the answer was there before all was said
                return Reply((await asking.code()).name, f"{error} {await asking.details()}")
            finally:
                asking.cancel()

        return Attempt(name, do, frozenset(refused), TRAIL, self._who, known.path, unheeded)
