"""The record of a reservation: nothing of it is lost on the way, and what a newer version wrote stays."""

from datetime import UTC, datetime

import pytest

from whaleflux.store.api import Entry
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.reservations import Reservation, ReservationState
from whaleflux_scheduler.reservation_records import RESERVATIONS

AT = datetime(2026, 5, 1, tzinfo=UTC)
ONE = Reservation(
    "reservations/r",
    AT,
    AT.replace(hour=1),
    gpus=3,
    gpu_type="H200",
    nodes=("sites/s/nodes/a",),
    queue="q",
    members=("users/ann",),
    reason="launch",
    state=ReservationState.ACTIVE,
    held=(("sites/s/nodes/a", ("GPU-1", "GPU-2")),),
    short=1,
    victims=("queues/q/jobs/j",),
)


def entry(value):
    return Entry("/whaleflux/v1/reservations/r", value, 1, 1, 1)


def test_what_is_written_is_read():
    assert RESERVATIONS.decode(entry(RESERVATIONS.encode(ONE))).value == ONE


def test_states_are_the_contracts():
    names = {f"RESERVATION_STATE_{state.name}": state.value for state in ReservationState}
    assert names == dict(pb.ReservationState.items())


def test_a_field_of_a_newer_version_survives_and_its_state_is_not_taken_for_another():
    unknown = b"\xba\x3e\x05later"  # field 999, of a newer contract
    stored = RESERVATIONS.decode(entry(RESERVATIONS.encode(ONE) + unknown))
    assert RESERVATIONS.encode(ONE, stored).endswith(unknown)
    newer = pb.Reservation(name="reservations/r", state=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not know"):
        RESERVATIONS.decode(entry(newer.SerializeToString()))


def test_a_large_one_is_packed():
    many = tuple(
        (f"sites/s/nodes/n{n}", tuple(f"GPU-{n:06}-{at}-4e1f-9a3c-0123456789ab" for at in range(8)))
        for n in range(2_500)
    )
    large = Reservation("reservations/r", AT, AT.replace(hour=1), gpus=20_000, queue="q", held=many)
    value = RESERVATIONS.encode(large)
    assert len(value) < 1_400_000
    assert RESERVATIONS.decode(entry(value)).value == large
