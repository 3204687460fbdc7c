"""Commands of costs: what is not there is said beside zeros and beside what is declared for it, and errors are in the words of who typed."""

import contextlib

import pytest
from typer.testing import CliRunner

from tests.support.virtual_time import VirtualTimeLoop
from whaleflux.cli import (
    budget_commands,
    cost_commands,
    cost_export,
    cost_filters,
    cost_nothing,
    price_commands,
    recommendation_commands,
)
from whaleflux.cli.__main__ import app
from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.reasons import What
from whaleflux.rpc import auth
from whaleflux.store.memory import MemoryStore
from whaleflux.trust.ownership import OPEN
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import identity_pb2, inventory_pb2, scheduler_pb2, trust_pb2, types_pb2
from whaleflux_console.budgets import Budgets
from whaleflux_console.prices import Adjustments, Prices
from whaleflux_console.servicer import CostServicer

RUN = CliRunner()
HOUR_S = 3_600
ROWS = [  # what was spent: queue, user, site, class of GPU
    ("queues/default", "admin/local", "onprem", "H200"),
    ("queues/research", "user/ann", "onprem", "H200"),
    ("queues/research", "user/ann", "edge", "RTX4090"),
]
PLACES = {pb.COST_GROUPING_QUEUE: 0, pb.COST_GROUPING_USER: 1, pb.COST_GROUPING_SITE: 2, pb.COST_GROUPING_GPU_CLASS: 3}


