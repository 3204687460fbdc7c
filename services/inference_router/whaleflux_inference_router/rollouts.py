"""What the leader does about changed engines: counts what is there, asks the core what follows, and writes it into the model's record.

Each step is in the record before anything is done by it, fenced by leadership and by the record's revision; a new leader goes on from there, and
begins to compare anew: what it has not seen is not known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.data import progress
from whaleflux.store.api import ConditionFailed, Entry, Fenced, Held, Put, Store, Unchanged
from whaleflux.telemetry import Event
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1 import scheduler_pb2
from whaleflux_inference_router import convert, model_changes
from whaleflux_inference_router.core import outcomes, rollout
from whaleflux_inference_router.core.outcomes import Tally
from whaleflux_inference_router.core.replicas import State
from whaleflux_inference_router.core.rollout import UNDER_WAY, Count, Stage
from whaleflux_inference_router.core.starts import Start
from whaleflux_inference_router.replica_jobs import ReplicaJobs
from whaleflux_inference_router.router_views import RouterViews
from whaleflux_inference_router.routing_state import RoutingState

_log = telemetry.get_logger(__name__)
_Step = tuple[int, Stage, int]  # which rollout, its stage, and how many new replicas are READY


class Rollouts:
    """One leadership's view of all models."""

    def __init__(
        self, store: Store, clock: Clock, routing: RoutingState, jobs: ReplicaJobs, views: RouterViews, held: Held
    ) -> None:
        self._views = views
        self._store, self._clock, self._routing, self._jobs, self._held = store, clock, routing, jobs, held
        self._seen: dict[str, dict[tuple[int, str], Count]] = {}
        self._steps: dict[str, tuple[_Step, float]] = {}  # and since when (monotonic)
        self._starts: dict[str, Start] = {}  # by replica
        self._measured: dict[str, dict[str, pb.SiteMeasure]] = {}  # what is not written yet, by model and site

    def note(self, model: pb.Model, existing: Mapping[str, pb.Replica]) -> None:
        """What is there of a model now."""
        seen = dict[tuple[int, str], Count]()
        for replica in existing.values():
            state = convert.state_of(replica)
            if state is not State.DRAINING:
                key = replica.version or 1, replica.site
                before, ready = seen.get(key, Count()), state is State.READY
                words = before.waits_for or ("" if ready else f"{replica.name}: {replica.message}")
                seen[key] = Count(before.existing + 1, before.ready + ready, words)
                self._watch_start(model, replica, existing)
        self._seen[model.name] = seen
        ready_now = sum(count.ready for (version, _), count in seen.items() if version == model.rollout.to_version)
        at: _Step = model.rollout.to_version, convert.stage_of(model), ready_now
        known = self._steps.get(model.name)
        if known is None or known[0][:2] != at[:2] or (known[0][2] < ready_now and at[1] is not Stage.WATCHING):
            self._steps[model.name] = at, self._clock.monotonic()

    def counts(self, model: pb.Model) -> dict[tuple[int, str], int]:
        """How many replicas there should be of each version at each site; what is of a stage that only a newer version knows stays."""
        if model.rollout.state and convert.stage_of(model) is Stage.NONE:
            return {key: count.existing for key, count in self._seen[model.name].items()}
        return rollout.counts(convert.rollout_of(model), self._seen[model.name])

    async def go_on(self, model: pb.Model) -> None:
        """Writes the step that follows, or what was measured; somebody else's change at that moment is seen at the next turn."""
        changed = pb.Model()
        changed.CopyFrom(model)
        found = convert.rollout_of(model)
        (_, since_s), now_s = self._steps[model.name], self._clock.monotonic()
        new, old = self._views.tallies(model) if found.stage in UNDER_WAY else (Tally(), Tally())
        judged = outcomes.worse(new, old), outcomes.unproven(new, old)
        following = rollout.step(found, self._seen[model.name], now_s - since_s, *judged)
        if following is not None:
            self._take(changed, *following)
        measured = self._measured.get(model.name, {})
        for site, measure in measured.items():
            _put_measure(changed, site, measure)
        if changed == model:
            self._measured.pop(model.name, None)
            return
        entry = Entry(convert.model_key(model.name), b"", int(model.etag.strip('"')), 0)
        try:
            revision = await self._store.commit(
                Put(entry.key, convert.encode(changed)), when=[Unchanged(entry), self._held]
            )
        except Fenced:
            raise
        except ConditionFailed:
            return
        self._measured.pop(model.name, None)
        if following is not None:
            _log.info(Event.MODEL_ROLLOUT, model=model.name, state=following[0].value, reason=following[1])
        await self._routing.seen(self._routing.models, revision)

    def _take(self, changed: pb.Model, stage: Stage, why: str) -> None:
        changed.rollout.state, changed.rollout.message = convert.stage_number(stage), why[:1000]
        changed.rollout.step_time.FromDatetime(self._clock.now())
        if stage is Stage.ROLLED_BACK:
            model_changes.restore(changed)

    def _watch_start(self, model: pb.Model, replica: pb.Replica, others: Mapping[str, pb.Replica]) -> None:
        """Follows the start of a replica from before its process runs."""
        now_s, start = self._clock.monotonic(), self._starts.get(replica.name)
        if convert.state_of(replica) is State.READY:
            if start is not None:
                self._measure(model, replica, self._starts.pop(replica.name), now_s)
            return
        if not replica.job or not self._jobs.synced:
            return
        task = self._jobs.task(replica.job, replica.owner)
        runs = task is not None and task.phase == scheduler_pb2.TASK_PHASE_RUNNING
        if start is None and runs:
            return  # it was READY before, or began before anybody looked: no start
        if start is None:
            peer = any(
                one.site == replica.site and one.version == replica.version and convert.state_of(one) is State.READY
                for one in others.values()
            )
            start = self._starts[replica.name] = Start(peer)
        if task is None:
            return
        if task.phase == scheduler_pb2.TASK_PHASE_FETCHING and (pulled := progress.read(task.message)):
            start.pulls(now_s, pulled.done_bytes, pulled.bytes_per_s)
        elif runs:
            start.runs(now_s)

    def _measure(self, model: pb.Model, replica: pb.Replica, start: Start, now_s: float) -> None:
        site = replica.site or (names.site(names.top(replica.node)) if replica.node else "")
        if not site:
            return
        found = self._measured.setdefault(model.name, {}).setdefault(site, pb.SiteMeasure(site=site))
        found.engine_start_s = round(start.engine_s(now_s), 1)
        if start.peer:
            found.peer_bytes_per_s = round(start.bytes_per_s)
        else:
            found.source_bytes_per_s = round(start.bytes_per_s)

    def keep_only(self, models: Collection[str], replicas: Collection[str]) -> None:
        """Forgets what exists no more."""
        by_model: tuple[dict[str, Any], ...] = (self._seen, self._steps, self._measured)
        for known, kept in (*((one, models) for one in by_model), (self._starts, replicas)):
            for gone in known.keys() - set(kept):
                del known[gone]


def _put_measure(changed: pb.Model, site: str, measure: pb.SiteMeasure) -> None:
    """What was measured takes the place of what was; what was not stays."""
    known = next((one for one in changed.measures if one.site == site), None)
    if known is None:
        changed.measures.add().CopyFrom(measure)
        return
    for name in ("source_bytes_per_s", "peer_bytes_per_s", "engine_start_s"):
        if value := getattr(measure, name):
            setattr(known, name, value)
