"""Which sizes planned elastic jobs may have now: asked of the checkpoint service before each attempt, worked out beside the leader's loop.

A job is offered to the planner when its sizes are known; until then a running one keeps the size that it has. Where the checkpoint service
does not answer, the split stays, and it is asked again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.convert import enum_name
from whaleflux.errors import InvalidArgument, NotFound, StatusError
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.manifests.job_fields import Spec
from whaleflux.planning.calibration import Calibrated
from whaleflux.planning.offers import Offer
from whaleflux.planning.wish import Wish
from whaleflux.telemetry import Event
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from whaleflux_scheduler.core import planned_sizes
from whaleflux_scheduler.core.elastic import SizePlan
from whaleflux_scheduler.core.model import Job, JobState
from whaleflux_scheduler.core.planned_sizes import Allowance, Saved
from whaleflux_scheduler.planning_turns import Turns

ANSWER_S, AGAIN_S = 2.0, 10.0  # of the checkpoint service, and when it is asked again where it gave none
MOST_KNOWN = 512  # sets of plans
_WAITS = frozenset({JobState.QUEUED, JobState.RECOVERING})
_log = telemetry.get_logger("whaleflux.scheduler")
_Key = tuple[tuple[object, ...], Allowance]


class Replanning:
    """Of one leadership. `touch` has a job looked at again; `measured` by precision, then GPU type."""

    def __init__(
        self,
        checkpoint: CheckpointServiceStub | None,
        clock: Clock,
        touch: Callable[[str], None],
        measured: Mapping[str, Mapping[str, Calibrated]] | None = None,
    ) -> None:
        self._checkpoint, self._clock, self._touch = checkpoint, clock, touch
        self._measured = measured or {}
        self._asked: dict[str, tuple[int, Saved | None]] = {}  # of jobs that wait, in that epoch
        self._running: Mapping[str, Saved] = {}  # of jobs that run
        self._plans: OrderedDict[_Key, tuple[SizePlan, ...]] = OrderedDict()
        self._under_way: set[object] = set()
        self._turns = Turns("jobs are being planned anew")
        self._tasks: asyncio.TaskGroup | None = None

    def runs_in(self, tasks: asyncio.TaskGroup) -> None:
        """Where it asks and works from now on."""
        self._tasks = tasks

    def ready(self, job: Job) -> bool:
        """Whether the sizes of a job that waits are known; else it is told of when they are."""
        wish = planned_sizes.wish_of(job.spec)
        if wish is None:
            return True
        if job.attempt is not None and self._answer(job) is None:
            self._begin((job.name, job.epoch), self._ask(job))
            return False
        return self._known(job, wish) is not None

    def seen(self, job: Job) -> Job:
        """The job with the sizes that it may have; any other as it is."""
        wish = planned_sizes.wish_of(job.spec)
        if wish is None or job.ended:
            return job
        has = job.attempt.gpus if job.attempt is not None else job.spec.gpus
        plans = self._known(job, wish)
        why = self._allowance(job, wish).why if plans is not None else "its plans are being made"
        return replace(job, spec=planned_sizes.with_plans(job.spec, plans or (), why, has))

    async def sized(self, job: Job) -> Job:
        """The same of a job that is not submitted yet: its plans are made at once."""
        wish = planned_sizes.wish_of(job.spec)
        if wish is not None and (allowed := self._allowance(job, wish)) and _key(job.spec, allowed) not in self._plans:
            await self._plan(job.name, job.spec, wish, allowed)
        return self.seen(job)

    def saved(self, newest: Mapping[str, Saved]) -> None:
        """The newest checkpoints of jobs that run."""
        before, self._running = self._running, newest
        for name in newest.keys() - {name for name, one in newest.items() if _alike(before.get(name), one)}:
            self._touch(name)

    def forget(self, name: str) -> None:
        self._asked.pop(name, None)

    # what its checkpoint allows

    def _answer(self, job: Job) -> tuple[Saved | None] | None:
        epoch, saved = self._asked.get(job.name, (-1, None))
        return (saved,) if epoch == job.epoch else None

    def _allowance(self, job: Job, wish: Wish) -> Allowance:
        if job.attempt is None:
            return planned_sizes.allowance(job, wish, Saved())
        if job.state in _WAITS:
            answer = self._answer(job)
            return planned_sizes.allowance(job, wish, answer[0] if answer else None)
        asked = self._asked.get(job.name, (0, None))[1]
        return planned_sizes.allowance(
            job, wish, self._running.get(job.name) or (asked if asked and asked.name else None)
        )

    async def _ask(self, job: Job) -> None:
        saved, certain = await self._restorable(job)
        self._asked[job.name] = job.epoch, saved
        self._touch(job.name)
        if not certain:
            await self._clock.sleep(AGAIN_S)
            if self._asked.get(job.name) == (job.epoch, saved):
                del self._asked[job.name]
                self._under_way.discard((job.name, job.epoch))  # who is told now may ask at once
                self._touch(job.name)

    async def _restorable(self, job: Job) -> tuple[Saved | None, bool]:
        """What it goes on from, None: not known; and whether asking again would give the same."""
        if self._checkpoint is None:
            return None, True
        request = pb.FindRestorableRequest(job=job.name, job_uid=job.uid)
        try:
            return saved_of(await self._checkpoint.FindRestorable(request, timeout=ANSWER_S)), True
        except NotFound:
            return (None if planned_sizes.may_keep_its_own(job) else Saved()), True
        except StatusError as error:
            _log.warning(Event.FEED_BROKEN, feed="checkpoint", job=job.name, reason=error.reason)
            return None, False

    # its plans

    def _known(self, job: Job, wish: Wish) -> tuple[SizePlan, ...] | None:
        """None: they are being made."""
        spec, allowed = job.spec, self._allowance(job, wish)
        key = _key(spec, allowed)
        if key not in self._plans:
            self._begin(key, self._plan(job.name, spec, wish, allowed))
            return None
        self._plans.move_to_end(key)
        return self._plans[key]

    async def _plan(self, name: str, spec: Spec, wish: Wish, allowed: Allowance) -> None:
        """One at a time."""
        plans = await self._turns.run(lambda: self._plans_of(spec, wish, allowed), patience_s=None)
        self._plans[_key(spec, allowed)] = plans
        while len(self._plans) > MOST_KNOWN:
            self._plans.popitem(last=False)
        self._touch(name)

    def _plans_of(self, spec: Spec, wish: Wish, allowed: Allowance) -> tuple[SizePlan, ...]:
        try:
            return planned_sizes.plans_of(spec, wish, allowed, lambda model: self._offer(model, fp8=wish.fp8))
        except InvalidArgument as error:  # a record from before a rule that is stricter now: it keeps its first plan
            _log.warning(Event.PLAN_REFUSED, model=wish.model[:80], reason=str(error)[:300])
        except Exception as error:  # a bug on what one job asks must not end the leader, and each that follows it
            _log.error(Event.PLAN_REFUSED, model=wish.model[:80], reason=repr(error)[:300], exc_info=True)
        return ()

    def _offer(self, model: str, *, fp8: bool) -> Offer | None:
        known = CATALOGUE.types.get(model)
        measured = self._measured.get("fp8" if fp8 else "bf16", {}).get(model)
        return Offer(known, 0, measured=measured) if known is not None and known.speed is not None else None

    def _begin(self, what: object, work: Coroutine[object, object, None]) -> None:
        """Once, however often it is asked for meanwhile."""
        if what in self._under_way or self._tasks is None:
            work.close()
            return
        self._under_way.add(what)
        self._tasks.create_task(work).add_done_callback(lambda _: self._under_way.discard(what))


def saved_of(one: pb.Checkpoint) -> Saved:
    """What a plan has to know of a checkpoint."""
    return Saved(one.name, one.epoch, one.world_size, enum_name(pb.Resharding, one.resharding, "RESHARDING_"))


def _alike(before: Saved | None, now: Saved) -> bool:
    """Whether it allows the same, whatever its step is."""
    return before is not None and replace(before, name=now.name) == now


def _key(spec: Spec, allowed: Allowance) -> _Key:
    """What plans come from; words do not count."""
    sizes = spec.gpus, spec.elastic_min, spec.elastic_max, spec.elastic_step
    return (spec.environment, spec.any_of, *sizes), replace(allowed, why="")
