"""What a change of a model's record comes to: what of it begins a rollout, what is refused, and what a rollback restores."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from datetime import datetime

from whaleflux import names
from whaleflux.errors import FailedPrecondition
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import convert, rights
from whaleflux_inference_router.core.rollout import UNDER_WAY


def fixed_queue(before: pb.Model, after: pb.Model) -> str:
    """Where its replicas run. Raises FailedPrecondition for another queue, in which it would be for others."""
    if after.queue and after.queue != before.queue and rights.queue_of(after) != rights.queue_of(before):
        raise FailedPrecondition(
            f"{before.name} runs in {names.queue(rights.queue_of(before))}, which cannot change; delete the model and create it again",
            reason=ErrorReason.ENGINE_FIXED,
            metadata={"model": before.name},
        )
    return before.queue


def clear_output(model: pb.Model) -> None:
    """What only the router says of a model."""
    model.ready_replicas = model.version = 0
    model.ClearField("rollout")
    model.ClearField("measures")
    model.engine.gpu_memory_bytes = 0


def same_engine(before: pb.Model, after: pb.Model) -> bool:
    """Whether replicas that run stay as they are: neither their engine nor what their sites make of it differs.

    Sites that come, go, or change their number of replicas change no replica; but where none of them stays, others are to answer first.
    """

    def parts(model: pb.Model) -> tuple[pb.Engine, dict[str, pb.ModelSite]]:
        engine, sites = pb.Engine(), dict[str, pb.ModelSite]()
        engine.CopyFrom(model.engine)
        engine.gpu_memory_bytes = 0
        engine.gpus = engine.gpus or (0 if engine.shape else 1)
        del engine.addresses[:]  # servers that run elsewhere come and go
        for site in model.sites:
            sites[site.site] = pb.ModelSite()
            sites[site.site].CopyFrom(site)
            sites[site.site].replicas = 0
        return engine, sites

    (old, old_sites), (new, new_sites) = parts(before), parts(after)
    if old_sites.keys() != new_sites.keys() and not old_sites.keys() & new_sites.keys():
        return False
    return (
        old == new
        and _sized_alike(before, after)
        and all(old_sites[site] == new_sites[site] for site in old_sites.keys() & new_sites.keys())
    )


def _sized_alike(before: pb.Model, after: pb.Model) -> bool:
    """Whether what decides on the GPUs of replicas is the same. How many share the requests is not asked: what runs stays."""
    if not after.engine.shape:
        return True
    return (before.objective, before.context_window_tokens) == (after.objective, after.context_window_tokens)


def check_may_roll(before: pb.Model, after: pb.Model) -> None:
    """Raises FailedPrecondition where the engine cannot change now."""
    if before.engine.addresses or after.engine.addresses:
        raise FailedPrecondition(
            f"the engine of {before.name} cannot change while servers that run elsewhere serve it; delete the model and create it again, or "
            "serve the new engine under another name",
            reason=ErrorReason.ENGINE_FIXED,
            metadata={"model": before.name},
        )
    if convert.stage_of(before) in UNDER_WAY:
        model = names.last(before.name)
        raise FailedPrecondition(
            f"v{before.rollout.to_version} of {before.name} is being rolled out; wait for it (whaleflux rollout status {model}), or end it with: "
            f"whaleflux rollout undo {model}",
            reason=ErrorReason.WRONG_STATE,
            metadata={"name": before.name},
        )


def begin(changed: pb.Model, before: pb.Model, order: list[str], now: datetime) -> None:
    """The record says that the engine of `changed` is to take the place of that of `before`."""
    version = max(before.version or 1, before.rollout.to_version) + 1
    changed.version = version
    changed.rollout.Clear()
    changed.rollout.state = pb.ROLLOUT_STATE_SURGING
    changed.rollout.to_version, changed.rollout.from_version = version, before.version or 1
    changed.rollout.from_engine.CopyFrom(before.engine)
    changed.rollout.from_sites.extend(before.sites)
    changed.rollout.from_replicas = before.replicas.min
    changed.rollout.from_context_window_tokens = before.context_window_tokens
    if before.HasField("objective"):
        changed.rollout.from_objective.CopyFrom(before.objective)
    changed.rollout.from_classes.extend(before.classes)
    changed.rollout.order.extend(order)
    changed.rollout.message = f"a first replica of v{version} starts"
    changed.rollout.start_time.FromDatetime(now)
    changed.rollout.step_time.CopyFrom(changed.rollout.start_time)


def restore(changed: pb.Model) -> None:
    """The engine of before the rollout is the model's again, with what goes with it: its context window, classes, objective, words of sites.

    How many replicas there are, and at which sites, stays as it is today; but where none of these sites was before, they were the change.
    """
    old = changed.rollout
    changed.version = old.from_version
    changed.engine.CopyFrom(old.from_engine)
    changed.context_window_tokens = old.from_context_window_tokens
    changed.ClearField("objective")
    if old.HasField("from_objective"):
        changed.objective.CopyFrom(old.from_objective)
    del changed.classes[:]
    changed.classes.extend(old.from_classes)
    sites = _with_words_of(changed.sites, old.from_sites)
    del changed.sites[:]
    changed.sites.extend(sites)


def _with_words_of(today: Iterable[pb.ModelSite], before: Iterable[pb.ModelSite]) -> list[pb.ModelSite]:
    """Today's sites and counts, and what those that were there before had of their own."""
    counts, had = {site.site: site.replicas for site in today}, {site.site: site for site in before}
    if not counts.keys() & had.keys():
        return list(had.values())
    made = [copy.deepcopy(had.get(site.site, site)) for site in today]
    for site in made:
        site.replicas = counts[site.site]
    return made
