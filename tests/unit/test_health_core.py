"""TaskFailure detection as a pure core: a fleet of simulated agents under virtual time, one failure at a time."""

import math
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.clock import VirtualClock
from whaleflux_health_monitor.core.attribution import Attribution, Fault, TaskFailure, attribute, is_settled
from whaleflux_health_monitor.core.evidence import Probe, Running, Stop
from whaleflux_health_monitor.core.monitor import Monitor, StoredHealth
from whaleflux_health_monitor.core.phases import ALIVE, NEXT, Intent, Phase, may_become
from whaleflux_health_monitor.core.timing import Arrivals, Timing
from whaleflux_health_monitor.health_records import HealthRecords

TICK_S = 0.1


def name(site, node):
    return f"sites/{site}/nodes/{node}"


class Fleet:
    """Agents that send heartbeats, break and answer probes; the monitor is the real one."""

    def __init__(self, *nodes, probes=True, start_s=1000.0, timing=None):
        self.now_s = start_s
        self.monitor = Monitor(start_s, timing)
        self.verdicts = []  # (time, verdict)
        self.probes = probes
        self.outcome = {}  # node -> what a probe of it gives
        self.sending, self.stream, self.tasks, self.next_heartbeat = set(), {}, {}, {}
        self.steps = {}  # job -> step, advanced by `training`
        for node in nodes:
            self.monitor.intent(node, Intent.ACTIVE, self.now_s)
            self.connect(node)
        self.run(1.0)
        self.verdicts.clear()

    def connect(self, node):
        address = "10.0.0.1:7000" if self.probes else ""
        self.stream[node] = self.monitor.hello(node, self.now_s, boot_id="b", probe_address=address)
        self.sending.add(node)
        self.next_heartbeat[node] = self.now_s
        self.outcome[node] = Probe.ANSWERED

    def silence(self, node, probe):
        self.sending.discard(node)
        self.outcome[node] = probe

    def kill(self, node, probe=Probe.REFUSED):
        """Agent and ranks die; the kernel closes their connections."""
        self.silence(node, probe)
        self.monitor.stream_ended(node, self.stream[node], self.now_s)

    def run(self, seconds, each_tick=lambda: None):
        end_s = self.now_s + seconds
        while self.now_s < end_s - 1e-9:
            self.now_s += TICK_S
            for node in sorted(self.sending):
                if self.next_heartbeat[node] <= self.now_s:
                    self.next_heartbeat[node] += 0.5
                    self.monitor.heartbeat(node, self.stream[node], self.now_s, self.tasks.get(node, ()))
            each_tick()
            for node, _ in self.monitor.probes_due(self.now_s):
                self.monitor.probe_begins(node, self.now_s)
                self.monitor.probed(node, self.outcome[node], self.now_s)
            self.verdicts += [(self.now_s, v) for v in self.monitor.tick(self.now_s)]

    def train(self, *nodes, job="queues/q/jobs/j", epoch=1, step_s=0.3):
        """The nodes work together in one job; call the result at each tick to let it advance."""
        begun_s = self.now_s

        def tick():
            step = int((self.now_s - begun_s) / step_s)
            for node in nodes:
                self.tasks[node] = (Running(f"t-{node[-2:]}", job, epoch, step),)

        tick()
        return tick

    def phase(self, node):
        return self.monitor.nodes[node].phase

    def reason(self, node):
        return self.monitor.nodes[node].reason

    def when(self, node, phase):
        """When it first got this phase, seconds of virtual time; infinite for never."""
        return next((at for at, v in self.verdicts if v.node == node and v.phase is phase), math.inf)


A1, A2, B1, B2, C1 = name("a", "n1"), name("a", "n2"), name("b", "n1"), name("b", "n2"), name("c", "n1")
FIVE = (A1, A2, B1, B2, C1)


def test_agents_that_beat_are_ready_and_stay_so():
    fleet = Fleet(*FIVE)
    fleet.run(60)
    assert not fleet.verdicts
    assert all(fleet.phase(node) is Phase.READY for node in FIVE)


