"""A servicer as one caller reaches it, without a server between."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from whaleflux.errors import Unauthenticated
from whaleflux.rpc import auth
from whaleflux.trust.ownership import note_asked


def agent(name: str) -> auth.Identity:
    """Of a node, "site/node"."""
    return auth.Identity("agent", name)


class Acting:
    """`Acting(servicer, identity).Rpc(request, None)` is that caller's call."""

    def __init__(self, servicer: Any, identity: auth.Identity) -> None:
        self._servicer, self._identity = servicer, identity

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any = None) -> Any:
            with auth.acting_as(self._identity):
                return await getattr(self._servicer, method)(request, context)

        return call


class Unowned:
    """A fake servicer, whose things belong to nobody: it says that it asked, as `rpc.owners` wants of a real one."""

    def __init__(self, servicer: Any) -> None:
        self._servicer = servicer

    def __getattr__(self, method: str) -> Callable[..., Any]:
        answer = getattr(self._servicer, method)

        def call(request: Any, context: Any) -> Any:
            note_asked()
            return answer(request, context)

        return call


ADMIN = auth.Identity("admin", "root")


@contextlib.contextmanager
def _acting() -> Iterator[None]:
    try:
        who = auth.principal()
    except Unauthenticated:
        who = auth.Principal(ADMIN)
    with auth.acting_as(who):
        yield


class AsAdmin:
    """A servicer that is called without a boundary: on behalf of an admin, unless the test acts as somebody."""

    def __init__(self, servicer: Any) -> None:
        self.servicer = servicer

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.servicer, name)
        if inspect.isasyncgenfunction(method):
            return lambda *given: _stream(method(*given))
        if inspect.iscoroutinefunction(method):
            return lambda *given: _call(method, *given)
        return method


async def _call(method: Any, *given: Any) -> Any:
    with _acting():
        return await method(*given)


async def _stream(answers: Any) -> Any:
    """Whoever takes the next answer acts: a generator has no context of its own."""
    async with contextlib.aclosing(answers):
        while True:
            with _acting():
                try:
                    answer = await anext(answers)
                except StopAsyncIteration:
                    return
            yield answer
