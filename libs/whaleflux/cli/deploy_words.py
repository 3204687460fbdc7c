"""What is said of models that are on their way: to their sites, and from one engine to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whaleflux import names
from whaleflux.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from whaleflux.v1 import router_pb2


def wanted_replicas(model: router_pb2.Model) -> int:
    """How many it is to have, of all sites together, or servers that run elsewhere."""
    from whaleflux.manifests import model_checks

    return sum(model_checks.replicas_of(model).values())


def rollout_state(model: router_pb2.Model) -> str:
    """DONE, SHIFTING, ...; "-" where its engine was never changed."""
    from whaleflux.v1 import router_pb2

    found = output.enum_name(router_pb2.RolloutState, model.rollout.state, "ROLLOUT_STATE_")
    return "-" if found == "UNSPECIFIED" else f"v{model.rollout.to_version} {found}"


def show_sites(estimates: Iterable[router_pb2.SiteEstimate]) -> None:
    """A line for each site: when it is ready, and how that comes about."""
    rows = [
        [names.last(one.site) or "any", f"{one.ready_replicas}/{one.replicas}", ready_in(one), one.problem or one.why]
        for one in estimates
    ]
    output.table(["SITE", "READY", "READY IN", "WHY"], rows)


def ready_in(one: router_pb2.SiteEstimate) -> str:
    """Seconds; "not known" where that is so."""
    if one.problem:
        return "never"
    return f"{one.ready_in.ToNanoseconds() / 1e9:.0f} s" if one.HasField("ready_in") else "not known"
