"""A job waits, a machine is rented for it, joins, runs it, and is given back: the real suite over the simulated cloud."""

import signal

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.v1 import inventory_pb2 as ipb
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import types_pb2

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SETTINGS = {
    "WHALEFLUX_BURST": "on",
    "WHALEFLUX_BURST_EVERY_S": "1",
    "WHALEFLUX_BURST_AFTER_S": "0",
    "WHALEFLUX_BURST_USD_PER_GPU_HOUR": "100",
}


async def submit(client, job_id, command, expected_s):
    asked = pb.JobSpec(command=command, gpus=2)
    asked.expected.FromSeconds(expected_s)
    request = pb.CreateJobRequest(parent="queues/default", job_id=job_id, job=pb.Job(spec=asked))
    return (await client.scheduler.CreateJob(request, timeout=10)).name


async def is_in(client, name, state):
    wanted = pb.JobState.Value(f"JOB_STATE_{state}")

    async def there():
        return (await client.scheduler.GetJob(pb.GetJobRequest(name=name), timeout=5)).state == wanted

    await until(there, f"{name} is {state}", 90)


async def leases(client):
    return (await client.inventory.ListLeases(ipb.ListLeasesRequest(show_gone=True), timeout=5)).leases


async def test_from_a_job_that_waits_to_a_machine_that_is_given_back():
    offer = ipb.Offer(
        provider="simulated", machine_type="rtx4090x2", gpu_type="RTX4090", gpus=2, site="sites/cloud", usd_per_hour=1.0,
        market=types_pb2.PRICE_KIND_ON_DEMAND, boot_s=2.0, billing_unit_s=1.0, options={"boot_s": "0-1", "faults": "lost_reply"},
    )  # fmt: skip
    with running_suite(settings=SETTINGS) as suite:
        await suite.join([Machine("edge", "rtx-a", "rtx4090x2")])
        async with suite.client() as client:
            await client.inventory.CreateOffer(ipb.CreateOfferRequest(offer_id="o", offer=offer), timeout=10)
            await is_in(client, await submit(client, "long", ["/bin/sleep", "600"], 7200), "RUNNING")
            waits = await submit(client, "waits", ["/bin/sleep", "1"], 60)

            async def rented():
                return await leases(client)

            await until(rented, "a machine is rented", 60)
            suite.send("inventory", signal.SIGKILL)  # whatever it was about to do
            await is_in(client, waits, "SUCCEEDED")
            job = await client.scheduler.GetJob(pb.GetJobRequest(name=waits), timeout=5)
            (lease,) = await leases(client)
            assert [task.node for task in job.attempt.tasks] == [lease.node]
            assert (lease.owner.partition("/")[0], lease.reason, list(lease.strays)) == (
                "scheduler",
                f"for {waits}",
                [],
            )

            async def gone():
                return all(one.state == ipb.LEASE_STATE_GONE for one in await leases(client))

            await until(gone, "it is given back", 90)
            (lease,) = await leases(client)
            assert "nothing has run on it" in lease.end_reason and 0 < lease.cost_usd < 1
