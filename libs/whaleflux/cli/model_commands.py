"""Served models: declare, list, ask where a request would go; keys of the inference API; join tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.fleet_commands import confirm
from whaleflux.cli.job_commands import _read
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, Yes, fleet, pages

if TYPE_CHECKING:
    from whaleflux.cli.manifests import ModelManifest

keys = typer.Typer(no_args_is_help=True, help="Keys of the inference API.")
token = typer.Typer(no_args_is_help=True, help="Join tokens: each admits one agent, once.")


def serve(file: Annotated[str, typer.Argument(help="Model file, or - for stdin.")], yes: Yes = False) -> None:
    """Declares a model, or changes one that is declared; its replicas are started and kept running.

    \b
      whaleflux serve model.yaml
      whaleflux replicas MODEL              how far they are
      whaleflux route MODEL                 where a request would go, and why
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli.manifests import model_from_yaml
    from whaleflux.errors import FieldViolation, Invalid, NotFound
    from whaleflux.names import ulid
    from whaleflux.v1 import router_pb2

    if file == "-" and not yes:
        raise Invalid(FieldViolation("--yes", "a model file from stdin cannot be asked about; add -y"))
    manifest = model_from_yaml(*_read(file))
    name = f"models/{manifest.model_id}"
    with fleet() as client:
        try:
            before = client.router.GetModel(router_pb2.GetModelRequest(name=name), timeout=10)
        except NotFound:
            request = router_pb2.CreateModelRequest(
                model_id=manifest.model_id, model=manifest.model, validate_only=True, request_id=ulid()
            )
            client.router.CreateModel(request, timeout=20)
            _show_model_plan(manifest, None)
            confirm("serve it?", yes)
            request.validate_only = False
            client.router.CreateModel(request, timeout=20)
        else:
            manifest.model.name, manifest.model.etag = name, before.etag
            _show_model_plan(manifest, before)
            confirm("change it?", yes)
            client.router.UpdateModel(router_pb2.UpdateModelRequest(model=manifest.model), timeout=20)
    output.note(f"{name} is declared; watch its replicas with: whaleflux replicas {manifest.model_id}")


def _show_model_plan(manifest: ModelManifest, before: Any) -> None:
    """On stdout: what will be served, and how many replicas there were."""
    count, engine = manifest.model.replicas.min, manifest.model.engine
    if engine.addresses:
        print(f"PLAN  serve {manifest.model_id} by {len(engine.addresses)} server(s) that run elsewhere")
    else:
        where = ", ".join(engine.gpu_models) or "any GPU"
        print(f"PLAN  serve {manifest.model_id} with {count} replica(s) of {engine.gpus} GPU(s) on {where}")
    if before is not None:
        print(f"  now        {before.replicas.min} replica(s), {before.ready_replicas} ready")


