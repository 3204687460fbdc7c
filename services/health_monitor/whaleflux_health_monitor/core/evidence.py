"""What speaks for and against the life of one node, and of the ranks that it runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from whaleflux_health_monitor.core.phases import ALIVE, Intent, Phase
from whaleflux_health_monitor.core.timing import HEARTBEAT_S, Arrivals, Timing


class Probe(Enum):
    """What came of dialling the agent's own port."""

    ANSWERED = "answered"  # the agent itself, by its certificate
    REFUSED = "refused"  # its host is up and nobody listens: the agent's process is gone
    CONNECTS = "connects"  # somebody listens and says nothing: stopped, hung, or overloaded
    NO_ROUTE = "no route"  # nothing came back: host down, network cut, or never reachable from here


REACHES_HOST = frozenset({Probe.REFUSED, Probe.CONNECTS})


class Stop(Enum):
    """What an agent that says goodbye announces."""

    AGENT_RESTART = "agent restart"  # its work goes on, and it is back soon
    HOST_SHUTDOWN = "host shutdown"  # its work ends with it


@dataclass(frozen=True, slots=True)
class Running:
    """A task that a node last said it runs. `step` is -1 before the first."""

    task: str
    job: str
    epoch: int
    step: int = -1
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class GpuFault:
    """The hardware of a GPU failed: an Xid that is no program's fault, or a GPU that became unhealthy."""

    at_s: float
    reason: str  # "XID_79", "GPU_LOST"
    message: str


@dataclass(slots=True)
class NodeState:
    """One node as this leader knows it. All `_s` are monotonic seconds; None means never.

    `life_s` is the last sign of life: a heartbeat, an answered probe, or, for what this leader has not heard of yet, the
    end of its grace.
    """

    name: str
    site: str
    life_s: float
    timing: Timing
    phase: Phase = Phase.REGISTERED
    reason: str = ""
    intent: Intent = Intent.ACTIVE
    reported: bool = False  # by this leader
    boot_id: str = ""
    machine_id: str = ""  # of the agent whose stream is the newest
    probe_address: str = ""
    stream: int = 0  # counts streams; 0: none yet
    connected: bool = False
    lost_s: float | None = None  # when the stream ended without a goodbye
    announced_s: float | None = None  # when it said that it restarts
    stopped: bool = False  # it said goodbye for good
    goodbye_s: float | None = None  # when it last said goodbye; being back does not undo it
    probe: Probe | None = None  # newest outcome since the last sign of life of the agent's own
    indirect_probe: Probe | None = None  # what a neighbour saw of its host since then
    probed_s: float = float("-inf")  # when the newest probe began
    probing: bool = False
    concluded_s: float = float("-inf")  # when a probe last came back
    indirect_asked_s: float = float("-inf")  # when a neighbour was last asked to dial it
    asked_about_it: set[str] = field(default_factory=set)  # neighbours, since its last sign of life
    urgent: bool = False  # probe it now, whatever its heartbeats say
    peer_exit_s: float | None = None  # ranks elsewhere ended that worked with this node's
    gpu_fault: GpuFault | None = None  # the newest
    heartbeat_s: float = 0.0  # last heartbeat, for the gaps between heartbeats
    tasks: tuple[Running, ...] = ()
    arrivals: Arrivals = field(default_factory=lambda: Arrivals(HEARTBEAT_S))

    def silence_s(self, now_s: float) -> float:
        """Since the last sign of life; negative during the grace."""
        return now_s - self.life_s

    def is_steady(self, now_s: float) -> bool:
        """Nothing speaks against it and nothing is to be said: at each tick true of nearly every node, so kept cheap."""
        return (
            now_s - self.life_s < self.timing.probe_least_s
            and self.reported
            and self.lost_s is None
            and self.announced_s is None
            and not (self.stopped or self.urgent)
            and self.phase is ALIVE[self.intent]
            and self.reason != ""
        )

    @property
    def seen(self) -> Probe | None:
        """What dialling it gives, by the neighbour's word where nothing comes back to us."""
        return self.indirect_probe or self.probe if self.probe in {None, Probe.NO_ROUTE} else self.probe

    def shows_life(self, now_s: float) -> None:
        """A sign of life from the agent itself: what spoke against it is void."""
        self.life_s = now_s  # also when a grace would have lasted longer: from now on it is judged by its heartbeats
        self.reported = True
        self.lost_s = self.announced_s = self.probe = self.indirect_probe = None
        self.asked_about_it.clear()
        self.stopped = False

    def announces(self, stop: Stop, at_s: float) -> None:
        """It said goodbye at `at_s`: what follows is meant."""
        self.connected = False
        self.goodbye_s = at_s
        self.announced_s = at_s if stop is Stop.AGENT_RESTART else None
        self.stopped = stop is Stop.HOST_SHUTDOWN

    def shift(self, gap_s: float) -> None:
        """The monitor itself slept for `gap_s`: nobody can have been heard meanwhile."""
        self.life_s += gap_s
        self.heartbeat_s += gap_s
        for name in ("lost_s", "announced_s", "goodbye_s", "peer_exit_s"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value + gap_s)
        if self.gpu_fault is not None:
            self.gpu_fault = replace(self.gpu_fault, at_s=self.gpu_fault.at_s + gap_s)

    def wants_probe(self, now_s: float) -> bool:
        """Whether dialling it now would tell something."""
        if self.probing or not self.probe_address or self.phase in {Phase.UNREACHABLE, Phase.RETIRED}:
            return False
        if self.urgent:
            return True
        suspicious = self.lost_s is not None or self.silence_s(now_s) >= self.arrivals.overdue_s(self.timing)
        return suspicious and now_s - self.probed_s >= self.timing.reprobe_s


