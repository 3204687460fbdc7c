"""What the leader shows of nodes, sites and GPUs to Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container

from whaleflux import telemetry
from whaleflux.fleet.xids import HARDWARE_FAULTS, XidAction
from whaleflux.telemetry import Metric
from whaleflux_health_monitor.core.evidence import NodeState
from whaleflux_health_monitor.core.phases import Phase


class FleetFigures:
    """Gauges by site. Those of a site that is gone go with it."""

    def __init__(self) -> None:
        self._sites: frozenset[str] = frozenset()

    def show(self, nodes: Collection[NodeState], cut_off: Container[str], sick: Container[str]) -> None:
        """Nodes by site and phase, those with a GPU out of use (`sick`, by name), and which sites are silent as one."""
        counts = Counter((node.site, node.phase) for node in nodes)
        broken = Counter(node.site for node in nodes if node.name in sick)
        sites = frozenset(site for site, _ in counts)
        for site in sites:
            telemetry.gauge(Metric.SITES_CUT_OFF).labels(site).set(site in cut_off)
            telemetry.gauge(Metric.NODES_SICK).labels(site).set(broken[site])
            for phase in Phase:
                telemetry.gauge(Metric.NODES).labels(site, phase.value).set(counts[site, phase])
        for site in self._sites - sites:
            _forget(site)
        self._sites = sites

    def clear(self) -> None:
        """The leadership is over: another replica shows them now."""
        for site in self._sites:
            _forget(site)
        self._sites = frozenset()


def count_gpu_fault(xid: int) -> None:
    """An Xid of the hardware, by what the GPU needs; `xid` is one of HARDWARE_FAULTS."""
    telemetry.counter(Metric.GPU_FAULTS).labels(_label(HARDWARE_FAULTS[xid])).inc()


def show_no_gpu_faults() -> None:
    """Begins the counters at 0."""
    telemetry.from_zero(Metric.GPU_FAULTS, *map(_label, XidAction))


def _label(action: XidAction) -> str:
    return action.name.lower()


def _forget(site: str) -> None:
    telemetry.gauge(Metric.SITES_CUT_OFF).remove(site)
    telemetry.gauge(Metric.NODES_SICK).remove(site)
    for phase in Phase:
        telemetry.gauge(Metric.NODES).remove(site, phase.value)
