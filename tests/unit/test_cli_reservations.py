"""`whaleflux reservation`: times and nodes as people write them, and what is shown of what is kept."""

import contextlib
import json
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from whaleflux.cli import fleet_commands, queue_commands, reservation_commands
from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument
from whaleflux.v1 import scheduler_pb2 as pb

RUN = CliRunner()
AT = datetime(2026, 12, 24, 8, tzinfo=UTC)


class Service:
    """Answers like SchedulerService, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def one(self, name="reservations/launch", **more):
        made = pb.Reservation(name=name, state=pb.RESERVATION_STATE_SCHEDULED, etag='"7"', creator="user/ann", **more)
        made.start_time.FromDatetime(AT)
        made.end_time.FromDatetime(AT + timedelta(hours=2))
        return made

    def kept(self):
        launch = self.one(gpus=4, gpu_type="H200", queue="queues/research", short_gpus=1)
        launch.held.add(node="sites/onprem/nodes/n1", gpu_uuids=["GPU-1", "GPU-2", "GPU-3"])
        return [self.one("reservations/kernel", maintenance=True, nodes=["sites/onprem/nodes/n2"]), launch]

    def CreateReservation(self, request, timeout):
        self.asked.append(request)
        made = pb.Reservation()
        made.CopyFrom(request.reservation)
        made.name = f"reservations/{request.reservation_id}"
        return made

    def UpdateReservation(self, request, timeout):
        self.asked.append(request)
        return self.one(gpus=4, queue="queues/research")

    def GetReservation(self, request, timeout):
        return next(one for one in self.kept() if one.name == request.name)

    def ListReservations(self, request, timeout):
        self.asked.append(request)
        return pb.ListReservationsResponse(reservations=self.kept())

    def DeleteReservation(self, request, timeout):
        self.asked.append(request)


@pytest.fixture
def service(monkeypatch):
    found = Service()
    client = type("Client", (), {"scheduler": found, "identity": None})()
    monkeypatch.setattr(reservation_commands, "note_strangers", lambda *_: None)
    monkeypatch.setattr(reservation_commands, "fleet", lambda: contextlib.nullcontext(client))
    return found


def run(*words, code=0):
    done = RUN.invoke(app, ["reservation", *words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def refused(*words):
    done = RUN.invoke(app, ["reservation", *words])
    assert isinstance(done.exception, InvalidArgument), (done.output, done.exception)
    return [(one.field, one.description) for one in done.exception.violations]


def span(one):
    return one.end_time.ToDatetime(tzinfo=UTC) - one.start_time.ToDatetime(tzinfo=UTC)


def test_times_are_instants_or_counted_from_now(service):
    run("create", "launch", "--gpus", "4", "--queue", "research", "--start", "2026-12-24T08:00Z", "--for", "2h")
    (made,) = service.asked
    assert (made.reservation_id, made.reservation.queue, made.reservation.gpus) == ("launch", "queues/research", 4)
    assert made.reservation.start_time.ToDatetime(tzinfo=UTC) == AT and span(made.reservation) == timedelta(hours=2)
    assert made.request_id and not made.validate_only
    run("create", "soon", "--gpus", "1", "--start", "+2h", "--end", "+3h", "--member", "users/ann", "--dry-run")
    asked = service.asked[-1]
    assert span(asked.reservation) == timedelta(hours=1) and asked.validate_only
    assert (asked.reservation.queue, list(asked.reservation.members)) == ("queues/default", ["users/ann"])


def test_maintenance_names_nodes_and_nothing_else(service):
    nodes = "onprem/n1, sites/onprem/nodes/n2"
    run("create", "kernel", "--maintenance", "--nodes", nodes, "--start", "+1d", "--for", "90 min", "-m", "kernel")
    made = service.asked[-1].reservation
    assert list(made.nodes) == ["sites/onprem/nodes/n1", "sites/onprem/nodes/n2"]
    assert (made.maintenance, made.queue, made.gpus, made.reason) == (True, "", 0, "kernel")


@pytest.mark.parametrize(
    ("words", "flag", "says"),
    [
        (("create", "a", "--gpus", "1"), "--end", "--for TIME"),
        (("create", "a", "--gpus", "1", "--for", "1h", "--end", "+1h"), "--end", "leave one out"),
        (("create", "a", "--gpus", "1", "--for", "soon"), "--for", "a time such as"),
        (("create", "a", "--gpus", "1", "--for", "0s"), "--for", "between 1 min and 366 d"),
        (("create", "a", "--gpus", "1", "--for", "400d"), "--for", "between 1 min and 366 d"),
        (("create", "a", "--gpus", "1", "--for", "99999999999d"), "--for", "is too long; use at most 366 d"),
        (("create", "a", "--gpus", "1", "--start", "tomorrow", "--for", "1h"), "--start", "or +2h from now"),
        (("create", "a", "--gpus", "1", "--start", "+x", "--for", "1h"), "--start", "a time such as"),
        (("update", "launch"), "--gpus", "nothing to change"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_asked(service, words, flag, says):
    ((field, description),) = refused(*words)
    assert field == flag and says in description
    assert not [asked for asked in service.asked if not isinstance(asked, pb.ListReservationsRequest)]


def test_a_change_names_its_fields_and_counts_a_length_from_the_start_that_it_has(service):
    run("update", "launch", "--for", "5h", "--gpus", "8")
    (asked,) = service.asked
    assert list(asked.update_mask.paths) == ["gpus", "end_time"] and asked.reservation.etag == '"7"'
    assert span(asked.reservation) == timedelta(hours=5) and asked.reservation.gpus == 8
    run("update", "launch", "--start", "+1h", "--end", "+2h")
    assert list(service.asked[-1].update_mask.paths) == ["start_time", "end_time"]


def test_what_is_kept_is_listed_shown_and_given_up(service):
    listed = run("ls")
    assert "reservations/launch" in listed and "4 H200" in listed and "SCHEDULED" in listed
    assert "1 node free of work" in listed
    shown = run("show", "launch")
    assert "short           1 GPUs" in shown and "n1 (3)" in shown
    assert json.loads(run("show", "launch", "-o", "json"))["gpu_type"] == "H200"
    assert len(json.loads(run("ls", "-o", "json"))) == 2
    run("rm", "launch", "--yes")
    assert service.asked[-1] == pb.DeleteReservationRequest(name="reservations/launch")


def test_nodes_and_queues_say_what_is_coming(service):
    client = type("Client", (), {"scheduler": service})()
    assert fleet_commands.under_maintenance(client) == {
        "sites/onprem/nodes/n2": "MAINTENANCE 2026-12-24T08:00Z to 2026-12-24T10:00Z"
    }
    own = [one for one in queue_commands.reservations(client) if one.queue == "queues/research"]
    assert [queue_commands.told(one) for one in own] == ["launch: 4 H200, 2026-12-24T08:00Z to 2026-12-24T10:00Z"]
