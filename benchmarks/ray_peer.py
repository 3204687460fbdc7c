"""Ray's own autoscaler (v2) decides: run by an interpreter that has Ray, told its cases on standard input, answers in JSON.

`{"types": [{"name", "resources", "labels"}], "selectors": whether, "cases": [{"singles": [[resources, count]], "gangs": [[bundles, strategy,
count]]}]}` -> `{"ray": version, "cases": [{"launch": {type: count}, "cpu_s", "infeasible"}]}`. Nothing is started: it is the scheduler's decision
alone, without nodes that are there. With `selectors` each bundle has a label selector of the node types one of whose GPUs can hold it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def main() -> int:
    import ray

    asked = json.load(sys.stdin)
    fits = (lambda wanted: fitting(asked["types"], wanted)) if asked["selectors"] else (lambda _: None)
    answers = [decided(asked["types"], case, fits) for case in asked["cases"]]
    json.dump({"ray": ray.__version__, "cases": answers}, sys.stdout)
    return 0


def fitting(types: list[dict[str, Any]], wanted: dict[str, float]) -> Any:
    """A label selector of the types whose GPUs have as much memory as a bundle wants of each."""
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    each = wanted.get("gpu_memory", 0) / max(1, int(wanted.get("GPU", 0)))
    names = [one["name"] for one in types if each <= one["resources"]["gpu_memory"] / one["resources"]["GPU"]]
    return [[("type", LabelSelectorOperator.Value("LABEL_OPERATOR_IN"), names)]]


def decided(
    types: list[dict[str, Any]], case: dict[str, Any], fits: Callable[[dict[str, float]], Any]
) -> dict[str, Any]:
    """What Ray would launch for one case."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    most = 100_000
    configs = {
        one["name"]: NodeTypeConfig(
            name=one["name"],
            min_worker_nodes=0,
            max_worker_nodes=most,
            resources=one["resources"],
            labels=one["labels"],
        )
        for one in types
    }
    make = ResourceRequestUtil.make
    singles = [
        ResourceRequestByCount(request=make(wanted, label_selectors=fits(wanted)), count=count)
        for wanted, count in case["singles"]
    ]
    request = SchedulingRequest(
        node_type_configs=configs,
        max_num_nodes=most,
        resource_requests=singles,
        gang_resource_requests=gangs_of(case["gangs"], fits),
        cluster_resource_constraints=[],
        current_instances=[],
        disable_launch_config_check=True,
    )
    begun = time.process_time()
    reply = ResourceDemandScheduler().schedule(request)
    return {
        "cpu_s": time.process_time() - begun,
        "launch": {one.instance_type: one.count for one in reply.to_launch},
        "infeasible": len(reply.infeasible_resource_requests) + len(reply.infeasible_gang_resource_requests),
    }


def gangs_of(asked: list[Any], fits: Callable[[dict[str, float]], Any]) -> list[Any]:
    """Placement groups as Ray's GCS tells them to its autoscaler."""
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest

    kinds = ResourceRequestUtil.PlacementConstraintType
    of = {"STRICT_PACK": kinds.AFFINITY, "STRICT_SPREAD": kinds.ANTI_AFFINITY}
    found = []
    for at, (bundles, strategy, count) in enumerate(asked):
        for one in range(count):
            constraint = [(of[strategy], "_PG", f"{at}-{one}")] if strategy in of else None
            requests = [
                ResourceRequestUtil.make(wanted, constraint, fits(wanted)) for wanted, n in bundles for _ in range(n)
            ]
            found.append(GangResourceRequest(requests=requests))
    return found


if __name__ == "__main__":
    sys.exit(main())
