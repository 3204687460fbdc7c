"""Prices and adjustments as people declare them: files, rpcs, what is refused and changes nothing."""

from datetime import UTC, datetime

import pytest
from google.protobuf import timestamp_pb2

from whaleflux.clock import VirtualClock
from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from whaleflux.events.publisher import EntryChange
from whaleflux.manifests.price_file import micros, prices_from_yaml
from whaleflux.rpc import auth
from whaleflux.store import Put, keys
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.ownership import OPEN
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_console import news
from whaleflux_console.budgets import Budgets
from whaleflux_console.prices import Adjustments, Prices
from whaleflux_console.servicer import CostServicer

FILE = """
prices:
- name: h100
  gpu: H100-80GB
  kind: reserved
  usd_per_gpu_hour: 2.95
  from: 2026-01-01
  until: 2027-01-01
  source: Contract 17
- name: rack
  site: onprem
  kind: owned
  from: 2026-01-01
  source: Invoice 4711
  source_date: 2025-12-11
  owned: {usd_per_gpu: 40000, months: 36, residual_percent: 30, power_w: 1275, pue: 1.3, usd_per_kwh: 0.1, usd_per_kw_month: 200, support_percent_per_year: 5}
"""


NODE_FILE = "prices:\n- name: node" + FILE.partition("- name: rack")[2].replace("site: onprem", "site: edge")


def at(year, month=1, day=1):
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(datetime(year, month, day, tzinfo=UTC))
    return stamp


def price(start=2026, end=None, **fields):
    told = {"kind": types_pb2.PRICE_KIND_ON_DEMAND, "micros_per_gpu_hour": 2_950_000, "source": "a list"} | fields
    return pb.GpuPrice(start_time=at(start), end_time=at(end) if end else None, **told)


class World:
    def __init__(self):
        self.store, self.clock = MemoryStore(), VirtualClock()
        self.rpc = CostServicer(
            Prices(self.store, self.clock),
            Adjustments(self.store, self.clock),
            Budgets(self.store, self.clock, lambda _: OPEN),
        )

    async def call(self, method, request):
        with auth.acting_as(auth.Identity("operator", "olga")):
            return await getattr(self.rpc, method)(request, None)

    async def create(self, name, one, **more):
        return await self.call("CreatePrice", pb.CreatePriceRequest(price_id=name, price=one, **more))

    async def names(self):
        return [one.name for one in (await self.call("ListPrices", pb.ListPricesRequest())).prices]


async def refused(what, error=InvalidArgument):
    with pytest.raises(error) as caught:
        await what
    return caught.value