class Progress:
    """Which nodes advance in which attempt: ranks that work together live or stall together."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, int], dict[str, _Advance]] = {}

    def note(self, node: str, tasks: tuple[Running, ...], now_s: float) -> None:
        """Takes the steps of a node's heartbeat."""
        for task in tasks:
            by_node = self._steps.setdefault((task.job, task.epoch), {})
            if node in by_node:
                by_node[node].to(task.step, now_s)
            else:
                by_node[node] = _Advance(task.step)

    def forget_but(self, running: set[tuple[str, int]]) -> None:
        """Drops attempts that nobody runs any more."""
        self._steps = {key: value for key, value in self._steps.items() if key in running}

    def step_s(self, node: NodeState) -> float:
        """The slowest step interval among the node's attempts, as peers show it; 0 where unknown."""
        return max((a.interval_s for _, a in self._peers(node)), default=0.0)

    def alive_without(self, node: NodeState, since_s: float, now_s: float) -> bool:
        """Whether peers elsewhere have gone on for so long after `since_s` that this node's ranks must live.

        A step that was under way when the ranks died may still end: one step, and at least one second, do not count.
        """
        for _, advance in self._peers(node):
            settled_s = since_s + max(1.0, 1.5 * advance.interval_s)
            if advance.at_s > settled_s and now_s - advance.at_s < max(5.0, 3 * advance.interval_s):
                return True
        return False

    def stalled_without(self, node: NodeState, now_s: float, least_s: float) -> bool:
        """Whether peers elsewhere, which had advanced with this node's ranks, all stand still: then its ranks are gone.

        False where it has no such peers: nobody can tell.
        """
        peers = [advance for _, advance in self._peers(node) if advance.interval_s > 0]
        return bool(peers) and all(now_s - peer.at_s >= max(least_s, 3 * peer.interval_s) for peer in peers)

    def _peers(self, node: NodeState) -> list[tuple[str, _Advance]]:
        attempts = (self._steps.get((task.job, task.epoch), {}) for task in node.tasks)
        return [(name, adv) for by_node in attempts for name, adv in by_node.items() if name != node.name]


class _Advance:
    """When the newest step of one node in one attempt was reached, and the smoothed time between steps.

    The step that is seen first was reached some unknown time before.
    """

    __slots__ = ("at_s", "interval_s", "step")

    def __init__(self, step: int) -> None:
        self.step, self.at_s, self.interval_s = step, float("-inf"), 0.0

    def to(self, step: int, now_s: float) -> None:
        if step <= self.step:
            return
        if self.at_s > float("-inf"):
            each_s = (now_s - self.at_s) / (step - self.step)
            self.interval_s = each_s if not self.interval_s else 0.7 * self.interval_s + 0.3 * each_s
        self.step, self.at_s = step, now_s
