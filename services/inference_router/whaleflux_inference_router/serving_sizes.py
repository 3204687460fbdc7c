"""What the scheduler says of GPUs that serve a model, for the core; and the engine of a replica that got some of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, StatusError
from whaleflux.manifests import model_checks
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1 import scheduler_pb2
from whaleflux_inference_router import convert
from whaleflux_inference_router.core import sizing
from whaleflux_inference_router.core.sizing import Lack, Size

MOST_SITES = 100
KNOWN_S = 5.0  # for which an answer is used again by the loop
Ask = Callable[[scheduler_pb2.PlanServingRequest], Awaitable[scheduler_pb2.PlanServingResponse]]
_LACKS = {int(one): one for one in Lack}
_FIELDS = {
    "model": "engine.shape",
    "prompt_tokens": "objective.prompt_tokens",
    "answer_tokens": "objective.answer_tokens",
    "context_tokens": "context_window_tokens",
    "first_token": "objective.first_token",
    "per_token": "objective.per_token",
    "requests_per_s": "objective.requests_per_s",
    "gpus": "engine.gpus",
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """An answer: as it came, and for the core."""

    answer: scheduler_pb2.PlanServingResponse
    all: tuple[Size, ...]

    def at(self, site: str, types: Collection[str]) -> list[Size]:
        return sizing.suiting(self.all, site, types)

    def unable(self, site: str) -> tuple[str, ...]:
        """What is left out there, each with the reason."""
        return tuple(f"{one.gpu_type}: {one.words}" for one in self.answer.refusals if site in ("", one.site))

    def shown(self, site: str, types: Collection[str], most: int) -> list[scheduler_pb2.ServingSize]:
        """As they came, the best first."""
        suiting = set(self.at(site, types))
        return [said for said, one in zip(self.answer.sizes, self.all, strict=True) if one in suiting][:most]


async def ask(call: Ask, model: pb.Model, version: int) -> Sizes:
    """What serves a version of a model, anywhere. Raises InvalidArgument in the words of the model's record."""
    try:
        answer = await call(request_of(model, version))
    except InvalidArgument as wrong:
        named = [FieldViolation(f"model.{_FIELDS.get(v.field, v.field)}", v.description) for v in wrong.violations]
        raise InvalidArgument(named) from None
    return Sizes(answer, tuple(map(_size, answer.sizes)))


def request_of(model: pb.Model, version: int) -> scheduler_pb2.PlanServingRequest:
    engine, (objective, context) = convert.engine_at(model, version, ""), convert.objective_at(model, version)
    replicas = sum(model_checks.replicas_of(model).values())
    named, before = ({site.site for site in some} for some in (model.sites, model.rollout.from_sites))
    everywhere = not named or (model.rollout.from_version and not before)
    made = scheduler_pb2.PlanServingRequest(
        model=engine.shape, fp8=engine.fp8, gpus=engine.gpus, prompt_tokens=objective.prompt_tokens, answer_tokens=objective.answer_tokens,
        context_tokens=context, requests_per_s=objective.requests_per_s / max(1, replicas), sites=() if everywhere else sorted(named | before)[:MOST_SITES],
    )  # fmt: skip
    for name in ("first_token", "per_token"):
        if objective.HasField(name):
            getattr(made, name).CopyFrom(getattr(objective, name))
    return made


def _size(said: scheduler_pb2.ServingSize) -> Size:
    lack = _LACKS.get(int(said.lack), Lack.WEIGHTS)  # one of a newer version is one: it does not serve
    return Size(
        said.gpu_type, said.gpus, said.site, lack, said.words, said.starts_now, said.weights_bytes - said.usable_bytes, said.context_tokens,
        said.first_token_s, said.per_token_s, said.requests_per_s,
    )  # fmt: skip


def with_size(engine: pb.Engine, size: Size) -> pb.Engine:
    """The engine on those GPUs."""
    made = pb.Engine()
    made.CopyFrom(engine)
    made.gpus, made.gpu_models[:] = size.gpus, [size.gpu_type]
    return made


class ReplicaSizes:
    """Decides for each replica that starts; one leadership's memory of the last answers."""

    def __init__(self, call: Ask, clock: Clock) -> None:
        self._call, self._clock = call, clock
        self._known: dict[tuple[str, int, str], tuple[float, Sizes | StatusError]] = {}
        self._asking: dict[str, asyncio.Lock] = {}

    async def sized(self, model: pb.Model, version: int, site: str) -> pb.Engine:
        """The engine of a replica that is to start now. Raises FailedPrecondition where nothing serves it, InvalidArgument where it cannot be asked."""
        engine = convert.engine_at(model, version, site)
        if not engine.shape:
            return engine
        sizes = await self._sizes(model, version)
        suiting = sizes.at(site, engine.gpu_models)
        if (size := sizing.chosen(suiting)) is None:
            raise FailedPrecondition(
                why_none(model, sizes, site, engine.gpu_models, version), reason=ErrorReason.WRONG_STATE
            )
        return with_size(engine, size)

    async def better(
        self, model: pb.Model, version: int, site: str, gpu_types: Sequence[str], gpus: int
    ) -> Size | None:
        """What a replica that waits for such GPUs would get now in their place; None: it waits on."""
        engine = convert.engine_at(model, version, site)
        if not engine.shape or not gpu_types:
            return None
        sizes = await self._sizes(model, version)
        return sizing.better(sizes.at(site, engine.gpu_models), gpu_types[0], gpus)

    async def _sizes(self, model: pb.Model, version: int) -> Sizes:
        """Of all replicas that want to know it at the same time one asks."""
        async with self._asking.setdefault(model.name, asyncio.Lock()):
            found = await self._sizes_now(model, version)
        if isinstance(found, StatusError):
            raise found
        return found

    async def _sizes_now(self, model: pb.Model, version: int) -> Sizes | StatusError:
        """What was refused counts as long: else each replica of a model waits for its own deadline, one after another."""
        key = model.name, version, model.etag
        known = self._fresh()
        if key in known:
            return known[key][1]
        found: Sizes | StatusError
        try:
            found = await ask(self._call, model, version)
        except StatusError as refused:
            found = refused
        self._known = self._fresh() | {key: (self._clock.monotonic(), found)}
        return found

    def _fresh(self) -> dict[tuple[str, int, str], tuple[float, Sizes | StatusError]]:
        now_s = self._clock.monotonic()
        return {key: known for key, known in self._known.items() if now_s - known[0] < KNOWN_S}

    def keep_only(self, models: Collection[str]) -> None:
        """Forgets what exists no more."""
        self._asking = {name: lock for name, lock in self._asking.items() if name in models}


def why_none(model: pb.Model, sizes: Sizes, site: str, types: Sequence[str], version: int) -> str:
    """Why nothing serves it there, and what to do; "" where something does."""
    suiting = sizes.at(site, types)
    if sizing.chosen(suiting) is not None:
        return ""
    refused = refusal(model, sizes, site, types, version)
    return refused.words if refused else "no GPUs take work there now: see whaleflux gpus, and whaleflux nodes for why"


def refusal(model: pb.Model, sizes: Sizes, site: str, types: Sequence[str], version: int) -> sizing.Refusal | None:
    objective, _ = convert.objective_at(model, version)
    return sizing.refusal(sizes.at(site, ()), sizes.at(site, types), objective.requests_per_s, sizes.unable(site))