class TestPrices:
    async def test_a_file_of_them_is_declared_and_listed_with_who_and_when(self):
        world = World()
        for one in prices_from_yaml(FILE):
            await world.create(one.price_id, one.price)
        h100, rack = (await world.call("ListPrices", pb.ListPricesRequest())).prices
        assert (h100.name, h100.micros_per_gpu_hour, h100.gpu_class) == ("prices/h100", 2_950_000, "H100-80GB")
        assert h100.source_date == f"{world.clock.now():%Y-%m-%d}"
        assert rack.ownership == pb.Ownership(
            capex_micros=40_000_000_000,
            months=36,
            residual_ppm=300_000,
            power_w=1275,
            pue_ppm=1_300_000,
            electricity_micros_per_kwh=100_000,
            colocation_micros_per_kw_month=200_000_000,
            support_ppm_per_year=50_000,
        )
        assert (rack.last_change.actor, rack.source_date) == ("operator/olga", "2025-12-11")

    async def test_each_gpu_of_a_node_that_is_owned_costs_its_share_of_every_part(self):
        world = World()
        of_node = NODE_FILE.replace("usd_per_gpu: 40000", "usd_per_node: 320000, gpus: 8").replace("1275", "10200")
        for text in (FILE, of_node):
            for one in prices_from_yaml(text):
                await world.create(one.price_id, one.price)
        _, node, rack = (await world.call("ListPrices", pb.ListPricesRequest())).prices
        assert (node.name, node.ownership.gpus, node.ownership.power_w) == ("prices/node", 8, 10_200)
        assert (node.components, node.micros_per_gpu_hour) == (rack.components, rack.micros_per_gpu_hour)

    @pytest.mark.parametrize("gpus", [-1, 1_025])
    async def test_a_node_has_so_many_gpus(self, gpus):
        one = price(kind=1, micros_per_gpu_hour=0, ownership=pb.Ownership(capex_micros=1, months=1, gpus=gpus))
        wrong = await refused(World().create("a", one))
        assert [violation.field for violation in wrong.violations] == ["price.ownership.gpus"]

    async def test_what_an_owned_gpu_costs_is_worked_out_and_shown_part_by_part(self):
        world = World()
        for one in prices_from_yaml(FILE):
            await world.create(one.price_id, one.price)
        h100, rack = (await world.call("ListPrices", pb.ListPricesRequest())).prices
        parts = {part.name: part.micros_per_gpu_hour for part in rack.components}
        assert parts == {
            "depreciation": 40_000_000_000 * 7 // 10 // (36 * 730),
            "electricity": 165_750,  # 1.275 kW x 1.3 x 0.10 USD
            "colocation": 1275 * 200_000_000 // 1000 // 730,
            "support": 40_000_000_000 // 20 // 8760,
        }
        assert rack.micros_per_gpu_hour == sum(parts.values())
        assert not h100.components

    async def test_two_of_one_scope_never_hold_at_one_time(self):
        world = World()
        await world.create("a", price(2026, 2028, gpu_class="H200"))
        for start, end in ((2027, None), (2025, 2027), (2026, 2028), (2025, None)):
            error = await refused(world.create("b", price(start, end, gpu_class="H200")))
            assert "prices/a holds for H200" in error.violations[0].description
        await world.create("b", price(2028, gpu_class="H200"))
        await world.create("c", price(2026, gpu_class="H100-80GB"))
        await world.create("d", price(2026))
        assert await world.names() == [f"prices/{x}" for x in "abcd"]

    @pytest.mark.parametrize(
        ("one", "field"),
        [
            (price(kind=0), "price.kind"),
            (price(source=" "), "price.source"),
            (price(source="x" * 301), "price.source"),
            (price(source_date="yesterday"), "price.source_date"),
            (price(micros_per_gpu_hour=-1), "price.micros_per_gpu_hour"),
            (price(micros_per_gpu_hour=10**11), "price.micros_per_gpu_hour"),
            (price(node="n1"), "price.node"),
            (price(node="sites/a/nodes/n", site="sites/a"), "price.site"),
            (price(gpu_class="x" * 65), "price.gpu_class"),
            (price(2026, 2026), "end_time"),
            (price(1990), "start_time"),
            (pb.GpuPrice(kind=1, source="x"), "start_time"),
            (price(ownership=pb.Ownership(capex_micros=1, months=1)), "price.ownership"),
            (price(kind=1, ownership=pb.Ownership(capex_micros=1, months=1)), "price.micros_per_gpu_hour"),
            (
                price(kind=1, micros_per_gpu_hour=0, ownership=pb.Ownership(capex_micros=1)),
                "price.ownership.months",
            ),
            (
                price(kind=1, micros_per_gpu_hour=0, ownership=pb.Ownership(capex_micros=1, months=1, pue_ppm=900_000)),
                "price.ownership.pue_ppm",
            ),
        ],
    )
    async def test_what_is_wrong_names_its_field_and_changes_nothing(self, one, field):
        world = World()
        error = await refused(world.create("a", one))
        assert field in [violation.field for violation in error.violations]
        assert await world.names() == []

    async def test_a_dry_run_checks_and_stores_nothing(self):
        world = World()
        assert (await world.create("a", price(), validate_only=True)).name == "prices/a"
        assert await world.names() == []
        await refused(world.create("a", price(kind=0), validate_only=True))

    async def test_a_name_is_given_once(self):
        world = World()
        await world.create("a", price(gpu_class="x"))
        assert "prices/a" in str(await refused(world.create("a", price(gpu_class="y")), AlreadyExists))

    async def test_an_end_is_set_and_frees_the_time_after_it(self):
        world = World()
        made = await world.create("a", price())
        ended = await world.call("EndPrice", pb.EndPriceRequest(name="prices/a", end_time=at(2027), etag=made.etag))
        assert ended.end_time == at(2027)
        await world.create("b", price(2027))
        await refused(world.call("EndPrice", pb.EndPriceRequest(name="prices/a", end_time=at(2028))))
        await refused(world.call("EndPrice", pb.EndPriceRequest(name="prices/a", end_time=at(2025))))
        stale = pb.EndPriceRequest(name="prices/a", end_time=at(2026, 6), etag=made.etag)
        await refused(world.call("EndPrice", stale), Aborted)

    async def test_an_end_that_somebody_sets_meanwhile_is_never_put_off(self):
        world = World()
        await world.create("a", price())
        read = world.store.get

        async def and_then_it_ends(key):
            found, world.store.get = await read(key), read
            await world.call("EndPrice", pb.EndPriceRequest(name="prices/a", end_time=at(2027)))
            return found

        world.store.get = and_then_it_ends
        await refused(world.call("EndPrice", pb.EndPriceRequest(name="prices/a", end_time=at(2028))), Aborted)
        (one,) = (await world.call("ListPrices", pb.ListPricesRequest())).prices
        assert one.end_time == at(2027)

    async def test_one_that_is_forgotten_is_gone(self):
        world = World()
        await world.create("a", price())
        await world.call("DeletePrice", pb.DeletePriceRequest(name="prices/a"))
        assert await world.names() == []
        hint = await refused(world.call("DeletePrice", pb.DeletePriceRequest(name="prices/a")), NotFound)
        assert "whaleflux prices ls" in str(hint)

    async def test_beside_one_that_cannot_be_read_none_is_declared(self):
        world = World()
        await world.store.commit(Put(keys.PRICES + "odd", b"\xff\xff"))
        assert "prices/odd cannot be read" in str(await refused(world.create("a", price()), FailedPrecondition))
        listed = await world.call("ListPrices", pb.ListPricesRequest())
        assert list(listed.unreadable) == ["prices/odd"]

    async def test_changes_are_told(self):
        world = World()
        await world.create("a", price())
        entry = await world.store.get(keys.PRICES + "a")
        told = news.of_price(EntryChange(entry.key, None, entry, entry.revision), world.clock.now())
        assert told.subject == "wf.v1.hub.price.a.created"


