"""Whose things may be touched: beside `roles.TABLE` the one table of methods and owner rules.

A key is a full method; every method of the contract has a row (a test walks them). The rule says where the question is asked:

* FLEET: nothing that somebody owns is touched; the role decides.
* SELF: the call is about the caller itself.
* `own_node(field)`: an agent speaks for its own node, which `field` of the first request names; the boundary compares.
* RECORD: the servicer asks the record's owner (`trust.ownership`, or a rule of its own that says `note_asked`).
* LEAVES_OUT: what the caller may not see is left out, and one such thing is not found; the servicer asks for each.

Who forgets to ask in RECORD and LEAVES_OUT answers nothing: the boundary makes it an internal error.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.rpc import auth


class Asks(Enum):
    """Where the question is asked."""

    NOBODY = "nobody"
    BOUNDARY = "boundary"
    SERVICER = "servicer"


@dataclass(frozen=True, slots=True)
class OwnerRule:
    """`about` says the rule in words, for people; `node` is the path of the field that names an agent's node."""

    about: str
    asks: Asks = Asks.NOBODY
    node: str = ""

    def check(self, request: object) -> None:
        """Refuses an agent that speaks for another node. Raises InvalidArgument when the field is missing."""
        value: object = request
        for part in self.node.split("."):
            value = getattr(value, part)
        if not value:
            raise InvalidArgument(FieldViolation(self.node, "is not set; name the node that this is about"))
        auth.require_own_node(str(value))


FLEET = OwnerRule("the fleet's; the role decides")
SELF = OwnerRule("the caller itself")
RECORD = OwnerRule(
    "the owner, who shares it through a group, operators; an agent: what is placed on its node", Asks.SERVICER
)
LEAVES_OUT = OwnerRule("what the caller may not see is left out, or not found", Asks.SERVICER)


def own_node(field: str) -> OwnerRule:
    """An agent's own node, named by `field` of the first request."""
    return OwnerRule(f"an agent's own node ({field})", Asks.BOUNDARY, field)


def _service(name: str, **rules: OwnerRule) -> dict[str, OwnerRule]:
    return {_method(name, method): rule for method, rule in rules.items()}


def _method(service: str, method: str) -> str:
    return f"/whaleflux.v1.{service}Service/{method}"


