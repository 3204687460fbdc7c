"""The story of a fleet, told by the real suite and read back: in order, with who and why, also what happened while NATS was dead."""

import asyncio
import csv
import io
import json
import signal
import subprocess
import sys

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.services import ROLES
from whaleflux.v1 import inventory_pb2, router_pb2
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]  # about 30 s on a quiet machine

A, B = Machine("onprem", "a", "a100x8"), Machine("onprem", "b", "a100x8")
# Its first attempt fails once it is told to: it was RUNNING by then.
FIRST = '[ "$TORCHELASTIC_RESTART_COUNT" -gt 0 ] || { until [ -e "$0" ]; do sleep 0.1; done; exit 7; }; exec sleep 600'


@pytest.fixture(scope="module")
def suite():
    with running_suite() as running:
        yield running


async def submit(client, job_id, command, gpus, **spec):
    job = pb.Job(spec=pb.JobSpec(command=command, gpus=gpus, **spec))
    made = await client.scheduler.CreateJob(
        pb.CreateJobRequest(parent="queues/default", job_id=job_id, job=job), timeout=20
    )
    return made.name


async def reaches(client, name, state):
    wanted = pb.JobState.Value(f"JOB_STATE_{state}")

    async def there():
        return (await client.scheduler.GetJob(pb.GetJobRequest(name=name), timeout=5)).state == wanted

    await until(there, f"{name} is {state}", 60)


async def cli(suite, *arguments):
    argv = [sys.executable, "-m", "whaleflux.cli", "--context", str(suite.context_file), *arguments]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


async def told(suite, *arguments):
    code, shown, why = await cli(suite, "events", "-o", "jsonl", *arguments)
    assert code == 0, why
    return [json.loads(line) for line in shown.splitlines()]


async def test_the_story_of_a_fleet(suite):
    async with suite.client() as client:
        await suite.join([A, B])
        fails = suite.state / "fails"
        low = await submit(client, "low", ["sh", "-c", FIRST, str(fails)], 8, retry={"backoff": {"seconds": 1}})
        await reaches(client, low, "RUNNING")
        fails.touch()
        await until(lambda: _on_attempt(client, low, 2), "it runs again after its failure", 60)
        high = await submit(client, "high", ["sleep", "600"], 16, priority=100)
        await reaches(client, high, "RUNNING")

        suite.send("nats", signal.SIGKILL)  # what happens now is told late
        await client.scheduler.CancelJob(pb.CancelJobRequest(name=high, reason="wrong data"), timeout=20)
        await reaches(client, low, "RUNNING")
        running_on = (await client.scheduler.GetJob(pb.GetJobRequest(name=low), timeout=5)).attempt.tasks[0].node
        await client.inventory.DrainNode(inventory_pb2.DrainNodeRequest(name=running_on, reason="new fan"), timeout=20)
        await until(lambda: _on_attempt(client, low, 4), "it moved", 60)
        await client.scheduler.CancelJob(pb.CancelJobRequest(name=low, reason="done"), timeout=20)
        await client.router.CreateApiKey(router_pb2.CreateApiKeyRequest(display_name="ci"), timeout=20)
        cost_usd = (await client.scheduler.GetJob(pb.GetJobRequest(name=low), timeout=5)).cost_usd
        await until(lambda: _deleted(client, low), "its record is deleted", 60)

        await until(lambda: _whole_story(suite, low), "all of it is told", 60, every_s=0.5)
        events = await told(suite, "--for", "job/low")
        assert [(e["what"], e["cause"]["actor"]) for e in events] == [
            ("QUEUED", "admin/local"),
            ("STARTING", "scheduler/placement"),
            ("RUNNING", "scheduler/start"),
            ("RECOVERING", "scheduler/exit"),
            ("QUEUED", "scheduler/retry"),
            ("STARTING", "scheduler/placement"),
            ("RUNNING", "scheduler/start"),
            ("SUSPENDING", "scheduler/preemption"),
            ("QUEUED", "scheduler/preemption"),
            ("STARTING", "scheduler/placement"),
            ("RUNNING", "scheduler/start"),
            ("RECOVERING", "scheduler/drain"),
            ("STARTING", "scheduler/placement"),
            ("RUNNING", "scheduler/start"),
            ("CANCELLED", "admin/local"),
            ("DELETED", "admin/local"),
        ]
        assert [e["time"] for e in events] == sorted(e["time"] for e in events)
        assert len({e["id"] for e in events}) == len(events), "each once, though NATS died"
        assert events[7]["cause"]["resource"] == high
        assert events[3]["attributes"]["exit_code"] == "7"
        assert events[-2]["cause"]["message"] == "done"

        drains = ("--for", f"node/{running_on}", "--what", "draining")
        await until(lambda: _are_told(suite, 2, *drains), "the drain and what followed", 60, every_s=0.5)
        asked, followed = await told(suite, *drains)
        assert (asked["source"], asked["cause"]) == ("inventory", {"actor": "admin/local", "message": "new fan"})
        assert followed["cause"]["actor"].startswith("health_monitor")

        async def of_the_key():
            return "ci" in {e["message"] for e in await told(suite, "--kind", "apikey", "--since", "1h")}

        await until(of_the_key, "the key is told of", 60, every_s=0.5)

        await _accounts(suite, low, cost_usd)
        code, shown, _ = await cli(suite, "describe", "job", "low")
        assert (code, "its record is deleted" in shown, "CANCELLED" in shown) == (0, True, True)
        code, _, why = await cli(suite, "describe", "job", "never")
        assert (code, "never" in why) == (1, True)


