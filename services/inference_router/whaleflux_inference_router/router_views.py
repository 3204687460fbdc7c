"""What each router knows of replicas that are compared or leave, told to the one that decides.

The front doors ask one router and tell another; the leader alone decides on rollouts and ends replicas. So each router keeps one record under its
lease: the tallies of versions that are compared, and which leaving replicas have nothing under way. It is written when it changes, at most each
second, and is empty while there is neither. A router that has not said that a replica is idle may be sending to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable

from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.store import keys
from whaleflux.store.api import Lease, Put, Store
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import convert
from whaleflux_inference_router.core.outcomes import Tally
from whaleflux_inference_router.core.replicas import State
from whaleflux_inference_router.core.rollout import UNDER_WAY
from whaleflux_inference_router.routing_state import RoutingState

EVERY_S = 1.0
TTL_S = 10.0
MOST_TRIALS, MOST_IDLE = 100, 1000  # in one record; more are told later
_Step = tuple[int, int]  # version and state of a rollout


class RouterViews:
    """This router's record, and those of the others. `router`: its own name among them."""

    def __init__(self, store: Store, clock: Clock, routing: RoutingState, router: str) -> None:
        self._store, self._clock, self._routing = store, clock, routing
        self._key = keys.ROUTER_VIEWS + router.replace("/", "-")
        self._mine, self._made_at_s = pb.RouterView(), float("-inf")
        self._since: dict[str, tuple[_Step, float]] = {}  # since when (monotonic) a model's rollout is where it is

    async def run(self) -> None:
        """Until cancelled; while the store is away nothing is told."""
        while True:
            try:
                lease = await self._store.lease(TTL_S)
                try:
                    await self._tell(lease)
                finally:
                    with contextlib.suppress(TimeoutError):  # an unreachable store lets it expire
                        async with asyncio.timeout(EVERY_S):
                            await lease.revoke()
            except StatusError:
                await self._clock.sleep(EVERY_S)

    async def _tell(self, lease: Lease) -> None:
        told: pb.RouterView | None = None
        while not lease.lost.is_set():
            if (view := self.mine()) != told:
                await self._store.commit(Put(self._key, view.SerializeToString(), lease))
                told = view
            await self._clock.sleep(EVERY_S)

    def mine(self) -> pb.RouterView:
        """What this router knows, as of a second ago at most."""
        now_s = self._clock.monotonic()
        if now_s - self._made_at_s >= EVERY_S:
            self._mine, self._made_at_s = self._view(now_s), now_s
        return self._mine

    def tallies(self, model: pb.Model) -> tuple[Tally, Tally]:
        """Of the version that is rolled out and of the one before, of all routers together, since the rollout is where it is."""
        new, old = Tally(), Tally()
        if (known := self._since.get(model.name)) is None or known[0] != _step_of(model):
            self._made_at_s = float("-inf")  # a step is counted from its beginning
        for view in (self.mine(), *self._others()):
            for trial in view.trials:
                if trial.model == model.name and (trial.to_version, trial.state) == _step_of(model):
                    new, old = new + _tally(trial.new), old + _tally(trial.old)
        return new, old

    def may_be_busy(self, replica: str) -> bool:
        """Whether a replica that leaves may have requests under way, of any router."""
        busy = self._routing.load_tracker.may_be_busy(replica, self._clock.monotonic())
        return busy or any(replica not in view.idle_replicas for view in self._others())

    def _others(self) -> Iterable[pb.RouterView]:
        return (view for key, view in self._routing.views.values.items() if key != self._key)

    def _view(self, now_s: float) -> pb.RouterView:
        models = [m for m in self._routing.models.values.values() if convert.stage_of(m) in UNDER_WAY]
        self._since = {model.name: self._since_of(model, now_s) for model in models[:MOST_TRIALS]}
        view = pb.RouterView(trials=[self._trial(model, now_s) for model in models[:MOST_TRIALS]])
        leaving = (r.name for r in self._routing.replicas.values.values() if convert.state_of(r) is State.DRAINING)
        idle = (one for one in leaving if not self._routing.load_tracker.may_be_busy(one, now_s))
        view.idle_replicas.extend(sorted(idle)[:MOST_IDLE])
        return view

    def _since_of(self, model: pb.Model, now_s: float) -> tuple[_Step, float]:
        step, known = _step_of(model), self._since.get(model.name)
        return known if known is not None and known[0] == step else (step, now_s)

    def _trial(self, model: pb.Model, now_s: float) -> pb.RolloutTally:
        rollout, since_s = model.rollout, self._since[model.name][1]
        here = self._routing.snapshot.replicas.get(convert.model_of(model.name), ())
        made = pb.RolloutTally(model=model.name, to_version=rollout.to_version, state=rollout.state)
        for version, told in ((rollout.to_version, made.new), (rollout.from_version, made.old)):
            names = {one.name for one in here if one.version == version}
            ages_s = self._routing.load_tracker.ages_s(names, now_s)
            _tell(told, self._routing.load_tracker.outcomes.tally(names, since_s, ages_s))
        return made


def _step_of(model: pb.Model) -> _Step:
    return model.rollout.to_version, model.rollout.state


def _tell(told: pb.Tally, tally: Tally) -> None:
    told.failed, told.refused, told.left = tally.failed, tally.refused, tally.left
    told.first_byte.update(tally.first_byte)
    told.lasted.update(tally.lasted)
    told.under_way.update(tally.under_way)


def _tally(told: pb.Tally) -> Tally:
    times = (Counter(dict(one)) for one in (told.first_byte, told.lasted, told.under_way))
    return Tally(told.failed, told.refused, told.left, *times)
