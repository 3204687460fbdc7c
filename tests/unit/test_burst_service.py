"""Renting through the scheduler: proposed or done by itself, used, and given back."""

import asyncio

import pytest
from google.protobuf import duration_pb2

from tests.support.scheduler_world import World, node, until
from whaleflux.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from whaleflux.store import Put, keys
from whaleflux.v1 import inventory_pb2 as ipb
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_scheduler.bursts import SETTLES_S, BurstSettings
from whaleflux_scheduler.core.burst import BurstRules
from whaleflux_scheduler.core.give_back import CLOSED_S
from whaleflux_scheduler.settings import Settings

HOUR_S = 3600


class Full(World):
    """One node of four GPUs that is busy for eight hours, a job that waits for it, and an offer of another such node."""

    def __init__(self, mode="off", **rules):
        super().__init__(bursting=BurstSettings(mode, BurstRules(**rules)))
        self.inventory.offers.append(
            ipb.Offer(
                name="offers/o", gpu_type="H200", gpus=4, site="sites/cloud", usd_per_hour=4.0, boot_s=60, trust=1.0,
                market=types_pb2.PRICE_KIND_ON_DEMAND, max_machines=2,
            )
        )  # fmt: skip
        self.waiting = ""

    async def fill(self):
        await self.add(node("s/a"))
        lasts = duration_pb2.Duration(seconds=8 * HOUR_S)
        await self.reaches(await self.submit(4, job_id="long", expected=lasts), "RUNNING")
        self.waiting = await self.submit(4, job_id="waits", expected=duration_pb2.Duration(seconds=HOUR_S))
        await asyncio.sleep(60)
        return self

    async def plan(self):
        return await self.scheduler.PlanBurst(pb.PlanBurstRequest(), None)

    @property
    def leases(self):
        return list(self.inventory.leases.values())


async def test_a_plan_says_what_is_worth_renting_and_rents_nothing():
    async with Full() as world:
        found = await (await world.fill()).plan()
        assert (found.mode, len(found.rents)) == ("off", 1)
        rent = found.rents[0]
        assert (rent.job, list(rent.offers), rent.machines, rent.queue) == (
            world.waiting,
            ["offers/o"],
            1,
            "queues/default",
        )
        assert rent.worth_usd > 40 > 6 > rent.usd > 4
        await asyncio.sleep(300)
        assert not world.leases


async def test_nothing_is_rented_where_waiting_is_worth_little_and_the_plan_says_so():
    async with Full("on", usd_per_gpu_hour=0.01) as world:
        found = await (await world.fill()).plan()
        assert not found.rents and "is worth 0.3" in found.waits[0].why
        await asyncio.sleep(300)
        assert not world.leases


async def test_a_job_that_waits_gets_a_rented_machine_which_is_given_back_when_nothing_runs_on_it():
    async with Full("on", budgets_usd={"": 50.0}) as world:
        await world.fill()
        await until(lambda: world.leases, "a machine is rented")
        lease = world.leases[0]
        assert lease.reason == f"for {world.waiting}" and lease.queue == "queues/default"
        await asyncio.sleep(120)
        assert len(world.leases) == 1  # it is on its way
        await world.add(node("cloud/l0"))
        lease.state = ipb.LEASE_STATE_JOINED
        job = await world.reaches(world.waiting, "RUNNING")
        assert [task.node for task in job.attempt.tasks] == [lease.node]
        await asyncio.sleep(300)
        assert not lease.end_reason
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=world.waiting), None)
        await world.reaches(world.waiting, "CANCELLED")
        await until(lambda: lease.end_reason, "it is given back", 70.0)  # within the minute that is paid anyway
        assert "nothing has run on it" in lease.end_reason
        assert len(world.leases) == 1


async def test_what_the_scheduler_rented_is_given_back_by_one_that_rents_no_more_and_by_the_next_leader():
    async with Full("off") as world:
        await world.fill()
        lease = ipb.Lease(
            name="leases/l", state=ipb.LEASE_STATE_JOINED, owner="scheduler/old", node="sites/cloud/nodes/l0"
        )
        lease.offer.CopyFrom(world.inventory.offers[0])
        lease.create_time.FromDatetime(world.clock.now())
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=world.waiting), None)
        world.inventory.leases[lease.name] = lease
        await world.add(node("cloud/l0"))
        await until(lambda: lease.end_reason, "it is given back", 200.0)
        record = pb.IdleTimesRecord.FromString((await world.store.get(keys.IDLE_TIMES)).value)
        assert [(one.site, one.gpus, len(one.open)) for one in record.kinds] == [("cloud", 4, 1)]


async def test_what_goes_wrong_with_renting_stops_no_job(monkeypatch):
    async with Full("on") as world:
        lists, calls = world.inventory.ListOffers, []

        async def odd(request, timeout=None):
            calls.append(request)
            raise KeyError("whatever it is")

        monkeypatch.setattr(world.inventory, "ListOffers", odd)
        await world.fill()  # the first of its jobs runs
        await until(lambda: len(calls) > 2, "it is looked at again and again", 120.0)
        monkeypatch.setattr(world.inventory, "ListOffers", lists)
        await until(lambda: world.leases, "a machine is rented")


