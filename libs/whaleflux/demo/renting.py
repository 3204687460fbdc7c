"""The elastic demo's second half: a peak is met by a rented machine, and the model that was trained on it goes to three sites."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from whaleflux import names
from whaleflux.context import Context
from whaleflux.demo.fleet import gpu_of_profile
from whaleflux.demo.serving import Served, send_requests
from whaleflux.demo.suite import within
from whaleflux.demo.training import Say
from whaleflux.errors import Unavailable
from whaleflux.manifests.yaml_files import job_from_yaml, model_from_yaml
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import inventory_pb2, router_pb2, types_pb2
from whaleflux.v1 import scheduler_pb2 as pb

# The setting `burst`, for a demo's patience and with a price of waiting that is above that of the machine.
BURST = {
    "WHALEFLUX_BURST": "on",
    "WHALEFLUX_BURST_EVERY_S": "1",
    "WHALEFLUX_BURST_AFTER_S": "2",
    "WHALEFLUX_BURST_USD_PER_GPU_HOUR": "100",
}
OFFER = inventory_pb2.Offer(
    provider="simulated", machine_type="a100x4pcie", gpus=4, site="sites/cloud", usd_per_hour=6.0,
    market=types_pb2.PRICE_KIND_SPOT, boot_s=3.0, billing_unit_s=1.0, options={"boot_s": "1-2"}, gpu_type=gpu_of_profile("a100x4pcie"),
)  # fmt: skip


@dataclass(slots=True)
class Rented:
    """What was seen of the peak and of the machine that met it; seconds after the second job was submitted, -1: never."""

    leases: int = 0
    node: str = ""
    ran_on: str = ""
    asked_s: float = -1.0
    joined_s: float = -1.0
    done_s: float = -1.0
    gone_s: float = -1.0
    cost_usd: float = 0.0
    end_reason: str = ""


async def meet_peak(client: AsyncClient, example: Path, state: Path, say: Say) -> Rented:
    """Two trainings for the one machine that the cloud site owns."""
    await client.inventory.CreateOffer(inventory_pb2.CreateOfferRequest(offer_id="cloud-spot", offer=OFFER), timeout=10)
    say(
        "PEAK  two trainings want 4 A100 each, and the fleet owns 4; a simulated provider offers a machine at $6 an hour"
    )
    await _submit(client, "fill", ["/bin/sleep", "1000"], example, "2 h")
    began = time.monotonic()
    job = await _submit(client, "finetune", _training(state / "weights"), example, "1 min")
    seen = Rented()
    watching = asyncio.create_task(_watch(client, seen, began, say))
    try:
        ended = await within(client.wait(job), 150, f"{job} to run on a rented machine")
        if ended.state != pb.JOB_STATE_SUCCEEDED:
            raise Unavailable(f"{job} ended as {pb.JobState.Name(ended.state)}: {ended.state_message}")
        seen.ran_on, seen.done_s = ended.attempt.tasks[0].node, time.monotonic() - began
        say(f"      the second training is done, on {seen.ran_on}")
        await client.scheduler.CancelJob(pb.CancelJobRequest(name=f"{names.DEFAULT_QUEUE}/jobs/fill"), timeout=10)
        await within(watching, 90, "the rented machine to be given back")
    finally:
        watching.cancel()
    return seen


def _training(output: Path) -> list[str]:
    """The example on one rank, which stands for the machine's four."""
    once = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    return [*once, "train.py", "--steps", "60", "--every", "1000", "--output", str(output)]


async def _submit(client: AsyncClient, job_id: str, command: list[str], folder: Path, expected: str) -> str:
    """A job of four A100, as a file would say it."""
    file = {
        "run": command, "gpus": 4, "gpu": OFFER.gpu_type, "launch": "once", "directory": str(folder), "expected": expected,
        "environment": {"GLOO_SOCKET_IFNAME": "lo"},
    }  # fmt: skip
    spec = job_from_yaml(json.dumps(file), folder).spec
    request = pb.CreateJobRequest(parent=names.DEFAULT_QUEUE, job_id=job_id, job=pb.Job(spec=spec))
    return str((await client.scheduler.CreateJob(request, timeout=20)).name)


async def _watch(client: AsyncClient, seen: Rented, began: float, say: Say) -> None:
    """Follows the leases until all are GONE."""
    while seen.gone_s < 0:
        _take(await _leases(client), seen, time.monotonic() - began, say)
        await asyncio.sleep(0.2)


