"""Which GPUs of the fleet serve a model, as it is asked for over the contract: checks, what the fleet has, sizes, and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.machine import lacks_precision
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.serving import Lack, Requests, longest, usual
from whaleflux.planning.serving_sizes import ServingOffer, Size, serve
from whaleflux.quantities import shown_number
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import training_offers
from whaleflux_scheduler.planning_turns import Turns
from whaleflux_scheduler.training_plans import shape_of

if TYPE_CHECKING:
    from whaleflux_scheduler.leader_session import Leading

MOST_RATE, MOST_GPUS, MOST_SITES, MOST_OFFERS, MOST_SIZES = 1e6, 64, 100, 256, 1024
_LACKS = {
    Lack.NOTHING: pb.SERVING_LACK_UNSPECIFIED,
    Lack.WEIGHTS: pb.SERVING_LACK_WEIGHTS,
    Lack.CONTEXT: pb.SERVING_LACK_CONTEXT,
    Lack.FIRST_TOKEN: pb.SERVING_LACK_FIRST_TOKEN,
    Lack.TOKEN: pb.SERVING_LACK_TOKEN,
    Lack.RATE: pb.SERVING_LACK_RATE,
}


class ServingPlans:
    """One at a time: 256 offers take less than a second."""

    def __init__(self) -> None:
        self._turns = Turns("it is being worked out what serves other models")

    async def planned(self, request: pb.PlanServingRequest, leading: Leading) -> pb.PlanServingResponse:
        """Of the fleet as it is now. Raises InvalidArgument naming field and limit, ResourceExhausted where others' plans take too long."""
        shape, asked, sites = _asked(request)
        await leading.view.caught_up()
        nodes = await leading.planner.ask(lambda plan: plan.free_nodes())
        offers, precision = training_offers.serving_offers(training_offers.had(nodes), sites), _precision(request)
        able = [one for one in offers if not _unable(one, request.gpus, precision)]
        refusals = [
            _refusal(one.gpu.name, one.site, why) for one in offers if (why := _unable(one, request.gpus, precision))
        ]
        unknown = training_offers.unknown_types(nodes)
        refusals += [
            _refusal(name, site, "its speed is not known") for name, site in unknown if not sites or site in sites
        ]
        if (more := len(able) - MOST_OFFERS) > 0:
            refusals.append(
                _refusal("", "", f"{more} types at sites with fewer GPUs: only {MOST_OFFERS} are looked at")
            )
        weight_bytes = 1.0 if request.fp8 else 2.0
        sizes = await self._turns.run(lambda: serve(shape, able[:MOST_OFFERS], asked, weight_bytes, request.gpus))
        return pb.PlanServingResponse(sizes=map(_message, sizes[:MOST_SIZES]), refusals=refusals[:MOST_OFFERS])


def _unable(one: ServingOffer, gpus: int, precision: str) -> str:
    """Why it is not asked whether these serve; "" where it is."""
    few = f"no node has {gpus} of them" if one.node_gpus < gpus else ""
    return lacks_precision(one.gpu, precision) or few


def _refusal(gpu_type: str, site: str, words: str) -> pb.ServingRefusal:
    return pb.ServingRefusal(gpu_type=gpu_type, site=names.site(site) if site else "", words=words[:500])


def _precision(request: pb.PlanServingRequest) -> str:
    return "fp8" if request.fp8 else "bf16"


def _asked(request: pb.PlanServingRequest) -> tuple[ModelShape, Requests, frozenset[str]]:
    """What is served, how, and the ids of sites. Raises InvalidArgument with every mistake."""
    shape = shape_of(request.model, "model")
    most = longest(shape)
    prompt, answer = usual(shape, request.prompt_tokens, request.answer_tokens, request.context_tokens)
    limits = {
        name: getattr(request, name).ToNanoseconds() / 1e9 if request.HasField(name) else 0.0
        for name in ("first_token", "per_token")
    }
    checks = (
        ("prompt_tokens", request.prompt_tokens, most), ("answer_tokens", request.answer_tokens, most),
        ("context_tokens", request.context_tokens, most), ("requests_per_s", request.requests_per_s, MOST_RATE), ("gpus", request.gpus, MOST_GPUS),
        ("sites", len(request.sites), MOST_SITES), *((name, value, 3600.0) for name, value in limits.items()),
    )  # fmt: skip
    wrong = [
        FieldViolation(field, f"is {shown_number(value)}; it must be between 0 and {shown_number(limit)}")
        for field, value, limit in checks
        if not 0 <= value <= limit or not math.isfinite(value)
    ]
    wrong += [
        FieldViolation(name, "is 0 s; give a time above 0, or leave it out")
        for name, value in limits.items()
        if request.HasField(name) and value == 0
    ]
    if not wrong and prompt + answer > (request.context_tokens or most):
        said = f"{prompt:,} and answer_tokens {answer:,} are more than the context of {request.context_tokens or most:,}; take fewer"
        wrong.append(FieldViolation("prompt_tokens", said))
    if request.gpus > 0 and shape.heads % request.gpus:
        wrong.append(
            FieldViolation("gpus", f"is {request.gpus}, which does not divide the {shape.heads} heads; take a divisor")
        )
    if wrong:
        raise InvalidArgument(wrong)
    sites = frozenset(names.split(site, "sites", field="sites")[0] for site in request.sites)
    asked = Requests(
        prompt,
        answer,
        limits["first_token"],
        limits["per_token"],
        request.context_tokens or most,
        request.requests_per_s,
    )
    return shape, asked, sites


def _message(size: Size) -> pb.ServingSize:
    one = size.replica
    return pb.ServingSize(
        gpu_type=one.gpu, gpus=one.tp, site=names.site(size.offer.site), lack=_LACKS[one.lack], words=one.binding, starts_now=size.starts_now,
        weights_bytes=one.weights_bytes, usable_bytes=one.usable_bytes, kv_bytes_per_token=one.kv_bytes_per_token, context_tokens=one.context,
        at_once=one.at_once, first_token_s=one.first_token_s, per_token_s=one.token_s, requests_per_s=one.requests_per_s,
        usd_per_hour=size.usd_per_hour or 0.0, usd_per_million_tokens=one.usd_per_million_tokens or 0.0, price_source=size.offer.price_source,
    )  # fmt: skip
