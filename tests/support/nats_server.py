"""A real nats-server for tests: start, kill, stop for a while, start again with its files; and a link that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from whaleflux.embedded import nats as embedded
from whaleflux.events import nats_config
from whaleflux.events.nats import NatsBus, NatsOptions
from whaleflux.rpc.tls_files import TlsFiles

USER, PASSWORD = "app", "app-secret"


def free_address() -> str:
    """An address of this machine that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class NatsServer:
    """One server process under `folder`; a hub by default, a leaf site when `hub_url` is given.

    Plain, with a user that may do everything; with `tls` users are known by their certificates. `agents`: a user as agents of
    this site are.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "hub",
        *,
        sites: dict[str, str] | None = None,
        hub_url: str = "",
        tls: TlsFiles | None = None,
        authority: Path | None = None,
        agents: bool = False,
    ) -> None:
        self.name, self.folder = name, folder / name
        self.address, self.monitor, self.leaf = free_address(), free_address(), free_address()
        self._config = self.folder / "nats.conf"
        self._process: subprocess.Popen[bytes] | None = None
        users = [] if tls else [nats_config.User(USER, PASSWORD)]
        if agents:
            users.append(nats_config.agents_user(name, "" if tls else "agent-secret"))
        elif tls:
            users += nats_config.service_users(sites or ())
        common = (self.folder / "store", self.address, self.monitor, tuple(users), tls)
        if hub_url:
            text = nats_config.site_config(
                nats_config.Site(*common, site=name, hub_url=hub_url, hub_authority=authority)
            )
        else:
            leaves = tuple(nats_config.Leaf(site, secret) for site, secret in (sites or {}).items())
            leaf = {"leaf_address": self.leaf if sites else "", "leaf_authority": authority}
            text = nats_config.hub_config(nats_config.Hub(*common, **leaf, sites=leaves))
        embedded.write_config(self._config, text)

    async def start(self) -> None:
        """Starts and waits until it is ready; keeps the files of earlier starts."""
        self.launch()
        await embedded.wait_ready(self.monitor, 45)

    def launch(self) -> None:
        """Starts and does not wait."""
        with open(self.folder / "nats.log", "ab") as log:
            self._process = subprocess.Popen(embedded.command(self._config), stdout=log, stderr=log)

    def reload(self) -> None:
        """SIGHUP: reads its configuration and certificates again."""
        assert self._process
        self._process.send_signal(signal.SIGHUP)

    def stall(self) -> None:
        """SIGSTOP: connections stay open and nothing answers. Returns when every thread has stopped."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        while not all("State:\tT" in (task / "status").read_text() for task in tasks.iterdir()):
            time.sleep(0.001)

    def resume(self) -> None:
        """Ends a stall."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self._process:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def lose_files(self) -> None:
        """The next start finds nothing of what was stored."""
        shutil.rmtree(self.folder / "store")

    def options(self, location: str = "hub", **more: Any) -> NatsOptions:
        """To reach this server as its ordinary user."""
        return NatsOptions((f"nats://{self.address}",), location, **{"user": USER, "password": PASSWORD, **more})

    async def connect(self, location: str = "hub") -> NatsBus:
        return await NatsBus.connect(self.options(location), timeout_s=45)


class Link:
    """A TCP proxy to `target` that can be cut and mended."""

    def __init__(self, target: str) -> None:
        self.address, self._target = free_address(), target
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        host, port = self.address.split(":")
        self._server = await asyncio.start_server(self._serve, host, int(port))

    def cut(self) -> None:
        """Closes every connection and takes no new one."""
        if self._server:
            self._server.close()
            self._server = None
        for writer in tuple(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self._target.split(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        self._open -= {writer, far_writer}

    @staticmethod
    async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.transport.abort()
