"""What waits in a Ray cluster and what it has, as JSON lines: a program for the interpreter that has the cluster's Ray, started by its path.

    python reader.py --address HOST:PORT [--every 1.0] [--once]

It prints a line (RayDemand of the contract) at the start and whenever the demand, the nodes or what is free on them changed, and
imports nothing of WhaleFlux: the interpreter is the job's. Exit codes: 0 done, 2 wrong input, 3 nobody answers, 4 no Ray here. Ray's own names
of these messages are private to it; they are as in 2.60 (`ray.core.generated.autoscaler_pb2`), and what a version lacks is left out.
"""

import argparse
import json
import socket
import sys
import time
from collections import Counter
from typing import Any

CONNECT_S = 5.0
NOT_IN = "LABEL_OPERATOR_NOT_IN"


def main() -> int:
    """Reads until it is stopped, or once."""
    parser = argparse.ArgumentParser(prog="reader.py")
    parser.add_argument("--address", required=True)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    host, _, port = options.address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        print(f"{options.address!r} is no HOST:PORT", file=sys.stderr)
        return 2
    try:  # Ray's own client waits for a minute, and ends the process then
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        print(f"nobody answers at {options.address}: {error.strerror or error}", file=sys.stderr)
        return 3
    try:
        import ray
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2
    except ImportError as error:
        print(f"{sys.executable} has no Ray: {error}", file=sys.stderr)
        return 4
    client, told = GcsClient(address=options.address), None
    while True:
        try:
            reply = autoscaler_pb2.GetClusterResourceStateReply.FromString(client.get_cluster_resource_state())
        except Exception as error:  # Ray says in many ways that the GCS is gone
            print(f"the GCS at {options.address} does not answer: {str(error)[:300]}", file=sys.stderr)
            return 3
        found = demand_of(reply.cluster_resource_state, autoscaler_pb2.NodeStatus.Name)
        if (key := without_time(found)) != told:
            told = key
            print(json.dumps({**found, "ray_version": ray.__version__}), flush=True)
        if options.once:
            return 0
        time.sleep(options.every)


def without_time(found: dict[str, Any]) -> str:
    """What has to differ for a line to be worth it."""
    nodes = [{key: value for key, value in node.items() if key != "idle_ms"} for node in found["nodes"]]
    return json.dumps({**found, "version": 0, "nodes": nodes}, sort_keys=True)


def demand_of(state: Any, status_name: Any) -> dict[str, Any]:
    """A ClusterResourceState as the contract's RayDemand in JSON."""
    constraints = [one for group in state.cluster_resource_constraints for one in group.resource_requests]
    return {
        "bundles": [bundle(one.request, one.count) for one in state.pending_resource_requests],
        "gangs": gangs(state.pending_gang_resource_requests),
        "constraints": [bundle(one.request, one.count) for one in constraints],
        "nodes": [node(one, status_name) for one in state.node_states],
        "session": state.cluster_session_name,
        "version": state.cluster_resource_state_version,
    }


def bundle(request: Any, count: int) -> dict[str, Any]:
    """A ResourceRequest, so often."""
    wishes = ([rule(one) for one in each.label_constraints] for each in getattr(request, "label_selectors", ()))
    selectors = [{"rules": rules} for rules in wishes if rules]  # Ray sends an empty one for none
    found: dict[str, Any] = {"resources": dict(request.resources_bundle), "count": max(1, count)}
    return {**found, "selectors": selectors} if selectors else found


def rule(constraint: Any) -> dict[str, Any]:
    """A LabelSelectorConstraint."""
    operator = constraint.DESCRIPTOR.fields_by_name["operator"].enum_type.values_by_number[constraint.operator].name
    return {"key": constraint.label_key, "values": list(constraint.label_values), "excludes": operator == NOT_IN}


def gangs(requests: Any) -> list[dict[str, Any]]:
    """Placement groups, equal ones together: the bundles as Ray's own autoscaler takes them, the strategy from what is said of it."""
    counts: Counter[str] = Counter()
    for gang in requests:
        selected = getattr(gang, "bundle_selectors", ())
        bundles = list(selected[0].resource_requests) if selected else list(gang.requests)
        alike = Counter(json.dumps(bundle(one, 1), sort_keys=True) for one in bundles)
        found = [{**json.loads(text), "count": count} for text, count in sorted(alike.items())]
        counts[json.dumps({"bundles": found, "strategy": strategy(gang.details, bundles)}, sort_keys=True)] += 1
    return [{**json.loads(text), "count": count} for text, count in counts.items()]


def strategy(details: str, bundles: Any) -> str:
    """`details` is "{id of the group}:{strategy}|{state}"; where it is not, constraints tell."""
    said = details.rpartition(":")[2].partition("|")[0]
    if said in ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"):
        return f"RAY_STRATEGY_{said}"
    constraints = [one for each in bundles for one in each.placement_constraints]
    if any(one.HasField("anti_affinity") for one in constraints):
        return "RAY_STRATEGY_STRICT_SPREAD"
    return "RAY_STRATEGY_STRICT_PACK" if constraints else "RAY_STRATEGY_PACK"


def node(state: Any, status_name: Any) -> dict[str, Any]:
    """A NodeState."""
    return {
        "id": state.node_id.hex(),
        "status": status_name(state.status),
        "total": dict(state.total_resources),
        "available": dict(state.available_resources),
        "labels": {**dict(state.dynamic_labels), **dict(getattr(state, "labels", {}))},
        "instance": state.instance_id,
        "node_type": state.ray_node_type_name,
        "idle_ms": state.idle_duration_ms,
        "activity": list(state.node_activity)[:20],
    }


if __name__ == "__main__":
    sys.exit(main())