class TestAdjustments:
    def one(self, **fields):
        told = {"micros": -5, "start_time": at(2026), "end_time": at(2026, 2), "reason": "credit"} | fields
        return pb.Adjustment(**told)

    async def test_it_is_declared_listed_and_taken_back(self):
        world = World()
        request = pb.CreateAdjustmentRequest(adjustment_id="nov", adjustment=self.one())
        assert (await world.call("CreateAdjustment", request)).micros == -5
        listed = (await world.call("ListAdjustments", pb.ListAdjustmentsRequest())).adjustments
        assert [one.name for one in listed] == ["adjustments/nov"]
        await world.call("DeleteAdjustment", pb.DeleteAdjustmentRequest(name="adjustments/nov"))
        assert not (await world.call("ListAdjustments", pb.ListAdjustmentsRequest())).adjustments

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"micros": 0}, "adjustment.micros"),
            ({"micros": 10**16}, "adjustment.micros"),
            ({"reason": ""}, "adjustment.reason"),
            ({"end_time": None}, "end_time"),
            ({"end_time": at(2030)}, "adjustment.end_time"),
            ({"site": "a"}, "adjustment.site"),
        ],
    )
    async def test_what_is_wrong_names_its_field(self, fields, field):
        request = pb.CreateAdjustmentRequest(adjustment_id="nov", adjustment=self.one(**fields))
        error = await refused(World().call("CreateAdjustment", request))
        assert field in [violation.field for violation in error.violations]


class TestFiles:
    def test_amounts_are_exact(self):
        assert [micros(x) for x in ("$2.95", "0.000001", 2, "-120.50 USD")] == [2_950_000, 1, 2_000_000, -120_500_000]

    @pytest.mark.parametrize("value", ["2,95", "1 EUR", "nan", "inf", "0.0000001", True, None, "1e30", "2$95"])
    def test_what_is_no_amount_is_refused(self, value):
        with pytest.raises(ValueError, match=r"must be|more than"):
            micros(value)

    @pytest.mark.parametrize(
        ("text", "field"),
        [
            ("name: a", "kind"),
            ("prices: []", "prices"),
            ("prices: {}", "prices"),
            (FILE.replace("reserved", "free"), "prices[0].kind"),
            (FILE.replace("2.95", "a lot"), "prices[0].usd_per_gpu_hour"),
            (FILE.replace("name: rack", "name: h100"), "name"),
            (FILE.replace("months: 36", "months: 3.5"), "prices[1].owned.months"),
            (FILE.replace("usd_per_gpu:", "usd:"), "prices[1].owned.usd_per_gpu"),
            (FILE.replace("usd_per_gpu: 40000", "usd_per_node: 1"), "prices[1].owned.gpus"),
            (FILE.replace("usd_per_gpu: 40000", "gpus: 8"), "prices[1].owned.usd_per_node"),
            (FILE.replace("usd_per_gpu: 40000", "usd_per_node: 1, gpus: 0"), "prices[1].owned.gpus"),
            (FILE.replace("months: 36", "months: 36, usd_per_node: 1, gpus: 8"), "prices[1].owned.usd_per_gpu"),
            (FILE.replace("  gpu: H100-80GB", "  gpus: H100-80GB"), "prices[0].gpus"),
        ],
    )
    def test_mistakes_name_their_field(self, text, field):
        with pytest.raises(InvalidArgument) as caught:
            prices_from_yaml(text)
        assert any(v.field.startswith(field) for v in caught.value.violations), caught.value.violations
