"""How what jobs were and cost is shown."""

from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from whaleflux.cli import history_commands
from whaleflux.cli.__main__ import app
from whaleflux.cli.history_commands import columns
from whaleflux.v1.scheduler_pb2 import AccountRecord


@pytest.mark.parametrize(("times", "waited"), [
    ({"create_time": {"seconds": 10}, "start_time": {"seconds": 13}, "end_time": {"seconds": 20}}, 3.0),
    ({"create_time": {"seconds": 10}, "end_time": {"seconds": 12}}, 2.0),
])  # fmt: skip
def test_what_never_ran_waited_until_its_end_and_no_longer(times, waited):
    shown = next(column for column in columns() if column.header == "WAITED")
    assert shown.of(AccountRecord(job="queues/q/jobs/j", **times)) == waited


@pytest.mark.parametrize(("options", "last"), [
    ([], "total: 1 job, 1 attempt, 2.00 GPU-hours, $5.00"),
    (["-o", "wide"], "total: 1 job, 1 attempt, 2.00 GPU-hours, $5.00"),
    (["--no-headers"], "queues/q/jobs/j"), (["-o", "csv"], "queues/q/jobs/j"),
])  # fmt: skip
def test_the_total_stands_below_the_table_that_it_is_of(monkeypatch, options, last):
    record = AccountRecord(job="queues/q/jobs/j", attempts=1, gpu_s=7200, cost_usd=5)
    monkeypatch.setattr(history_commands, "fleet", nullcontext)
    monkeypatch.setattr(history_commands, "records", lambda client, request, most: [record])
    done = CliRunner().invoke(app, ["history", *options])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1].startswith(last)
