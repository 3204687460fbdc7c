"""InventoryService: each rpc is one call of the part that does the work."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.empty_pb2 import Empty

from whaleflux.rpc import auth
from whaleflux.rpc.watching import fill, watch_resources
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux.v1 import inventory_pb2_grpc as rpc
from whaleflux_inventory import convert
from whaleflux_inventory.core.intents import Intent
from whaleflux_inventory.datasets import Datasets
from whaleflux_inventory.joining import Joining
from whaleflux_inventory.leases import Leases
from whaleflux_inventory.nodes import Nodes
from whaleflux_inventory.offers import Offers
from whaleflux_inventory.sites import Sites

Context = Any  # grpc.aio's, which no rpc here needs


class InventoryServicer(rpc.InventoryServiceServicer):
    """Who may call what is the boundary's business; that an agent touches only its own node is ours."""

    def __init__(
        self,
        store: Store,
        sites: Sites,
        nodes: Nodes,
        joining: Joining,
        datasets: Datasets,
        offers: Offers,
        leases: Leases,
    ) -> None:
        self._store, self._sites, self._nodes = store, sites, nodes
        self._joining, self._datasets = joining, datasets
        self._offers, self._leases = offers, leases

    async def CreateSite(self, request: pb.CreateSiteRequest, context: Context) -> pb.Site:
        return await self._sites.create(request)

    async def ListSites(self, request: pb.ListSitesRequest, context: Context) -> pb.ListSitesResponse:
        page = await self._sites.page(request)
        return pb.ListSitesResponse(sites=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable)

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        return await self._joining.join(request)

    async def RenewCertificate(
        self, request: pb.RenewCertificateRequest, context: Context
    ) -> pb.RenewCertificateResponse:
        return await self._joining.renew(auth.caller(), request)

    async def RegisterNode(self, request: pb.RegisterNodeRequest, context: Context) -> pb.Node:
        auth.require_own_node(request.name)
        return await self._nodes.register(request)

    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> pb.Node:
        return await self._nodes.get(request.name)

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        page = await self._nodes.page(request)
        return pb.ListNodesResponse(
            nodes=page.items,
            next_page_token=page.next_page_token,
            resource_version=page.revision,
            unreadable=page.unreadable,
        )

    async def WatchNodes(self, request: pb.WatchNodesRequest, context: Context) -> AsyncIterator[pb.WatchNodesResponse]:
        changes = watch_resources(self._store, keys.NODES, request.resource_version, convert.node_of)
        async for change in changes:
            yield fill(pb.WatchNodesResponse(), change)

    async def UpdateNode(self, request: pb.UpdateNodeRequest, context: Context) -> pb.Node:
        return await self._nodes.update(request)

    async def CordonNode(self, request: pb.CordonNodeRequest, context: Context) -> pb.Node:
        return await self._nodes.set_intent(request.name, Intent.CORDONED, request.reason, request.etag)

    async def UncordonNode(self, request: pb.UncordonNodeRequest, context: Context) -> pb.Node:
        return await self._nodes.set_intent(request.name, Intent.ACTIVE, "", request.etag)

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Context) -> pb.Node:
        return await self._nodes.set_intent(request.name, Intent.DRAINING, request.reason, request.etag)

    async def RetireNode(self, request: pb.RetireNodeRequest, context: Context) -> pb.Node:
        return await self._nodes.set_intent(request.name, Intent.RETIRED, request.reason, request.etag)

    async def ReplaceNode(self, request: pb.ReplaceNodeRequest, context: Context) -> pb.Node:
        return await self._nodes.replace(request.name)

    async def CreateJoinToken(self, request: pb.CreateJoinTokenRequest, context: Context) -> pb.JoinToken:
        return await self._joining.create_token(request)

    async def ListJoinTokens(self, request: pb.ListJoinTokensRequest, context: Context) -> pb.ListJoinTokensResponse:
        page = await self._joining.list_tokens(request)
        return pb.ListJoinTokensResponse(
            join_tokens=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def DeleteJoinToken(self, request: pb.DeleteJoinTokenRequest, context: Context) -> Empty:
        await self._joining.delete_token(request)
        return Empty()

    async def CreateDataset(self, request: pb.CreateDatasetRequest, context: Context) -> pb.Dataset:
        return await self._datasets.create(request)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.Dataset:
        return await self._datasets.get(request.name)

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        page = await self._datasets.page(request)
        who = auth.principal()
        unreadable = page.unreadable if who.is_service or who.is_operator else ()
        return pb.ListDatasetsResponse(datasets=page.items, next_page_token=page.next_page_token, unreadable=unreadable)

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Context) -> Empty:
        await self._datasets.delete(request)
        return Empty()

    async def PinDataset(self, request: pb.PinDatasetRequest, context: Context) -> pb.Dataset:
        return await self._datasets.pin(request)

    async def UnpinDataset(self, request: pb.UnpinDatasetRequest, context: Context) -> pb.Dataset:
        return await self._datasets.unpin(request)

    async def ListNodePins(self, request: pb.ListNodePinsRequest, context: Context) -> pb.ListNodePinsResponse:
        auth.require_own_node(request.node)
        return pb.ListNodePinsResponse(datasets=await self._datasets.pins.of_node(request.node))

    async def GetDatasetManifest(self, request: pb.GetDatasetManifestRequest, context: Context) -> pb.DatasetManifest:
        return await self._datasets.manifest(request.name)

    async def SetDatasetManifest(self, request: pb.SetDatasetManifestRequest, context: Context) -> pb.Dataset:
        auth.require_own_node(request.node)
        return await self._datasets.set_manifest(request)

    async def ReportCachedDataset(self, request: pb.ReportCachedDatasetRequest, context: Context) -> pb.Dataset:
        auth.require_own_node(request.copy.node)
        return await self._datasets.report_copy(request)

    async def CreateOffer(self, request: pb.CreateOfferRequest, context: Context) -> pb.Offer:
        return await self._offers.create(request)

    async def ListOffers(self, request: pb.ListOffersRequest, context: Context) -> pb.ListOffersResponse:
        page = await self._offers.page(request)
        return pb.ListOffersResponse(
            offers=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def DeleteOffer(self, request: pb.DeleteOfferRequest, context: Context) -> Empty:
        await self._offers.delete(request)
        return Empty()

    async def CreateLease(self, request: pb.CreateLeaseRequest, context: Context) -> pb.Lease:
        return await self._leases.create(request)

    async def GetLease(self, request: pb.GetLeaseRequest, context: Context) -> pb.Lease:
        return await self._leases.get(request.name)

    async def ListLeases(self, request: pb.ListLeasesRequest, context: Context) -> pb.ListLeasesResponse:
        page = await self._leases.page(request)
        return pb.ListLeasesResponse(
            leases=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def EndLease(self, request: pb.EndLeaseRequest, context: Context) -> pb.Lease:
        return await self._leases.end(request)
