"""When machines are rented for jobs that wait, and when they are given back."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from whaleflux_scheduler.core import give_back
from whaleflux_scheduler.core.burst import BurstRules, decide, ever
from whaleflux_scheduler.core.give_back import CLOSED_S
from whaleflux_scheduler.core.idle_times import Idle, IdleTimes, Open
from whaleflux_scheduler.core.offered import Offered, Rented, Waiting, billed_usd, fits, gpus_on, machines_for
from whaleflux_scheduler.core.spare_machines import TAKES_WITHIN_S

HOUR = 3600.0
SPOT = Offered("offers/spot", "H200", 8, "cloud", 16.0, 300.0, 60.0, 2, spot=True)
DEAR = Offered("offers/dear", "H200", 8, "cloud", 40.0, 300.0, 60.0, 4)
RULES = BurstRules(usd_per_gpu_hour=2.0)
JOB = Waiting("queues/a/jobs/j", "a", 8, wait_s=4 * HOUR, run_s=2 * HOUR, waited_s=60.0)


NOW = 1e9


def plan(jobs=(JOB,), offers=(SPOT, DEAR), rented=(), spent=None, free=None, times=None, **rules):
    times = give_back.seen(rented, times or {}, free or {}, NOW)
    return decide(jobs, offers, rented, spent or {}, replace(RULES, **rules), times, NOW)


def why(found):
    return [one.why for one in found.waits]


def test_renting_pays_when_the_waiting_that_it_saves_is_worth_more():
    (rent,) = plan().rents
    assert (rent.offers, rent.machines) == (("offers/spot",), 1)  # at 40 USD an hour it would not pay
    assert abs(rent.usd - 16.0 * (2 * HOUR + 300) / HOUR) < 0.3
    assert abs(rent.worth_usd - 2.0 * 8 * (4 - 300 / HOUR)) < 0.01
    assert not plan([replace(JOB, wait_s=HOUR)]).rents
    assert "is worth" in why(plan([replace(JOB, wait_s=HOUR)]))[0]
    assert not plan(usd_per_gpu_hour=0.0).rents


def test_a_deadline_is_kept_whatever_waiting_is_worth():
    late = replace(JOB, late_s=3 * HOUR)
    (rent,) = plan([late], usd_per_gpu_hour=0.0).rents
    assert rent.why.startswith("its deadline would be missed") and rent.offers == ("offers/spot", "offers/dear")
    assert not plan([replace(late, late_s=HOUR)], usd_per_gpu_hour=0.0).rents  # too late anyway
    assert not plan([replace(late, wait_s=0.5 * HOUR)], usd_per_gpu_hour=0.0).rents  # in time here


def test_what_does_not_fit_or_is_not_believed_is_not_rented():
    assert why(plan([replace(JOB, models=frozenset({"A100"}))])) == ["no offer has GPUs that it could use"]
    assert why(plan([replace(JOB, sites=frozenset({"onprem"}))])) == ["no offer has GPUs that it could use"]
    assert not plan([replace(JOB, no_spot=True)]).rents
    assert not plan(offers=[replace(SPOT, trust=0.2)]).rents
    assert not plan([replace(JOB, waited_s=5.0)]).rents
    (rent,) = plan([replace(JOB, gpus=16)]).rents
    assert rent.machines == 2
    assert not plan([replace(JOB, gpus=24)], offers=[SPOT]).rents  # two are left


def test_small_jobs_share_a_machine_and_its_price():
    small = [replace(JOB, name=f"queues/a/jobs/{n}", gpus=2, wait_s=3 * HOUR) for n in range(5)]
    assert not plan(small[:1]).rents
    found = plan(small)
    assert len(found.rents) == 1 and found.rents[0].worth_usd > found.rents[0].usd


def machine(lease="leases/l", offer=SPOT, **more):
    return Rented(lease, offer, "a", **{"begun_s": 1010.0, **more})  # its unit ends in 10 s


def test_nobody_rents_for_what_is_on_its_way_and_what_is_wanted_stays():
    found = plan(rented=[machine(coming=True)])
    assert not found.rents and "has room for it" in why(found)[0]
    idle = machine(idle_s=100.0)
    assert not plan(rented=[idle]).ends
    assert [one.lease for one in plan([], rented=[idle]).ends] == ["leases/l"]
    assert not plan([], rented=[machine()]).ends  # it works
    assert not plan([], rented=[replace(idle, ending=True)]).ends


def idle_for(idle_s, *over, room=False):
    """What is known where a machine of the offer has been idle for so long, after idle times of these lengths without room elsewhere."""
    known = tuple(Idle(lasted_s, lasted_s if lasted_s < 300.0 else 60.0) for lasted_s in over)
    return {SPOT.kind: IdleTimes(0, (Open(NOW - idle_s, room),), known)}


def test_an_idle_machine_goes_before_the_next_unit_is_paid_and_not_earlier():
    for left_s, gone in ((59.0, False), (21.0, False), (19.0, True), (1.0, True)):
        found = plan([], rented=[machine(begun_s=600.0 - left_s, idle_s=0.0)], times=idle_for(0.0))
        assert bool(found.ends) is gone
    hourly = replace(SPOT, billing_unit_s=HOUR)
    kept = plan([], rented=[machine(offer=hourly, begun_s=1900.0, idle_s=1500.0)], times=idle_for(1500.0))
    assert not kept.ends  # half an hour is paid anyway
    assert plan([], rented=[machine(offer=hourly, begun_s=HOUR - 5, idle_s=1500.0)], times=idle_for(1500.0)).ends


def test_an_idle_machine_is_kept_where_such_are_needed_again_soon():
    (end,) = plan([], rented=[machine(idle_s=5.0)], times=idle_for(5.0, *[9000.0] * 6)).ends
    assert "as 6 idle times of such machines say" in end.why
    assert not plan([], rented=[machine(idle_s=5.0)], times=idle_for(5.0, *[90.0] * 6)).ends
    assert plan([], rented=[machine(idle_s=400.0)], times=idle_for(400.0, *[420.0] * 6)).ends  # no longer than a boot
    (end,) = plan([], rented=[machine(idle_s=5.0)], times=idle_for(5.0, *[90.0] * 6, room=True)).ends
    assert "own nodes had room" in end.why


def test_the_dearest_of_several_idle_machines_goes_and_as_many_stay_as_are_needed():
    dear = replace(SPOT, name="offers/dear", usd_per_hour=20.0)
    two = [machine("leases/cheap", idle_s=50.0), machine("leases/dear", dear, idle_s=1.0)]
    times = {SPOT.kind: IdleTimes(0, (Open(NOW - 290.0), Open(NOW - 1.0)), (Idle(100.0, 100.0),) * 6)}
    assert [one.lease for one in plan([], rented=two, times=times).ends] == ["leases/dear"]


def test_what_a_job_takes_of_a_machine_is_counted_as_that_machine_has_it():
    part = replace(JOB, gpus=2, share_memory_bytes=40 * 10**9)
    assert gpus_on(part, SPOT) == 2 / 3 and machines_for(part, SPOT) == 1  # three of them on 141 GB
    assert not fits(replace(part, share_memory_bytes=200 * 10**9), SPOT)
    twice = replace(JOB, models=frozenset({"H200"}), per_unit={"H200": 2})
    assert gpus_on(twice, SPOT) == 16 and plan([twice]).rents[0].machines == 2
    assert plan([replace(JOB, gpus=12)]).rents[0].machines == 2
    assert plan([replace(JOB, gpus=4, wait_s=12 * HOUR, min_nodes=2)]).rents[0].machines == 2
    assert not plan([replace(JOB, gpus=16, one_node=True)]).rents
    assert not plan([replace(JOB, labels=frozenset({("room", "b")}))]).rents
    assert plan([replace(JOB, labels=frozenset({("rented", "spot")}))]).rents
    assert not plan([replace(JOB, nvme=True)]).rents and not plan([replace(JOB, least_capability=(10, 0))]).rents


def test_a_machine_that_a_job_passes_by_is_neither_waited_for_nor_rented_again():
    idle = machine(idle_s=TAKES_WITHIN_S + 1)
    found = plan(rented=[idle], times={SPOT.kind: IdleTimes(0, (Open(NOW - 301.0),))})
    assert [one.lease for one in found.ends] == ["leases/l"] and not found.rents
    assert "leases/l seemed to fit it and stands idle; see what it waits for: whaleflux explain" in why(found)[0]


def test_what_could_be_rented_at_all_is_said_whatever_is_rented_now():
    late = replace(JOB, gpus=16, waited_s=0.0)
    rent = ever(late, [replace(SPOT, trust=0.0)], RULES)
    assert rent.machines == 2 and rent.offers == ("offers/spot",)
    assert "`max`" in ever(replace(JOB, gpus=24), [SPOT], RULES)


def test_a_gang_that_lost_a_machine_rents_that_one_and_its_others_are_kept_for_it():
    gang = replace(JOB, gpus=24)
    there = [machine(f"leases/{n}", DEAR, idle_s=20.0) for n in range(2)]
    found = plan([replace(gang, wait_s=20 * HOUR)], offers=[DEAR], rented=there)
    assert [(one.offers, one.machines) for one in found.rents] == [(("offers/dear",), 1)] and not found.ends
    coming = [replace(one, idle_s=None, coming=True) for one in there]
    assert plan([replace(gang, wait_s=20 * HOUR)], offers=[DEAR], rented=coming).rents[0].machines == 1
    other = [replace(one, offer=replace(DEAR, gpus=4)) for one in there]
    assert plan([replace(gang, wait_s=20 * HOUR)], offers=[DEAR], rented=other).rents[0].machines == 3


def test_a_gang_whose_machines_come_one_after_another_rents_none_again():
    gang, early = replace(JOB, gpus=16), machine("leases/0", idle_s=TAKES_WITHIN_S + 100)
    for late in (machine("leases/1", coming=True), machine("leases/1", idle_s=5.0)):
        found = plan([gang], rented=[early, late])
        assert not found.rents and "has room for it" in why(found)[0] and not found.ends


def test_the_machine_is_as_large_as_who_waits_needs():
    single = replace(SPOT, name="offers/single", gpus=1, usd_per_hour=3.0)
    alone = replace(JOB, gpus=1, wait_s=24 * HOUR)
    assert plan([alone], offers=[SPOT, single]).rents[0].offers[0] == "offers/single"
    many = [replace(alone, name=f"queues/a/jobs/{n}") for n in range(8)]
    assert [one.offers[0] for one in plan(many, offers=[SPOT, single]).rents] == ["offers/spot"]


def test_one_machine_of_an_offer_that_needs_two_stands_behind_none():
    half = replace(SPOT, name="offers/half", gpus=4, usd_per_hour=9.0)
    assert plan(offers=[SPOT, half]).rents[0].offers == ("offers/spot",)


def test_a_machine_that_takes_no_work_for_long_is_given_back_and_not_counted_as_needed():
    shut = machine(closed_s=CLOSED_S - 1)
    assert not plan([], rented=[shut]).ends
    (end,) = plan([], rented=[replace(shut, closed_s=CLOSED_S)]).ends
    assert "takes no work" in end.why and "whaleflux nodes" in end.why
    assert not plan([], rented=[replace(shut, closed_s=CLOSED_S, ending=True)]).ends
    assert not give_back.seen([shut], {}, {}, NOW)


def test_an_offer_that_stands_behind_another_keeps_its_own_budget():
    abroad = replace(SPOT, name="offers/abroad", site="abroad", usd_per_hour=17.0)
    two, here = [replace(JOB, name=f"queues/a/jobs/{n}") for n in range(2)], {"sites/cloud": 200.0}
    found = plan(two, offers=[SPOT, abroad], budgets_usd={**here, "sites/abroad": 80.0}).rents
    assert [one.offers for one in found] == [("offers/spot", "offers/abroad"), ("offers/spot",)]
    short = plan(offers=[SPOT, abroad], budgets_usd={**here, "sites/abroad": 40.0}).rents
    assert short[0].offers == ("offers/spot",) and short[0].cap_usd > 40.0
    assert plan(offers=[SPOT, abroad], budgets_usd={"sites/abroad": 40.0}).rents[0].offers == ("offers/spot",)


def test_budgets_of_queue_site_and_all_bound_what_is_rented():
    for scope in ("", "queues/a", "sites/cloud"):
        assert plan(budgets_usd={scope: 40.0}).rents
        short = plan(budgets_usd={scope: 40.0}, spent={scope: 20.0})
        assert not short.rents and "20.00 USD left today" in why(short)[0]
    assert plan(budgets_usd={"queues/b": 0.0}).rents


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.floats(0, 1e5), st.floats(60, 1e5)), max_size=12),
    st.floats(0, 500),
)
def test_all_that_is_rented_stays_within_the_budget_and_what_is_offered(jobs, budget_usd):
    waiting = [Waiting(f"queues/a/jobs/{n}", "a", g, w, r, 60.0) for n, (g, w, r) in enumerate(jobs)]
    found = plan(waiting, budgets_usd={"": budget_usd})
    assert sum(one.cap_usd * one.machines for one in found.rents) <= budget_usd + 1e-6
    assert all(one.usd <= one.cap_usd * one.machines + 1e-6 for one in found.rents)
    assert sum(one.machines for one in found.rents) <= SPOT.left + DEAR.left
    assert len({one.job for one in found.rents} | {one.job for one in found.waits}) == len(found.rents) + len(
        found.waits
    )
    assert billed_usd(SPOT, 0.0) > 0
