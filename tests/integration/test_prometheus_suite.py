"""A real Prometheus scrapes the real suite, a machine that is played: the dashboards' queries return data, times lead to traces."""

import asyncio
import contextlib
import json
import shutil
import sys
import textwrap

import pytest

from tests.support.deploy_files import DEPLOY
from tests.support.prometheus import free_port, prometheus, rules
from tests.support.spans import collecting
from tests.support.suite import running_suite, until
from tools.dashboards import DASHBOARDS
from whaleflux.demo.fleet import Machine
from whaleflux.services import ROLES
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not here: apt-get install prometheus"),
]
# The first attempt fails, the second reports steps and stays.
TRAINING = textwrap.dedent(
    """
    import os, sys, time
    import torch
    from whaleflux.sdk import Checkpointer

    if os.environ["WHALEFLUX_EPOCH"] == "1":
        sys.exit(3)
    model = torch.nn.Linear(3, 3)
    with Checkpointer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as saved:
        for step, batch in saved.steps(lambda step: step, total=100_000):
            time.sleep(0.1)
            saved.report(1.0 / (step + 1), tokens=50)
    """
)
# What this fleet has no cause for: no model is served, no node is lost, nobody writes beside the scheduler, no call fails.
WITHOUT_CAUSE = (
    "whaleflux_first_token",
    "whaleflux_route_",
    "whaleflux_detection_",
    "whaleflux_cas_conflicts",
    "first_token_slow",
    'code!="OK"',
    "whaleflux_ledger_residual",
)


async def submit(client, name, command):
    spec = pb.JobSpec(command=command, gpus=1)
    request = pb.CreateJobRequest(parent="queues/default", job_id=name, job=pb.Job(spec=spec))
    await client.scheduler.CreateJob(request, timeout=10)


async def test_every_query_of_the_dashboards_returns_data_and_times_lead_to_traces(tmp_path):
    queries = {t["expr"] for name in DASHBOARDS for panel in page(name)["panels"] for t in panel["targets"]}
    expected = {query for query in queries if not any(part in query for part in WITHOUT_CAUSE)}
    assert len(expected) > 25
    with collecting() as collector, running_suite(otlp_endpoint=collector.endpoint) as suite:
        shown_at = f"127.0.0.1:{free_port()}"
        settings = (("usage_every_s", "1"), ("metrics_listen", shown_at))
        await suite.join([Machine("onprem", "a", "h200x8:usage=45%@1h", settings=settings)])
        targets = {role: f"127.0.0.1:{suite.port(f'{role}_metrics')}" for role in ROLES}
        targets["agent"] = shown_at
        with prometheus(tmp_path, targets, rules()) as seen:
            async with suite.client() as client:
                (tmp_path / "train.py").write_text(TRAINING)
                await submit(client, "train", [sys.executable, str(tmp_path / "train.py")])
                await submit(client, "hold", ["sleep", "600"])
            silent = expected

            async def all_answer():
                nonlocal silent
                silent = {query for query in silent if not await asyncio.to_thread(answers, seen, query)}
                return not silent

            try:
                await until(all_answer, "every query returns data", 180)
            except AssertionError:
                raise AssertionError(f"without data: {sorted(silent)}") from None
            assert seen.get("alerts")["alerts"] == [] or {
                alert["labels"]["alertname"] for alert in seen.get("alerts")["alerts"] if alert["state"] == "firing"
            } <= {"WhaleFluxUnknownShareHigh", "WhaleFluxIdleAllocatedHigh", "WhaleFluxRecoverySlow"}
            traces = set()

            async def leads_to_traces():
                asked = {"query": "whaleflux_recovery_duration_seconds_bucket", "start": 0, "end": 4e9}
                found = await asyncio.to_thread(lambda: seen.get("query_exemplars", **asked))
                traces.update(one["labels"]["trace_id"] for series in found for one in series["exemplars"])
                return traces

            await until(leads_to_traces, "the training that failed once is back, and its recovery names its trace", 90)
            await until(
                lambda: traces <= {span.trace for span in collector.spans}, "the collector has these traces", 30
            )


def answers(seen, query):
    with contextlib.suppress(OSError):  # it has just been started
        return bool(seen.found(query))
    return False


def page(name):
    return json.loads((DEPLOY / f"observability/grafana/dashboards/{name}.json").read_text())
