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
    "whose claim was to be taken over waited for nobody else when the one that had to leave for it did": (
        32,
        [
            ("submit", 873295922),
            ("submit", 2516392300),
            ("submit", 3037791613),
            ("submit", 3148291967),
            ("time_passes", 2349469257),
            ("time_passes", 362476966),
            ("is_cordoned", 244232803),
            ("fails", 1852814941),
            ("time_passes", 846998427),
            ("time_passes", 3283218308),
            ("time_passes", 1397998219),
            ("time_passes", 2447808036),
            ("time_passes", 275677334),
            ("submit", 3217135352),
            ("limits_change", 483052206),
            ("time_passes", 1523153632),
            ("time_passes", 3894322553),
            ("limits_change", 4059180707),
        ],
    ),
    "a resize went on to claim what somebody else had claimed while it stopped": (
        0,
        [
            ("submit", 447033969),
            ("time_passes", 2374524620),
            ("is_cancelled", 4171257345),
            ("limits_change", 3648060833),
            ("submit", 136094094),
            ("time_passes", 3499771969),
        ],
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_it_holds_now(what):
    number, operations = FOUND[what]
    failed = replay(operations, worlds_of(number))
    assert failed is None, failed