def models(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Served models."""
    from whaleflux.v1 import router_pb2

    with fleet() as client:
        listed = pages(client.router.ListModels, router_pb2.ListModelsRequest(), "models")
    columns = [
        Column("NAME", lambda m: m.name),
        Column("READY", lambda m: f"{m.ready_replicas}/{m.replicas.min}"),
        Column("ENGINE", lambda m: m.engine.kind),
        Column("ON", lambda m: ", ".join(m.engine.gpu_models) or "any"),
        Column("AGE", lambda m: output.age(m.create_time)),
    ]
    output.show(
        listed, columns, fmt, headers=not no_headers, empty="no models yet; serve one with: whaleflux serve model.yaml"
    )


def replicas(
    model: Annotated[str, typer.Argument(help="Model; none: all.")] = "",
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """Replicas of models: where they run and how loaded they are."""
    from whaleflux.v1 import router_pb2

    with fleet() as client:
        request = router_pb2.ListReplicasRequest(parent=f"models/{model or '-'}")
        listed = pages(client.router.ListReplicas, request, "replicas")
    columns = [
        Column("NAME", lambda r: r.name),
        Column("STATE", lambda r: output.enum_name(router_pb2.ReplicaState, r.state, "REPLICA_STATE_")),
        Column("ADDRESS", lambda r: r.address or "-"),
        Column("NODE", lambda r: r.node or "-"),
        Column("GPU", lambda r: f"{r.gpus} x {r.gpu_model}" if r.gpu_model else "-"),
        Column("IN FLIGHT", lambda r: str(r.in_flight)),
        Column("WHY", lambda r: r.message, wide=True),
        Column("JOB", lambda r: r.job, wide=True),
    ]
    output.show(listed, columns, fmt, headers=not no_headers, empty="no replicas")


def unserve(model: Annotated[str, typer.Argument(help="Model.")], yes: Yes = False) -> None:
    """Removes a model; its replicas finish what they have and end."""
    from whaleflux.v1 import router_pb2

    with fleet() as client:
        confirm(f"stop serving {model}?", yes)
        client.router.DeleteModel(
            router_pb2.DeleteModelRequest(name=f"models/{model.removeprefix('models/')}"), timeout=10
        )
    output.note(f"{model} is no longer served")


def route(
    model: Annotated[str, typer.Argument(help="Model.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=0)] = 100,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.", min=0)] = 100,
    fmt: Output = Format.table,
) -> None:
    """Where a request would go now, and why."""
    from whaleflux.v1 import router_pb2

    request = router_pb2.RouteRequest(model=model, prompt_tokens=prompt_tokens, max_output_tokens=max_tokens)
    with fleet() as client:
        answer = client.router.Route(request, timeout=10)
    if fmt is Format.json:
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
    days: Annotated[int, typer.Option(min=0, help="0: for ever.")] = 0,
) -> None:
    """Makes a key; it is shown once."""
    from whaleflux.v1 import router_pb2

    with fleet() as client:
        made = client.router.CreateApiKey(
            router_pb2.CreateApiKeyRequest(display_name=name, ttl_s=86400 * days), timeout=10
        )
    print(made.secret)
    output.note(f"{made.name}: shown this once, stored hashed; revoke it with: whaleflux keys delete {made.name}")


@keys.command("list")
def list_keys(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Keys, without their secrets."""
    from whaleflux.v1 import router_pb2

    with fleet() as client:
        listed = pages(client.router.ListApiKeys, router_pb2.ListApiKeysRequest(), "api_keys")
    columns = [
        Column("NAME", lambda k: k.name),
        Column("FOR", lambda k: k.display_name),
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


@token.command("create")
def create_token(
    site: Annotated[str, typer.Option(help="Site that it admits to; made when it does not exist.")],
    hours: Annotated[float, typer.Option(min=0.01, max=168, help="Ends after this.")] = 1,
    fmt: Output = Format.table,
) -> None:
    """Makes a join token; it is shown once and admits one agent."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        request = inventory_pb2.CreateJoinTokenRequest(
            site=f"sites/{site.removeprefix('sites/')}", ttl_s=round(3600 * hours)
        )
        made = client.inventory.CreateJoinToken(request, timeout=10)
        context = client.context
    if fmt is Format.json:
        output.show_one(made, [], fmt)
        return
    print(made.secret)
    if context is not None:
        output.note(
            "on the new node: WHALEFLUX_JOIN_TOKEN=<token> whaleflux agent "
            f"--server {context.server} --server-name {context.server_name} --ca-file {context.ca} --site {site} --node-id NAME"
        )


@token.command("list")
def list_tokens(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Join tokens, without their secrets."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        listed = pages(client.inventory.ListJoinTokens, inventory_pb2.ListJoinTokensRequest(), "join_tokens")
    columns = [
        Column("NAME", lambda t: t.name),
        Column("SITE", lambda t: t.site),
        Column("USED BY", lambda t: t.used_by or "-"),
        Column("AGE", lambda t: output.age(t.create_time)),
    ]
    output.show(listed, columns, fmt, headers=not no_headers, empty="no tokens")


@token.command("delete")
def delete_token(name: Annotated[str, typer.Argument(help="joinTokens/...")]) -> None:
    """Revokes a token."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        client.inventory.DeleteJoinToken(inventory_pb2.DeleteJoinTokenRequest(name=name), timeout=10)
    output.note("revoked")


def datasets(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Datasets and where they are cached."""
    from whaleflux.cli.quantities import shown_bytes
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        listed: list[Any] = pages(client.inventory.ListDatasets, inventory_pb2.ListDatasetsRequest(), "datasets")
    columns = [
        Column("NAME", lambda d: d.name),
        Column("SIZE", lambda d: shown_bytes(d.size_bytes)),
        Column("COPIES", lambda d: str(len(d.copies))),
        Column("FROM", lambda d: d.uri),
    ]
    output.show(listed, columns, fmt, headers=not no_headers, empty="no datasets")
