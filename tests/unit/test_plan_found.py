"""Histories of the random operations that failed once, as they were printed; what was wrong is said beside each."""

import pytest

from tests.support.plan_soak.driver import replay, worlds_of

FOUND = {
    "who is over before a reservation begins started on GPUs that another job claims until then": (
        39,
        [
            ("submit", 3659254563),
            ("is_cordoned", 924505863),
            ("submit", 1607248022),
            ("time_passes", 364370002),
            ("time_passes", 1786458067),
            ("submit", 4016954445),
            ("is_deleted", 278232724),
            ("submit", 620999912),
            ("submit", 2616611310),
            ("submit", 1066280005),
            ("submit", 2163949605),
            ("submit", 3413005653),
            ("is_deleted", 442530436),
            ("time_passes", 1039054426),
            ("time_passes", 1001033931),
            ("time_passes", 3448692892),
            ("changes_priority", 2144859790),
            ("reserves", 2228820509),
            ("time_passes", 3546872357),
        ],
    ),
    "who waits had an elastic job give GPUs that were promised to another": (
        48,
        [
            ("submit", 1858807774),
            ("submit", 545264436),
            ("submit", 734547998),
            ("submit", 1542477606),
            ("submit", 711149003),
            ("time_passes", 3428732826),
            ("submit", 4141808874),
        ],
    ),
    "a job was given up with what came free, though others had become ones that it may have stopped": (
        2504,
        [
            ("submit", 1601020446),
            ("time_passes", 712890706),
            ("is_cancelled", 1165058348),
            ("time_passes", 532411665),
            ("changes_priority", 3940462954),
            ("submit", 2514396907),
            ("time_passes", 4264898336),
            ("submit", 3702507508),
            ("time_passes", 3399370882),
            ("submit", 230837807),
            ("time_passes", 1130796483),
            ("time_passes", 2924082171),
            ("time_passes", 3375019750),
            ("time_passes", 1647997471),
            ("time_passes", 4164403504),
            ("submit", 1699286282),
            ("submit", 521930424),
            ("time_passes", 1516033380),
            ("submit", 4222238184),
            ("time_passes", 1764405446),
            ("time_passes", 170812884),
            ("time_passes", 190553575),
            ("fails", 1579781670),
        ],
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_it_holds_now(what):
    number, operations = FOUND[what]
    failed = replay(operations, worlds_of(number))
    assert failed is None, failed