def test_an_agent_that_died_alone_is_suspect_at_once_and_waited_for_as_for_a_restart():
    fleet = Fleet(*FIVE)
    fleet.tasks[A1] = (Running("t", "queues/q/jobs/alone", 1, 7),)
    fleet.run(2)
    killed_s = fleet.now_s
    fleet.kill(A1)
    fleet.run(58)
    assert fleet.when(A1, Phase.SUSPECT) - killed_s <= 0.3
    assert fleet.when(A1, Phase.UNREACHABLE) == math.inf  # its host answers, and nobody could miss its ranks
    fleet.connect(A1)
    fleet.run(1)
    assert fleet.phase(A1) is Phase.READY
    killed_s = fleet.now_s
    fleet.kill(A1)
    fleet.run(65)
    assert 59 <= fleet.when(A1, Phase.UNREACHABLE) - killed_s <= 62
    assert {v.node for _, v in fleet.verdicts} == {A1}


def test_a_dead_agent_whose_ranks_peers_stand_still_is_a_dead_node():
    fleet = Fleet(*FIVE)
    fleet.run(5, fleet.train(A1, A2))
    killed_s = fleet.now_s
    fleet.kill(A1)
    fleet.run(10)  # the ranks on A2 wait for the dead ones and do not end
    assert 4.4 <= fleet.when(A1, Phase.UNREACHABLE) - killed_s <= 6.0


def test_an_end_of_peers_long_after_the_agents_death_is_no_proof_of_the_nodes():
    fleet = Fleet(*FIVE)
    training = fleet.train(A1, A2)
    fleet.run(5, training)
    fleet.kill(A1)
    fleet.run(20, training)
    fleet.monitor.peers_lost([A1], fleet.now_s)
    fleet.run(1, training)
    assert fleet.phase(A1) is Phase.SUSPECT


def test_a_killed_node_whose_peers_report_it_is_fenced_at_once():
    fleet = Fleet(*FIVE)
    fleet.run(3, fleet.train(A1, A2))
    killed_s = fleet.now_s
    fleet.kill(A1)
    fleet.run(0.3)
    fleet.monitor.peers_lost([A1], fleet.now_s)
    fleet.run(1)
    assert fleet.when(A1, Phase.UNREACHABLE) - killed_s <= 0.7
    assert fleet.when(A1, Phase.SUSPECT) < fleet.when(A1, Phase.UNREACHABLE)
    assert fleet.phase(A2) is Phase.READY


def test_peers_that_are_heard_before_the_broken_stream_count_too():
    fleet = Fleet(*FIVE)
    fleet.silence(A1, Probe.REFUSED)
    fleet.monitor.peers_lost([A1], fleet.now_s)
    fleet.run(0.2)
    fleet.kill(A1)
    fleet.run(0.4)
    assert fleet.phase(A1) is Phase.UNREACHABLE


@pytest.mark.parametrize("probe", [Probe.CONNECTS, Probe.NO_ROUTE])
def test_a_silent_node_is_suspect_within_two_seconds_and_fenced_after_five(probe):
    fleet = Fleet(*FIVE)
    silent_s = fleet.now_s
    fleet.silence(A1, probe)
    fleet.run(10)
    assert 1.0 <= fleet.when(A1, Phase.SUSPECT) - silent_s <= 2.0
    assert 4.4 <= fleet.when(A1, Phase.UNREACHABLE) - silent_s <= 6.0


def test_without_a_probe_port_silence_alone_decides_in_the_same_time():
    fleet = Fleet(*FIVE, probes=False)
    silent_s = fleet.now_s
    fleet.silence(A1, Probe.NO_ROUTE)
    fleet.run(10)
    assert fleet.when(A1, Phase.SUSPECT) - silent_s <= 2.0
    assert fleet.when(A1, Phase.UNREACHABLE) - silent_s <= 6.0


def test_a_verdict_is_withdrawn_when_the_node_comes_back_before_the_fence():
    fleet = Fleet(*FIVE)
    fleet.silence(A1, Probe.CONNECTS)
    fleet.run(3)
    assert fleet.phase(A1) is Phase.SUSPECT
    fleet.sending.add(A1)
    fleet.run(2)
    assert fleet.phase(A1) is Phase.READY
    assert fleet.when(A1, Phase.UNREACHABLE) == math.inf


def test_a_fenced_node_is_ready_again_when_its_agent_is_back_and_not_before():
    fleet = Fleet(*FIVE)
    fleet.kill(A1)
    fleet.run(65)
    assert fleet.phase(A1) is Phase.UNREACHABLE
    fleet.connect(A1)
    fleet.run(0.2)
    assert fleet.phase(A1) is Phase.READY


