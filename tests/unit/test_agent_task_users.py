"""Which user a queue's work runs as, and which group an attempt has to itself."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument, ResourceExhausted
from whaleflux_agent.core.task_users import DEFAULT_IDS, IdRange, gid_after, parse_range, uid_of
from whaleflux_agent.runtime import leftovers
from whaleflux_agent.runtime.walls import hides_processes

SMALL = IdRange(200_000, 200_063)


@given(st.lists(st.text(min_size=1), max_size=62, unique=True))
def test_no_two_queues_share_a_user_and_each_keeps_its_own(queues):
    taken = {}
    for queue in queues:
        taken[queue] = uid_of(queue, SMALL, taken)
    assert len(set(taken.values())) == len(queues)
    assert SMALL.everybody not in taken.values()
    assert all(uid in SMALL for uid in taken.values())
    assert {queue: uid_of(queue, SMALL, taken) for queue in queues} == taken


def test_a_queue_has_the_same_user_on_every_node_unless_its_number_is_taken_there():
    assert uid_of("research", DEFAULT_IDS, {}) == uid_of("research", DEFAULT_IDS, {"other": DEFAULT_IDS.first + 1})
    assert uid_of("research", SMALL, {"x": uid_of("research", SMALL, {})}) != uid_of("research", SMALL, {})


def test_a_queue_whose_user_is_of_another_range_gets_one_of_this():
    assert uid_of("q", SMALL, {"q": 7}) in SMALL


def test_a_full_range_is_said_with_what_to_do():
    taken = {str(number): number for number in range(SMALL.first + 1, SMALL.last + 1)}
    with pytest.raises(ResourceExhausted, match="larger range"):
        uid_of("one more", SMALL, taken)
    with pytest.raises(ResourceExhausted, match="larger range"):
        gid_after(0, SMALL, taken.values())


def test_every_group_has_its_turn_before_one_comes_again_and_none_is_two_attempts():
    given_, last = [], 0
    for _ in range(SMALL.size):
        last = gid_after(last, SMALL, ())
        given_.append(last)
    assert sorted(given_) == list(range(SMALL.first + 1, SMALL.last + 1))
    assert gid_after(last, SMALL, ()) == given_[0]
    assert gid_after(last, SMALL, {given_[0]}) == given_[1]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "FIRST-LAST"),
        ("a-b", "FIRST-LAST"),
        ("5000", "FIRST-LAST"),
        ("-5-100000", "FIRST-LAST"),
        ("0-100000", "lower ids are the system's"),
        ("999-100000", "lower ids are the system's"),
        ("200000-4294967295", "must lie between"),
        ("200000-200010", "at least 64"),
        ("300000-200000", "at least 64"),
    ],
)
def test_a_range_that_is_none_is_refused_with_what_to_write(text, word):
    with pytest.raises(InvalidArgument, match=word) as refused:
        parse_range(text)
    assert refused.value.violations[0].field == "task_uids"


def test_a_range_is_read_as_it_is_shown():
    assert parse_range(str(SMALL)) == SMALL


def test_processes_are_hidden_where_that_changes_one_mount_alone():
    for release, hides in (
        ("4.18.0-553.el8.x86_64", False),
        ("5.4.0-200-generic", False),
        ("5.8-rc1", True),
        ("6.8.0", True),
        ("10.1", True),
    ):
        assert hides_processes(release) == hides, release


def test_shared_memory_of_a_process_that_lives_is_not_swept():
    """PyTorch hands a tensor on by name: for a moment no process has it open, and another job's sweep may come then."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    alive, left = (f"/dev/shm/torch_{pid}_{os.urandom(4).hex()}_0" for pid in (os.getpid(), dead.pid))
    for path in (alive, left):
        open(path, "w").close()
    try:
        leftovers.remove_by_name(os.stat(alive).st_ctime_ns)
        assert os.path.exists(alive) and not os.path.exists(left)
    finally:
        for path in (alive, left):
            if os.path.exists(path):
                os.unlink(path)