async def test_a_machine_that_cannot_be_rented_keeps_none_from_being_given_back(monkeypatch):
    async with Full("on") as world:

        async def fails(request, timeout=None):
            raise Unavailable("no answer")

        monkeypatch.setattr(world.inventory, "CreateLease", fails)
        await world.fill()  # who waits for another kind of GPU than the idle machine has
        lease = ipb.Lease(
            name="leases/l", state=ipb.LEASE_STATE_JOINED, owner="scheduler/old", node="sites/other/nodes/l0"
        )
        lease.offer.CopyFrom(world.inventory.offers[0])
        lease.offer.gpus, lease.offer.site = 1, "sites/other"
        lease.create_time.FromDatetime(world.clock.now())
        world.inventory.leases[lease.name] = lease
        await world.add(node("other/l0", gpus=1))
        await until(lambda: lease.end_reason, "it is given back", 400.0)


async def test_a_job_whose_lease_is_refused_holds_up_no_other(monkeypatch):
    async with Full("on") as world:
        made = world.inventory.CreateLease

        async def refuses(request, timeout=None):
            if request.reason.endswith("/waits"):
                raise NotFound("offer", "offers/o")
            return await made(request, timeout)

        monkeypatch.setattr(world.inventory, "CreateLease", refuses)
        await world.fill()
        await world.submit(4, job_id="other", expected=duration_pb2.Duration(seconds=HOUR_S))
        await until(lambda: world.leases, "one is rented for the other", 120.0)
        assert world.leases[0].reason.endswith("/other")


async def test_a_damaged_memory_of_idle_times_is_learned_anew():
    async with Full("on") as world:
        await world.store.commit(Put(keys.IDLE_TIMES, b"\xff\xff\xff"))
        await world.fill()
        await until(lambda: world.leases, "a machine is rented")


async def test_a_machine_that_joined_and_takes_no_work_is_not_waited_for():
    async with Full("on", budgets_usd={"": 50.0}) as world:
        await world.fill()
        await until(lambda: world.leases, "a machine is rented")
        lease = world.leases[0]
        lease.state = ipb.LEASE_STATE_JOINED
        lease.join_time.FromDatetime(world.clock.now())
        await asyncio.sleep(SETTLES_S / 2)
        assert len(world.leases) == 1  # its node may be on its way here
        await until(lambda: len(world.leases) == 2, "another one is rented", 600.0)


async def test_a_machine_whose_agent_died_is_given_back_and_one_that_an_operator_cordoned_with_work_is_not():
    async with Full("on", budgets_usd={"": 50.0}) as world:
        await world.fill()
        await until(lambda: world.leases, "a machine is rented")
        lease = world.leases[0]
        await world.add(node("cloud/l0"))
        lease.state = ipb.LEASE_STATE_JOINED
        lease.join_time.FromDatetime(world.clock.now())
        await world.reaches(world.waiting, "RUNNING")
        world.intend("sites/cloud/nodes/l0", ipb.NODE_INTENT_CORDONED)
        await asyncio.sleep(2 * CLOSED_S)
        assert not lease.end_reason
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=world.waiting), None)
        await world.reaches(world.waiting, "CANCELLED")
        await asyncio.sleep(CLOSED_S / 2)
        assert not lease.end_reason
        await until(lambda: lease.end_reason, "it is given back", CLOSED_S)
        assert "takes no work" in lease.end_reason


async def test_a_gang_of_which_a_lease_was_not_made_is_completed_not_rented_again(monkeypatch):
    async with Small("on") as world:
        await world.fill()
        made = world.inventory.CreateLease

        async def once(request, timeout=None):
            if world.leases:
                raise Unavailable("inventory is gone")
            return await made(request, timeout)

        monkeypatch.setattr(world.inventory, "CreateLease", once)
        await world.large(job_id="large")
        await until(lambda: world.leases, "the first is rented")
        monkeypatch.setattr(world.inventory, "CreateLease", made)
        await asyncio.sleep(120)
        assert len(world.leases) == 2


async def test_a_lease_counts_for_the_site_of_each_offer_that_may_still_have_its_machine():
    async with Full("on", budgets_usd={"": 20.0, "sites/abroad": 12.0}) as world:
        abroad = ipb.Offer()
        abroad.CopyFrom(world.inventory.offers[0])
        abroad.name, abroad.site, abroad.usd_per_hour = "offers/abroad", "sites/abroad", 4.4
        world.inventory.offers.append(abroad)
        await world.fill()
        await until(lambda: world.leases, "a machine is rented")
        lease = world.leases[0]
        assert list(lease.offers) == ["offers/o", "offers/abroad"]
        assert (await world.plan()).left_usd["sites/abroad"] == 12.0 - lease.cost_cap_usd
        lease.state = ipb.LEASE_STATE_JOINED
        assert (await world.plan()).left_usd["sites/abroad"] == 12.0


