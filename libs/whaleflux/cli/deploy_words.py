"""What is said of models that are on their way: to their sites, and from one engine to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whaleflux import names
from whaleflux.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from whaleflux.v1 import router_pb2
    from whaleflux.v1.scheduler_pb2 import ServingSize

_MOST_SERVING, _MOST_LACKING = 4, 4  # of a site; -o json has more


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


def gpus_of(engine: router_pb2.Engine) -> str:
    """What each replica gets, as its model's file bounds it."""
    types = ", ".join(engine.gpu_models)
    if not engine.shape:
        return f"{engine.gpus or 1} GPU(s) on {types or 'any GPU'}"
    number = f"{engine.gpus} GPU(s)" if engine.gpus else "GPUs that the router picks"
    return f"{number}{f' of {types}' if types else ''}, what serves it best"


def show_sizes(estimates: Iterable[router_pb2.SiteEstimate]) -> None:
    """Of a model that names its shape: what the next replica gets at each site, what else serves, and why other GPUs do not."""
    rows = [row for one in estimates for row in _size_rows(one)]
    if rows:
        output.say("")
        output.table(
            ["SITE", "", "REPLICA", "AT ONCE", "FIRST TOKEN", "TOKEN", "REQUESTS/S", "$/HOUR", "CONTEXT", "WHY"], rows
        )


def size_lines(estimate: router_pb2.SiteEstimate) -> list[str]:
    """The same of one site in a few words: next 2 x H200 at onprem, 5.20 USD/h."""
    problem = [f"none: {estimate.problem}"] if estimate.problem else []
    return problem + [_size_line(*row) for row in _size_rows(estimate)]


def _size_line(site: str, word: str, size: str, *cells: str) -> str:
    _, first, token, _, usd, _, why = cells
    if word == "not":
        return f"{word} {size} at {site}: {why}"
    return f"{word} {size} at {site}: {usd} USD/h, the first token after {first}, {token} for each further one"


def _size_rows(estimate: router_pb2.SiteEstimate) -> list[list[str]]:
    good = [one for one in estimate.sizes if not one.lack][:_MOST_SERVING]
    bad = [one for one in estimate.sizes if one.lack][:_MOST_LACKING]
    return [
        _size_row(estimate, one, word)
        for one, word in (
            *((one, "or" if number else "next") for number, one in enumerate(good)),
            *((one, "not") for one in bad),
        )
    ]


def _size_row(estimate: router_pb2.SiteEstimate, one: ServingSize, word: str) -> list[str]:
    where = names.last(estimate.site or one.site)
    size = f"{one.gpus} x {one.gpu_type}"
    if one.lack:
        return [where, word, size, *["-"] * 5, f"{one.context_tokens:,}", one.words]
    usd = f"{one.usd_per_hour:.2f}" if one.price_source else "not known"
    why = f"bound by {one.words}" + ("" if one.starts_now else "; none are free now")
    return [
        where, word, size, f"{one.at_once:,}", f"{one.first_token_s * 1e3:,.0f} ms", f"{one.per_token_s * 1e3:.1f} ms",
        f"{one.requests_per_s:.2f}", usd, f"{one.context_tokens:,}", why,
    ]  # fmt: skip


def ready_in(one: router_pb2.SiteEstimate) -> str:
    """Seconds; "not known" where that is so."""
    if one.problem:
        return "never"
    return f"{one.ready_in.ToNanoseconds() / 1e9:.0f} s" if one.HasField("ready_in") else "not known"
