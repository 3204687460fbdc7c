"""For every method of the contract: what kind of object a request of it is about, and how such a request is made.

A method of the contract without a row fails the benchmark. Requests of verbs that change carry an etag that never matches, so that
whoever is let in changes nothing: the owner has to be asked before the etag is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whaleflux import names
from whaleflux.v1 import (
    agent_pb2,
    audit_pb2,
    checkpoint_pb2,
    console_pb2,
    events_pb2,
    health_pb2,
    identity_pb2,
    inventory_pb2,
    router_pb2,
    scheduler_pb2,
    secrets_pb2,
    trust_pb2,
    usage_pb2,
)

STALE = '"1"'
DIGEST = "0" * 64
Build = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Probe:
    """`kind`: of the object that `build` gets the name of; "" where a request is about none, and `build` gets "".

    `empty`: a list below an object, or a clean-up that may be repeated: where there is nothing for the caller, an empty answer is right.
    `spent`: whoever is let in may find nothing: the first has deleted it, or there was nothing below the object; such calls come last.
    """

    kind: str
    build: Build
    empty: bool = False
    spent: bool = False


def _job(make: Build, *, empty: bool = False, spent: bool = False) -> Probe:
    return Probe("job", make, empty, spent)


def _named(request: Any, **fields: Any) -> Build:
    return lambda name: request(name=name, **fields)


def _none(message: Any) -> Probe:
    return Probe("", lambda _: message)


def _spec() -> scheduler_pb2.JobSpec:
    return scheduler_pb2.JobSpec(command=["true"], gpus=1)


def _checkpoint(job: str) -> str:
    return names.checkpoint(job, 1, 1, 1)


def _begin(job: str) -> checkpoint_pb2.BeginCheckpointRequest:
    return checkpoint_pb2.BeginCheckpointRequest(
        job=job, epoch=1, step=1, serial=1, world_size=1, location="file:///nowhere"
    )


def _model(name: str) -> router_pb2.Model:
    return router_pb2.Model(name=name, etag=STALE, engine=router_pb2.Engine(kind="vllm", addresses=["10.0.0.1:8000"]))


def _replacing(queue: str) -> scheduler_pb2.CreateJobRequest:
    return scheduler_pb2.CreateJobRequest(parent=queue, job=scheduler_pb2.Job(spec=_spec()), validate_only=True)


_I, _S, _H, _C, _R = inventory_pb2, scheduler_pb2, health_pb2, checkpoint_pb2, router_pb2
_INVENTORY: dict[str, Probe] = {
    "CreateSite": _none(_I.CreateSiteRequest(site_id="Not A Site")),
    "ListSites": _none(_I.ListSitesRequest()),
    "Join": _none(_I.JoinRequest(token="no token", node_id="n1")),
    "RenewCertificate": _none(_I.RenewCertificateRequest()),
    "RegisterNode": Probe("node", _named(_I.RegisterNodeRequest)),
    "GetNode": Probe("node", _named(_I.GetNodeRequest)),
    "ListNodes": _none(_I.ListNodesRequest()),
    "WatchNodes": _none(_I.WatchNodesRequest()),
    "UpdateNode": Probe("node", lambda name: _I.UpdateNodeRequest(node=_I.Node(name=name, etag=STALE))),
    "CordonNode": Probe("node", _named(_I.CordonNodeRequest, etag=STALE)),
    "UncordonNode": Probe("node", _named(_I.UncordonNodeRequest, etag=STALE)),
    "DrainNode": Probe("node", _named(_I.DrainNodeRequest, etag=STALE)),
    "RetireNode": Probe("node", _named(_I.RetireNodeRequest, etag=STALE)),
    "ReplaceNode": _none(
        _I.ReplaceNodeRequest(name="sites/absent/nodes/absent")
    ),  # has no etag: a node would be replaced
    "CreateJoinToken": _none(_I.CreateJoinTokenRequest(site="not a site")),
    "ListJoinTokens": _none(_I.ListJoinTokensRequest()),
    "DeleteJoinToken": _none(_I.DeleteJoinTokenRequest(name="joinTokens/absent")),
    "CreateDataset": _none(_I.CreateDatasetRequest(dataset_id="Not A Dataset")),
    "GetDataset": Probe("dataset", _named(_I.GetDatasetRequest)),
    "ListDatasets": _none(_I.ListDatasetsRequest()),
    "DeleteDataset": Probe("dataset", _named(_I.DeleteDatasetRequest, etag=STALE)),
    "PinDataset": Probe("dataset", lambda name: _I.PinDatasetRequest(name=name, copies=-1)),
    "UnpinDataset": Probe("dataset", lambda name: _I.UnpinDatasetRequest(name=name, nodes=["no node"])),
    "ListNodePins": Probe("node", lambda name: _I.ListNodePinsRequest(node=name)),
    "CreateOffer": _none(_I.CreateOfferRequest(offer_id="Not An Offer")),
    "ListOffers": _none(_I.ListOffersRequest()),
    "DeleteOffer": _none(_I.DeleteOfferRequest(name="offers/absent")),
    "CreateLease": _none(_I.CreateLeaseRequest()),
    "GetLease": _none(_I.GetLeaseRequest(name="leases/absent")),
    "ListLeases": _none(_I.ListLeasesRequest()),
    "EndLease": _none(_I.EndLeaseRequest(name="leases/absent")),
    "GetDatasetManifest": Probe("dataset", _named(_I.GetDatasetManifestRequest)),
    "SetDatasetManifest": Probe("node", lambda name: _I.SetDatasetManifestRequest(node=name)),
    "ReportCachedDataset": Probe("node", lambda name: _I.ReportCachedDatasetRequest(copy=_I.DatasetCopy(node=name))),
}
_SCHEDULER: dict[str, Probe] = {
    "CreateQueue": _none(_S.CreateQueueRequest(queue_id="Not A Queue")),
    "GetQueue": Probe("queue", _named(_S.GetQueueRequest)),
    "ListQueues": _none(_S.ListQueuesRequest()),
    "DeleteQueue": Probe("queue", _named(_S.DeleteQueueRequest, etag=STALE)),
    "UpdateQueue": Probe("queue", lambda name: _S.UpdateQueueRequest(queue=_S.Queue(name=name, etag=STALE))),
    "CreateJob": Probe("queue", _replacing),
    "GetCode": Probe("code", lambda digest: _S.GetCodeRequest(digest=digest)),
    "UploadCode": _none(_S.UploadCodeRequest(digest="not one")),
    "DownloadCode": _job(lambda name: _S.DownloadCodeRequest(job=name, epoch=1), spent=True),
    "GetJob": _job(_named(_S.GetJobRequest)),
    "ListJobs": _none(_S.ListJobsRequest(parent="queues/-")),
    "WatchJobs": _none(_S.WatchJobsRequest()),
    "ListJobHistory": _none(_S.ListJobHistoryRequest(parent="queues/-")),
    "CancelJob": _job(_named(_S.CancelJobRequest, etag=STALE)),
    "HoldJob": _job(_named(_S.HoldJobRequest, etag=STALE)),
    "ReleaseJob": _job(_named(_S.ReleaseJobRequest, etag=STALE)),
    "RequeueJob": _job(_named(_S.RequeueJobRequest, etag=STALE)),
    "SetJobPriority": _job(_named(_S.SetJobPriorityRequest, priority=1, etag=STALE)),
    "DeleteJob": _job(_named(_S.DeleteJobRequest, etag=STALE)),
    "ExplainJob": _job(_named(_S.ExplainJobRequest)),
    "StreamLogs": _job(_named(_S.StreamLogsRequest)),
    "AttachJob": _job(
        lambda name: _S.AttachJobRequest(open=_S.AttachOpen(name=name, command=_S.AttachCommand(argv=["true"])))
    ),
    "ListAllocations": _none(_S.ListAllocationsRequest()),
    "PlanRay": _none(_S.PlanRayRequest()),
    "PlanTraining": _none(_S.PlanTrainingRequest()),
    "PlanServing": _none(_S.PlanServingRequest()),
    "PlanBurst": _none(_S.PlanBurstRequest()),
    "PlanRebalance": _none(_S.PlanRebalanceRequest()),
    "ApplyRebalance": _none(_S.ApplyRebalanceRequest(etag=STALE)),
    "CreateReservation": _none(_S.CreateReservationRequest(reservation_id="Not A Reservation")),
    "GetReservation": _none(_S.GetReservationRequest(name="reservations/absent")),
    "ListReservations": _none(_S.ListReservationsRequest()),
    "UpdateReservation": _none(_S.UpdateReservationRequest(reservation=_S.Reservation(name="reservations/absent"))),
    "DeleteReservation": _none(_S.DeleteReservationRequest(name="reservations/absent")),
    "CreateRayCluster": _none(_S.CreateRayClusterRequest(ray_cluster_id="Not A Cluster")),
    "GetRayCluster": _none(_S.GetRayClusterRequest(name="rayClusters/absent")),
    "ListRayClusters": _none(_S.ListRayClustersRequest()),
    "UpdateRayCluster": _none(_S.UpdateRayClusterRequest(ray_cluster=_S.RayCluster(name="rayClusters/absent"))),
    "DeleteRayCluster": _none(_S.DeleteRayClusterRequest(name="rayClusters/absent")),
}
_P = identity_pb2
_IDENTITY: dict[str, Probe] = {
    "GetLoginOptions": _none(_P.GetLoginOptionsRequest()),
    "Login": _none(_P.LoginRequest(code="no code")),
    "RenewLogin": _none(_P.RenewLoginRequest()),
    "Logout": _none(_P.LogoutRequest()),
    "WhoAmI": _none(_P.WhoAmIRequest()),
    "CreateUser": _none(_P.CreateUserRequest(user_id="Not A User")),
    "GetUser": Probe("user", _named(_P.GetUserRequest)),
    "ListUsers": _none(_P.ListUsersRequest()),
    "UpdateUser": Probe("user", lambda name: _P.UpdateUserRequest(user=trust_pb2.Principal(name=name, etag=STALE))),
    "DisableUser": Probe("user", _named(_P.DisableUserRequest, etag=STALE)),
    "EnableUser": Probe("user", _named(_P.EnableUserRequest, etag=STALE)),
    "CreateLoginLink": Probe("user", lambda name: _P.CreateLoginLinkRequest(user=name, ttl_s=60)),
    "CreateGroup": _none(_P.CreateGroupRequest(group_id="Not A Group")),
    "ListGroups": _none(_P.ListGroupsRequest()),
    "DeleteGroup": _none(_P.DeleteGroupRequest(name="groups/research", etag=STALE)),
    "AddGroupMember": _none(_P.AddGroupMemberRequest(name="groups/absent", member="users/eve")),
    "RemoveGroupMember": _none(_P.RemoveGroupMemberRequest(name="groups/absent", member="users/bob")),
    "CreateToken": _none(_P.CreateTokenRequest(ttl_s=-1)),
    "ListTokens": _none(_P.ListTokensRequest()),
    "RevokeToken": _none(_P.RevokeTokenRequest(name="tokens/absent")),
}
_OTHERS: dict[str, dict[str, Probe]] = {
    "Identity": _IDENTITY,
    "Secret": {
        "CreateSecret": _none(secrets_pb2.CreateSecretRequest(secret_id="Not A Secret")),
        "UpdateSecret": Probe(
            "secret",
            lambda name: secrets_pb2.UpdateSecretRequest(secret=secrets_pb2.Secret(name=name, etag=STALE), value=b"x"),
        ),
        "GetSecret": Probe("secret", _named(secrets_pb2.GetSecretRequest)),
        "ListSecrets": _none(secrets_pb2.ListSecretsRequest()),
        "DeleteSecret": Probe("secret", _named(secrets_pb2.DeleteSecretRequest, etag=STALE)),
        "OpenSecrets": _none(secrets_pb2.OpenSecretsRequest()),
        "RewrapSecrets": _none(secrets_pb2.RewrapSecretsRequest()),
    },
    "Audit": {
        "ListAudit": _none(audit_pb2.ListAuditRequest()),
        "VerifyAudit": _none(audit_pb2.VerifyAuditRequest()),
        "ExportAudit": _none(audit_pb2.ExportAuditRequest()),
    },
    "Event": {
        "ListEvents": _none(events_pb2.ListEventsRequest()),
        "WatchEvents": _none(events_pb2.WatchEventsRequest()),
    },
    "Task": {
        "OpenTaskSecrets": _job(lambda job: agent_pb2.OpenTaskSecretsRequest(job=job, epoch=1)),
        "FindDatasetReader": _none(  # that it reads it not is the answer for jobs that are not there, or none of the caller's business
            agent_pb2.FindDatasetReaderRequest(
                job="queues/open/jobs/absent", dataset="datasets/d", node="sites/s/nodes/n"
            )
        ),
        "Sync": Probe("node", lambda name: agent_pb2.SyncRequest(hello=agent_pb2.SyncHello(node=name))),
        "Attach": Probe("node", lambda name: agent_pb2.AttachRequest(hello=agent_pb2.AttachHello(node=name))),
    },
    "Health": {
        "Heartbeat": Probe("node", lambda name: _H.HeartbeatRequest(hello=_H.HeartbeatHello(node=name))),
        "ReportFailure": _none(_H.ReportFailureRequest()),
        "GetNodeHealth": Probe("node", _named(_H.GetNodeHealthRequest)),
        "ListNodeHealth": _none(_H.ListNodeHealthRequest()),
        "WatchNodeHealth": _none(_H.WatchNodeHealthRequest()),
        "GetIncident": _none(_H.GetIncidentRequest(name="incidents/absent")),
        "ListIncidents": _none(_H.ListIncidentsRequest()),
        "WatchIncidents": _none(_H.WatchIncidentsRequest()),
    },
    "Checkpoint": {
        "BeginCheckpoint": _job(_begin),
        "ReportPieces": _job(lambda job: _C.ReportPiecesRequest(checkpoint=_checkpoint(job), epoch=1)),
        "AbandonCheckpoint": _job(lambda job: _C.AbandonCheckpointRequest(name=_checkpoint(job), epoch=1), spent=True),
        "GetCheckpoint": _job(lambda job: _C.GetCheckpointRequest(name=_checkpoint(job))),
        "ListCheckpoints": _job(lambda job: _C.ListCheckpointsRequest(parent=job), empty=True),
        "FindRestorable": _job(lambda job: _C.FindRestorableRequest(job=job), spent=True),
        "ListDeletable": _none(_C.ListDeletableRequest()),
        "ConfirmDeleted": _job(lambda job: _C.ConfirmDeletedRequest(names=[_checkpoint(job)]), empty=True),
        "MarkLost": _job(lambda job: _C.MarkLostRequest(name=_checkpoint(job), epoch=1)),
        "MarkIntact": _job(lambda job: _C.MarkIntactRequest(name=_checkpoint(job), epoch=1)),
    },
    "Cost": {
        "CreatePrice": _none(console_pb2.CreatePriceRequest(price_id="Not A Price")),
        "ListPrices": _none(console_pb2.ListPricesRequest()),
        "EndPrice": _none(console_pb2.EndPriceRequest(name="prices/absent")),
        "DeletePrice": _none(console_pb2.DeletePriceRequest(name="prices/absent")),
        "CreateAdjustment": _none(console_pb2.CreateAdjustmentRequest(adjustment_id="Not An Adjustment")),
        "ListAdjustments": _none(console_pb2.ListAdjustmentsRequest()),
        "GetCost": _none(console_pb2.GetCostRequest()),
        "GetJobCost": _job(lambda job: console_pb2.GetJobCostRequest(job=job), empty=True),
        "GetStepHistory": _job(lambda job: console_pb2.GetStepHistoryRequest(job=job), empty=True),
        "GetDeviceHistory": _none(console_pb2.GetDeviceHistoryRequest(node="sites/s/nodes/absent")),
        "GetUnitCosts": _none(console_pb2.GetUnitCostsRequest()),
        "GetForecast": _none(console_pb2.GetForecastRequest()),
        "SetBudget": _none(console_pb2.SetBudgetRequest(budget_id="Not A Budget")),
        "ListBudgets": _none(console_pb2.ListBudgetsRequest()),
        "DeleteBudget": _none(console_pb2.DeleteBudgetRequest(name="budgets/absent")),
        "ExportCost": _none(console_pb2.ExportCostRequest()),
        "GetLedger": _none(console_pb2.GetLedgerRequest()),
        "ListRecommendations": _none(console_pb2.ListRecommendationsRequest()),
        "AcceptRecommendation": _none(console_pb2.AcceptRecommendationRequest(name="recommendations/absent")),
        "DismissRecommendation": _none(console_pb2.DismissRecommendationRequest(name="recommendations/absent")),
        "DeleteAdjustment": _none(console_pb2.DeleteAdjustmentRequest(name="adjustments/absent")),
    },
    "Usage": {"ReportUsage": Probe("node", lambda name: usage_pb2.ReportUsageRequest(node=name))},
    "Router": {
        "CreateModel": _none(_R.CreateModelRequest(model_id="Not A Model")),
        "GetModel": Probe("model", _named(_R.GetModelRequest)),
        "ListModels": _none(_R.ListModelsRequest()),
        "UpdateModel": Probe("model", lambda name: _R.UpdateModelRequest(model=_model(name))),
        "DeleteModel": Probe("model", _named(_R.DeleteModelRequest, etag=STALE)),
        "RollBackModel": Probe("model", _named(_R.RollBackModelRequest, etag=STALE)),
        "EstimateDeployment": Probe("model", _named(_R.EstimateDeploymentRequest)),
        "ListReplicas": Probe("model", lambda name: _R.ListReplicasRequest(parent=name), empty=True),
        "WatchReplicas": Probe("model", lambda name: _R.WatchReplicasRequest(parent=name), empty=True),
        "Route": Probe("model", lambda name: _R.RouteRequest(model=name)),
        "CreateApiKey": _none(_R.CreateApiKeyRequest(ttl_s=-1)),
        "ListApiKeys": _none(_R.ListApiKeysRequest()),
        "DeleteApiKey": Probe("key", _named(_R.DeleteApiKeyRequest), spent=True),
    },
}


def _table() -> dict[str, Probe]:
    services = {"Inventory": _INVENTORY, "Scheduler": _SCHEDULER, **_OTHERS}
    return {
        f"/whaleflux.v1.{service}Service/{method}": probe
        for service, rows in services.items()
        for method, probe in rows.items()
    }


PROBES: dict[str, Probe] = _table()