def test_an_agent_that_redials_at_once_is_never_suspected():
    fleet = Fleet(*FIVE)
    for _ in range(20):
        fleet.monitor.stream_ended(A1, fleet.stream[A1], fleet.now_s)
        fleet.sending.discard(A1)
        fleet.run(0.2)
        fleet.connect(A1)
        fleet.run(1)
    assert not fleet.verdicts


def test_the_end_of_an_older_stream_means_nothing():
    fleet = Fleet(*FIVE)
    old = fleet.stream[A1]
    fleet.connect(A1)
    fleet.monitor.stream_ended(A1, old, fleet.now_s)
    fleet.monitor.goodbye(A1, old, fleet.now_s, Stop.HOST_SHUTDOWN)
    fleet.run(3)
    assert not fleet.verdicts


def test_an_agent_whose_way_to_us_is_broken_but_answers_probes_is_alive():
    fleet = Fleet(*FIVE)
    fleet.kill(A1, Probe.ANSWERED)
    fleet.run(30)
    assert not fleet.verdicts


@pytest.mark.parametrize("probe", [Probe.CONNECTS, Probe.NO_ROUTE, Probe.REFUSED])
def test_a_suspicion_that_lasts_is_said_once_whatever_later_probes_do(probe):
    fleet = Fleet(*FIVE)
    fleet.kill(A1, probe)
    fleet.run(4)
    assert [v.phase for _, v in fleet.verdicts] == [Phase.SUSPECT] * len(fleet.verdicts)


def test_a_neighbour_that_is_refused_proves_what_cannot_be_seen_from_here():
    fleet = Fleet(*FIVE)
    fleet.run(3, fleet.train(A1, A2))
    fleet.kill(A1, Probe.NO_ROUTE)
    fleet.monitor.peers_lost([A1], fleet.now_s)
    fleet.run(1)
    assert fleet.phase(A1) is Phase.SUSPECT
    assert fleet.monitor.indirect_probes_for(A2, fleet.now_s) == ["10.0.0.1:7000"]
    assert fleet.monitor.indirect_probes_for(A2, fleet.now_s) == []  # one at a time
    assert fleet.monitor.indirect_probes_for(B1, fleet.now_s) == []
    fleet.monitor.indirectly_probed("10.0.0.1:7000", A2, Probe.REFUSED)
    fleet.run(0.6)
    assert fleet.phase(A1) is Phase.UNREACHABLE


def test_the_word_of_who_was_not_asked_about_a_neighbour_does_not_count():
    fleet = Fleet(*FIVE)
    fleet.run(3, fleet.train(A1, A2))
    fleet.kill(A1, Probe.NO_ROUTE)
    fleet.monitor.peers_lost([A1], fleet.now_s)
    fleet.run(1)
    for prober in (A2, B1):
        fleet.monitor.indirectly_probed("10.0.0.1:7000", prober, Probe.REFUSED)
    fleet.run(0.6)
    assert fleet.phase(A1) is Phase.SUSPECT


def test_of_many_hosts_that_cannot_be_seen_from_here_each_has_its_turn_with_the_neighbours():
    silent = [name("a", f"n{number:02}") for number in range(30)]
    fleet = Fleet(A1, A2, *(name("a", f"w{number}") for number in range(100)), *silent)
    for number, node in enumerate(silent):
        fleet.monitor.nodes[node].probe_address = f"10.0.1.{number}:7000"
        fleet.kill(node, Probe.NO_ROUTE)
    asked = []
    fleet.run(3, lambda: asked.extend(fleet.monitor.indirect_probes_for(A1, fleet.now_s)))
    assert set(asked) == {f"10.0.1.{number}:7000" for number in range(30)}


def test_an_announced_restart_has_a_minute():
    fleet = Fleet(*FIVE)
    left_s = fleet.now_s
    fleet.monitor.goodbye(A1, fleet.stream[A1], left_s, Stop.AGENT_RESTART)
    fleet.kill(A1)
    fleet.run(58)
    assert (fleet.phase(A1), fleet.reason(A1)) == (Phase.SUSPECT, "AGENT_RESTARTING")
    fleet.run(5)
    assert 59 <= fleet.when(A1, Phase.UNREACHABLE) - left_s <= 62


