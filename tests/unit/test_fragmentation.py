"""Where parts of GPUs go by what is asked for: the growth of FGD's expected fragmentation, against the published rule, and the mix that is learned."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines_packing import Typical, fragmentation_milli
from tests.support.scheduler_world import GB, node
from whaleflux.fleet.model import Gpu, Node
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.asked_mix import MOST_KINDS, AskedMix, ask_of
from whaleflux_scheduler.core.model import Attempt, Job, JobState, Queue
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement.api import GroupRequest, Placement, PlaceRequest, Share
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.placement.fragmentation import Ask, stranded_by_share, stranded_by_whole
from whaleflux_scheduler.core.plan import News, Plan

NOW = datetime(2026, 5, 1, tzinfo=UTC)
MILLI = 1000  # bytes of a thousandth of these tests' GPUs
CORE = 1000


def engine_with(*frees, cpu=1000 * CORE):
    """Nodes with so many thousandths free of each of their GPUs."""
    made = Engine()
    for n, free in enumerate(frees):
        gpus = tuple(Gpu(i, f"GPU-{n}-{i}", "M", 1000 * MILLI, (9, 0)) for i in range(len(free)))
        made.upsert_node(Node(f"sites/s/nodes/n{n}", "s", gpus=gpus, leaf="l", cpu_millicores=cpu, memory_bytes=0))
    columns = made.columns
    for n, free in enumerate(frees):
        for i, left in enumerate(free):
            if left < 1000:
                columns.share(n, i, 0, (1000 - left) * MILLI, 1)
    return made


def typical(mix):
    """The same mix as the published rule takes it."""
    kinds = [kind for kind, _ in mix]
    return Typical(
        np.array([kind.cpu_millicores for kind in kinds]),
        np.array([kind.gpus for kind in kinds]),
        np.array([kind.share_bytes // MILLI or 1000 for kind in kinds]),
        np.zeros(len(kinds), dtype=np.int64),
        np.array([weight for _, weight in mix]),
    )


MILLIS = st.sampled_from([0, 100, 250, 400, 500, 750, 1000])
KIND = st.one_of(
    st.builds(lambda milli, cpu: Ask(1, milli * MILLI, cpu * CORE, 0), st.sampled_from([100, 250, 500, 600]), st.integers(0, 40)),
    st.builds(lambda gpus, cpu: Ask(gpus, 0, cpu * CORE, 0), st.integers(1, 4), st.integers(0, 40)),
)  # fmt: skip
MIX = st.lists(KIND, min_size=1, max_size=5, unique=True).map(
    lambda kinds: tuple((kind, 1 / len(kinds)) for kind in kinds)
)


class TestAgainstThePublishedRule:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(MILLIS, min_size=1, max_size=4),
        MIX,
        st.sampled_from([100, 250, 500]),
        st.integers(0, 20),
        st.integers(20, 60),
    )
    def test_a_share(self, free, mix, milli, took, cores):
        made, wanted = engine_with(free, cpu=cores * CORE), typical(mix)
        fits = np.array([[left >= milli for left in free]])
        growth = stranded_by_share(made.columns, mix, Ask(1, milli * MILLI, took * CORE, 0), fits)
        before = fragmentation_milli(wanted, cores * CORE, 0, np.array(free))
        for i, left in enumerate(free):
            after = np.array([one - milli if at == i else one for at, one in enumerate(free)])
            expected = (fragmentation_milli(wanted, (cores - took) * CORE, 0, after) - before) / 1000
            assert growth[0, i] == (pytest.approx(expected) if left >= milli else np.inf)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(MILLIS, min_size=1, max_size=4), MIX, st.integers(0, 20), st.integers(20, 60), st.data())
    def test_whole_gpus(self, free, mix, took, cores, data):
        free = [*free, 1000]
        count = data.draw(st.integers(1, free.count(1000)))
        made, wanted = engine_with(free, cpu=cores * CORE), typical(mix)
        (growth,) = stranded_by_whole(made.columns, mix, Ask(count, 0, took * CORE, 0), np.array([0]))
        after, left = [], count
        for one in free:
            after.append(0 if one == 1000 and left > 0 else one)
            left -= one == 1000 and left > 0
        before = fragmentation_milli(wanted, cores * CORE, 0, np.array(free))
        assert growth == pytest.approx(
            (fragmentation_milli(wanted, (cores - took) * CORE, 0, np.array(after)) - before) / 1000
        )


class TestEngine:
    def share(self, made, milli, name="j"):
        request = PlaceRequest(name, (GroupRequest(gpus=1, share=Share(milli * MILLI, apart=True)),))
        answer = made.place(request)
        assert isinstance(answer, Placement), answer
        ((part, device),) = [(part, device) for part in answer.nodes for device in part.gpus]
        return part.node[-1], device

    def test_a_hole_that_somebody_asks_for_is_kept_for_them(self):
        made = engine_with([1000, 600, 300])
        assert self.share(made, 250) == ("0", 2), "the tightest fit"
        made.expect(((Ask(1, 300 * MILLI, 0, 0), 1.0),))
        assert self.share(made, 250) == ("0", 0), (
            "what is left of the GPU are two of 300 and nearly one more; of 600 it would be one"
        )
        made.expect(())
        assert self.share(made, 250) == ("0", 2)

    def test_whole_gpus_are_kept_where_those_are_asked_for(self):
        made = engine_with([1000, 1000], [400, 1000])
        made.expect(((Ask(2, 0, 0, 0), 1.0),))
        node_of, _ = self.share(made, 300)
        assert node_of == "1", "the first node holds two whole ones"

    def test_one_that_has_no_room_is_never_taken(self):
        made = engine_with([200, 200], [250, 0])
        made.expect(((Ask(1, 200 * MILLI, 0, 0), 1.0),))
        assert self.share(made, 250) == ("1", 0)

    def test_it_lasts_when_nodes_change(self):
        made = engine_with([1000, 600, 300])
        made.expect(((Ask(1, 300 * MILLI, 0, 0), 1.0),))
        made.upsert_node(Node("sites/s/nodes/n9", "s", leaf="l"))
        assert made.columns.mix


def ran(name, at_s=0.0, uid="", **spec):
    job = Job(f"queues/q/jobs/{name}", Spec(command=("x",), **spec), JobState.RUNNING, NOW, uid=uid or name)
    return replace(job, attempt=Attempt(1, (), NOW + timedelta(seconds=at_s)))


SHARE = {"gpus": 1, "share_memory_bytes": 20 * GB}


class TestMix:
    def test_kinds_are_what_is_asked_of_one_node(self):
        assert ask_of(ran("a", **SHARE, cpu_millicores_per_rank=2000).spec) == Ask(1, 20 * GB, 2000, 0)
        assert ask_of(ran("b", gpus=64, memory_bytes_per_rank=GB).spec) == Ask(8, 0, 0, 8 * GB)

    def test_while_nobody_asks_for_shares_nothing_is_packed_by_it(self):
        mix = AskedMix()
        for n in range(100):
            mix.learn(ran(f"j{n}", gpus=1 + n % 8))
        assert mix.mix() == ()

    def test_each_job_counts_once_and_less_as_time_goes_by(self):
        mix = AskedMix(half_life_s=100.0)
        for _ in range(5):
            mix.learn(ran("old", **SHARE))
        mix.learn(ran("new", 100.0, gpus=2))
        assert dict(mix.mix()) == {Ask(2, 0, 0, 0): pytest.approx(2 / 3), Ask(1, 20 * GB, 0, 0): pytest.approx(1 / 3)}

    @given(
        st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 4), st.booleans()), min_size=1, max_size=20), st.randoms()
    )
    @settings(max_examples=50, deadline=None)
    def test_a_new_leader_learns_the_same_in_whatever_order(self, jobs, random):
        made = [
            ran(f"j{n}", at_s, gpus=1 if share else gpus, share_memory_bytes=gpus * GB * share)
            for n, (at_s, gpus, share) in enumerate(jobs)
        ]
        one, other = AskedMix(), AskedMix()
        for job in made:
            one.learn(job)
        random.shuffle(made)
        for job in made:
            other.learn(job)
        assert dict(one.mix()) == pytest.approx(dict(other.mix()))
        assert sum(weight for _, weight in one.mix()) == (pytest.approx(1.0) if one.mix() else 0)

    def test_it_is_bounded(self):
        mix = AskedMix()
        for n in range(3 * MOST_KINDS):
            mix.learn(ran(f"j{n}", float(n), gpus=1, share_memory_bytes=n + 1))
        assert 0 < len(mix.mix()) <= 32
        assert mix.kinds <= MOST_KINDS


class TestPlan:
    """Three GPUs of 80 GB with 48, 24 and 80 GB free, and forty jobs of 24 GB that ran: a share of 20 GB would spoil the hole of 24."""

    def device_of_the_last(self, **how):
        made = Plan(**how)
        made.apply(News(queues={"q": Queue("queues/q")}, nodes=(node("s/a", 3),), closed={"sites/s/nodes/a": ""}))
        before = [ran(f"before-{n}", gpus=1, share_memory_bytes=24 * GB) for n in range(40)]
        made.apply(News(jobs=tuple(replace(job, state=JobState.SUCCEEDED) for job in before)))
        for name, share_gb in (("a", 32), ("b", 56), ("c", 20)):
            spec = Spec(command=("x",), gpus=1, share_memory_bytes=share_gb * GB)
            asked = Job(f"queues/q/jobs/{name}", spec, JobState.QUEUED, NOW)
            made.apply(News(jobs=(asked,), candidates={asked.name: Candidate(asked)}))
            (move,) = made.decide(NOW)
            placed = lifecycle.place(asked, move.assignment, move.decision, NOW)
            made.apply(News(jobs=(placed,)))
            made.check()
        return placed.attempt.tasks[0].gpus[0][-1]

    def test_shares_go_by_what_was_asked_for_so_far(self):
        assert self.device_of_the_last(packs_by_mix=True) != "1"

    def test_else_they_go_where_they_fit_tightest(self):
        assert self.device_of_the_last() == "1"
