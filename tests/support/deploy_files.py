"""What the tests of deploy/ read: the folder, the versions, and which settings each process knows."""

import importlib
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"
SETTINGS = {
    "inventory": "whaleflux_inventory.config.InventorySettings",
    "scheduler": "whaleflux_scheduler.settings.Settings",
    "health-monitor": "whaleflux_health_monitor.config.HealthSettings",
    "checkpoint": "whaleflux_checkpoint.__main__.Settings",
    "inference-router": "whaleflux_inference_router.__main__.Settings",
    "agent-1": "whaleflux_agent.config.AgentSettings",
    "agent-2": "whaleflux_agent.config.AgentSettings",
}
VERSIONS = dict(
    line.split("=", 1)
    for line in (DEPLOY / "compose" / ".env").read_text().splitlines()
    if line and not line.startswith("#")
)


def settings_of(service):
    module, _, name = SETTINGS[service].rpartition(".")
    return getattr(importlib.import_module(module), name)


def unknown_settings(service, environment):
    known = {f"WHALEFLUX_{field.upper()}" for field in settings_of(service).model_fields} | {"WHALEFLUX_CONFIG"}
    return {name for name in environment if name.startswith("WHALEFLUX_")} - known
