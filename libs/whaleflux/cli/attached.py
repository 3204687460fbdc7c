"""One session with a command: this process's input, output, signals and terminal are the command's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

from whaleflux.cli import terminal
from whaleflux.rpc.pipe import Pipe
from whaleflux.sdk.client import AsyncClient
from whaleflux.sdk.sessions import JobSession, SessionOver
from whaleflux.v1 import scheduler_pb2

_READ_BYTES = 64 << 10
_KEYS = 1000  # reads of a terminal
_PATIENCE_S = 10.0  # for a command that was sent SIGTERM
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Left(Exception):  # named for what happened
    """The user left the session; `code` is the exit code of this process."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


async def run(client: AsyncClient, wanted: scheduler_pb2.AttachOpen, *, stdin: bool, greeting: str = "") -> int:
    """The command's exit code as a shell gives it."""
    has_terminal = wanted.command.HasField("terminal")
    async with JobSession(client.scheduler, wanted) as session:
        if greeting:
            os.write(2, greeting.format(node=session.opened.node).encode() + b"\n")
        with terminal.raw() if has_terminal else contextlib.nullcontext():
            try:
                await _Attached(session, has_terminal).run(stdin=stdin)
            except Left as left:
                return left.code
        assert session.result is not None  # it ended in order
        code = session.result.exit_code
        return code if code >= 0 else 128 - code


class _Attached:
    def __init__(self, session: JobSession, has_terminal: bool) -> None:
        self._session, self._has_terminal = session, has_terminal
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Keys wait here while the session takes none, so that the way out is always read; pipes wait themselves.
        self._typed: Pipe[bytes] = Pipe(_KEYS if has_terminal else 1)
        self._sending = set[asyncio.Task[None]]()
        self._interrupts = 0

    async def run(self, *, stdin: bool) -> None:
        loop = asyncio.get_running_loop()
        if stdin:
            threading.Thread(target=self._read, args=(loop,), daemon=True).start()
        else:
            self._typed.close()
        writing, sending = asyncio.create_task(self._write()), asyncio.create_task(self._pass_on())
        with self._signals():
            try:
                await asyncio.wait({writing, self._left}, return_when=asyncio.FIRST_COMPLETED)
                if self._left.done():
                    self._left.result()
                await writing
            finally:
                writing.cancel()
                sending.cancel()
                await asyncio.gather(writing, sending, return_exceptions=True)

    async def _write(self) -> None:
        writer = _Writer(asyncio.get_running_loop())
        async with contextlib.aclosing(self._session.responses()) as responses:
            async for response in responses:
                for descriptor, data in ((1, response.data), (2, response.error_data)):
                    if data:
                        await writer.write(descriptor, data)

    async def _pass_on(self) -> None:
        with contextlib.suppress(SessionOver):  # `_write` raises why
            async for data in self._typed:
                await self._session.send(data)
            await self._session.end_input()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own, which nothing can wake: what is typed or piped in, until its end."""
        escape = terminal.Escape()
        with contextlib.suppress(Exception):  # the session is over
            while data := os.read(0, _READ_BYTES):
                leave = False
                if self._has_terminal:
                    data, leave = escape.typed(data)
                if leave:
                    loop.call_soon_threadsafe(self._leave, 1)
                    return
                asyncio.run_coroutine_threadsafe(self._typed.put(data), loop).result()
            loop.call_soon_threadsafe(self._typed.close)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _FORWARDED:
            loop.add_signal_handler(number, self._signalled, number)
        if self._has_terminal:
            loop.add_signal_handler(signal.SIGWINCH, self._resized)
        try:
            yield
        finally:
            for number in (*_FORWARDED, signal.SIGWINCH):
                loop.remove_signal_handler(number)

    def _signalled(self, number: int) -> None:
        """To the command; a second one, or one that brings no end, leaves the session, which ends the command."""
        self._interrupts += 1
        self._send(self._session.signal(number))
        if self._has_terminal or self._interrupts > 1:
            self._leave(128 + number)
        elif number != signal.SIGINT:
            asyncio.get_running_loop().call_later(_PATIENCE_S, self._leave, 128 + number)

    def _resized(self) -> None:
        with contextlib.suppress(OSError):
            self._send(self._session.resize(*terminal.size()))

    def _send(self, sending: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(sending)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def _leave(self, code: int) -> None:
        if not self._left.done():
            self._left.set_exception(Left(code))


class _Writer:
    """Writes in a thread that ends with this process: a pager that reads no more keeps nobody from leaving."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._work: queue.SimpleQueue[tuple[int, bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    async def write(self, descriptor: int, data: bytes) -> None:
        """Returns when all of it is written. Raises OSError."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._work.put((descriptor, data, done))
        await done

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            while True:
                descriptor, data, done = self._work.get()
                error: OSError | None = None
                try:
                    _write_all(descriptor, data)
                except OSError as failure:
                    error = failure
                self._loop.call_soon_threadsafe(_settle, done, error)


def _settle(done: asyncio.Future[None], error: OSError | None) -> None:
    if done.cancelled():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
