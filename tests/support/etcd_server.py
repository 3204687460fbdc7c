"""A real etcd for tests: one member on free ports that can be killed, stopped and started again on its data."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from whaleflux.embedded import etcd
from whaleflux.rpc.tls_files import client_context


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; all are held until all are known."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class EtcdServer:
    """Use as `async with EtcdServer(tmp_path) as server: EtcdStore([server.endpoint])`."""

    def __init__(self, data: Path, tls: etcd.EtcdTls | None = None) -> None:
        self.client_port, self.peer_port = free_ports(2)
        self.endpoint = f"127.0.0.1:{self.client_port}"
        self._data, self._tls, self._process = data, tls, None

    async def __aenter__(self) -> EtcdServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()

    async def start(self) -> None:
        self.launch()
        shown = client_context(self._tls.files) if self._tls else None
        await etcd.wait_ready("127.0.0.1", self.client_port, tls=shown)

    def launch(self) -> None:
        """Starts the process and does not wait for it to serve."""
        ports = {"client_port": self.client_port, "peer_port": self.peer_port}
        command = etcd.command(etcd.find(), self._data / "etcd", **ports, tls=self._tls)
        with (self._data / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL, also when stopped."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def back_up(self) -> None:
        """Keeps a copy of the data of a server that does not run."""
        shutil.copytree(self._data / "etcd", self._data / "backup")

    def restore(self) -> None:
        """Goes back to the copy."""
        shutil.rmtree(self._data / "etcd")
        shutil.copytree(self._data / "backup", self._data / "etcd")

    async def restart(self) -> None:
        self.kill()
        await self.start()

    async def stopped_for(self, seconds: float) -> None:
        """Stops the process for real seconds: what is tested here is real time."""
        self.stop()
        try:
            await asyncio.sleep(seconds)
        finally:
            self.resume()
