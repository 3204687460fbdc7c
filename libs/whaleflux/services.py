"""The services of the control plane, in one table.

The embedded suite starts what stands here, in this order; identities, addresses in settings, the front door's routes, and the
parts of deploy/ and docs/ that name each service are made from it (`make generate`) or compared with it by a test.
`docs/next-change.md` lists the other places that a new service touches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Service:
    """One service. `role` is its identity, its folder under services/ and the setting that names its address.

    Sizes are for deploy/: what a replica is given, and what it asks a scheduler of containers for.
    """

    role: str
    about: str  # what it knows, for people
    proto: str  # its file of the contract, which names the stub of clients too
    grpc: tuple[str, ...]  # services of the contract that the front door sends to it
    reaches_nodes: bool = False  # dials agents or replicas, wherever they are
    also: Mapping[str, str] = field(
        default_factory=dict
    )  # what else people call there: file of the contract -> service
    tells: tuple[str, ...] = ()  # kinds of resources whose events it alone may publish, as in their subjects
    reads_streams: tuple[str, ...] = ()  # of the event bus, from which it answers questions
    keeps_streams: bool = False  # sets the bounds of the bus' streams, of sites' too
    accounts: bool = False  # writes what jobs cost
    takes_usage: bool = False  # publishes what agents saw of their GPUs
    keeps_code: bool = False  # holds the folders that travel with jobs
    keeps_ledger: bool = False  # of what was used and what it cost, in a folder that outlives its replicas
    signs: bool = False  # holds the authority that admits agents
    reflects: bool = False  # answers gRPC reflection for all of them, behind the front door
    http: Mapping[str, int] = field(default_factory=dict)  # HTTP over mTLS for the front door alone: setting -> port
    memory_mib: int = 384
    asked_memory_mib: int = 192
    asked_cpu_millicores: int = 100

    @property
    def host(self) -> str:
        """Its name where names may not have underscores: hosts, images, extras, objects of Kubernetes."""
        return self.role.replace("_", "-")

    @property
    def package(self) -> str:
        return f"whaleflux_{self.role}"


GRPC_PORT, METRICS_PORT = 7000, 9000  # of every service, where it has a host of its own
FRONTDOOR_GRPC_PORT, FRONTDOOR_HTTP_PORT = 7443, 8080  # what people, agents and clients dial
# Host of the routing policy: a name beside its service's, so that it can be bound where the front door alone is.
POLICY_HOST = "routing-policy"

SERVICES: tuple[Service, ...] = (
    Service(
        "inventory",
        "Sites, nodes, datasets, secrets, and who may join.",
        "inventory",
        ("InventoryService", "EventService", "IdentityService", "SecretService", "AuditService"),
        also={
            "events": "EventService",
            "identity": "IdentityService",
            "secrets": "SecretService",
            "audit": "AuditService",
        },
        tells=("site", "node", "dataset", "jointoken", "offer", "lease"),
        reads_streams=("EVENTS", "ACCOUNTING", "AUDIT"),
        keeps_streams=True,
        signs=True,
        reflects=True,
    ),
    Service(
        "health_monitor",
        "What is alive, what is broken, what is being done about it.",
        "health",
        ("HealthService",),
        tells=("node", "incident"),
        reaches_nodes=True,
        asked_cpu_millicores=200,
    ),
    Service(
        "checkpoint",
        "What can be restored, and from where.",
        "checkpoint",
        ("CheckpointService",),
        tells=("checkpoint",),
    ),
    Service(
        "scheduler",
        "Who runs where, and why.",
        "scheduler",
        ("SchedulerService", "TaskService"),
        tells=("job", "queue", "reservation", "raycluster"),
        reads_streams=("ACCOUNTING",),
        accounts=True,
        keeps_code=True,
        memory_mib=1024,
        asked_memory_mib=512,
        asked_cpu_millicores=500,
    ),
    Service(
        "console",
        "What everything costs, and what of it was wasted.",
        "console",
        ("CostService", "UsageService"),
        tells=("price", "adjustment", "budget", "recommendation"),
        reads_streams=("USAGE",),
        takes_usage=True,
        keeps_ledger=True,
        memory_mib=1024,
        asked_memory_mib=384,
    ),
    Service(
        "inference_router",
        "Where each inference request goes.",
        "router",
        ("RouterService",),
        tells=("model", "replica", "apikey"),
        reaches_nodes=True,
        http={"policy_listen": 7010},
        memory_mib=512,
        asked_cpu_millicores=500,
    ),
)
ROLES: tuple[str, ...] = tuple(service.role for service in SERVICES)
BY_ROLE: dict[str, Service] = {service.role: service for service in SERVICES}
BY_GRPC: dict[str, Service] = {name: service for service in SERVICES for name in service.grpc}
# A tool asks one server for everything: https://github.com/grpc/grpc/blob/master/doc/server-reflection.md
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
REFLECTING: Service = next(service for service in SERVICES if service.reflects)
