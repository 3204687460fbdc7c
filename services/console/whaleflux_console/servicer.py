"""CostService: a thin adapter between the contract and what answers it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.empty_pb2 import Empty

from whaleflux.errors import FailedPrecondition
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import console_pb2_grpc as rpc
from whaleflux_console.budgets import Budgets
from whaleflux_console.costs import Costs
from whaleflux_console.device_history import DeviceHistory
from whaleflux_console.exports import Exports
from whaleflux_console.forecasts import scope_of
from whaleflux_console.prices import Adjustments, Prices
from whaleflux_console.recommendations import Recommendations
from whaleflux_console.step_history import StepHistory
from whaleflux_console.unit_answers import unit_costs_of

Context = Any  # grpc.aio's, which no rpc here needs


class CostServicer(rpc.CostServiceServicer):
    """Who may call what is the boundary's business."""

    def __init__(
        self,
        prices: Prices,
        adjustments: Adjustments,
        budgets: Budgets,
        costs: Costs | None = None,
        recommendations: Recommendations | None = None,
    ) -> None:
        self._prices, self._adjustments, self._budgets = prices, adjustments, budgets
        self._spent, self._recommended = costs, recommendations

    async def CreatePrice(self, request: pb.CreatePriceRequest, context: Context) -> pb.GpuPrice:
        return await self._prices.create(request)

    async def ListPrices(self, request: pb.ListPricesRequest, context: Context) -> pb.ListPricesResponse:
        page = await self._prices.page(request)
        return pb.ListPricesResponse(
            prices=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def EndPrice(self, request: pb.EndPriceRequest, context: Context) -> pb.GpuPrice:
        return await self._prices.end(request)

    async def DeletePrice(self, request: pb.DeletePriceRequest, context: Context) -> Empty:
        await self._prices.delete(request.name, request.etag)
        return Empty()

    async def CreateAdjustment(self, request: pb.CreateAdjustmentRequest, context: Context) -> pb.Adjustment:
        return await self._adjustments.create(request)

    async def ListAdjustments(self, request: pb.ListAdjustmentsRequest, context: Context) -> pb.ListAdjustmentsResponse:
        page = await self._adjustments.page(request)
        return pb.ListAdjustmentsResponse(
            adjustments=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def DeleteAdjustment(self, request: pb.DeleteAdjustmentRequest, context: Context) -> Empty:
        await self._adjustments.delete(request.name, request.etag)
        return Empty()

    async def GetCost(self, request: pb.GetCostRequest, context: Context) -> pb.GetCostResponse:
        return await self._costs.spent(request)

    async def GetJobCost(self, request: pb.GetJobCostRequest, context: Context) -> pb.GetJobCostResponse:
        return await self._costs.of_job(request)

    async def GetStepHistory(self, request: pb.GetStepHistoryRequest, context: Context) -> pb.GetStepHistoryResponse:
        return await StepHistory(self._costs.answers, self._costs.queue_access).of_job(request)

    async def GetDeviceHistory(
        self, request: pb.GetDeviceHistoryRequest, context: Context
    ) -> pb.GetDeviceHistoryResponse:
        return await DeviceHistory(self._costs.answers, self._costs.clock).of_node(request)

    async def ExportCost(self, request: pb.ExportCostRequest, context: Context) -> AsyncIterator[pb.ExportCostResponse]:
        async for part in Exports(self._costs.answers, self._costs.clock).export(request):
            yield part

    async def GetForecast(self, request: pb.GetForecastRequest, context: Context) -> pb.Forecast:
        scope = scope_of(request)
        return await self._costs.forecast(scope)

    async def GetUnitCosts(self, request: pb.GetUnitCostsRequest, context: Context) -> pb.GetUnitCostsResponse:
        return await unit_costs_of(self._costs, request)

    async def SetBudget(self, request: pb.SetBudgetRequest, context: Context) -> pb.Budget:
        return await self._budgets.set(request)

    async def ListBudgets(self, request: pb.ListBudgetsRequest, context: Context) -> pb.ListBudgetsResponse:
        return await self._budgets.page(request, self._spent)

    async def DeleteBudget(self, request: pb.DeleteBudgetRequest, context: Context) -> Empty:
        await self._budgets.delete(request.name, request.etag)
        return Empty()

    async def GetLedger(self, request: pb.GetLedgerRequest, context: Context) -> pb.Ledger:
        return self._costs.ledger()

    async def ListRecommendations(
        self, request: pb.ListRecommendationsRequest, context: Context
    ) -> pb.ListRecommendationsResponse:
        return await self._recommendations.page(request)

    async def AcceptRecommendation(
        self, request: pb.AcceptRecommendationRequest, context: Context
    ) -> pb.Recommendation:
        return await self._recommendations.accept(request)

    async def DismissRecommendation(
        self, request: pb.DismissRecommendationRequest, context: Context
    ) -> pb.Recommendation:
        return await self._recommendations.dismiss(request)

    @property
    def _costs(self) -> Costs:
        if self._spent is None:
            raise _no_ledger()
        return self._spent

    @property
    def _recommendations(self) -> Recommendations:
        if self._recommended is None:
            raise _no_ledger()
        return self._recommended


def _no_ledger() -> FailedPrecondition:
    return FailedPrecondition("no usage ledger is kept here; give the console service a folder: --ledger-folder PATH")
