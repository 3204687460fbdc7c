"""Secrets: values that tasks are given and nobody is shown. A value comes from a file, a pipe or a prompt, never from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.filters import Sort, ordered
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, pages

secrets = typer.Typer(
    invoke_without_command=True,
    help="Secrets that jobs, models and datasets use: store, rotate, share, list, delete. Alone: list them.",
)

ALL = "all"  # --queue all: no limit again
NOBODY = "none"  # --team none
MAX_BYTES = 64 << 10

Name = Annotated[str, typer.Argument(metavar="NAME", help="Secret.")]
FromFile = Annotated[
    Path | None, typer.Option("--from-file", metavar="FILE", help="Take the value from here; - for stdin.")
]
Team = Annotated[str, typer.Option("--team", metavar="GROUP", help="Group whose members may use and rotate it too.")]
Queues = Annotated[
    list[str] | None,
    typer.Option("--queue", metavar="QUEUE", help="Queue in which it may be used; may be repeated. All without it."),
]
# Taken so that it can be refused with a word on why, and before anything shows it again.
NoValue = Annotated[list[str] | None, typer.Argument(hidden=True, show_default=False)]


@secrets.callback()
def listed_alone(
    context: typer.Context, sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False
) -> None:
    if context.invoked_subcommand is None:
        list_(sort, fmt, no_headers)


@secrets.command("add")
def add(
    name: Name,
    more: NoValue = None,
    from_file: FromFile = None,
    team: Team = "",
    queue: Queues = None,
    fmt: Output = Format.table,
) -> None:
    """Stores a secret. Asks for the value without showing it; or takes it from a file or a pipe.

    \b
      whaleflux secrets add hf-token                              asks
      whaleflux secrets add deploy-key --from-file ~/.ssh/deploy  a file as it is
      pass show hf | whaleflux secrets add hf-token               a pipe
      whaleflux secrets add wandb-key --team nlp --queue research

    Of a single line the newline at its end is left out. Jobs use it with: secrets: [hf-token]
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import secrets_pb2 as pb

    _refuse(name, more, "add")
    secret = pb.Secret(team=_group(team), queues=_queues(queue))
    request = pb.CreateSecretRequest(
        secret_id=_id(name), secret=secret, value=_value(name, from_file), request_id=names.ulid()
    )
    with fleet() as client:
        made = client.secrets.CreateSecret(request, timeout=20)
    if fmt is not Format.table:
        output.show_one(made, [], fmt)
        return
    output.note(f"{made.name} is stored, {_shared(made)}; jobs use it with: secrets: [{names.last(made.name)}]")


@secrets.command("rotate")
def rotate(name: Name, more: NoValue = None, from_file: FromFile = None, fmt: Output = Format.table) -> None:
    """Stores a new value. What runs keeps the old one; every attempt that begins from now on gets the new one.

    \b
      whaleflux secrets rotate hf-token
      whaleflux secrets rotate deploy-key --from-file ~/.ssh/new
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import secrets_pb2 as pb

    _refuse(name, more, "rotate")
    with fleet() as client:
        client.secrets.GetSecret(pb.GetSecretRequest(name=_full(name)), timeout=20)  # nobody types a value in vain
        request = pb.UpdateSecretRequest(
            secret=pb.Secret(name=_full(name)), value=_value(name, from_file), request_id=names.ulid()
        )
        made = client.secrets.UpdateSecret(request, timeout=20)
    if fmt is not Format.table:
        output.show_one(made, [], fmt)
        return
    output.note(f"{made.name} has version {made.versions[-1].version}; attempts that begin from now on get it")


@secrets.command("set")
def set_(name: Name, team: Team = "", queue: Queues = None) -> None:
    """Changes whom a secret is shared with, and where it may be used.

    \b
      whaleflux secrets set hf-token --team nlp
      whaleflux secrets set hf-token --queue research --queue prod
      whaleflux secrets set hf-token --queue all --team none
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import secrets_pb2 as pb

    request = pb.UpdateSecretRequest(secret=pb.Secret(name=_full(name)))
    if team:
        request.update_mask.paths.append("team")
        request.secret.team = "" if team == NOBODY else _group(team)
    if queue:
        request.update_mask.paths.append("queues")
        request.secret.queues.extend([] if queue == [ALL] else _queues(queue))
    if not request.update_mask.paths:
        raise InvalidArgument(FieldViolation("--team", "nothing to change; give --team or --queue"))
    with fleet() as client:
        made = client.secrets.UpdateSecret(request, timeout=20)
    output.note(f"{made.name}: {_shared(made)}")


