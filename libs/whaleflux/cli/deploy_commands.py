"""Models that go to sites: declare and change them, see how far they are, go back to the engine of before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import deploy_words, output, submission
from whaleflux.cli.files import read
from whaleflux.cli.output import Format
from whaleflux.cli.state import Output, Yes, confirm, fleet

if TYPE_CHECKING:
    from whaleflux.manifests.yaml_files import ModelManifest
    from whaleflux.v1 import router_pb2

rollout = typer.Typer(no_args_is_help=True, help="Changed engines of models: how far they are, and back again.")
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model.")]


def deploy(
    file: Annotated[str, typer.Argument(help="Model file, or - for stdin.")],
    sites: Annotated[
        str,
        typer.Option(
            "--sites", metavar="SITE,SITE", help="Of the sites of the file these alone; or these, where it names none."
        ),
    ] = "",
    yes: Yes = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Until all of its replicas are READY, or a changed engine was rolled back; Ctrl-C ends the wait.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say when it would be ready at each site, and why; changes nothing.")
    ] = False,
    allow_address: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-address",
            metavar="IP:PORT",
            help="Dial it though the router's networks leave it out; operators only.",
        ),
    ] = None,
    fmt: Output = Format.table,
) -> None:
    """Declares a model, or changes one that is declared; its replicas are started at their sites and kept running.

    A changed engine (or weights) takes over one replica at a time, and goes back by itself when it does worse.

    \b
      whaleflux deploy model.yaml
      whaleflux deploy model.yaml --sites onprem,cloud,edge --dry-run
      whaleflux deploy model.yaml --wait    and come back when it answers
      whaleflux rollout status MODEL        how far it is at each site, and how long it still takes
      whaleflux route MODEL                 where a request would go, and why
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument, NotFound
    from whaleflux.manifests.yaml_files import model_from_yaml
    from whaleflux.v1 import router_pb2

    if file == "-" and not yes and not dry_run:
        raise InvalidArgument(FieldViolation("--yes", "a model file from stdin cannot be asked about; add -y"))
    manifest = model_from_yaml(*read(file))
    _only(manifest.model, sites)
    output.note(submission.secrets_in_clear([manifest.model.engine, *manifest.model.sites]))
    manifest.model.allowed_addresses.extend(allow_address or ())
    name = names.model(manifest.model_id)
    with fleet() as client:
        declared = _undeclared(client, manifest, dry_run=dry_run)
        planned = manifest.model if declared is None else _without_weights(manifest.model)
        try:
            before = client.router.GetModel(router_pb2.GetModelRequest(name=name), timeout=10)
        except NotFound:
            before = None
        asked = router_pb2.EstimateDeploymentRequest(model=_named(planned, before))
        estimate = client.router.EstimateDeployment(asked, timeout=30)
        if dry_run and fmt.is_json:
            output.show_one(estimate, [], fmt)
        else:
            _show_plan(manifest, before, estimate)
        if dry_run:
            _leave(estimate)
            return
        _ask(client, manifest.model_id, planned, before, yes=yes)
        if declared is not None:
            client.inventory.CreateDataset(declared, timeout=30)
            output.note(f"{manifest.weights_source} is {manifest.model.engine.weights} from now on")
        _send(client, manifest, before, keep_addresses=not allow_address)
        output.note(f"{name} is declared; watch its replicas with: whaleflux replicas {manifest.model_id}")
        if wait:
            from whaleflux.cli.replica_waiting import until_ready

            until_ready(client, name)


def _leave(estimate: router_pb2.EstimateDeploymentResponse) -> None:
    """Of a dry run: with the code of wrong input, as `deploy` would, where none of a site's GPUs serve a model that names its shape."""
    if any(site.sizes and all(size.lack for size in site.sizes) for site in estimate.sites):
        raise typer.Exit(2)