async def _accounts(suite, low, cost_usd):
    code, shown, why = await cli(suite, "history", "low", "-o", "csv")
    assert code == 0, why
    job, *attempts = list(csv.DictReader(io.StringIO(shown)))
    assert [int(row["attempt"]) for row in (job, *attempts)] == [0, 1, 2, 3, 4]
    assert [row["state"] for row in attempts] == ["exit", "preempted", "drain", "cancelled"]
    assert (job["state"], attempts[0]["exit"]) == ("CANCELLED", "7")
    assert float(job["cost"]) == pytest.approx(cost_usd, abs=1e-5)
    assert sum(float(row["cost"]) for row in attempts) == pytest.approx(cost_usd, abs=1e-4)

    async def both():
        return "2 jobs" in (await cli(suite, "history", "--since", "1h"))[1]

    await until(both, "both jobs are accounted for", 60, every_s=0.5)


async def _on_attempt(client, name, number):
    job = await client.scheduler.GetJob(pb.GetJobRequest(name=name), timeout=5)
    return job.attempt.number == number and job.state == pb.JOB_STATE_RUNNING


async def _deleted(client, name):
    await client.scheduler.DeleteJob(pb.DeleteJobRequest(name=name), timeout=5)
    return True


async def _are_told(suite, count, *arguments):
    return len(await told(suite, *arguments)) >= count


async def _whole_story(suite, name):
    code, shown, _ = await cli(suite, "events", "-o", "json", "--for", "job/low")
    _, accounts, _ = await cli(suite, "history", "low", "-o", "name")
    return code == 0 and '"DELETED"' in shown and len(accounts.splitlines()) == 5


async def test_the_audit_trail_has_every_change_of_it_though_nats_died(suite):
    wanted = {("CreateJob", f"queues/default/jobs/{name}") for name in ("low", "high")}
    wanted |= {("CancelJob", "queues/default/jobs/high"), ("DeleteJob", "queues/default/jobs/low")}
    records = []

    async def written():
        records[:] = await _audited(suite)
        done = {(r["method"].rpartition("/")[2], r.get("object", "")) for r in records if r["result"] == "OK"}
        methods = {method for method, _ in done}
        return wanted <= done and {"DrainNode", "CreateApiKey", "CreateJoinToken", "Join"} <= methods

    await until(written, "every change is in the trail", 60, every_s=0.5)
    assert {r["peer"] for r in records} == {"127.0.0.1"}
    assert {r["subject"].partition("/")[0] for r in records} <= {"admin", "anonymous", "agent", *ROLES}
    code, shown, why = await cli(suite, "audit", "verify")
    assert (code, shown.startswith("sound") or "sound" in why) == (0, True), shown + why


async def _audited(suite):
    code, shown, why = await cli(suite, "audit", "-n", "1000", "-o", "json")
    assert code == 0, why
    return json.loads(shown)