async def _leases(client: AsyncClient) -> list[inventory_pb2.Lease]:
    """All of them: those that are over are on pages of their own."""
    found, request = list[inventory_pb2.Lease](), inventory_pb2.ListLeasesRequest(show_gone=True)
    while True:
        page = await client.inventory.ListLeases(request, timeout=10)
        found += page.leases
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def _take(leases: list[inventory_pb2.Lease], seen: Rented, passed: float, say: Say) -> None:
    if not leases:
        return
    seen.leases, lease = len(leases), leases[0]
    if seen.asked_s < 0:
        seen.asked_s = passed
        say(f"RENT  {lease.name} is asked for after {passed:.1f} s: {lease.reason}")
    if lease.HasField("join_time") and seen.joined_s < 0:
        seen.joined_s, seen.node = passed, lease.node
        say(f"      the rented machine joins as {lease.node}, {passed:.1f} s after the job came")
    if all(one.state == inventory_pb2.LEASE_STATE_GONE for one in leases):
        seen.gone_s, seen.cost_usd = passed, sum(one.cost_usd for one in leases)
        seen.end_reason = lease.end_reason
        say(f"      it is given back ({lease.end_reason}); it has cost ${seen.cost_usd:.3f}, simulated")


# a model for three sites


@dataclass(slots=True)
class Everywhere:
    """What came of the deployment; seconds after it was declared."""

    ready_s: dict[str, float] = field(default_factory=dict)
    promised: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    served: Served = field(default_factory=Served)


async def serve_everywhere(
    client: AsyncClient, context: Context, example: Path, weights: Path, sites: Mapping[str, str], say: Say
) -> Everywhere:
    """The trained weights become a dataset, and a replica starts at each site, on the GPUs of a profile; then requests, all through the front door."""
    found, model_id, model = Everywhere(), "gpt-everywhere", _model(example, sites)
    dataset = inventory_pb2.Dataset(uri=weights.as_uri(), size_bytes=sum(p.stat().st_size for p in weights.iterdir()))
    request = inventory_pb2.CreateDatasetRequest(
        dataset_id=names.last(model.engine.weights), dataset=dataset, request_id=names.ulid()
    )
    await client.inventory.CreateDataset(request, timeout=10)
    say(f"SERVE the weights of that training at {', '.join(sites)}: a dataset, pulled once for each site")
    asked = router_pb2.EstimateDeploymentRequest(model=model)
    for one in (await client.router.EstimateDeployment(asked, timeout=30)).sites:
        found.promised[names.last(one.site)] = one.problem or one.why
        say(f"      {names.last(one.site)}: {one.problem or one.why}")
    began = time.monotonic()
    await client.router.CreateModel(router_pb2.CreateModelRequest(model_id=model_id, model=model), timeout=20)
    ready = _all_ready(client, names.model(model_id), sites, found, began, say)
    await within(ready, 120, "a replica at each site")
    await send_requests(context, model_id, found.served, 40, 4, lambda _: None)
    say(f"      {found.served.asked} requests asked, {found.served.failed} failed")
    return found


def _model(example: Path, sites: Mapping[str, str]) -> router_pb2.Model:
    model = model_from_yaml((example / "model.yaml").read_text(), example).model
    serve = [
        sys.executable, "serve.py", "--weights", "{weights}/model.pt", "--name", "gpt-everywhere", "--port", "{port}",
    ]  # fmt: skip
    del model.engine.command[:], model.engine.gpu_models[:]
    model.engine.command.extend(serve)
    model.engine.weights = names.dataset("gpt-everywhere")
    model.replicas.min = 1
    for site, profile in sites.items():  # a class for each: the training's GPUs are left to it
        model.sites.add(site=names.site(site), gpu_models=[gpu_of_profile(profile)])
    return model


async def _all_ready(
    client: AsyncClient, model: str, sites: Collection[str], found: Everywhere, began: float, say: Say
) -> None:
    while len(found.ready_s) < len(sites):
        listed = await client.router.ListReplicas(router_pb2.ListReplicasRequest(parent=model), timeout=10)
        for replica in listed.replicas:
            site = names.last(replica.site)
            if replica.state == router_pb2.REPLICA_STATE_READY and site not in found.ready_s:
                found.ready_s[site], found.classes[site] = time.monotonic() - began, replica.gpu_model
                say(f"      READY at {site} on {replica.node} ({replica.gpu_model}), {found.ready_s[site]:.1f} s")
        await asyncio.sleep(0.2)
