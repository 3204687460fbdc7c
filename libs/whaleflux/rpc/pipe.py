"""A few messages between two coroutines: who writes waits for who reads, and either may end it at any time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Pipe(Generic[T]):
    """At most `size` messages. One reader, any number of writers."""

    def __init__(self, size: int = 2) -> None:
        self._size = size
        self._messages: deque[T] = deque()
        self._some, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._error: BaseException | None = None
        self.closed = False

    def __len__(self) -> int:
        return len(self._messages)

    async def put(self, message: T) -> bool:
        """True when it is in; False when the pipe was closed, also while it waited for room."""
        while len(self._messages) >= self._size and not self.closed:
            self._room.clear()
            await self._room.wait()
        if not self.closed:
            self._messages.append(message)
            self._some.set()
        return not self.closed

    def close(self, error: BaseException | None = None) -> None:
        """Nothing more goes in; what is in it comes out, then the end, or `error` where one is given. The first call counts."""
        if not self.closed:
            self.closed, self._error = True, error
            self._some.set()
            self._room.set()

    async def get(self) -> T | None:
        """The next message; None at the end. Raises the error that the pipe was closed with."""
        while not self._messages:
            if self.closed:
                if self._error is not None:
                    raise self._error
                return None
            self._some.clear()
            await self._some.wait()
        message = self._messages.popleft()
        self._room.set()
        return message

    async def __aiter__(self) -> AsyncIterator[T]:
        while (message := await self.get()) is not None:
            yield message