def test_an_agent_that_stops_for_good_is_suspect_at_once():
    fleet = Fleet(*FIVE)
    fleet.monitor.goodbye(A1, fleet.stream[A1], fleet.now_s, Stop.HOST_SHUTDOWN)
    fleet.silence(A1, Probe.REFUSED)
    fleet.run(0.2)
    assert (fleet.phase(A1), fleet.reason(A1)) == (Phase.SUSPECT, "AGENT_STOPPED")
    fleet.run(6)
    assert fleet.phase(A1) is Phase.UNREACHABLE


@pytest.mark.parametrize("exit_code", [-15, -9, 143, 137])
@pytest.mark.parametrize("stop", list(Stop))
def test_work_that_is_ended_while_its_node_stops_in_order_is_not_at_fault(stop, exit_code):
    fleet = Fleet(*FIVE)
    fleet.monitor.goodbye(A2, fleet.stream[A2], fleet.now_s, stop)
    fleet.silence(A2, Probe.REFUSED)
    fleet.run(1)
    got = attributed(fleet, exit_code=exit_code)
    assert (got.fault, got.culprits, got.application_fault) == (Fault.NODE_LOST, (A2,), False)
    fleet.connect(A2)  # the agent is back, and reports what it finds
    fleet.run(2)
    assert not attributed(fleet, exit_code=exit_code).application_fault
    assert attributed(fleet, exit_code=1).application_fault
    fleet.run(120)
    assert attributed(fleet, exit_code=exit_code).application_fault


def test_an_end_from_outside_waits_for_a_goodbye_that_explains_it():
    fleet = Fleet(*FIVE)
    asked_s = fleet.now_s
    fleet.monitor.look_at(A1)
    fleet.monitor.look_at(A2)
    fleet.run(0.1)
    nodes = [fleet.monitor.nodes[n] for n in (A1, A2)]
    assert is_settled(failure(exit_code=1), nodes, asked_s, fleet.now_s)
    assert not is_settled(failure(exit_code=-15), nodes, asked_s, fleet.now_s)
    fleet.monitor.goodbye(A2, fleet.stream[A2], fleet.now_s, Stop.HOST_SHUTDOWN)
    assert is_settled(failure(exit_code=-15), nodes, asked_s, fleet.now_s)


@pytest.mark.parametrize(("age_s", "fenced_after_s"), [(0, 60), (40, 20), (300, 8.25)])
def test_an_announced_restart_has_what_is_left_of_its_minute_under_the_next_leader(age_s, fenced_after_s):
    left = StoredHealth(A1, Phase.READY, "ALIVE", announced=Stop.AGENT_RESTART, announced_age_s=age_s)
    monitor = Monitor(0.0, known=[left, StoredHealth(A2, Phase.READY, "ALIVE")])
    monitor.intent(A1, Intent.ACTIVE, 0.0, address="h:1")
    stream = monitor.hello(A2, 0.1)
    fenced_s, now_s = math.inf, 0.0
    while now_s < 70:
        now_s += TICK_S
        monitor.heartbeat(A2, stream, now_s)
        if (now_s * 10) % 5 < 1:
            monitor.probe_begins(A1, now_s)
            monitor.probed(A1, Probe.REFUSED, now_s)
        fences = [v for v in monitor.tick(now_s) if v.node == A1 and v.phase is Phase.UNREACHABLE]
        fenced_s = min(fenced_s, *[now_s for _ in fences], math.inf)
    assert fenced_s == pytest.approx(fenced_after_s, abs=1.0)


def test_a_host_that_shut_down_is_still_shut_down_under_the_next_leader():
    left = StoredHealth(A1, Phase.READY, "ALIVE", announced=Stop.HOST_SHUTDOWN, announced_age_s=1)
    monitor = Monitor(0.0, known=[left])
    [verdict] = monitor.tick(TICK_S)
    assert (verdict.phase, verdict.reason) == (Phase.SUSPECT, "AGENT_STOPPED")


