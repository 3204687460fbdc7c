"""Leases of rented machines: what is done next, from the record and what the provider lists."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux_inventory.core import lease_rules as rules
from whaleflux_inventory.core.lease_rules import NEXT, Lease, Machine, Seen, State, Terms
from whaleflux_inventory.core.offers import Offer, choose, trust
from whaleflux_inventory.core.rental_cost import end_by_cap_s, paid_usd

T0 = 1_800_000_000.0
TERMS = Terms(usd_per_hour=36.0, billing_unit_s=60.0, boot_s=100.0, drain_s=120.0)
LAG_S = 30.0


def lease(**more):
    return Lease("leases/l", "offers/a", TERMS, T0, T0 + 7200, 1000.0, **{"state_s": T0, **more})


def machine(of, id_="m-1", **more):
    return Machine(id_, of.name, of.token, T0, **more)


def seen(*machines, **more):
    return Seen(machines=machines, lag_s=LAG_S, **more)


def booting(**more):
    asked = rules.step(lease(), Seen(lag_s=LAG_S), T0).lease
    return replace(rules.launched(asked, "m-1", T0 + 2), **more)


def joined(**more):
    there = booting()
    return replace(rules.step(there, seen(machine(there), joined=True), T0 + 90).lease, **more)


def test_every_state_but_the_last_leads_to_the_end():
    def reaches(state, been=frozenset()):
        return state is State.GONE or any(reaches(after, been | {state}) for after in NEXT[state] - been)

    assert all(reaches(state) for state in State)
    assert [state for state in State if not NEXT[state]] == [State.GONE]


def test_the_record_says_that_a_call_is_made_before_it_is():
    done = rules.step(lease(), Seen(), T0)
    assert done.launch and done.lease.state is State.REQUESTED
    assert (done.lease.calls, done.lease.called_s, done.lease.asked_s) == (1, T0, T0)


def test_what_an_unanswered_call_made_is_adopted_and_a_second_machine_of_it_ended():
    asked = rules.step(lease(), Seen(), T0).lease
    done = rules.step(asked, seen(machine(asked, "m-2"), machine(asked, "m-1")), T0 + 9)
    assert (done.lease.state, done.lease.provider_id, done.launch) == (State.BOOTING, "m-1", False)
    assert done.end == ("m-2",) and done.lease.strays == ("m-2",) and done.lease.stray_usd > 0


def test_it_is_asked_again_only_when_a_machine_would_be_listed_by_then():
    asked = rules.step(lease(), Seen(lag_s=LAG_S), T0).lease
    assert not rules.step(asked, seen(), T0 + LAG_S - 1).launch
    again = rules.step(asked, seen(), T0 + LAG_S)
    assert again.launch and again.lease.token == asked.token and again.lease.calls == 2
    assert not rules.step(asked, Seen(lag_s=LAG_S), T0 + LAG_S).launch  # the list was not read


def test_another_offer_has_another_token():
    first = rules.step(lease(), Seen(), T0).lease
    second = rules.other_offer(first, "offers/b", TERMS, T0 + 3)
    again = rules.other_offer(second, "offers/b", TERMS, T0 + 6)
    assert len({first.token, second.token, again.token}) == 3
    assert (second.state, second.attempt, second.calls) == (State.INTENT, 2, 0)


def test_a_machine_is_gone_when_it_is_not_listed_for_longer_than_lists_lag():
    there = booting()
    missing = rules.step(there, seen(), T0 + 10)
    assert not missing.next_offer and missing.lease.missing_s == T0 + 10
    assert rules.step(missing.lease, seen(), T0 + 10 + LAG_S).next_offer
    back = rules.step(missing.lease, seen(machine(there)), T0 + 20).lease
    assert back.missing_s == 0.0 and back.state is State.BOOTING


def test_gone_is_only_what_the_provider_does_not_list():
    ended = rules.end(joined(), "given back")
    draining = rules.step(ended, seen(machine(ended)), T0 + 600)
    assert draining.drain and draining.lease.state is State.DRAINING
    releasing = rules.step(draining.lease, seen(machine(ended), held=0), T0 + 610).lease
    told = rules.step(releasing, seen(machine(ended)), T0 + 610)
    assert told.end == ("m-1",) and told.lease.state is State.RELEASING
    still = rules.step(told.lease, seen(machine(ended)), T0 + 700)
    assert still.end == ("m-1",) and still.lease.state is State.RELEASING  # acknowledged and alive
    gone = rules.step(told.lease, seen(), T0 + 720).lease
    assert gone.state is State.GONE and gone.spent_usd == pytest.approx(12 * 0.6)
    zombie = rules.step(gone, seen(machine(ended)), T0 + 900)
    assert zombie.end == ("m-1",) and zombie.lease.stray_usd == pytest.approx(3 * 0.6)


def test_work_leaves_before_the_machine_is_taken_and_never_later_than_that():
    there = joined()
    notice = seen(machine(there, taken_s=T0 + 720, taken_why="spot notice"), held=8)
    draining = rules.step(there, notice, T0 + 600)
    assert draining.lease.state is State.DRAINING and draining.lease.end_reason == "spot notice" and draining.drain
    assert rules.step(draining.lease, notice, T0 + 700).lease.state is State.DRAINING
    assert rules.step(draining.lease, notice, T0 + 711).lease.state is State.RELEASING


def test_the_cap_is_a_time_and_ends_it_before_it_is_reached():
    there = joined(cost_cap_usd=6.0)  # ten minutes at 36 USD an hour
    assert there.end_s == T0 + 600
    assert rules.step(there, seen(machine(there)), T0 + 470).lease.state is State.JOINED
    draining = rules.step(there, seen(machine(there), held=8), T0 + 481).lease
    assert draining.state is State.DRAINING and "cap of 6.00 USD" in draining.end_reason
    assert rules.step(draining, seen(machine(there), held=8), T0 + 600).lease.state is State.RELEASING
    assert there.cost_usd(T0 + 600) <= 6.0


def test_one_that_never_joins_is_given_back():
    assert rules.step(booting(), seen(machine(booting())), T0 + 601).lease.state is State.RELEASING


def test_a_refusal_of_the_only_call_ends_it_at_once_and_an_unsure_one_looks_first():
    asked = rules.step(lease(), Seen(), T0).lease
    assert rules.no_offer(asked, "no stock", T0 + 1).state is State.GONE
    assert rules.no_offer(replace(asked, calls=2), "no stock", T0 + 1).state is State.RELEASING


@given(
    st.sampled_from(State),
    st.lists(st.tuples(st.sampled_from(["m-1", "m-2", "m-3"]), st.booleans(), st.booleans()), max_size=3),
    st.booleans(),
    st.floats(0, 10_000),
    st.booleans(),
)
def test_steps_follow_the_machine_and_no_stray_is_spared(state, listed, joins, later_s, ends):
    one = booting(state=state, end_reason="over" if ends else "")
    if state in (State.INTENT, State.REQUESTED):
        one = replace(one, provider_id="")
    there = [
        replace(machine(one, id_, ended=ended), token=one.token if own else "another")
        for id_, ended, own in {entry[0]: entry for entry in listed}.values()
    ]
    done = rules.step(one, seen(*there, joined=joins, held=0), T0 + later_s)
    assert done.lease.state is state or done.lease.state in NEXT[state]
    kept = {done.lease.provider_id} if done.lease.live else set()
    spared = {m.id for m in there if not m.ended} - set(done.end) - kept
    assert not spared or (one.state is State.REQUESTED and spared <= {m.id for m in there if m.token == one.token})


def test_cost_counts_begun_units():
    assert paid_usd(0, TERMS) == pytest.approx(0.6)
    assert paid_usd(61, TERMS) == pytest.approx(1.2)
    assert end_by_cap_s(T0, 1.3, TERMS) == T0 + 120
    assert end_by_cap_s(T0, 1.3, Terms(0.0)) == float("inf")


def offer(name, usd, **more):
    return Offer(name, "p", "m", "sites/s", Terms(usd), gpus=8, **more)


def test_an_offer_that_refused_regains_trust_and_is_left_alone_until_then():
    cheap, dear = offer("offers/a", 8.0, refusals=1, refused_s=T0), offer("offers/b", 16.0)
    assert [trust(cheap, T0 + s) for s in (0, 300, 600, 900)] == [0.0, 0.5, 1.0, 1.0]
    assert trust(replace(cheap, refusals=3), T0 + 600) == 0.25
    assert choose([cheap, dear], {}, T0 + 60) == dear
    assert choose([cheap, dear], {"offers/b": 1}, T0 + 60) is None


def test_what_the_machine_itself_has_heard_drains_it_when_it_is_near():
    there = joined()
    far = rules.step(there, seen(machine(there), notice=(T0 + 100 + rules.NOTICE_AHEAD_S + 1, "restarted")), T0 + 100)
    assert (far.lease.state, far.drain) == (State.JOINED, False)
    near = rules.step(there, seen(machine(there), notice=(T0 + 160, "taken")), T0 + 100)
    assert (near.lease.state, near.drain, near.lease.end_reason) == (State.DRAINING, True, "taken")
    assert near.lease.drain_end_s == T0 + 160 - rules.NOTICE_SPARE_S


def test_of_two_announcements_the_earlier_counts():
    there = joined()
    listed = machine(there, taken_s=T0 + 900, taken_why="listed")
    done = rules.step(there, seen(listed, notice=(T0 + 150, "heard")), T0 + 100)
    assert (done.lease.end_reason, done.lease.drain_end_s) == ("heard", T0 + 150 - rules.NOTICE_SPARE_S)
