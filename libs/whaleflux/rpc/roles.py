"""Who may call what: the one table of methods and roles. A method that is not here is denied to everybody.

A key is a full method ("/whaleflux.v1.InventoryService/GetNode") or a prefix that ends in "*"; the longest match
wins. `FRONTDOOR` is for calls that Envoy makes on its own account (access logs, discovery), never for calls it
forwards: its routes must not forward a method listed with it.
"""

from __future__ import annotations

from whaleflux.services import ROLES

ADMIN = "admin"
OPERATOR = "operator"
USER = "user"
VIEWER = "viewer"  # reads what is nobody's private content, changes nothing
APP = "app"
AGENT = "agent"
SCHEDULER = "scheduler"
HEALTH_MONITOR = "health_monitor"
CHECKPOINT = "checkpoint"
INFERENCE_ROUTER = "inference_router"
INVENTORY = "inventory"
CONSOLE = "console"
FRONTDOOR = "frontdoor"
ETCD = "etcd"
NATS = "nats"
SITE = "site"  # a site's own event server, by the name of its site
BACKUP = "backup"  # copies etcd and the bus' streams, and puts copies back
SCRAPER = "scraper"  # reads figures over HTTP (/metrics), calls nothing
ANONYMOUS = "anonymous"

SERVICES = frozenset(ROLES)
PEOPLE = frozenset({ADMIN, OPERATOR, USER})
OPERATORS = frozenset({ADMIN, OPERATOR})
HUMANS = PEOPLE | {VIEWER}  # PEOPLE: those of them who change things
KNOWN = SERVICES | HUMANS | {APP, AGENT}
LOGIN = HUMANS | {APP}  # whom records name: those who log in
GIVEN = (ADMIN, OPERATOR, USER, VIEWER, APP)  # roles that a user, an account or a token can have, the highest first
PARTS = frozenset(
    {FRONTDOOR, ETCD, NATS, SITE, BACKUP, SCRAPER}
)  # programs that are not ours; all but the first call nothing
READS_METRICS = OPERATORS | {SCRAPER}
CERTIFIED = KNOWN | PARTS  # roles that a certificate can name
ANYONE = CERTIFIED | {ANONYMOUS}

Table = dict[str, frozenset[str]]

_INVENTORY = "/whaleflux.v1.InventoryService/"
_SECRETS = "/whaleflux.v1.SecretService/"
_SCHEDULER = "/whaleflux.v1.SchedulerService/"
_HEALTH = "/whaleflux.v1.HealthService/"
_CHECKPOINT = "/whaleflux.v1.CheckpointService/"
_ROUTER = "/whaleflux.v1.RouterService/"
_COST = "/whaleflux.v1.CostService/"
_USAGE = "/whaleflux.v1.UsageService/"
_IDENTITY = "/whaleflux.v1.IdentityService/"
_READERS = HUMANS | SERVICES