def test_a_paused_agent_whose_ranks_make_progress_is_not_fenced():
    fleet = Fleet(*FIVE)
    training = fleet.train(A1, A2)
    fleet.run(5, training)
    fleet.silence(A1, Probe.CONNECTS)
    frozen = fleet.tasks[A1]

    def without_a1():
        training()
        fleet.tasks[A1] = frozen

    fleet.run(30, without_a1)
    assert (fleet.phase(A1), fleet.reason(A1)) == (Phase.SUSPECT, "AGENT_SILENT_RANKS_ALIVE")
    fleet.sending.add(A1)
    fleet.run(1, training)
    assert fleet.phase(A1) is Phase.READY
    assert fleet.when(A1, Phase.UNREACHABLE) == math.inf


def test_a_dead_node_among_peers_that_do_not_need_it_is_fenced_after_a_minute():
    fleet = Fleet(*FIVE)
    training = fleet.train(A1, A2)
    fleet.run(5, training)
    killed_s = fleet.now_s
    fleet.kill(A1)
    fleet.run(70, training)
    assert 59 <= fleet.when(A1, Phase.UNREACHABLE) - killed_s <= 61


def test_when_the_ranks_of_a_paused_agent_stall_too_it_is_fenced():
    fleet = Fleet(*FIVE)
    training = fleet.train(A1, A2)
    fleet.run(5, training)
    silent_s = fleet.now_s
    fleet.silence(A1, Probe.CONNECTS)
    fleet.run(12)  # nobody advances: the whole gang waits for the dead ranks
    assert fleet.when(A1, Phase.UNREACHABLE) - silent_s <= 6.0


def test_the_last_step_that_peers_finish_is_no_proof_of_life():
    fleet = Fleet(*FIVE)
    training = fleet.train(A1, A2)
    fleet.run(5, training)
    silent_s = fleet.now_s
    fleet.silence(A1, Probe.NO_ROUTE)
    fleet.run(0.6, training)
    fleet.run(8)
    assert fleet.when(A1, Phase.UNREACHABLE) - silent_s <= 6.0


def test_a_paused_agent_with_slow_steps_is_given_the_time_of_its_steps():
    fleet = Fleet(*FIVE)
    training = fleet.train(A1, A2, step_s=4.0)
    fleet.run(30, training)
    fleet.silence(A1, Probe.CONNECTS)
    fleet.run(40, training)
    assert fleet.when(A1, Phase.UNREACHABLE) == math.inf


def test_a_site_that_goes_silent_as_one_is_partitioned_and_never_fenced():
    fleet = Fleet(*FIVE)
    for node in (A1, A2):
        fleet.silence(node, Probe.NO_ROUTE)
    fleet.run(300)
    assert {fleet.reason(A1), fleet.reason(A2)} == {"SITE_PARTITIONED"}
    assert fleet.phase(A1) is fleet.phase(A2) is Phase.SUSPECT
    assert fleet.phase(B1) is Phase.READY


def test_a_site_of_one_node_has_the_same_rights():
    fleet = Fleet(*FIVE)
    fleet.silence(C1, Probe.NO_ROUTE)
    fleet.run(300)
    assert (fleet.phase(C1), fleet.reason(C1)) == (Phase.SUSPECT, "SITE_PARTITIONED")
    fleet.connect(C1)
    fleet.run(1)
    assert fleet.phase(C1) is Phase.READY and fleet.when(C1, Phase.UNREACHABLE) == math.inf


def test_a_lonely_host_that_answers_is_no_partition():
    fleet = Fleet(*FIVE)
    fleet.silence(C1, Probe.CONNECTS)
    fleet.run(8)
    assert fleet.phase(C1) is Phase.UNREACHABLE


def test_who_stays_silent_after_the_partition_is_fenced_by_its_own_silence():
    fleet = Fleet(*FIVE)
    for node in (A1, A2):
        fleet.silence(node, Probe.NO_ROUTE)
    fleet.run(100)
    healed_s = fleet.now_s
    fleet.connect(A1)
    fleet.run(10)
    assert fleet.phase(A1) is Phase.READY
    assert 3 <= fleet.when(A2, Phase.UNREACHABLE) - healed_s <= 4


def test_killed_agents_on_reachable_hosts_are_no_partition():
    fleet = Fleet(*FIVE)
    for node in (A1, A2):
        fleet.kill(node)
    fleet.run(65)
    assert fleet.phase(A1) is fleet.phase(A2) is Phase.UNREACHABLE


