"""Pages that are made of tables which live in services."""

from __future__ import annotations

import importlib
from typing import Any

from whaleflux.config import ServiceSettings, table
from whaleflux.rpc import owners, roles
from whaleflux.services import ROLES

_HEAD = """# Settings of services and agents

<!-- Made from each process's Settings class by `make generate`. -->

A setting is a flag (`--drain-grace-s 5`), a variable (`WHALEFLUX_DRAIN_GRACE_S=5`) and a key of the YAML or TOML file that
`--config` or `WHALEFLUX_CONFIG` names; flags win over variables, variables over the file. `python -m whaleflux_scheduler
--help` lists them, `--print-config` shows the result without secrets, and unknown ones are refused with the nearest name.

## All of them

"""


def settings() -> str:
    """docs/guide/settings.md."""
    parts = [_HEAD + table(ServiceSettings)]
    for role in (*ROLES, "agent"):
        kind: Any = importlib.import_module(f"whaleflux_{role}.settings").Settings
        if len(kind.model_fields) > len(ServiceSettings.model_fields):
            parts.append(f"## {role}\n\n" + table(kind, leave_out=ServiceSettings.model_fields))
    return "\n".join(parts)


_PERMISSIONS = """# Permissions

<!-- Made from libs/whaleflux/rpc/roles.py and owners.py by `make generate`. -->

Two questions are asked for each call: may this *role* call the method, and *whose things* does it touch? The first table says what
roles there are, the others answer both for every method. What neither table knows is denied to everybody.

| role | who |
|---|---|
| `admin`, `operator` | run the fleet: owners are not asked of them |
| `user` | submits jobs, declares models, datasets, secrets: touches their own, and what is in a queue that names a group of theirs |
| `viewer` | reads states and costs of everything, nothing private (environment, command, output), changes nothing |
| `app` | an application |
| `agent` | a node's: its own node, and what is placed there |
| services | the parts of the control plane, by their certificates |
| nobody | without a certificate: joins, logs in |
"""


def permissions() -> str:
    """docs/guide/permissions.md."""
    parts = [_PERMISSIONS]
    for service in dict.fromkeys(method.split("/")[1] for method in owners.TABLE):
        rows = [_permission(method) for method in owners.TABLE if method.split("/")[1] == service]
        head = f"\n## {service.rpartition('.')[2]}\n\n| method | roles | whose things |\n|---|---|---|\n"
        parts.append(head + "".join(rows))
    return "".join(parts)


def _permission(method: str) -> str:
    rule = owners.TABLE[method]
    return f"| {method.rpartition('/')[2]} | {_who(roles.allowed(method, roles.TABLE))} | {rule.about} |\n"


def _who(allowed: frozenset[str]) -> str:
    """Roles in few words: people first, all services as one."""
    if roles.ANONYMOUS in allowed:
        return "everybody, also without a certificate"
    order = (roles.ADMIN, roles.OPERATOR, roles.USER, roles.VIEWER, roles.APP, roles.AGENT)
    shown = [role for role in order if role in allowed]
    services = sorted(allowed & roles.SERVICES)
    return ", ".join(shown + (["services"] if len(services) > 3 else services))