@secrets.command("ls")
def list_(sort: Sort = "", fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Secrets that are yours, your groups', or (for operators) anybody's; never their values."""
    from whaleflux.v1 import secrets_pb2 as pb

    with fleet() as client:
        listed: list[Any] = pages(client.secrets.ListSecrets, pb.ListSecretsRequest(), "secrets")
    columns = [
        Column("NAME", lambda s: names.last(s.name)),
        Column("VERSION", lambda s: str(s.versions[-1].version)),
        Column("OWNER", lambda s: s.owner),
        Column("TEAM", lambda s: names.last(s.team) or "-"),
        Column("QUEUES", lambda s: ", ".join(map(names.last, s.queues)) or ALL),
        Column("AGE", lambda s: output.age(s.create_time), value=lambda s: output.age_s(s.create_time)),
        Column(
            "ROTATED",
            lambda s: output.age(s.versions[-1].create_time),
            value=lambda s: output.age_s(s.versions[-1].create_time),
        ),
        Column("KEY", lambda s: s.versions[-1].key_id, wide=True),
    ]
    empty = "no secrets of yours; store one with: whaleflux secrets add NAME"
    output.show(ordered(listed, columns, sort), columns, fmt, headers=not no_headers, empty=empty)


@secrets.command("show")
def show(name: Name, fmt: Output = Format.table) -> None:
    """What is known about a secret: its versions, whose it is, where it may be used; never its value."""
    from whaleflux.quantities import shown_bytes
    from whaleflux.v1 import secrets_pb2 as pb

    with fleet() as client:
        found = client.secrets.GetSecret(pb.GetSecretRequest(name=_full(name)), timeout=20)
    kept = [
        f"{one.version} ({shown_bytes(one.size_bytes)}, {output.age(one.create_time)} ago by {one.creator}, key {one.key_id})"
        for one in found.versions
    ]
    lines = [
        ("name", found.name),
        ("owner", found.owner),
        ("team", names.last(found.team)),
        ("queues", ", ".join(map(names.last, found.queues)) or ALL),
        ("stored", output.age(found.create_time) + " ago"),
        ("versions", "; ".join(kept)),
    ]
    output.show_one(found, lines, fmt)


@secrets.command("rm")
def remove(name: Name, yes: Yes = False) -> None:
    """Deletes a secret with all its versions. What runs keeps what it was given; new attempts that name it are refused."""
    from whaleflux.v1 import secrets_pb2 as pb

    with fleet() as client:
        confirm(f"delete {_full(name)} with all its versions?", yes)
        client.secrets.DeleteSecret(pb.DeleteSecretRequest(name=_full(name)), timeout=20)
    output.note(f"{_full(name)} is deleted")


@secrets.command("rewrap")
def rewrap(fmt: Output = Format.table) -> None:
    """Wraps the keys of all secrets with the newest key of inventory's file, or of the key management service. For admins.

    \b
      python -m whaleflux.bootstrap secrets-key --file .whaleflux/pki/secrets.keys
      whaleflux secrets rewrap                  then the older keys may be taken out of the file
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import secrets_pb2 as pb

    said = pb.RewrapSecretsResponse()
    with fleet() as client:
        for answer in client.secrets.RewrapSecrets(pb.RewrapSecretsRequest(), timeout=3600):
            said.CopyFrom(answer)
            if sys.stderr.isatty():
                output.progress(f"{said.done} of {said.total}" if said.done < said.total else "")
    if fmt is not Format.table:
        output.say_json(output.as_json(said), fmt)
    elif not said.failed:
        output.note(f"{said.rewrapped} of {said.total} secrets are wrapped anew; older keys are not needed any more")
    for name in said.failed:
        output.fail(
            f"{name} cannot be opened: its key is not there, or it is damaged; put the key back, or: whaleflux secrets rotate {names.last(name)}"
        )
    raise typer.Exit(1 if said.failed else 0)


def _value(name: str, from_file: Path | None) -> bytes:
    """From the file, the pipe, or a prompt that shows nothing."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    if from_file is not None and str(from_file) != "-":
        try:
            with open(from_file, "rb") as file:
                value = file.read(MAX_BYTES + 2)
        except OSError as error:
            raise InvalidArgument(FieldViolation("--from-file", f"cannot read {from_file}: {error.strerror}")) from None
    elif from_file is not None or not sys.stdin.isatty():
        value = sys.stdin.buffer.read(MAX_BYTES + 2)
    else:
        import getpass

        value = getpass.getpass(f"value of {names.last(_full(name))} (not shown): ").encode()
    value = without_newline(value)
    if not 0 < len(value) <= MAX_BYTES:
        size = "is empty" if not value else f"has more than {MAX_BYTES} bytes"
        raise InvalidArgument(
            FieldViolation("value", f"{size}; give 1 byte to 64 KiB by --from-file, a pipe, or at the prompt")
        )
    return value


def without_newline(value: bytes) -> bytes:
    """A single line as people mean it: editors and `echo` put a newline behind it, which breaks a token. Other values stay as they are."""
    line = value.removesuffix(b"\n").removesuffix(b"\r")
    return line if b"\n" not in line and b"\0" not in line else value


def _refuse(name: str, more: list[str] | None, command: str) -> None:
    """Says nothing of what was given."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    if more or "=" in name:
        text = (
            "is not taken from the command line: everybody on this machine sees it there, and your shell keeps it in its history (take it "
            f"out there, and make a new one if others use this machine); type it at the prompt of: whaleflux secrets {command} NAME"
        )
        raise InvalidArgument(FieldViolation("value", text))


def _id(name: str) -> str:
    return name.removeprefix("secrets/")


def _full(name: str) -> str:
    return names.secret(name)


def _group(team: str) -> str:
    return names.group(team.removeprefix("groups/")) if team else ""


def _queues(queues: list[str] | None) -> list[str]:
    return [names.queue(queue.removeprefix("queues/")) for queue in queues or []]


def _shared(secret: Any) -> str:
    who = f"{secret.owner} and group {names.last(secret.team)} use it" if secret.team else f"{secret.owner} uses it"
    return who + (f" in {', '.join(map(names.last, secret.queues))}" if secret.queues else "")