def test_when_the_whole_fleet_is_silent_nobody_is_fenced():
    fleet = Fleet(*FIVE)
    for node in FIVE:
        fleet.silence(node, Probe.NO_ROUTE)
    fleet.run(120)
    assert {fleet.phase(node) for node in FIVE} == {Phase.SUSPECT}


def test_a_front_door_that_breaks_every_stream_suspects_nobody_for_a_moment():
    fleet = Fleet(*FIVE, probes=False)
    for node in FIVE:
        fleet.kill(node, Probe.NO_ROUTE)
    fleet.run(1.2)
    for node in FIVE:
        fleet.connect(node)
    fleet.run(5)
    assert not fleet.verdicts


def test_a_new_leader_judges_nobody_before_a_full_window_has_passed():
    known = [StoredHealth(node, Phase.READY, "ALIVE") for node in FIVE]
    monitor = Monitor(50.0, known=known)
    stream = monitor.hello(A1, 50.5)
    at_s, verdicts = 50.0, []
    while at_s < 54.8:
        at_s += TICK_S
        monitor.heartbeat(A1, stream, at_s)
        verdicts += monitor.tick(at_s)
    assert not verdicts
    while at_s < 75:
        at_s += TICK_S
        monitor.heartbeat(A1, stream, at_s)
        verdicts += [(at_s, v) for v in monitor.tick(at_s)]
    suspects = {v.node for at, v in verdicts if v.phase is Phase.SUSPECT}
    assert suspects == {A2, B1, B2, C1}
    assert monitor.nodes[A1].phase is Phase.READY


def test_what_was_fenced_stays_fenced_under_the_next_leader_until_it_is_heard():
    monitor = Monitor(0.0, known=[StoredHealth(A1, Phase.UNREACHABLE, "SILENT_TOO_LONG", age_s=10)])
    for i in range(200):
        assert not monitor.tick(i * TICK_S)
    stream = monitor.hello(A1, 20.0)
    monitor.heartbeat(A1, stream, 20.0)
    [verdict] = monitor.tick(20.1)
    assert verdict.phase is Phase.READY


@pytest.mark.parametrize("sleep_s", [3.0, 60.0])
def test_the_monitors_own_sleep_counts_for_nothing(sleep_s):
    fleet = Fleet(*FIVE)
    fleet.run(0.2)
    fleet.now_s += sleep_s
    for node in FIVE:
        fleet.next_heartbeat[node] = fleet.now_s + 0.5
    fleet.run(5)
    assert not fleet.verdicts


def test_sleep_delays_the_fence_of_a_silent_node_and_does_not_withdraw_it():
    fleet = Fleet(*FIVE)
    fleet.silence(A1, Probe.NO_ROUTE)
    fleet.run(3)
    assert fleet.phase(A1) is Phase.SUSPECT
    fleet.now_s += 60
    fleet.run(1)
    assert fleet.phase(A1) is Phase.SUSPECT
    fleet.run(3)
    assert fleet.phase(A1) is Phase.UNREACHABLE


def test_the_breaker_stops_a_massacre_and_lets_go_when_nodes_come_back():
    nodes = [name(f"s{i}", "n") for i in range(10)]
    fleet = Fleet(*nodes)
    for node in nodes[:9]:
        fleet.kill(node)
        fleet.run(0.7)
    fleet.run(65)
    fenced = [n for n in nodes if fleet.phase(n) is Phase.UNREACHABLE]
    held = [n for n in nodes[:9] if fleet.reason(n) == "FENCE_BREAKER_OPEN"]
    assert (len(fenced), len(held)) == (5, 4)
    assert fleet.phase(held[0]) is Phase.SUSPECT
    fleet.connect(fenced[0])
    fleet.run(1)
    assert sum(fleet.phase(n) is Phase.UNREACHABLE for n in nodes) == 5
    assert sum(fleet.reason(n) == "FENCE_BREAKER_OPEN" for n in nodes) == 3


def test_intents_are_mirrored_while_the_node_lives_and_retirement_is_final():
    fleet = Fleet(*FIVE)
    for intent in (Intent.CORDONED, Intent.DRAINING, Intent.ACTIVE, Intent.DRAINING):
        fleet.monitor.intent(A1, intent, fleet.now_s)
        fleet.run(0.2)
        assert fleet.phase(A1) is ALIVE[intent]
    fleet.silence(A1, Probe.NO_ROUTE)
    fleet.run(3)
    assert fleet.phase(A1) is Phase.SUSPECT
    fleet.sending.add(A1)
    fleet.run(1)
    assert fleet.phase(A1) is Phase.DRAINING
    fleet.monitor.intent(A1, Intent.RETIRED, fleet.now_s)
    fleet.run(10)
    assert fleet.phase(A1) is Phase.RETIRED