class Console:
    """Prices, adjustments and budgets as the console keeps them; costs of ROWS, in whole hours."""

    def __init__(self):
        store, clock = MemoryStore(), VirtualClock()
        self.costs = []  # requests
        self._rpc = CostServicer(Prices(store, clock), Adjustments(store, clock), Budgets(store, clock, lambda _: OPEN))

    def _ask(self, method, request):
        async def call():
            with auth.acting_as(auth.Identity("operator", "olga")):
                return await getattr(self._rpc, method)(request, None)

        with contextlib.closing(VirtualTimeLoop()) as loop:
            return loop.run_until_complete(call())

    def CreatePrice(self, request, timeout):
        return self._ask("CreatePrice", request)

    def ListPrices(self, request, timeout):
        return self._ask("ListPrices", request)

    def CreateAdjustment(self, request, timeout):
        return self._ask("CreateAdjustment", request)

    def SetBudget(self, request, timeout):
        return self._ask("SetBudget", request)

    def GetCost(self, request, timeout):
        self.costs.append(request)
        where = request.filter
        wanted = (where.queue, where.user, where.site.removeprefix("sites/"), where.gpu_class)
        rows = [row for row in ROWS if all(not one or one == value for one, value in zip(wanted, row, strict=True))]
        at = [PLACES[number] for number in request.group_by]
        keys = dict.fromkeys(tuple(row[place] for place in at) for row in rows)
        answer = pb.GetCostResponse(total=pb.CostGroup(bill_micros=len(rows), gpu_hours=len(rows)))
        answer.groups.extend(pb.CostGroup(keys=key, bill_micros=1, gpu_hours=1.0) for key in keys if at)
        answer.start_time.FromSeconds(where.start_time.seconds // HOUR_S * HOUR_S)
        answer.end_time.FromSeconds(-(-where.end_time.seconds // HOUR_S) * HOUR_S)
        answer.watermark.FromSeconds(1_800_000_000)
        return answer

    def GetForecast(self, request, timeout):
        return pb.Forecast(spent_micros=0 if request.queue == "queues/nope" else 5)

    def GetUnitCosts(self, request, timeout):
        return pb.GetUnitCostsResponse(start_time=request.start_time)

    def ListRecommendations(self, request, timeout):
        return pb.ListRecommendationsResponse(start_time={"seconds": 0}, end_time={"seconds": 0})

    def DismissRecommendation(self, request, timeout):
        what = What.CHANGED if request.name.endswith("accepted") else What.CREATED
        return pb.Recommendation(name=request.name, last_change=types_pb2.Change(what=what))


class Fleet:
    """Two nodes of two sites, two queues, one user; `away`: nobody says so."""

    def __init__(self, away=False):
        self.away = away

    def _said(self, answer):
        if self.away:
            raise Unavailable("inventory is away")
        return answer

    def ListNodes(self, request, timeout):
        gpus = {"onprem/n1": "H200", "edge/n2": "RTX4090"}
        names = {"onprem/n1": "sites/onprem/nodes/n1", "edge/n2": "sites/edge/nodes/n2"}
        nodes = [
            inventory_pb2.Node(name=names[one], facts=inventory_pb2.NodeFacts(gpus=[types_pb2.Gpu(model=model)]))
            for one, model in gpus.items()
        ]
        return self._said(inventory_pb2.ListNodesResponse(nodes=nodes))

    def ListSites(self, request, timeout):
        sites = [inventory_pb2.Site(name=name) for name in ("sites/edge", "sites/onprem")]
        return self._said(inventory_pb2.ListSitesResponse(sites=sites))

    def ListQueues(self, request, timeout):
        if not request.page_token:  # the first page of two
            first = [scheduler_pb2.Queue(name="queues/default")]
            return self._said(scheduler_pb2.ListQueuesResponse(queues=first, next_page_token="2"))
        return self._said(scheduler_pb2.ListQueuesResponse(queues=[scheduler_pb2.Queue(name="queues/research")]))

    def ListUsers(self, request, timeout):
        return self._said(identity_pb2.ListUsersResponse(users=[trust_pb2.Principal(name="users/bob", role="user")]))


class Client:
    def __init__(self, away=False):
        self.console = Console()
        self.inventory = self.scheduler = self.identity = Fleet(away)


def reached(monkeypatch, away=False):
    client = Client(away)
    modules = (budget_commands, cost_commands, cost_filters, cost_nothing, price_commands, recommendation_commands)
    for module in modules:
        monkeypatch.setattr(module, "fleet", lambda: contextlib.nullcontext(client))
    return client


@pytest.fixture
def client(monkeypatch):
    return reached(monkeypatch)


def ran(line, *more):
    done = RUN.invoke(app, [*line.split(), *more])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def refused(line, *more):
    done = RUN.invoke(app, [*line.split(), *more])
    assert isinstance(done.exception, InvalidArgument), (done.output, done.exception)
    return [(one.field, one.description) for one in done.exception.violations]


PRICE = "prices set p --usd-per-gpu-hour 2.95 --from 2026-01-01 --source s"
ADJUST = "prices adjust a --from 2026-01-01 --until 2026-02-01 --reason r"


class TestNothing:
    @pytest.mark.parametrize("command", ["cost", "waste"])
    @pytest.mark.parametrize(
        ("narrowed", "said"),
        [
            ("--queue nope", "has queue nope in this window; queues there: default, research"),
            ("--gpu nope", "has class of GPU nope in this window; classes of GPU there: H200, RTX4090"),
            ("--site nope", "has site nope in this window; sites there: edge, onprem"),
            ("--user local", "has user user/local in this window; users there: admin/local, user/ann"),
            ("--queue default --gpu RTX4090", "nothing in the ledger has all of that together in this window"),
        ],
    )
    def test_zeros_say_what_nothing_matches_and_what_is_there(self, client, command, narrowed, said):
        assert said in ran(f"{command} {narrowed}").stderr

    @pytest.mark.parametrize("line", ["cost --queue default", "cost", "cost forecast --queue default"])
    def test_of_sums_of_something_nothing_is_said(self, client, line):
        assert "nothing in the ledger" not in ran(line).stderr

    def test_what_is_there_is_looked_for_in_the_same_window_alone(self, client):
        ran("cost --queue nope --since 2026-11-01 --until 2026-11-02")
        asked, looked = client.console.costs
        assert (looked.filter.start_time, looked.filter.end_time) == (asked.filter.start_time, asked.filter.end_time)
        assert looked.filter.queue == ""

    @pytest.mark.parametrize("line", ["cost forecast --queue nope", "cost units --queue nope"])
    def test_forecasts_and_units_say_it_too(self, client, line):
        assert "nothing in the ledger has queue nope" in ran(line).stderr

    def test_when_it_cannot_be_read_the_zeros_stand(self, client, monkeypatch):
        def away():
            raise Unavailable("the console is away")

        monkeypatch.setattr(cost_nothing, "fleet", away)
        done = ran("cost --queue nope")
        assert "TOTAL" in done.stdout and "nothing in the ledger has" not in done.stderr

    @pytest.mark.parametrize(
        ("window", "said"),
        [
            ("--since 2026-11-01T15:00Z --until 2026-11-01T15:30Z", "from 2026-11-01T15:00Z until 2026-11-01T16:00Z"),
            ("--since 2026-11-01T15:10Z", "from 2026-11-01T15:00Z\n"),
        ],
    )
    def test_a_window_that_was_widened_says_so(self, client, window, said):
        assert f"whole hours count: {said}" in ran(f"cost {window}").stderr

    def test_a_window_of_whole_hours_says_nothing(self, client):
        assert "whole" not in ran("cost --since 2026-11-01T15:00Z --until 2026-11-01T16:00Z").stderr


class TestWhatIsNotThere:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            (f"{PRICE} --gpu H2000", "no GPU of class H2000 is there now; there are: H200, RTX4090"),
            (f"{PRICE} --node onprem/nope", "no node onprem/nope is there now; there are: edge/n2, onprem/n1"),
            (f"{PRICE} --dry-run --site nope", "no site nope is there now; there are: edge, onprem"),
            (f"{ADJUST} --usd 1 --site nope", "no site nope is there now"),
            (f"{ADJUST} --usd 1 --gpu RTX4091", "no GPU of class RTX4091 is there now; there are: RTX4090, H200"),
            ("budget set b --usd 5 --queue nope", "no queue nope is there now; there are: default, research"),
            ("budget set b --usd 5 --site nope", "no site nope is there now"),
            (
                "budget set b --usd 5 --user local",
                "nobody is known as user/local so far; there are: admin/local, user/ann",
            ),
        ],
    )
    def test_it_is_declared_all_the_same_and_said(self, client, line, said):
        assert said in ran(line).stderr

    @pytest.mark.parametrize(
        "line",
        [
            f"{PRICE} --gpu H200 --site onprem",
            f"{PRICE} --node edge/n2",
            "budget set b --usd 5 --queue research",
            "budget set b --usd 5 --user bob",
            "budget set b --usd 5 --user admin/local",
            "budget set b --usd 5",
        ],
    )
    def test_of_what_is_there_nothing_is_said(self, client, line):
        assert "there are:" not in ran(line).stderr

    @pytest.mark.parametrize("line", [f"{PRICE} --gpu H2000", "budget set b --usd 5 --user nope"])
    def test_what_cannot_be_read_is_not_said_to_be_absent(self, monkeypatch, line):
        reached(monkeypatch, away=True)
        assert "there are:" not in ran(line).stderr


class TestWords:
    @pytest.mark.parametrize(
        ("line", "field", "said"),
        [
            (f"{PRICE} --usd-per-gpu-hour=-1", "price.micros_per_gpu_hour", "-1 USD is outside of 0 USD to 10,000 USD"),
            (f"{PRICE} --usd-per-gpu-hour=1e12", "usd_per_gpu_hour", "is more than 1,000,000,000 USD, the most that any amount may be"),
            (f"{PRICE} --usd-per-gpu-hour=nan", "usd_per_gpu_hour", "must be an amount such as 2.95 USD"),
            (f"{PRICE} --kind free", "kind", "must be one of owned, on_demand, reserved, spot"),
            ("budget set b --usd 0", "budget.micros_per_month", "0 USD is outside of 0.000001 USD to 1,000,000,000 USD"),
            ("budget set b --usd 5 --alert 50,50", "budget.alert_percents", "50 is there twice; leave one out"),
            (f"budget set b --usd 5 --alert {','.join(map(str, range(1, 10)))}", "budget.alert_percents", "are 9; use at most 8"),
        ],
    )  # fmt: skip
    def test_limits_are_in_the_units_that_were_typed(self, client, line, field, said):
        assert (field, said) in refused(line)

    def test_nothing_for_alerts_is_no_list_of_percents(self, client):
        ((field, said),) = refused("budget set b --usd 5 --alert", "")
        assert field == "--alert" and "such as 50,80,100" in said

    def test_of_a_file_errors_name_the_price_and_its_words(self, client, tmp_path):
        file = tmp_path / "prices.yaml"
        entry = "kind: owned, from: 2026-01-01, source: s, owned: {usd_per_gpu: 5, months: 36, residual_percent: 130, pue: 0.9}"
        file.write_text(f"prices: [{{name: edge, {entry}}}]")
        assert refused("prices import -f", str(file)) == [
            ("prices/edge: owned.residual_percent", "130 % is outside of 0 % to 100 %"),
            ("prices/edge: owned.pue", "0.9 is below 1: a building takes no less than it gives"),
        ]
        of_node = "owned: {usd_per_node: 20000000, gpus: 8, months: 36}"
        file.write_text(f"name: edge\nkind: owned\nfrom: 2026-01-01\nsource: s\n{of_node}")
        ((field, said),) = refused("prices import -f", str(file))
        assert field == "prices/edge: owned.usd_per_node" and said.startswith("20,000,000 USD is outside of")
        file.write_text("name: a\nkind: owned\nfrom: 2026-01-01\nsource: s\nowns: {}\nusd_per_gpu_hour: 1\n")
        (known,) = [said for field, said in refused("prices import -f", str(file)) if field == "owns"]
        assert "owned" in known

    def test_amounts_are_shown_to_the_micro_dollar(self, client):
        assert "declared: -0.000007 USD" in ran(f"{ADJUST} --usd=-0.000007").stderr
        assert price_commands.usd(-7) == "0.00" and price_commands.usd_exact(-1_200_000_000) == "-1,200.00"

    @pytest.mark.parametrize(
        ("words", "field", "said"),
        [
            (("x.csv", "--check"), "FILE", "is not written with --check; leave one of the two out"),
            ((), "FILE", "give a file to write, or --check to write none"),
            (("--check", "--account", " "), "--account", "is empty; give an id, or leave it out for whaleflux"),
            (("/",), "FILE", "/ is a folder; name a file in it"),
        ],
    )
    def test_of_an_export_the_mistake_is_named(self, client, words, field, said):
        assert refused("cost export", *words) == [(field, said)]

    def test_a_file_that_cannot_be_written_is_named_as_it_was_given(self, tmp_path):
        file = tmp_path / "nowhere" / "x.csv"
        with pytest.raises(FileNotFoundError) as caught:
            cost_export.write([], file)
        assert caught.value.filename == str(file)

    def test_a_format_that_is_none_is_refused_without_the_words_of_a_library(self):
        said = RUN.invoke(app, ["prices", "ls", "-o", "xml"]).output
        assert "'xml' is not one of" in " ".join(said.split()) and "Value error" not in said


class TestRecommendations:
    def test_an_empty_ledger_is_said_to_be_empty(self, client):
        said = ran("cost recommendations").stderr
        assert "no whole hour is in the ledger yet" in said and "1970" not in said

    def test_dismissing_what_was_decided_says_what_ends(self, client):
        assert "no longer counts" in ran("cost recommendations dismiss was-accepted").stderr
        assert "no longer counts" not in ran("cost recommendations dismiss open").stderr
