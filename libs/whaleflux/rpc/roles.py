"""Who may call what: the one table of methods and roles. A method that is not here is denied to everybody.

A key is a full method ("/whaleflux.v1.InventoryService/GetNode") or a prefix that ends in "*"; the longest match
wins. `FRONTDOOR` is for calls that Envoy makes on its own account (access logs, discovery), never for calls it
forwards: its routes must not forward a method listed with it.
"""

from __future__ import annotations

ADMIN = "admin"
OPERATOR = "operator"
USER = "user"
APP = "app"
AGENT = "agent"
SCHEDULER = "scheduler"
HEALTH_MONITOR = "health_monitor"
CHECKPOINT = "checkpoint"
INFERENCE_ROUTER = "inference_router"
INVENTORY = "inventory"
CONSOLE = "console"
FRONTDOOR = "frontdoor"
ANONYMOUS = "anonymous"

SERVICES = frozenset({SCHEDULER, HEALTH_MONITOR, CHECKPOINT, INFERENCE_ROUTER, INVENTORY, CONSOLE})
PEOPLE = frozenset({ADMIN, OPERATOR, USER})
OPERATORS = frozenset({ADMIN, OPERATOR})
KNOWN = SERVICES | PEOPLE | {APP, AGENT}
CERTIFIED = KNOWN | {FRONTDOOR}  # roles that a certificate can name
ANYONE = CERTIFIED | {ANONYMOUS}

Table = dict[str, frozenset[str]]

_INVENTORY = "/whaleflux.v1.InventoryService/"
_SCHEDULER = "/whaleflux.v1.SchedulerService/"
_HEALTH = "/whaleflux.v1.HealthService/"
_CHECKPOINT = "/whaleflux.v1.CheckpointService/"
_ROUTER = "/whaleflux.v1.RouterService/"
_READERS = PEOPLE | SERVICES

TABLE: Table = {
    "/grpc.health.v1.Health/*": ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/*": KNOWN,
    "/grpc.reflection.v1.ServerReflection/*": KNOWN,
    # inventory: everybody reads, operators change, agents speak for their own node
    _INVENTORY + "*": OPERATORS,
    _INVENTORY + "List*": _READERS | {AGENT},
    _INVENTORY + "Get*": _READERS | {AGENT},
    _INVENTORY + "WatchNodes": _READERS,
    _INVENTORY + "ListJoinTokens": OPERATORS,
    _INVENTORY + "Join": ANYONE,
    _INVENTORY + "RenewCertificate": frozenset({AGENT}),
    _INVENTORY + "RegisterNode": frozenset({AGENT}),
    _INVENTORY + "ReportCachedDataset": frozenset({AGENT}),
    _INVENTORY + "CreateDataset": PEOPLE,
    # scheduler: people submit and cancel, the router runs replicas as jobs
    _SCHEDULER + "*": PEOPLE | {INFERENCE_ROUTER},
    _SCHEDULER + "CreateQueue": OPERATORS | {INFERENCE_ROUTER},
    _SCHEDULER + "DeleteQueue": OPERATORS,
    _SCHEDULER + "List*": _READERS,
    _SCHEDULER + "Get*": _READERS,
    _SCHEDULER + "WatchJobs": _READERS,
    "/whaleflux.v1.TaskService/Sync": frozenset({AGENT}),
    "/whaleflux.v1.NodeService/Probe": frozenset({HEALTH_MONITOR, AGENT, ADMIN, OPERATOR}),
    # health_monitor alone judges; the scheduler asks it what a failure means
    _HEALTH + "Heartbeat": frozenset({AGENT}),
    _HEALTH + "ReportFailure": frozenset({SCHEDULER}),
    _HEALTH + "Get*": _READERS,
    _HEALTH + "List*": _READERS,
    _HEALTH + "WatchNodeHealth": _READERS,
    # checkpoint: written by agents on behalf of their ranks
    _CHECKPOINT + "*": frozenset({AGENT}),
    _CHECKPOINT + "Get*": _READERS | {AGENT},
    _CHECKPOINT + "List*": _READERS | {AGENT},
    _CHECKPOINT + "FindRestorable": frozenset({AGENT, SCHEDULER}) | PEOPLE,
    # inference_router
    _ROUTER + "*": OPERATORS,
    _ROUTER + "Get*": _READERS,
    _ROUTER + "List*": _READERS,
    _ROUTER + "ListApiKeys": OPERATORS,
    _ROUTER + "Route": PEOPLE | {APP},
    _ROUTER + "CreateModel": PEOPLE,
    _ROUTER + "UpdateModel": PEOPLE,
    _ROUTER + "DeleteModel": PEOPLE,
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