def test_a_node_that_never_reported_stays_registered():
    fleet = Fleet(A1, A2)
    fleet.monitor.intent(B1, Intent.ACTIVE, fleet.now_s)
    fleet.run(120)
    assert fleet.phase(B1) is Phase.REGISTERED


def test_a_slower_heart_has_longer_limits():
    slow = Timing().scaled(5.0)
    assert (slow.suspect_s, slow.fence_s) == (17.5, 50.0)
    assert Timing().scaled(0.1) == Timing() == Timing().scaled(0.5)


def test_jitter_raises_what_counts_as_overdue_within_limits():
    steady, jittery = Arrivals(0.5), Arrivals(0.5)
    for i in range(200):
        steady.add(0.5)
        jittery.add(0.2 if i % 2 else 0.8)
    assert steady.overdue_s(Timing()) == Timing().probe_least_s
    assert jittery.overdue_s(Timing()) == Timing().probe_s


# the machine


def test_no_phase_but_retired_is_a_dead_end_and_every_phase_can_be_reached():
    seen, todo = set(), deque([Phase.REGISTERED])
    while todo:
        phase = todo.popleft()
        seen.add(phase)
        todo.extend(NEXT[phase] - seen)
    assert seen == set(Phase)
    for phase in set(Phase) - {Phase.RETIRED}:
        assert _reaches(phase, Phase.READY), phase
        assert may_become(phase, Phase.RETIRED), phase
    assert NEXT[Phase.RETIRED] == frozenset()


def _reaches(start, goal):
    seen, todo = set(), deque([start])
    while todo:
        phase = todo.popleft()
        if phase is goal:
            return True
        seen.add(phase)
        todo.extend(NEXT[phase] - seen)
    return False


def test_service_phases_end_only_through_a_test():
    assert Phase.READY not in NEXT[Phase.QUARANTINED] | NEXT[Phase.REPAIRING]
    assert Phase.READY in NEXT[Phase.TESTING]


def mishap(fleet, node, chance):
    """One thing that happens to a node."""
    stream, now_s = fleet.stream[node], fleet.now_s
    happens = [
        lambda: fleet.kill(node, chance.choice(list(Probe))),
        lambda: fleet.silence(node, chance.choice(list(Probe))),
        lambda: fleet.connect(node),
        lambda: fleet.monitor.peers_lost([node], now_s),
        lambda: fleet.monitor.goodbye(node, stream, now_s, chance.choice(list(Stop))),
        lambda: fleet.monitor.intent(node, chance.choice(list(Intent)[:3]), now_s),
    ]
    chance.choice(happens)()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_random_histories_take_only_steps_of_the_machine_and_end_ready(seed):
    chance = random.Random(seed)
    fleet = Fleet(*FIVE)
    before = dict.fromkeys(FIVE, Phase.READY)
    for _ in range(25):
        node = chance.choice(FIVE)
        mishap(fleet, node, chance)
        fleet.run(chance.choice([0.1, 0.5, 2, 7]))
    for node in FIVE:
        fleet.monitor.intent(node, Intent.ACTIVE, fleet.now_s)
        fleet.connect(node)
    fleet.run(1)
    for _, verdict in fleet.verdicts:
        assert may_become(before[verdict.node], verdict.phase), (before[verdict.node], verdict)
        before[verdict.node] = verdict.phase
    assert all(fleet.phase(node) is Phase.READY for node in FIVE)


# whose fault was it


def failure(**more):
    fields = {
        "job": "queues/q/jobs/j", "epoch": 1, "task": "j-1-0", "node": A2, "exit_code": 1, "message": "",
        "nodes": (A1, A2),
    }  # fmt: skip
    return TaskFailure(**{**fields, **more})


def attributed(fleet, **more):
    ended = failure(**more)
    return attribute(ended, [fleet.monitor.nodes[n] for n in ended.nodes], fleet.now_s)