def _ask(client: Any, model_id: str, planned: router_pb2.Model, before: Any, *, yes: bool) -> None:
    """Asks whether to go on; nothing was changed until then. Of a new model what can be refused is refused before that."""
    from whaleflux.v1 import router_pb2

    if before is not None:
        confirm("change it?", yes)
        return
    request = router_pb2.CreateModelRequest(model_id=model_id, model=planned, validate_only=True)
    client.router.CreateModel(request, timeout=20)
    confirm("serve it?", yes)


def _send(client: Any, manifest: ModelManifest, before: Any, *, keep_addresses: bool) -> None:
    from whaleflux.v1 import router_pb2

    if before is None:
        request = router_pb2.CreateModelRequest(
            model_id=manifest.model_id, model=manifest.model, request_id=names.ulid()
        )
        client.router.CreateModel(request, timeout=20)
        return
    manifest.model.name, manifest.model.etag = before.name, before.etag
    if keep_addresses:
        manifest.model.allowed_addresses.extend(before.allowed_addresses)
    client.router.UpdateModel(router_pb2.UpdateModelRequest(model=manifest.model), timeout=20)


def _only(model: router_pb2.Model, sites: str) -> None:
    """`--sites`: those of the file that are named, and those that it does not name as they are."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import router_pb2

    wanted = [site.strip() for site in sites.split(",") if site.strip()]
    if sites and not wanted:
        raise InvalidArgument(FieldViolation("--sites", "names no site; write --sites onprem,edge"))
    if len(set(wanted)) < len(wanted):
        raise InvalidArgument(FieldViolation("--sites", "names a site twice; name it once"))
    if not wanted:
        return
    of_file = {site.site: site for site in model.sites}
    if of_file and (unknown := [one for one in wanted if _site(one) not in of_file]):
        known = ", ".join(map(names.last, of_file))
        raise InvalidArgument(
            FieldViolation("--sites", f"names {', '.join(unknown)}, and the file only {known}; add it to `sites` there")
        )
    chosen = [of_file.get(_site(one), router_pb2.ModelSite(site=_site(one))) for one in wanted]
    del model.sites[:]
    model.sites.extend(chosen)


def _site(text: str) -> str:
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        return names.site(text.removeprefix("sites/"))
    except InvalidArgument as wrong:
        raise InvalidArgument(FieldViolation("--sites", wrong.violations[0].description)) from None


def _undeclared(client: Any, manifest: ModelManifest, *, dry_run: bool) -> Any:
    """Where the file says from where weights come: the request that declares that dataset; None where it is declared, or one is named."""
    from whaleflux.errors import NotFound
    from whaleflux.v1 import inventory_pb2

    name, source = manifest.model.engine.weights, manifest.weights_source
    if not source:
        return None
    try:
        client.inventory.GetDataset(inventory_pb2.GetDatasetRequest(name=name), timeout=10)
        return None
    except NotFound:
        pass
    request = inventory_pb2.CreateDatasetRequest(dataset_id=names.last(name), request_id=names.ulid())
    request.dataset.uri = source
    if not dry_run:
        _look_at(source, request)
    output.note(f"{source} would become {name}; what its pull takes is not in the times below")
    return request


def _look_at(source: str, request: Any) -> None:
    """Its size, and of a folder or file what it consists of: then nodes take from other versions what is the same.

    Where a URL shows nothing from here, the first node that reads it finds out. Raises InvalidArgument for a folder that is not there.
    """
    from whaleflux.cli.copying import Progress
    from whaleflux.data import hashing, sources
    from whaleflux.data import manifest as manifests
    from whaleflux.data.manifest import ManifestWrong
    from whaleflux.data.sources import SourceFailed
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        opened = sources.open_source(source)
        request.dataset.size_bytes = manifests.draft((one.path, one.size_bytes) for one in opened.scan()).size_bytes
        if "://" not in source:
            progress = Progress(request.dataset.size_bytes)
            request.manifest.CopyFrom(hashing.hashed(opened, progress.add).to_proto())
            progress.clear()
    except (SourceFailed, ManifestWrong, OSError) as unseen:
        if "://" not in source:
            why = f"{unseen.filename}: {unseen.strerror}" if isinstance(unseen, OSError) and unseen.filename else unseen
            advice = f"{why} (as seen from here); a dataset is written dataset:NAME, and one that nodes alone see is declared with: whaleflux datasets add"
            raise InvalidArgument(FieldViolation("weights", advice)) from None
        output.note(
            f"how large {source} is cannot be seen from here ({unseen}); whether it fits is found out at its nodes"
        )


def _named(model: router_pb2.Model, before: Any) -> router_pb2.Model:
    """For an estimate: with the name, whose measures count, where it is declared already."""
    made = type(model)()
    made.CopyFrom(model)
    made.name = before.name if before is not None else ""
    return made


def _without_weights(model: router_pb2.Model) -> router_pb2.Model:
    """What can be told of it before its weights are declared."""
    made = type(model)()
    made.CopyFrom(model)
    made.engine.weights = ""
    made.engine.command[:] = [word.replace("{weights}", "weights") for word in made.engine.command]
    return made


def _show_plan(manifest: ModelManifest, before: Any, estimate: router_pb2.EstimateDeploymentResponse) -> None:
    """On stdout: what will be served, when it is ready where, and how many replicas there were."""
    model, engine = manifest.model, manifest.model.engine
    if engine.addresses:
        output.say(f"PLAN  serve {manifest.model_id} by {len(engine.addresses)} server(s) that run elsewhere")
    else:
        count = deploy_words.wanted_replicas(model)
        output.say(f"PLAN  serve {manifest.model_id} with {count} replica(s) of {deploy_words.gpus_of(engine)}")
        deploy_words.show_sites(estimate.sites)
        deploy_words.show_sizes(estimate.sites)
    if before is not None:
        now = deploy_words.wanted_replicas(before)
        output.say(f"  now        {now} replica(s), {before.ready_replicas} ready, v{before.version or 1}")


@rollout.command("status")
def status(model: Model, fmt: Output = Format.table) -> None:
    """How far a model is at each of its sites, how long it still takes and why, and what became of its last change.

    \b
      whaleflux rollout status llama-8b
      whaleflux rollout status llama-8b -o json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import router_pb2

    name = names.model(model.removeprefix("models/"))
    with fleet() as client:
        found = client.router.GetModel(router_pb2.GetModelRequest(name=name), timeout=10)
        estimate = client.router.EstimateDeployment(router_pb2.EstimateDeploymentRequest(name=name), timeout=30)
    if fmt.is_json:
        shown = {
            "rollout": output.as_json(found.rollout),
            "version": str(found.version or 1),
            **output.as_json(estimate),
        }
        output.say_json(shown, fmt)
        return
    deploy_words.show_sites(estimate.sites)
    deploy_words.show_sizes(estimate.sites)
    output.say(
        f"{name} serves v{found.version or 1}"
        if not found.rollout.state
        else f"{deploy_words.rollout_state(found)}: {found.rollout.message}"
    )


@rollout.command("undo")
def undo(model: Model, yes: Yes = False) -> None:
    """Goes back to the engine of before: at once while a rollout is under way, by another rollout when it is done.

    \b
      whaleflux rollout undo llama-8b
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import router_pb2

    name = names.model(model.removeprefix("models/"))
    with fleet() as client:
        found = client.router.GetModel(router_pb2.GetModelRequest(name=name), timeout=10)
        if found.rollout.state not in {router_pb2.ROLLOUT_STATE_UNSPECIFIED, router_pb2.ROLLOUT_STATE_ROLLED_BACK}:
            confirm(f"go back from v{found.rollout.to_version} to v{found.rollout.from_version} of {model}?", yes)
        # Else nobody is asked about what the router refuses.
        changed = client.router.RollBackModel(router_pb2.RollBackModelRequest(name=name, etag=found.etag), timeout=20)
    output.note(f"{name}: {changed.rollout.message}; follow it with: whaleflux rollout status {names.last(name)}")
