"""What steps were made of, as a rank tells it."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.support.fake_agent import FakeAgent
from whaleflux.sdk import Checkpointer, agent_keeper
from whaleflux.sdk.keeper import StepReport
from whaleflux.sdk.step_times import TOLD_EVERY, StepTimes
from whaleflux.sdk.trace import TracedStep
from whaleflux_agent.usage.steps import wrong


class Loop:
    """A training loop under a clock that the test moves."""

    def __init__(self, world_size=1, **more):
        self.now_s, self.told = 100.0, []
        self.times = StepTimes(
            nn.Linear(1, 1), world_size, self.told.append, lambda: self.now_s, lambda: self.now_s + 1e9, **more
        )

    def pass_(self, seconds):
        self.now_s += seconds

    def step(self, step, *, data=0.0, work=1.0, save=0.0, tokens=None, flops=None):
        arrived = self.times.waited_for_data()
        self.pass_(data)
        arrived()
        self.pass_(work)
        self.times.trained_on(tokens, flops)
        if save:
            goes_on = self.times.saved()
            self.pass_(save)
            goes_on()
        self.times.stepped(step)


def test_ten_steps_are_told_together_with_where_their_time_went():
    loop = Loop()
    with loop.times.running(40):
        for step in range(41, 51):
            loop.step(step, data=0.1, save=2.0 if step == 45 else 0.0, tokens=100, flops=1e9)
    (told,) = loop.told
    assert (told.first_step, told.last_step, told.tokens, told.flops) == (41, 50, 1000, pytest.approx(1e10))
    assert (told.data_s, told.save_s) == (pytest.approx(1.0), pytest.approx(2.0))
    assert told.end_s - told.start_s == pytest.approx(13.0)
    assert (told.comm_in_node_s, told.comm_cross_s) == (0, 0), "one rank has nobody to wait for"


def test_reports_leave_no_gap_and_the_last_steps_are_told_at_the_end():
    loop = Loop()
    with loop.times.running(0):
        for step in range(1, 26):
            loop.step(step)
    assert [(one.first_step, one.last_step) for one in loop.told] == [(1, 10), (11, 20), (21, 25)]
    assert [one.start_s for one in loop.told[1:]] == [one.end_s for one in loop.told[:-1]]


def test_what_a_program_does_not_say_is_not_known():
    loop = Loop()
    with loop.times.running(0):
        for step in range(1, TOLD_EVERY + 1):
            loop.step(step)
    assert (loop.told[0].tokens, loop.told[0].flops) == (None, None)


def test_a_loop_that_ends_by_an_error_tells_the_steps_that_it_has_done():
    loop = Loop()
    with pytest.raises(RuntimeError), loop.times.running(0):
        loop.step(1)
        loop.step(2)
        raise RuntimeError
    assert [(one.first_step, one.last_step) for one in loop.told] == [(1, 2)]


def test_nothing_done_is_nothing_told():
    loop = Loop()
    with loop.times.running(7):
        pass
    assert loop.told == []


def test_what_is_told_fits_into_the_time_of_the_steps():
    """A wait may be measured on one step of ten, and a span on a GPU may end with the next ten."""
    loop = Loop()
    with loop.times.running(0):
        late = loop.times.waited_for_data()
        loop.pass_(50)
        for step in range(1, TOLD_EVERY + 1):
            loop.step(step, work=0.1)
        late()  # told with the next ten, whose time is shorter
        for step in range(TOLD_EVERY + 1, 2 * TOLD_EVERY + 1):
            loop.step(step, work=0.1)
    second = loop.told[1]
    assert second.data_s == pytest.approx(second.end_s - second.start_s)


class Seen:
    """Looks, of which the newest saw this."""

    def __init__(self, newest):
        self.newest, self.spoiled = newest, 0

    def spoil(self):
        self.spoiled += 1

    def nothing(self, *_):
        pass

    start = stop = stepped = waited = nothing


def test_a_look_at_one_step_speaks_for_those_after_it():
    loop = Loop(looks=Seen(TracedStep(whole_s=1.0, host_s=0.2, in_node_s=0.3, cross_s=0.1)), world_size=2)
    with loop.times.running(0):
        for step in range(1, 11):
            loop.step(step, data=0.5)
    told = loop.told[0]
    assert (told.comm_in_node_s, told.comm_cross_s) == (pytest.approx(3.0), pytest.approx(1.0))
    assert told.host_s == pytest.approx(2.0)


def test_what_a_step_took_longer_because_it_was_looked_at_is_no_wait_of_others():
    loop = Loop(looks=Seen(TracedStep(whole_s=1.15, host_s=0.2, in_node_s=None, cross_s=None)))
    with loop.times.running(0):
        for step in range(1, 11):
            loop.step(step, data=0.5)
    assert loop.told[0].host_s == pytest.approx(0.5)


def test_before_the_first_look_nothing_is_known_but_of_a_rank_that_is_alone():
    for world_size, known in ((1, 0.0), (2, None)):
        loop = Loop(looks=Seen(None), world_size=world_size)
        with loop.times.running(0):
            loop.step(1)
        assert (loop.told[0].comm_in_node_s, loop.told[0].comm_cross_s, loop.told[0].host_s) == (known, known, None)


def test_a_step_with_a_save_is_none_like_others():
    seen = Seen(None)
    loop = Loop(looks=seen)
    with loop.times.running(0):
        loop.step(1, save=1.0)
        loop.step(2)
    assert seen.spoiled == 1


@pytest.fixture
def agent(tmp_path, monkeypatch):
    with FakeAgent(tmp_path) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(agent_keeper, "PAUSE_S", 0.001)
        yield running


def trained(total=20):
    model = nn.Linear(3, 3)
    with Checkpointer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), every=100) as saved:
        for _ in saved.steps(lambda step: step, total=total):
            saved.report(1.0, tokens=50, flops=1e6)


def test_the_checkpointer_tells_its_agent_by_itself(agent):
    trained()
    told = agent.named("report_steps")
    assert [(one.times.first_step, one.times.last_step, one.times.tokens) for one in told] == [
        (1, 10, 500),
        (11, 20, 500),
    ]
    assert told[0].end_time == told[1].start_time
    assert all(one.times.HasField("data_us") and one.times.HasField("comm_cross_us") for one in told)
    assert not told[0].times.HasField("host_us"), "no GPU waits where none computes"


def test_losses_are_told_with_their_steps_as_far_as_they_can_be_read(agent):
    def lost():
        raise RuntimeError("CUDA error: unspecified launch failure")

    keeper = agent_keeper.AgentKeeper(str(agent.socket), "token")
    values = [3.0, 1.0, float("nan"), float("inf"), 1e200]
    keeper.steps(0, StepReport(0, 1, 1, 10, losses=(*(lambda v=v: v for v in values), lost)))
    keeper.steps(0, StepReport(1, 2, 11, 20))
    keeper.close()
    first, second = (one.times for one in agent.named("report_steps"))
    assert (first.loss.count, first.loss.sum, first.loss.min, first.loss.max, first.loss.not_finite) == (
        2,
        4.0,
        1.0,
        3.0,
        3,
    )
    assert not second.HasField("loss")


def test_the_checkpointer_tells_the_loss_of_each_step(agent):
    trained()
    told = [one.times.loss for one in agent.named("report_steps")]
    assert [(loss.count, loss.sum) for loss in told] == [(10, 10.0), (10, 10.0)]


def test_an_agent_that_does_not_know_them_is_told_once(agent):
    agent.refuse = lambda request: (
        ("INVALID_ARGUMENT", "FIELD_INVALID", "call: is not set, or is not known to this agent")
        if request.HasField("report_steps")
        else None
    )
    trained(100)
    assert len(agent.named("report_steps")) == 1


def test_one_report_that_cannot_be_true_does_not_silence_the_next(agent):
    agent.refuse = lambda request: (
        ("INVALID_ARGUMENT", "FIELD_INVALID", "times: flops is 1e+30; use 0 to 1e+17 for 1 s")
        if request.report_steps.times.flops > 1e29
        else None
    )
    keeper = agent_keeper.AgentKeeper(str(agent.socket), "token")
    for at in range(3):
        keeper.steps(0, StepReport(at, at + 1, at + 1, at + 1, flops=1e30 if at == 1 else 1e9))
    keeper.close()
    assert [one.times.first_step for one in agent.named("report_steps")] == [1, 2, 3]


@given(st.floats(1.7e9, 1.8e9), st.lists(st.floats(0, 60), min_size=5, max_size=5))
def test_parts_fit_into_their_steps_in_the_whole_microseconds_that_are_told(start_s, parts):
    data_s, host_s, save_s, here_s, cross_s = parts
    told = agent_keeper.steps_request(
        0, StepReport(start_s, start_s + sum(parts), 1, 10, data_s, host_s, save_s, here_s, cross_s)
    )
    assert wrong(told) == ""
    assert told.times.HasField("host_us")


def test_what_an_agent_that_restarts_did_not_take_is_told_again(agent):
    fails, all_taken = iter([True, True, False, False]), threading.Event()

    def answer(request):
        if request.HasField("report_steps") and next(fails, None):
            return "UNAVAILABLE", "X", "restarts"
        if request.HasField("report_steps") and request.report_steps.times.first_step == 3:
            all_taken.set()
        return None

    agent.refuse = answer
    keeper = agent_keeper.AgentKeeper(str(agent.socket), "token")
    for at in range(3):
        keeper.steps(0, StepReport(at, at + 1, at + 1, at + 1))
    assert all_taken.wait(30)
    keeper.close()
    assert [one.times.first_step for one in agent.named("report_steps")][-3:] == [1, 2, 3]
