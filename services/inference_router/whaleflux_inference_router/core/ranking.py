"""Where a request goes: a pure function of the request, an immutable snapshot, the loads and the time.

The answer is the whole ranking with reasons, not only the winner: the front door's next try (`libs/whaleflux/frontdoor/clusters.py`,
`override_host`), `explain` and the `Route` rpc all use the same one.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter

from whaleflux.errors import FieldViolation, InvalidArgument, NotFound, Unavailable
from whaleflux.reasons import ErrorReason

BYTES_PER_TOKEN = 4  # rule of thumb for English text with current tokenizers; only a length class hangs on it
LONG_PROMPT_TOKENS = 8192
BIG_MEMORY_BYTES = 70 * 10**9  # "80 GB" cards show a little less
TIER = 8.0  # a card of the preferred class is worth waiting behind this many requests
PRICE_STEP = 2.0  # and a cheaper one, for short requests, behind this many
# While a changed engine is tried: behind whatever serves the version that the request was drawn for.
OTHER_VERSION = 10_000.0
ROLLED_BACK = 20.0  # what was rolled back helps out where too few others are READY: behind one with so many requests
FAILURE = 20.0  # a replica that just failed is worse than one with this many requests
HALF_LIFE_S = 5.0  # of that
RANKED = 4  # names that the front door gets: one and three retries


@dataclass(frozen=True, slots=True)
class RequestClass:
    """Prompts up to `max_prompt_tokens` (0: any) prefer these GPU models, best first."""

    max_prompt_tokens: int
    gpu_models: tuple[str, ...]

    def admits(self, tokens: int) -> bool:
        return not self.max_prompt_tokens or tokens <= self.max_prompt_tokens

    def choice_of(self, gpu_model: str) -> int:
        """0 for the first choice; behind all for a model that is not named."""
        return self.gpu_models.index(gpu_model) if gpu_model in self.gpu_models else len(self.gpu_models)


@dataclass(frozen=True, slots=True)
class Trial:
    """A changed engine that is tried: `share` of the requests go to `version` first, the others to the one that serves.

    `behind`: how far, in requests, the replicas of the other one are behind. Versions that are neither were rolled back before.
    """

    version: int
    share: float
    serving: int = 1
    behind: float = OTHER_VERSION


@dataclass(frozen=True, slots=True)
class Model:
    """What routing needs to know of a model."""

    id: str
    context_window_tokens: int = 0
    classes: tuple[RequestClass, ...] = ()
    engine: str = "openai"  # its kind, which decides on the paths that it gets
    trial: Trial | None = None
    windows: Mapping[int, int] = field(default_factory=dict)  # of versions whose context window is another one

    def window_tokens(self, version: int) -> int:
        """Context window of a version; 0: not known."""
        return self.windows.get(version, self.context_window_tokens)


@dataclass(frozen=True, slots=True)
class Replica:
    """What routing needs to know of a replica."""

    name: str
    address: str
    ready: bool
    state: str = "READY"
    gpu_model: str = ""
    gpu_memory_bytes: int = 0
    usd_per_hour: float = 0.0
    message: str = ""  # one sentence on the state
    version: int = 0  # of its model's engine


@dataclass(frozen=True, slots=True)
class Load:
    """A replica's requests under way, and its recent failures as of `failures_at_s` (monotonic)."""

    in_flight: int = 0
    failures: float = 0.0
    failures_at_s: float = 0.0
    last_used: int = 0

    def penalty(self, now_s: float) -> float:
        """Failures decay: a replica that was restarted gets requests again."""
        return float(FAILURE * self.failures * 0.5 ** ((now_s - self.failures_at_s) / HALF_LIFE_S))


