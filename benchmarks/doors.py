"""By which door a user reaches what each benchmark measures: a command, a job or model file's field, or none yet.

`waits_for` names what a figure waits for where no door is open; the README and docs/not-yet.md say so beside it, held to that by
tests/unit/test_doors.py. Code that only such benchmarks use lives in `benchmarks/placement_lab`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Door:
    """`commands` of the CLI and `fields` of job files through which the measured code runs."""

    commands: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    waits_for: str = ""


NO_DOOR = "not reachable from a job file yet"  # what the README, the docs and reports say then
_TABLE = "moves of shares"
DOORS: dict[str, Door] = {
    "authz_matrix": Door(commands=("login", "submit", "cancel")),
    "first_day": Door(commands=("submit", "logs", "exec", "port-forward", "deploy", "history")),
    "cli_latency": Door(commands=("up", "status")),
    "front_door_abuse": Door(commands=("up", "deploy")),
    "trust_overhead": Door(commands=("cancel", "submit")),
    "idle_cost": Door(commands=("up",)),
    "usage_h200": Door(commands=("agent",)),
    "isolation_start": Door(commands=("submit",)),
    "control_plane": Door(commands=("submit",)),
    "fleet_month": Door(commands=("simulate",)),
    "backfill": Door(commands=("submit", "explain", "simulate"), fields=("expected", "time_limit", "gpus")),
    "kueue_generators": Door(commands=("submit",), fields=("gpus", "priority", "place")),
    "scheduler_speed": Door(commands=("submit",), fields=("gpus", "priority")),
    "scheduler_store": Door(commands=("submit",)),
    "leader_loss": Door(commands=("submit",)),
    "decision_scale": Door(commands=("submit",), fields=("gpus", "priority")),
    "plan_accuracy": Door(commands=("fits", "plan")),
    "plan_mixed": Door(commands=("plan",)),
    "plan_placement": Door(commands=("submit",), fields=("parallel.tensor", "place")),
    "plan_reality": Door(commands=("calibrate",)),
    "plan_search": Door(commands=("plan", "fits")),
    "elastic": Door(commands=("submit",), fields=("elastic.min", "elastic.max", "elastic.speeds")),
    "elastic_mixed": Door(commands=("submit",), fields=("gpu.any", "elastic.min", "elastic.speeds")),
    "topology": Door(commands=("submit",), fields=("gpus", "place")),
    "placement_invariants": Door(commands=("submit",)),
    "fairness": Door(commands=("simulate", "submit")),
    "idle_gpus": Door(commands=("simulate", "submit")),
    "ray_drain": Door(commands=("ray",)),
    "ray_pool": Door(commands=("ray",)),
    "ray_resize": Door(commands=("ray",)),
    "ray_start": Door(commands=("ray",)),
    "rebalance": Door(commands=("submit",), fields=("checkpoint.every",)),
    "packing": Door(waits_for=_TABLE),
    "packing_churn": Door(waits_for=_TABLE),
    "mixed_pools": Door(waits_for="planning over pools of rented and owned GPUs"),
    "burst": Door(commands=("offers", "leases", "burst")),
    "ledger_identity": Door(commands=("cost",)),
    "forecast_error": Door(commands=("cost",)),
    "waste_attribution": Door(commands=("waste",)),
    "tco_replay": Door(commands=("cost",)),
    "deploy_models": Door(commands=("deploy", "rollout")),
    "dataset_peers": Door(commands=("submit",), fields=("data",)),
    "dataset_faults": Door(commands=("submit",), fields=("data",)),
    "dataset_pull": Door(commands=("submit",), fields=("data",)),
    "ledger_speed": Door(commands=("cost",)),
    "locality": Door(commands=("submit",), fields=("data",)),
}