def test_a_rank_that_ends_among_healthy_peers_ended_by_itself():
    got = attributed(Fleet(*FIVE))
    assert (got.fault, got.culprits, got.application_fault) == (Fault.PROCESS_EXIT, (), True)


@pytest.mark.parametrize("text", ["CUDA out of memory", "oom-kill", "killed: OOM"])
def test_out_of_memory_is_told_by_its_words(text):
    got = attributed(Fleet(*FIVE), message=text, exit_code=-9)
    assert (got.fault, got.application_fault) == (Fault.OUT_OF_MEMORY, True)
    assert "SIGKILL" in got.message


def test_words_that_merely_contain_oom_are_not_out_of_memory():
    assert attributed(Fleet(*FIVE), message="no room in the broom cupboard").fault is Fault.PROCESS_EXIT


def test_a_lost_peer_is_to_blame_as_soon_as_its_stream_is_gone():
    fleet = Fleet(*FIVE)
    fleet.kill(A1)
    got = attributed(fleet)
    assert (got.fault, got.culprits, got.application_fault) == (Fault.PEER_LOST, (A1,), False)


def test_a_peer_that_the_scheduler_lost_is_to_blame():
    got = attributed(Fleet(*FIVE), disconnected=(A1,))
    assert (got.fault, got.culprits) == (Fault.PEER_LOST, (A1,))


def test_a_task_whose_own_node_is_gone_was_lost_with_it():
    fleet = Fleet(*FIVE)
    fleet.kill(A2)
    fleet.run(6)
    got = attributed(fleet)
    assert (got.fault, got.culprits, got.application_fault) == (Fault.NODE_LOST, (A2,), False)
    assert attributed(Fleet(*FIVE), disconnected=(A2,)).fault is Fault.NODE_LOST


def test_nodes_that_have_nothing_to_do_with_the_attempt_are_not_blamed():
    assert attributed(Fleet(*FIVE), disconnected=(B1,)).fault is Fault.PROCESS_EXIT


def test_a_peer_whose_agent_merely_restarts_is_not():
    fleet = Fleet(*FIVE)
    fleet.monitor.goodbye(A1, fleet.stream[A1], fleet.now_s, Stop.AGENT_RESTART)
    fleet.silence(A1, Probe.REFUSED)
    fleet.run(5)
    assert fleet.reason(A1) == "AGENT_RESTARTING"
    assert attributed(fleet).fault is Fault.PROCESS_EXIT


def test_a_refusing_port_of_a_peer_that_beats_is_no_evidence():
    fleet = Fleet(*FIVE)
    fleet.outcome[A1] = Probe.REFUSED
    fleet.monitor.peers_lost([A1], fleet.now_s)
    fleet.run(0.1)
    assert attributed(fleet).fault is Fault.PROCESS_EXIT
    assert fleet.phase(A1) is Phase.READY


def test_an_answer_is_final_when_every_peer_was_probed_or_a_culprit_is_known():
    fleet = Fleet(*FIVE)
    ended, others = failure(), [fleet.monitor.nodes[A1]]
    asked_s = fleet.now_s
    assert not is_settled(ended, others, asked_s, fleet.now_s)
    fleet.monitor.peers_lost([A1], asked_s)
    fleet.run(0.1)
    assert is_settled(ended, others, asked_s, fleet.now_s)
    fleet.kill(A1)
    assert is_settled(ended, others, fleet.now_s, fleet.now_s)


def test_the_record_of_a_loss_that_ends_many_jobs_stays_small():
    records = HealthRecords(VirtualClock(), lambda *_, **__: "00-" + "a" * 32 + "-" + "1" * 16 + "-01")
    lost = Attribution(Fault.NODE_LOST, (name("a", "n1"),), False, 0.9, "n1 is lost")
    largest, incidents = 0, set()
    for number in range(1_000):
        job = f"queues/default/jobs/{'j' * 40}-{number}"
        failure = TaskFailure(job, 1, "t", name("a", "n1"), 0, "lost", (name("a", "n1"),))
        incident, writes = records.failure(failure, lost, "", 0.0)
        largest = max(largest, *(len(write.value) for write in writes))
        incidents.add(incident.name)
        assert records.of_failure(job, 1) is incident
    assert largest < 64 * 1024
    assert len(incidents) < 20, "most of them share one"
