"""Served models: list, ask where a request would go, end; keys of the inference API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.deploy_words import rollout_state, wanted_replicas
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, pages

_MAX_TOKENS = 2**31 - 1
keys = typer.Typer(no_args_is_help=True, help="Keys of the inference API.")


def models(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Served models."""
    from whaleflux.v1 import router_pb2

    with fleet() as client:
        listed = pages(client.router.ListModels, router_pb2.ListModelsRequest(), "models")
    columns = [
        Column("NAME", lambda m: m.name),
        Column("READY", lambda m: f"{m.ready_replicas}/{wanted_replicas(m)}"),
        Column("ENGINE", lambda m: m.engine.kind),
        Column("ON", lambda m: ", ".join(m.engine.gpu_models) or "any"),
        Column("OWNER", lambda m: m.owner or "-"),
        Column("QUEUE", lambda m: names.last(m.queue) or "serving", wide=True),
        Column("ROLLOUT", rollout_state, wide=True),
        Column("AGE", lambda m: output.age(m.create_time)),
    ]
    output.show(
        listed, columns, fmt, headers=not no_headers, empty="no models yet; serve one with: whaleflux deploy model.yaml"
    )


def replicas(
    model: Annotated[str, typer.Argument(help="Model; none: all.")] = "",
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Show again at each change.")] = False,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """Replicas of models: where they run and how loaded they are.

    \b
      whaleflux replicas llama-3-8b -o wide
      whaleflux replicas -w -o jsonl        each as it starts, gets ready and leaves, a line each

    With -w, json is a replica a line, as jsonl is: it has no end.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import watching
    from whaleflux.v1 import router_pb2

    parent, columns = names.model(model) if model else "models/-", _replica_columns()

    def draw(found: Sequence[Any]) -> None:
        output.show(found, columns, fmt, headers=not no_headers, empty="no replicas")

    with fleet() as client:
        listed = pages(client.router.ListReplicas, router_pb2.ListReplicasRequest(parent=parent), "replicas")
        if model and not listed:  # a model that is not there is told
            client.router.GetModel(router_pb2.GetModelRequest(name=parent), timeout=10)
        if watch:
            watching.watch(
                lambda after: client.router.WatchReplicas(
                    router_pb2.WatchReplicasRequest(parent=parent, resource_version=after)
                ),
                fmt,
                lambda found: draw(sorted(found, key=lambda replica: replica.name)),
            )
            return
    draw(listed)


def _replica_columns() -> list[Column]:
    from whaleflux.v1 import router_pb2

    return [
        Column("NAME", lambda r: r.name),
        Column("VERSION", lambda r: f"v{r.version or 1}", wide=True),
        Column("STATE", lambda r: output.enum_name(router_pb2.ReplicaState, r.state, "REPLICA_STATE_")),
        Column("ADDRESS", lambda r: r.address or "-"),
        Column("NODE", lambda r: r.node or "-"),
        Column("GPU", lambda r: f"{r.gpus} x {r.gpu_model}" if r.gpu_model else "-"),
        Column("IN FLIGHT", lambda r: str(r.in_flight)),
        Column("WHY", lambda r: r.message, wide=True),
        Column("JOB", lambda r: r.job, wide=True),
    ]


def unserve(model: Annotated[str, typer.Argument(help="Model.")], yes: Yes = False) -> None:
    """Removes a model; its replicas finish what they have and end."""
    from whaleflux.v1 import router_pb2

    with fleet() as client:
        confirm(f"stop serving {model}?", yes)
        client.router.DeleteModel(
            router_pb2.DeleteModelRequest(name=names.model(model.removeprefix("models/"))), timeout=10
        )
    output.note(f"{model} is no longer served")


def route(
    model: Annotated[str, typer.Argument(help="Model.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=0, max=_MAX_TOKENS)] = 100,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.", min=0, max=_MAX_TOKENS)] = 100,
    fmt: Output = Format.table,
) -> None:
    """Where a request would go now, and why."""
    from whaleflux.v1 import router_pb2

    request = router_pb2.RouteRequest(model=model, prompt_tokens=prompt_tokens, max_output_tokens=max_tokens)
    with fleet() as client:
        answer = client.router.Route(request, timeout=10)
    if fmt.is_json:
        output.show_one(answer, [], fmt)
        return
    ranked = [
        [str(i), r.replica, r.address, f"{r.score:.3f}", "; ".join(r.reasons)] for i, r in enumerate(answer.ranking, 1)
    ]
    output.table(["#", "REPLICA", "ADDRESS", "SCORE", "WHY"], ranked)
    for excluded in answer.excluded:
        output.note(f"left out {excluded.replica}: {excluded.reason}")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What people call it.")] = "",
    days: Annotated[int, typer.Option(min=0, max=3650, help="0: for ever.")] = 0,
    expires: Annotated[str, typer.Option("--expires", metavar="TIME", help="Ends after this: 30d, 12h.")] = "",
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="MODEL", help="Opens this one; none: all that you may use.")
    ] = None,
    owner: Annotated[
        str, typer.Option("--owner", metavar="ROLE/NAME", help="Whose it is, as user/ann; operators only.")
    ] = "",
) -> None:
    """Makes a key; it is shown once. It opens what its owner may use, for as long as they may.

    \b
      whaleflux keys create chatbot --expires 90d
      whaleflux keys create ci --model llama-3-8b --expires 12h
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import router_pb2

    request = router_pb2.CreateApiKeyRequest(display_name=name, ttl_s=_ttl_s(days, expires), owner=owner)
    request.models.extend(names.model(one.removeprefix("models/")) for one in model or ())
    with fleet() as client:
        made = client.router.CreateApiKey(request, timeout=10)
    output.say(made.secret)
    output.note(f"{made.name}: shown this once, stored hashed; revoke it with: whaleflux keys delete {made.name}")


def _ttl_s(days: int, expires: str) -> int:
    from whaleflux import quantities
    from whaleflux.errors import FieldViolation, InvalidArgument

    if days and expires:
        raise InvalidArgument(FieldViolation("--expires", "says when it ends, and so does --days; give one of them"))
    try:
        return round(quantities.seconds(expires)) if expires else 86_400 * days
    except ValueError as error:
        raise InvalidArgument(FieldViolation("--expires", f"{expires!r}: {error}; write 30d or 12h")) from None


@keys.command("list")
def list_keys(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Keys, without their secrets."""
    from whaleflux.v1 import router_pb2

    with fleet() as client:
        listed = pages(client.router.ListApiKeys, router_pb2.ListApiKeysRequest(), "api_keys")
    columns = [
        Column("NAME", lambda k: k.name),
        Column("FOR", lambda k: k.display_name),
        Column("OWNER", lambda k: k.owner or "-"),
        Column("MODELS", lambda k: ", ".join(map(names.last, k.models)) or "all"),
        Column("ENDS", lambda k: k.expire_time.ToJsonString() if k.expire_time.seconds else "never", wide=True),
        Column("AGE", lambda k: output.age(k.create_time)),
    ]
    output.show(listed, columns, fmt, headers=not no_headers, empty="no keys")


@keys.command("delete")
def delete_key(name: Annotated[str, typer.Argument(help="apiKeys/...")], yes: Yes = False) -> None:
    """Revokes a key."""
    from whaleflux.v1 import router_pb2

    with fleet() as client:
        confirm(f"revoke {name}?", yes)
        client.router.DeleteApiKey(router_pb2.DeleteApiKeyRequest(name=name), timeout=10)
    output.note("revoked")