TABLE: Table = {
    "/grpc.health.v1.Health/*": ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/*": KNOWN,
    "/grpc.reflection.v1.ServerReflection/*": KNOWN,
    # inventory: everybody reads, operators change, agents speak for their own node
    _INVENTORY + "*": OPERATORS,
    _INVENTORY + "List*": _READERS,
    _INVENTORY + "Get*": _READERS,
    _INVENTORY + "GetDataset": _READERS | {AGENT},  # what its tasks read
    _INVENTORY + "WatchNodes": _READERS,
    _INVENTORY + "ListJoinTokens": OPERATORS,
    _INVENTORY + "Join": ANYONE,
    _INVENTORY + "RenewCertificate": frozenset({AGENT}),
    _INVENTORY + "RegisterNode": frozenset({AGENT}),
    _INVENTORY + "PinDataset": PEOPLE,
    _INVENTORY + "UnpinDataset": PEOPLE,
    _INVENTORY + "ListNodePins": frozenset({AGENT}),
    _INVENTORY + "GetDatasetManifest": _READERS | {AGENT},
    _INVENTORY + "SetDatasetManifest": frozenset({AGENT}),
    _INVENTORY + "ReportCachedDataset": frozenset({AGENT}),
    _INVENTORY + "CreateLease": OPERATORS | {SCHEDULER},
    _INVENTORY + "EndLease": OPERATORS | {SCHEDULER},
    _INVENTORY + "CreateDataset": PEOPLE,
    _INVENTORY + "DeleteDataset": PEOPLE,
    # who people are: everybody asks who they are, people mind their own tokens, operators the others
    _IDENTITY + "*": OPERATORS,
    _IDENTITY + "GetLoginOptions": ANYONE,
    _IDENTITY + "Login": ANYONE,
    _IDENTITY + "RenewLogin": LOGIN,
    _IDENTITY + "Logout": LOGIN,
    _IDENTITY + "WhoAmI": KNOWN,
    _IDENTITY + "Get*": _READERS,
    _IDENTITY + "List*": _READERS,
    _IDENTITY + "CreateLoginLink": PEOPLE,
    _IDENTITY + "CreateToken": PEOPLE,
    _IDENTITY + "RevokeToken": PEOPLE,
    # secrets: whose they are, the servicer asks; their values go to the scheduler alone, for the agent of a task
    _SECRETS + "*": PEOPLE,
    _SECRETS + "GetSecret": HUMANS,
    _SECRETS + "ListSecrets": HUMANS,
    _SECRETS + "OpenSecrets": frozenset({SCHEDULER, INFERENCE_ROUTER}),  # whose values the scheduler alone is given
    _SECRETS + "RewrapSecrets": frozenset({ADMIN}),
    # what happened, wherever: whoever may read the records may read their history
    "/whaleflux.v1.EventService/*": _READERS,
    # who changed what: everybody reads what is written down of their own calls, operators all of it
    "/whaleflux.v1.AuditService/ListAudit": HUMANS,
    "/whaleflux.v1.AuditService/*": OPERATORS,
    # scheduler: people submit and cancel, the router runs replicas as jobs
    _SCHEDULER + "*": PEOPLE | {INFERENCE_ROUTER},
    _SCHEDULER + "ExplainJob": _READERS,
    _SCHEDULER + "HoldJob": PEOPLE,
    _SCHEDULER + "ReleaseJob": PEOPLE,
    _SCHEDULER + "RequeueJob": PEOPLE,
    _SCHEDULER + "SetJobPriority": PEOPLE,
    _SCHEDULER + "AttachJob": PEOPLE,  # commands inside of jobs are for those who may also cancel them
    _SCHEDULER + "CreateQueue": OPERATORS | {INFERENCE_ROUTER},
    _SCHEDULER + "DeleteQueue": OPERATORS,
    _SCHEDULER + "UpdateQueue": OPERATORS,
    _SCHEDULER + "PlanRay": PEOPLE,
    _SCHEDULER + "PlanRebalance": OPERATORS,
    _SCHEDULER + "PlanTraining": PEOPLE,
    _SCHEDULER + "PlanServing": PEOPLE | {INFERENCE_ROUTER},
    _SCHEDULER + "PlanBurst": OPERATORS,
    _SCHEDULER + "ApplyRebalance": OPERATORS,
    _SCHEDULER + "CreateReservation": PEOPLE,  # users within what their queue is guaranteed, which the servicer asks
    _SCHEDULER + "UpdateReservation": PEOPLE,
    _SCHEDULER + "DeleteReservation": PEOPLE,
    _SCHEDULER + "CreateRayCluster": PEOPLE,
    _SCHEDULER + "UpdateRayCluster": PEOPLE,
    _SCHEDULER + "DeleteRayCluster": PEOPLE,
    _SCHEDULER + "List*": _READERS,
    _SCHEDULER + "Get*": _READERS,
    _SCHEDULER + "WatchJobs": _READERS,
    _SCHEDULER + "UploadCode": PEOPLE,
    _SCHEDULER + "DownloadCode": frozenset({AGENT}),  # of tasks placed on its node: `code_transfer` asks for that
    "/whaleflux.v1.TaskService/Sync": frozenset({AGENT}),
    "/whaleflux.v1.TaskService/Attach": frozenset({AGENT}),
    "/whaleflux.v1.TaskService/OpenTaskSecrets": frozenset({AGENT}),
    "/whaleflux.v1.TaskService/FindDatasetReader": frozenset({AGENT}),  # of its own site
    "/whaleflux.v1.NodeService/Probe": frozenset({HEALTH_MONITOR, ADMIN, OPERATOR}),  # neighbours look at the port only
    # agents of one site, among themselves
    "/whaleflux.v1.PieceService/ListPieces": frozenset({AGENT}),
    "/whaleflux.v1.PieceService/ReadPiece": frozenset({AGENT}),
    # health_monitor alone judges; the scheduler asks it what a failure means
    _HEALTH + "Heartbeat": frozenset({AGENT}),
    _HEALTH + "ReportFailure": frozenset({SCHEDULER}),
    _HEALTH + "Get*": _READERS,
    _HEALTH + "List*": _READERS,
    _HEALTH + "Watch*": _READERS,
    # checkpoint: written by agents on behalf of their ranks
    _CHECKPOINT + "*": frozenset({AGENT}),
    _CHECKPOINT + "Get*": _READERS | {AGENT},
    _CHECKPOINT + "List*": _READERS | {AGENT},
    _CHECKPOINT + "FindRestorable": frozenset({AGENT, SCHEDULER}) | PEOPLE,
    # inference_router
    # console: everybody reads what is theirs, operators declare prices
    _COST + "*": OPERATORS,
    _COST + "List*": _READERS,
    _COST + "Get*": _READERS,
    _COST + "AcceptRecommendation": PEOPLE,  # of their own jobs; the fleet's are operators'
    _COST + "DismissRecommendation": PEOPLE,
    _USAGE + "ReportUsage": frozenset({AGENT}),
    _ROUTER + "*": OPERATORS,
    _ROUTER + "Get*": _READERS,
    _ROUTER + "List*": _READERS,
    _ROUTER + "WatchReplicas": _READERS,
    _ROUTER + "ListApiKeys": PEOPLE,
    _ROUTER + "CreateApiKey": PEOPLE,
    _ROUTER + "DeleteApiKey": PEOPLE,
    _ROUTER + "Route": PEOPLE | {APP},
    _ROUTER + "CreateModel": PEOPLE,
    _ROUTER + "UpdateModel": PEOPLE,
    _ROUTER + "DeleteModel": PEOPLE,
    _ROUTER + "RollBackModel": PEOPLE,
    _ROUTER + "EstimateDeployment": PEOPLE,
    # what Envoy asks on its own account
    "/envoy.service.accesslog.v3.AccessLogService/*": frozenset({FRONTDOOR}),
    "/envoy.service.endpoint.v3.EndpointDiscoveryService/*": frozenset({FRONTDOOR}),
}


def allowed(method: str, table: Table) -> frozenset[str]:
    """The roles that may call `method`; none when the table does not know it."""
    if method in table:
        return table[method]
    prefixes = [key for key in table if key.endswith("*") and method.startswith(key[:-1])]
    return table[max(prefixes, key=len)] if prefixes else frozenset()


def within(role: str, limit: str) -> bool:
    """Whether `role` may do nothing that `limit` may not: what one may give, and what a certificate may still say. App is no reader."""
    if role == limit:
        return True
    if role == APP:
        return limit in PEOPLE
    return role in HUMANS and limit in HUMANS and GIVEN.index(role) >= GIVEN.index(limit)
