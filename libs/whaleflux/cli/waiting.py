"""Calls that take long say on stderr what they wait for, and one that gets no answer names who did not give it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from whaleflux.cli import output
from whaleflux.errors import DeadlineExceeded, StatusError

if TYPE_CHECKING:
    from whaleflux.sdk.resume import Patience

SAY_AFTER_S, SAY_AGAIN_S = 2.0, 10.0
Told = Callable[[StatusError], None]
T = TypeVar("T")


def look(ask: Callable[[], T], patience: Patience) -> T:
    """What `ask` returns; asked again while who answers is away, as long as `patience` lasts. Raises what it raises else."""
    while True:
        try:
            found = ask()
        except StatusError as error:
            if (pause_s := patience.pause_s(error, time.monotonic())) is None:
                raise
            time.sleep(pause_s)
        else:
            patience.received()
            return found


class Waiting:
    """Stands beside the calls of one command; may be used from several threads. What is said of a service is said once at a time."""

    def __init__(
        self, say: Callable[[str], None] = output.note, after_s: float = SAY_AFTER_S, apart_s: float = SAY_AFTER_S
    ) -> None:
        self._say, self._after_s, self._apart_s = say, after_s, apart_s
        self._lock, self._said_at_s = threading.Lock(), float("-inf")

    @contextmanager
    def call(self, method: str) -> Iterator[Told]:
        """Around one call of `method` ("/package.Service/Method"), all its attempts; is told of each that failed.

        Raises DeadlineExceeded with the service and the time in its message in place of one that has neither.
        """
        began_s, why, over = time.monotonic(), list[str](), threading.Event()

        def failed(error: StatusError) -> None:
            if not isinstance(error, DeadlineExceeded):  # that nobody answered is no reason
                why.append(error.message)

        def said() -> None:
            pause_s = self._after_s
            while not over.wait(pause_s):
                self._tell(method, time.monotonic() - began_s, why[-1] if why else "")
                pause_s = SAY_AGAIN_S

        threading.Thread(target=said, daemon=True).start()
        try:
            yield failed
        except DeadlineExceeded as late:
            waited_s = time.monotonic() - began_s
            raise DeadlineExceeded(no_answer(method, waited_s, why), metadata=_facts(method, late)) from None
        finally:
            over.set()

    def _tell(self, method: str, waited_s: float, why: str) -> None:
        with self._lock:
            if time.monotonic() - self._said_at_s < self._apart_s:
                return  # calls side by side wait for the same
            self._said_at_s = time.monotonic()
        because = why or f"no answer to {method.rpartition('/')[2]} for {waited_s:.0f} s"
        self._say(f"waits for {service_of(method)}: {because}; Ctrl-C ends the wait")


def service_of(method: str) -> str:
    """Which service of the control plane answers a method: "inventory" for "/whaleflux.v1.IdentityService/WhoAmI"."""
    from whaleflux.services import SERVICES

    called = method.strip("/").partition("/")[0].rpartition(".")[2]
    return next((one.role for one in SERVICES if called in one.grpc), called)


def no_answer(method: str, waited_s: float, why: list[str]) -> str:
    """That a call had no answer in its time, what was heard last, and whether it may have been done all the same."""
    from whaleflux.rpc.retry_policy import READS

    name = method.rpartition("/")[2]
    said = f", and said last: {why[-1]}" if why else ""
    unknown = "" if name.startswith(READS) else "; whether it was done is not known: look before you repeat it"
    return f"{service_of(method)} did not answer {name} within {waited_s:.0f} s{said}{unknown}"


def _facts(method: str, late: DeadlineExceeded) -> dict[str, str]:
    return {**late.metadata, "method": method, "service": service_of(method)}