_NONE = Load()
_ORDER = itemgetter(0, 1, 2, 3)  # score, then price, then whoever was used longest ago


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Models and their replicas at one moment; never changed, only replaced."""

    models: Mapping[str, Model] = field(default_factory=dict)
    replicas: Mapping[str, tuple[Replica, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """What a decision depends on. `prompt_tokens` 0: estimated from bytes. `draw`, 0 to 1: below a trial's share it is for the changed engine."""

    model: str
    prompt_tokens: int = 0
    max_output_tokens: int = 0
    prompt_bytes: int = 0
    draw: float = 1.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens or -(-self.prompt_bytes // BYTES_PER_TOKEN)


@dataclass(frozen=True, slots=True)
class Ranked:
    """One replica in a ranking; a smaller score is better."""

    replica: Replica
    score: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Best first, and who was left out and why."""

    request: Request
    ranking: tuple[Ranked, ...]
    excluded: tuple[tuple[Replica, str], ...] = ()


def rank(
    request: Request,
    snapshot: Snapshot,
    loads: Mapping[str, Load],
    now_s: float,
    reachable: frozenset[str] | None = None,
    most: int = 0,
) -> RoutingDecision:
    """The ranking for a request, whole, or the best `most` of it.

    `reachable`: addresses that the front door knows (None: not asked). Raises NotFound for an unknown model, InvalidArgument
    for a request that fits into no context window, Unavailable when no replica can take it now.
    """
    model = snapshot.models.get(request.model)
    if model is None:
        raise unknown_model(request.model)
    _check_context(request, model)
    excluded, fit = [], []
    for replica in snapshot.replicas.get(request.model, ()):
        reason = _unfit(replica, reachable)
        if reason:
            excluded.append((replica, reason))
        else:
            fit.append(replica)
    if not fit:
        counts = "; ".join(f"{r.name}: {why.partition(':')[0]}" for r, why in excluded[:5]) or "it has no replicas"
        raise Unavailable(
            f"no replica of {request.model} can answer now ({counts}); try again in a second",
            reason=ErrorReason.NO_READY_REPLICA,
            metadata={"model": request.model},
        )
    prices = {price: rank for rank, price in enumerate(sorted({replica.usd_per_hour for replica in fit}))}
    fit = _roomy(request, model, fit)
    scored = [
        (
            _score(request, model, replica, load, prices, now_s),
            replica.usd_per_hour,
            load.last_used,
            replica.name,
            replica,
        )
        for replica in fit
        for load in (loads.get(replica.name, _NONE),)
    ]
    best = heapq.nsmallest(most, scored, key=_ORDER) if most else sorted(scored, key=_ORDER)
    ranking = [
        Ranked(replica, score, _reasons(request, model, replica, loads.get(replica.name, _NONE), prices, now_s))
        for score, _, _, _, replica in best
    ]
    return RoutingDecision(request, tuple(ranking), tuple(excluded))


def unknown_model(name: str) -> NotFound:
    """Of one that is not there, or not for who asks: others' names are not told."""
    return NotFound("model", name[:100], "list what you may use with: whaleflux models, or GET /v1/models")


def _check_context(request: Request, model: Model) -> None:
    windows = (model.context_window_tokens, *model.windows.values())
    if all(_is_too_long(request, window) for window in windows):
        raise _too_long(request, model, max(windows))


def _roomy(request: Request, model: Model, fit: list[Replica]) -> list[Replica]:
    """Those into whose version's window it fits."""
    found = [one for one in fit if not _is_too_long(request, model.window_tokens(one.version))]
    if not found:
        raise _too_long(request, model, max(model.window_tokens(one.version) for one in fit))
    return found


def _is_too_long(request: Request, window_tokens: int) -> bool:
    return 0 < window_tokens < _sure_tokens(request) + request.max_output_tokens


def _sure_tokens(request: Request) -> int:
    """An estimate must not refuse what would have fitted: only a sure excess is refused here, the engine knows the rest."""
    return request.prompt_tokens or request.prompt_bytes // (4 * BYTES_PER_TOKEN)


def _too_long(request: Request, model: Model, window_tokens: int) -> InvalidArgument:
    return InvalidArgument(
        FieldViolation(
            "max_tokens",
            f"prompt ({_sure_tokens(request)} tokens or more) and answer ({request.max_output_tokens}) do not fit into the "
            f"{window_tokens} tokens of {model.id}; shorten the prompt or ask for a shorter answer",
        )
    )


def _unfit(replica: Replica, reachable: frozenset[str] | None) -> str:
    if not replica.ready:
        return f"it is {replica.state}" + (f": {replica.message}" if replica.message else "")
    if not replica.address:
        return "its address is not known yet"
    if reachable is not None and replica.address not in reachable:
        return "the front door does not know it yet"
    return ""


def _score(
    request: Request, model: Model, replica: Replica, load: Load, prices: Mapping[float, int], now_s: float
) -> float:
    penalty = load.penalty(now_s) if load.failures else 0.0
    behind = _behind(request, model, replica)
    return load.in_flight + penalty + behind + _distance(request, model, replica, prices)


def _behind(request: Request, model: Model, replica: Replica) -> float:
    """How far a replica is behind, in requests, for which the request was not drawn while a trial is under way."""
    trial = model.trial
    if trial is None:
        return 0.0
    if replica.version not in {trial.version, trial.serving}:
        return ROLLED_BACK
    return trial.behind if (replica.version == trial.version) != (request.draw < trial.share) else 0.0


def _distance(request: Request, model: Model, replica: Replica, prices: Mapping[float, int]) -> float:
    """How far the replica's card is from the one that this length of request wants, in requests."""
    for rule in model.classes:
        if rule.admits(request.tokens):
            return TIER * rule.choice_of(replica.gpu_model)
    if request.tokens >= LONG_PROMPT_TOKENS:
        return 0.0 if replica.gpu_memory_bytes >= BIG_MEMORY_BYTES else TIER
    return PRICE_STEP * prices[replica.usd_per_hour]


def _reasons(
    request: Request, model: Model, replica: Replica, load: Load, prices: Mapping[float, int], now_s: float
) -> tuple[str, ...]:
    """The parts of `_score` in words; only for those that are named, as they cost more than the score."""
    reasons = [_why_this_card(request, model, replica, prices), f"{load.in_flight} in flight"]
    if (penalty := load.penalty(now_s)) > 0.5:
        reasons.append(f"failed recently (+{penalty:.1f})")
    if _behind(request, model, replica):
        reasons.append(f"v{replica.version} is not the one that it was drawn for")
    return tuple(reasons)


def _why_this_card(request: Request, model: Model, replica: Replica, prices: Mapping[float, int]) -> str:
    for rule in model.classes:
        if rule.admits(request.tokens):
            choice = rule.choice_of(replica.gpu_model) + 1
            return f"choice {choice} for {request.tokens} tokens: {replica.gpu_model or 'any GPU'}"
    if request.tokens >= LONG_PROMPT_TOKENS:
        big = replica.gpu_memory_bytes >= BIG_MEMORY_BYTES
        return "long prompt on a big card" if big else "long prompt, small card"
    return f"short prompt, price rank {prices[replica.usd_per_hour] + 1} of {len(prices)}"
