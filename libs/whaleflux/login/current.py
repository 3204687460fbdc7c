"""As whom this program talks to which fleet: a named context, else a token from the environment, else the context in use; renewed when due."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from whaleflux.context import VARIABLE, Context, find
from whaleflux.errors import StatusError

LOOK_EVERY_S = 60.0  # a machine that slept notices soon


def by_variables(explicit: str = "") -> bool:
    """Whether a token of the environment counts: no context is named, neither here nor there."""
    return not explicit and not os.environ.get(VARIABLE) and bool(os.environ.get("WHALEFLUX_TOKEN", "").strip())


def known(explicit: str = "") -> Context | None:
    """The context as it lies on the disk, whether or not it is due; None for a token that has yet to log in. Asks nobody."""
    if not by_variables(explicit):
        return Context.load(find(explicit))
    from whaleflux.login import by_token

    return by_token.kept()


def current(explicit: str = "") -> Context:
    """The context of the next calls. Raises InvalidArgument when there is none, Unauthenticated when the login has ended."""
    if by_variables(explicit):
        from whaleflux.login import by_token

        return by_token.context()
    loaded = Context.load(find(explicit))
    if not loaded.renew_after:
        return loaded
    from whaleflux.login.signing_in import renewed

    return renewed(loaded)


class Renewer:
    """Keeps the login of a program that runs on: looks each minute, in a thread that ends with the program or with `stop`."""

    def __init__(self, look: Callable[[], object]) -> None:
        self._look, self._stopping = look, threading.Event()
        self._thread = threading.Thread(target=self._run, name="whaleflux-login", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, context: Context, explicit: str | Path) -> Renewer | None:
        """For a context that can be renewed."""
        return cls(lambda: current(str(explicit))) if context.renew_after else None

    def stop(self) -> None:
        """Ends the thread, not the login."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_EVERY_S):
            try:
                self._look()
            except (StatusError, OSError):
                continue  # the program's own calls tell