class Small(Full):
    """One node of four GPUs, and offers of two more."""

    def __init__(self, mode, **rules):
        super().__init__(mode, **rules)
        self.inventory.complete = True

    async def fill(self):
        await self.add(node("s/a"))
        await until(lambda: self.node_view.complete, "inventory has told")
        return self

    async def large(self, gpus=8, **more):
        return await self.create(gpus, expected=duration_pb2.Duration(seconds=HOUR_S), **more)


async def test_a_job_that_the_fleet_could_never_hold_is_taken_where_an_offer_could_and_rented_for():
    async with Small("on") as world:
        await world.fill()
        said = "it waits for 2 machines by offers/o, about 8.13 USD, rented by the scheduler"
        assert said in (await world.large(dry=True)).decision.reasons[0]
        assert said in (await world.large(job_id="large")).decision.reasons[0]
        await until(lambda: len(world.leases) == 2, "two machines are rented")


async def test_a_job_that_could_be_rented_for_waits_for_operators_where_only_plans_are_made():
    async with Small("plan") as world:
        await world.fill()
        made = await world.large(job_id="large")
        assert "operators do: whaleflux leases add o" in made.decision.reasons[0]
        await asyncio.sleep(60)
        assert [one.machines for one in (await world.plan()).rents] == [2] and not world.leases


@pytest.mark.parametrize(
    ("gpus", "rules", "why"),
    [
        (12, {}, r"has 2 machine\(s\) left of its `max`, and 3 are needed"),
        (
            8,
            {"budgets_usd": {"queues/default": 5.0}},
            r"queues/default \(burst_budgets\) has 5.00 USD left today, and 8.13",
        ),
        (8, {"usd_per_gpu_hour": 0.001}, r"worth 0.19 USD \(burst_usd_per_gpu_hour\)"),
    ],
)
async def test_the_limit_that_forbids_renting_is_named_at_submission_and_nothing_is_stored(gpus, rules, why):
    async with Small("on", **rules) as world:
        await world.fill()
        before = (await world.store.list("")).revision
        with pytest.raises(FailedPrecondition, match=rf"could never run: .*{why}"):
            await world.large(gpus)
        assert (await world.store.list("")).revision == before


async def test_nobody_is_taken_whom_a_limit_of_the_queue_or_a_fleet_that_rents_nothing_keeps_from_starting():
    async with Small("off") as world:
        await world.fill()
        with pytest.raises(FailedPrecondition, match="could never run"):
            await world.large()
    async with Small("on") as world:
        await world.fill()
        await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="tiny", queue=pb.Queue(max_gpus=4)), None)
        with pytest.raises(FailedPrecondition, match="could never run"):
            await world.large(queue="tiny")


async def test_what_waits_to_serve_is_reckoned_with_a_day():
    async with Full() as world:
        await world.fill()
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=world.waiting), None)
        name = await world.submit(4, job_id="replica", kind=pb.JOB_KIND_SERVICE)
        await asyncio.sleep(60)
        (waits,) = (await world.plan()).waits
        assert waits.job == name and "renting costs 96." in waits.why  # until the node is free it waits for eight hours


async def test_jobs_that_take_parts_of_gpus_are_rented_for_together():
    async with Full("on") as world:
        await world.fill()
        await world.scheduler.CancelJob(pb.CancelJobRequest(name=world.waiting), None)
        lasts = duration_pb2.Duration(seconds=HOUR_S)
        gpu = pb.GpuRequirement(share_memory_bytes=20 * 10**9)
        for number in range(4):
            await world.submit(1, job_id=f"part-{number}", expected=lasts, gpu=gpu)
        await until(lambda: world.leases, "a machine is rented")
        await asyncio.sleep(120)
        assert len(world.leases) == 1


async def test_what_cannot_be_read_is_not_taken_for_nothing_rented():
    async with Full("on") as world:
        world.inventory.unreadable.append("leases/newer")
        await world.fill()
        with pytest.raises(FailedPrecondition, match="leases/newer cannot be read"):
            await world.plan()
        await asyncio.sleep(300)
        assert not world.leases
        world.inventory.unreadable.clear()
        await until(lambda: world.leases, "a machine is rented")


async def test_a_machine_that_an_operator_rented_is_the_operators():
    async with Full("on") as world:
        world.inventory.leases["leases/mine"] = ipb.Lease(
            name="leases/mine", state=ipb.LEASE_STATE_JOINED, owner="user/olga", node="sites/s/nodes/b", offer=world.inventory.offers[0]
        )  # fmt: skip
        await world.add(node("s/b"))
        await asyncio.sleep(2 * HOUR_S)
        assert not world.leases[0].end_reason


def test_budgets_name_queues_sites_or_all():
    rules = Settings(burst_budgets={"all": 10, "queues/a": 5, "sites/s": 1}).burst_rules()
    assert rules.budgets_usd == {"": 10, "queues/a": 5, "sites/s": 1}
    for wrong in ({"research": 5}, {"all": -1}, {"jobs/a": 1}, {"queues/": 1}, {"queues/A b": 1}, {"sites/a/b": 1}):
        with pytest.raises(InvalidArgument, match="burst_budgets"):
            Settings(burst_budgets=wrong).burst_rules()
