"""What the node's network ports moved, by the kernel's own counters. Blocks, and takes well below a millisecond."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from whaleflux.v1 import usage_pb2
from whaleflux_agent.core.usage import grown

_LANES = 4  # InfiniBand's data counters count 32-bit words: https://docs.kernel.org/infiniband/sysfs.html


class NetworkCounters:
    """`root` is the kernel's /sys."""

    def __init__(self, root: Path = Path("/sys")) -> None:
        self._root = root
        self._before: tuple[int | None, ...] = (None,) * 4

    def take(self) -> usage_pb2.NetworkUsage:
        """Since the last call; what is not there, or began anew, is not set."""
        now = (*self._rdma(), *self._kernel())
        before, self._before = self._before, now
        rdma_sent, rdma_received, kernel_sent, kernel_received = map(grown, before, now)
        return usage_pb2.NetworkUsage(
            rdma_sent_bytes=rdma_sent,
            rdma_received_bytes=rdma_received,
            kernel_sent_bytes=kernel_sent,
            kernel_received_bytes=kernel_received,
        )

    def _rdma(self) -> tuple[int | None, int | None]:
        ports = list(self._root.glob("class/infiniband/*/ports/*/counters"))
        sent = _sum(port / "port_xmit_data" for port in ports)
        received = _sum(port / "port_rcv_data" for port in ports)
        return (None if sent is None else sent * _LANES), (None if received is None else received * _LANES)

    def _kernel(self) -> tuple[int | None, int | None]:
        """Of interfaces with a device behind them: loopback, bridges and containers' ends have none."""
        ports = [port.parent / "statistics" for port in self._root.glob("class/net/*/device")]
        return _sum(port / "tx_bytes" for port in ports), _sum(port / "rx_bytes" for port in ports)


def _sum(files: Iterable[Path]) -> int | None:
    """None of no file that can be read."""
    found: list[int] = []
    for file in files:
        try:
            found.append(int(file.read_text()))
        except (OSError, ValueError):
            continue
    return sum(found) if found else None
