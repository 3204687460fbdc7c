"""A budget is spent, new work waits also while the console is dead, and goes on when the budget is raised: the real suite, a machine that is played."""

import signal

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.errors import StatusError
from whaleflux.v1 import console_pb2, types_pb2
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SETTINGS = {"WHALEFLUX_LEDGER_TICK_S": "1"}
USD = 1_000_000


async def submit(client, job_id, seconds):
    asked = pb.JobSpec(command=["/bin/sleep", str(seconds)], gpus=1)
    request = pb.CreateJobRequest(parent="queues/default", job_id=job_id, job=pb.Job(spec=asked))
    return (await client.scheduler.CreateJob(request, timeout=10)).name


async def state(client, name):
    job = await client.scheduler.GetJob(pb.GetJobRequest(name=name), timeout=5)
    return pb.JobState.Name(job.state).removeprefix("JOB_STATE_"), job.state_message


async def is_in(client, name, wanted):
    async def there():
        return (await state(client, name))[0] == wanted

    await until(there, f"{name} is {wanted}", 60)


async def price(client):
    one = console_pb2.GpuPrice(
        kind=types_pb2.PRICE_KIND_ON_DEMAND, micros_per_gpu_hour=10_000 * USD, source="contract", gpu_class="RTX4090"
    )
    one.start_time.GetCurrentTime()
    await client.console.CreatePrice(console_pb2.CreatePriceRequest(price_id="p", price=one), timeout=10)


async def set_budget(client, micros):
    one = console_pb2.Budget(queue="queues/default", micros_per_month=micros, stop=True)
    return await client.console.SetBudget(console_pb2.SetBudgetRequest(budget_id="b", budget=one), timeout=10)


async def test_a_budget_that_is_spent_keeps_new_work_back_also_without_the_console():
    with running_suite(settings=SETTINGS) as suite:
        await suite.join([Machine("edge", "rtx-a", "rtx4090x2")])
        async with suite.client() as client:
            await price(client)
            runs = await submit(client, "runs", 600)
            await is_in(client, runs, "RUNNING")
            await set_budget(client, USD)

            async def stopped():
                (budget,) = (await client.console.ListBudgets(console_pb2.ListBudgetsRequest(), timeout=10)).budgets
                return budget.stopped_month

            await until(stopped, "the month has cost all of the budget", 150)
            suite.send("console", signal.SIGKILL)
            waits = await submit(client, "waits", 1)

            async def says_why():
                found, why = await state(client, waits)
                return found == "QUEUED" and "budget b is spent" in why and "nothing new of queue default" in why

            await until(says_why, "it waits for the budget", 30)
            assert (await state(client, runs))[0] == "RUNNING"

            async def raised():
                try:
                    return await set_budget(client, 1_000_000 * USD)
                except StatusError:  # it is not back yet
                    return None

            await until(raised, "the console is back", 60)
            await is_in(client, waits, "SUCCEEDED")
