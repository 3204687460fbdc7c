"""How many workers a Ray cluster should have: what is done once is not done again, what nobody waits for any more goes, bounds are kept."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduler_world import GB, node
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.core.ray_clusters import RayCluster, RayClusterState
from whaleflux_scheduler.core.ray_demand import Demand, Gang, Strategy, shape_of
from whaleflux_scheduler.core.ray_nodes import Cluster, FreeNode, RayNode
from whaleflux_scheduler.core.ray_parts import End, Forget, Make, Part, Role, Worker, acts
from whaleflux_scheduler.core.ray_sizing import SETTLES_S, Seen, size

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LONG_AGO = NOW - timedelta(seconds=600)
MIB = 80 * GB // 2**20
RL = RayCluster("rayClusters/rl", max_gpus=64, uid="u")


def fleet(*gpus, labels=()):
    """A node each, with so many free GPUs of 8."""
    machines = [replace(node(f"s/n{n}", 8), labels=labels) for n in range(len(gpus))]
    return [FreeNode(m, free, m.cpu_millicores, m.memory_bytes) for m, free in zip(machines, gpus, strict=True)]


def seen(*singles, gangs=(), constraints=(), nodes=(), joined=(), left=()):
    shapes = tuple((shape_of(resources), count) for resources, count in singles)
    wanted = tuple((shape_of(resources), count) for resources, count in constraints)
    return Seen(Cluster(Demand(shapes, gangs), wanted, nodes), frozenset(joined), frozenset(left))


def parts(workers, state=JobState.RUNNING, since=LONG_AGO):
    return [Part(f"queues/q/jobs/w{n}", Role.WORKER, state, since, worker=one) for n, one in enumerate(workers)]


def started(cluster, what, have=(), free=None):
    return size(cluster, what, have, fleet(8, 8) if free is None else free, NOW)


class TestSize:
    def test_a_task_of_whole_gpus_has_a_worker_of_its_own_and_so_has_each_shared_gpu(self):
        three = started(RL, seen(({"GPU": 1, "CPU": 2}, 3))).start
        assert [(w.gpus, w.cpus, w.gpu_type, w.site) for w in three] == [(1, 2, "H100-80GB", "s")] * 3
        assert [w.gpus for w in started(RL, seen(({"gpu_memory": 60_000}, 3))).start] == [1, 1, 1]
        mixed = started(
            RL, seen(({"GPU": 4, "CPU": 8}, 1), ({"GPU": 1}, 1), ({"gpu_memory": 60_000}, 2), ({"CPU": 3}, 1))
        )
        assert sorted(w.gpus for w in mixed.start) == [1, 1, 1, 4]
        assert not started(RL, seen(({"GPU": 4, "CPU": 8}, 1), ({"CPU": 3}, 1)), parts(mixed.start)).start

    def test_what_a_group_has_on_a_node_stays_together_and_so_does_what_is_much(self):
        group = Gang(((shape_of({"GPU": 1}), 4),), Strategy.PACK)
        assert [w.gpus for w in started(RL, seen(gangs=(group,))).start] == [4]
        many = started(replace(RL, max_gpus=1000), seen(({"GPU": 1}, 400)), free=fleet(*[8] * 60)).start
        assert {w.gpus for w in many} == {8}

    def test_without_gpus_and_with_memory(self):
        (one,) = started(RL, seen(({"CPU": 4, "memory": 10 * GB}, 2))).start
        assert (one.gpus, one.cpus, one.memory_bytes) == (0, 8, 20 * GB)
        assert not started(RL, seen(({"CPU": 4, "memory": 10 * GB}, 2)), parts([one])).start, "it will hold both"

    def test_labels_that_are_asked_for_are_the_nodes_own(self):
        from whaleflux_scheduler.core.ray_demand import LabelRule

        shape = shape_of({"GPU": 1}, [(LabelRule("rack", ("a",)),)])
        what = Seen(Cluster(Demand(((shape, 1),))))
        (one,) = started(RL, what, free=fleet(8, labels=(("rack", "a"),))).start
        assert one.labels == (("rack", "a"),)
        assert not started(RL, what, parts([one]), fleet(8, labels=(("rack", "a"),))).start

    def test_those_that_have_left_are_not_waited_for(self):
        what = ({"gpu_memory": 60_000}, 1)
        (one,) = started(RL, seen(what)).start
        there = parts([one])
        assert not started(RL, seen(what), there).start
        assert started(RL, seen(what, left=[there[0].job]), there).start == (one,)

    def test_a_busy_cluster_whose_gpus_others_hold_gets_workers_that_wait(self):
        sizing = started(RL, seen(({"gpu_memory": 60_000}, 3)), free=fleet(1, 0))
        assert [w.gpus for w in sizing.start] == [1, 1, 1]
        never = started(RL, seen(({"gpu_memory": 10**9}, 3)), free=fleet(1, 0))
        assert (never.start, [one.never for one in never.plans[0].unmet]) == ((), [True])

    def test_a_group_that_waits_is_asked_for_whole(self):
        group = Gang(((shape_of({"GPU": 8}), 2),), Strategy.STRICT_SPREAD)
        assert [w.gpus for w in started(RL, seen(gangs=(group,)), free=fleet(8, 0)).start] == [8, 8]

    def test_who_only_waits_goes_with_the_demand_and_who_came_a_moment_ago_stays(self):
        workers = [Worker(1, "H100-80GB", MIB, site="s")] * 2
        old = parts(workers, JobState.QUEUED)
        assert started(RL, seen(), old).end == tuple(End(p.job, "nothing waits for it any more") for p in old)
        young = parts(workers, JobState.QUEUED, NOW - timedelta(seconds=SETTLES_S / 2))
        assert not started(RL, seen(), young).end
        assert not started(RL, seen(), parts(workers)).end, "who holds GPUs leaves by itself"

    def test_only_on_its_sites_and_types(self):
        what = seen(({"gpu_memory": 60_000}, 1))
        assert not started(replace(RL, sites=("elsewhere",)), what).start
        assert not started(replace(RL, gpu_types=("H200",)), what).start
        assert started(replace(RL, sites=("s",), gpu_types=("H100-80GB",)), what).start

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(
                    [
                        {"GPU": 1.0},
                        {"GPU": 0.25},
                        {"gpu_memory": 30_000.0},
                        {"GPU": 4.0},
                        {"CPU": 4.0},
                        {"memory": 5e9},
                    ]
                ),
                st.integers(1, 20),
            ),
            max_size=4,
        ),
        st.integers(0, 20),
        st.lists(st.integers(0, 8), min_size=1, max_size=3),
        st.booleans(),
    )
    def test_done_once_it_is_not_done_again_and_bounds_are_kept(self, singles, most, free, settled):
        """Whatever waits: with what was started there (waiting for GPUs, or on its way) looks soon start nothing more, and end nothing."""
        cluster, nodes = replace(RL, max_gpus=most), fleet(*free)
        state, since = (JobState.QUEUED, LONG_AGO) if settled else (JobState.STARTING, NOW)
        have = list[Worker]()
        looks = []
        while not looks or (looks[-1].start and len(looks) < 20):
            looks.append(size(cluster, seen(*singles), parts(have, state, since), nodes, NOW))
            have += looks[-1].start
        assert not looks[-1].start, "it comes to an end"
        assert len(looks) <= 2 or not settled, "those that wait are planned anew, so one look says all"
        assert not [end for look in looks for end in look.end]
        assert sum(one.gpus for one in have) <= most


class TestParts:
    def role(self, role, state=JobState.RUNNING, *, ended=False, gone=False, **more):
        return Part(f"queues/q/jobs/{role.word}", role, state, more.pop("since", LONG_AGO), ended, gone, **more)

    def done(self, cluster, *parts, session="", since=LONG_AGO):
        return list(acts(cluster, parts, session, since, NOW))

    def test_a_head_or_for_an_address_a_reader_and_not_at_once_again(self):
        assert self.done(RL) == [Make(Role.HEAD)]
        assert self.done(replace(RL, address="h:1")) == [Make(Role.READER)]
        assert self.done(RL, self.role(Role.HEAD)) == []
        assert self.done(RL, self.role(Role.HEAD, JobState.FAILED, ended=True, gone=True, since=NOW)) == []
        assert self.done(RL, self.role(Role.HEAD, JobState.FAILED, ended=True, gone=True)) == [Make(Role.HEAD)]

    def test_workers_of_another_head_end(self):
        head = self.role(Role.HEAD, address="h:1")
        (end,) = self.done(RL, head, self.role(Role.WORKER, address="h:2"))
        assert end == End("queues/q/jobs/worker", "its head is gone; the cluster's is at h:1 now")
        (end,) = self.done(RL, head, self.role(Role.WORKER, address="h:1", session="old"), session="new")
        assert end.why == "its head was started anew"
        for unknown in ({"session": ""}, {"session": "new"}):
            assert not self.done(RL, head, self.role(Role.WORKER, address="h:1", **unknown), session="new")
        assert not self.done(RL, self.role(Role.HEAD), self.role(Role.WORKER, address="h:2")), "it may come back"

    def test_down_is_workers_then_head_then_nothing(self):
        ending = replace(RL, state=RayClusterState.ENDING)
        head, w = self.role(Role.HEAD), self.role(Role.WORKER)
        why = "the Ray cluster is taken down"
        assert self.done(ending, head, w, since=NOW) == [End(w.job, why)]
        drains = replace(w, ended=True, state=JobState.CANCELLED)
        assert self.done(ending, head, drains, since=NOW) == []
        assert self.done(ending, head, drains) == [End(head.job, why)], "a lost node is not waited for for ever"
        left = replace(drains, gone=True)
        assert self.done(ending, head, left, since=NOW) == [End(head.job, why)]
        assert self.done(ending, replace(head, ended=True), left, since=NOW) == []
        assert self.done(ending, replace(head, ended=True, gone=True), left, since=NOW) == [Forget()]
        assert self.done(ending) == [Forget()]


def test_joined_nodes_hold_what_they_have_free():
    total = {"CPU": 1.0, "GPU": 1.0, "gpu_memory": float(MIB)}
    there = RayNode("1", total, total, {"whaleflux/gpu": "H100-80GB"})
    what = ({"gpu_memory": 60_000}, 1)
    assert not started(RL, seen(what, nodes=(there,))).start
    assert started(RL, seen(what, nodes=(replace(there, free={"CPU": 1.0}),))).start