TABLE: dict[str, OwnerRule] = {
    **_service(
        "Inventory",
        CreateSite=FLEET,
        ListSites=FLEET,
        Join=SELF,  # the token says who
        RenewCertificate=SELF,
        RegisterNode=own_node("name"),
        GetNode=FLEET,
        ListNodes=FLEET,
        WatchNodes=FLEET,
        UpdateNode=FLEET,
        CordonNode=FLEET,
        UncordonNode=FLEET,
        DrainNode=FLEET,
        RetireNode=FLEET,
        ReplaceNode=FLEET,
        CreateJoinToken=FLEET,
        ListJoinTokens=FLEET,
        DeleteJoinToken=FLEET,
        CreateDataset=SELF,
        GetDataset=LEAVES_OUT,
        ListDatasets=LEAVES_OUT,
        DeleteDataset=RECORD,
        PinDataset=RECORD,
        UnpinDataset=RECORD,
        ListNodePins=own_node("node"),
        GetDatasetManifest=LEAVES_OUT,
        SetDatasetManifest=own_node("node"),
        ReportCachedDataset=own_node("copy.node"),
        CreateOffer=FLEET,
        ListOffers=FLEET,
        DeleteOffer=FLEET,
        CreateLease=FLEET,
        GetLease=FLEET,
        ListLeases=FLEET,
        EndLease=FLEET,
    ),
    **_service(
        "Identity",
        GetLoginOptions=FLEET,
        Login=SELF,  # the credential says who
        RenewLogin=SELF,
        Logout=SELF,
        WhoAmI=SELF,
        CreateUser=FLEET,
        GetUser=LEAVES_OUT,
        ListUsers=LEAVES_OUT,
        UpdateUser=FLEET,
        DisableUser=FLEET,
        EnableUser=FLEET,
        CreateLoginLink=RECORD,
        CreateGroup=FLEET,
        ListGroups=LEAVES_OUT,
        DeleteGroup=FLEET,
        AddGroupMember=FLEET,
        RemoveGroupMember=FLEET,
        CreateToken=RECORD,
        ListTokens=LEAVES_OUT,
        RevokeToken=RECORD,
    ),
    **_service(
        "Secret",
        CreateSecret=RECORD,
        UpdateSecret=RECORD,
        GetSecret=LEAVES_OUT,
        ListSecrets=LEAVES_OUT,
        DeleteSecret=RECORD,
        OpenSecrets=RECORD,
        RewrapSecrets=FLEET,
    ),
    **_service(
        "Event",
        ListEvents=LEAVES_OUT,
        WatchEvents=LEAVES_OUT,
    ),
    **_service(
        "Audit",
        ListAudit=LEAVES_OUT,
        VerifyAudit=FLEET,
        ExportAudit=FLEET,
    ),
    **_service(
        "Scheduler",
        CreateQueue=FLEET,
        GetQueue=LEAVES_OUT,
        ListQueues=LEAVES_OUT,
        DeleteQueue=FLEET,
        UpdateQueue=FLEET,
        CreateJob=RECORD,
        GetCode=LEAVES_OUT,
        UploadCode=SELF,
        DownloadCode=RECORD,
        GetJob=LEAVES_OUT,
        ListJobs=LEAVES_OUT,
        WatchJobs=LEAVES_OUT,
        ListJobHistory=LEAVES_OUT,
        CancelJob=RECORD,
        HoldJob=RECORD,
        ReleaseJob=RECORD,
        RequeueJob=RECORD,
        SetJobPriority=RECORD,
        DeleteJob=RECORD,
        ExplainJob=LEAVES_OUT,
        StreamLogs=RECORD,
        AttachJob=RECORD,
        ListAllocations=LEAVES_OUT,
        PlanRay=FLEET,
        PlanRebalance=FLEET,
        PlanTraining=FLEET,
        PlanServing=FLEET,
        PlanBurst=FLEET,
        ApplyRebalance=FLEET,
        CreateReservation=RECORD,
        GetReservation=LEAVES_OUT,
        ListReservations=LEAVES_OUT,
        UpdateReservation=RECORD,
        DeleteReservation=RECORD,
        CreateRayCluster=RECORD,
        GetRayCluster=LEAVES_OUT,
        ListRayClusters=LEAVES_OUT,
        UpdateRayCluster=RECORD,
        DeleteRayCluster=RECORD,
    ),
    **_service(
        "Task",
        Sync=own_node("hello.node"),
        Attach=own_node("hello.node"),
        OpenTaskSecrets=RECORD,
        FindDatasetReader=LEAVES_OUT,
    ),
    **_service(
        "Node",
        Probe=FLEET,
    ),
    **_service(
        "Piece",
        ListPieces=LEAVES_OUT,
        ReadPiece=LEAVES_OUT,
    ),
    **_service(
        "Health",
        Heartbeat=own_node("hello.node"),
        ReportFailure=FLEET,
        GetNodeHealth=FLEET,
        ListNodeHealth=FLEET,
        WatchNodeHealth=FLEET,
        GetIncident=LEAVES_OUT,
        ListIncidents=LEAVES_OUT,
        WatchIncidents=LEAVES_OUT,
    ),
    **_service(
        "Checkpoint",
        BeginCheckpoint=RECORD,
        ReportPieces=RECORD,
        AbandonCheckpoint=RECORD,
        GetCheckpoint=LEAVES_OUT,
        ListCheckpoints=LEAVES_OUT,
        FindRestorable=LEAVES_OUT,
        ListDeletable=LEAVES_OUT,
        ConfirmDeleted=RECORD,
        MarkLost=RECORD,
        MarkIntact=RECORD,
    ),
    **_service(
        "Cost",
        CreatePrice=FLEET,
        ListPrices=FLEET,
        EndPrice=FLEET,
        DeletePrice=FLEET,
        CreateAdjustment=FLEET,
        ListAdjustments=FLEET,
        DeleteAdjustment=FLEET,
        GetCost=LEAVES_OUT,
        GetJobCost=LEAVES_OUT,
        GetStepHistory=LEAVES_OUT,
        GetDeviceHistory=FLEET,
        ExportCost=FLEET,
        GetForecast=LEAVES_OUT,
        GetUnitCosts=LEAVES_OUT,
        SetBudget=FLEET,
        ListBudgets=LEAVES_OUT,
        DeleteBudget=FLEET,
        GetLedger=FLEET,
        ListRecommendations=LEAVES_OUT,
        AcceptRecommendation=RECORD,
        DismissRecommendation=RECORD,
    ),
    **_service("Usage", ReportUsage=own_node("node")),
    **_service(
        "Router",
        CreateModel=RECORD,
        GetModel=LEAVES_OUT,
        ListModels=LEAVES_OUT,
        UpdateModel=RECORD,
        DeleteModel=RECORD,
        RollBackModel=RECORD,
        EstimateDeployment=RECORD,
        ListReplicas=LEAVES_OUT,
        WatchReplicas=LEAVES_OUT,
        Route=LEAVES_OUT,
        CreateApiKey=RECORD,
        ListApiKeys=LEAVES_OUT,
        DeleteApiKey=RECORD,
    ),
}

# Not changes, for the audit trail: reads, and what agents and Envoy say all the time. A denied attempt counts always.
_READS = (
    "Get",
    "List",
    "Watch",
    "Find",
    "Explain",
    "Estimate",
    "Plan",
    "Stream",
    "Route",
    "Probe",
    "Export",
    "Verify",
    "WhoAmI",
    "Download",
    "Read",
)
_ROUTINE = frozenset(
    {
        _method("Task", "Sync"),
        _method("Task", "Attach"),
        _method("Health", "Heartbeat"),
        _method("Health", "ReportFailure"),
        _method("Inventory", "RegisterNode"),
        _method("Inventory", "ReportCachedDataset"),
        _method("Inventory", "SetDatasetManifest"),
        _method("Checkpoint", "BeginCheckpoint"),
        _method("Checkpoint", "ReportPieces"),
        _method("Checkpoint", "ConfirmDeleted"),
        _method("Usage", "ReportUsage"),
    }
)

# "Not found" is what these are asked for: nobody tried to get at anything.
ASKS_WHETHER = frozenset({_method("Scheduler", "GetCode")})


def rule_of(method: str) -> OwnerRule:
    """The rule of a method; FLEET for methods that are none of the contract's (health, reflection, Envoy's), which own nothing."""
    return TABLE.get(method, FLEET)


def insists(method: str) -> bool:
    """Whether an answer counts only when the owner was asked for."""
    return rule_of(method).asks is Asks.SERVICER


def is_change(method: str) -> bool:
    """Whether a call that went well belongs in the audit trail."""
    return method in TABLE and method not in _ROUTINE and not _reads(method)


@cache  # as many as there are methods: asked of each call
def _reads(method: str) -> bool:
    return method.rpartition("/")[2].startswith(_READS)
