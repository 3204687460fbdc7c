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
KNOWN = SERVICES | PEOPLE | {APP, AGENT, FRONTDOOR}
ANYONE = KNOWN | {ANONYMOUS}

Table = dict[str, frozenset[str]]

TABLE: Table = {
    "/grpc.health.v1.Health/*": ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/*": KNOWN,
    "/grpc.reflection.v1.ServerReflection/*": KNOWN,
}


def allowed(method: str, table: Table) -> frozenset[str]:
    """The roles that may call `method`; none when the table does not know it."""
    if method in table:
        return table[method]
    prefixes = [key for key in table if key.endswith("*") and method.startswith(key[:-1])]
    return table[max(prefixes, key=len)] if prefixes else frozenset()
