"""The audit trail: who changed what, who was refused, and whether it is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.event_commands import Until
from whaleflux.cli.filters import Since, since_s
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, fleet, pages

if TYPE_CHECKING:
    from whaleflux.v1.audit_pb2 import AuditFilter, AuditRecord, VerifyAuditResponse

audit = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
_PAGE = 500


@audit.callback()
def show(
    call: typer.Context,
    who: Annotated[
        str, typer.Option("--who", metavar="SUBJECT", help="By this one: user/ann, agent/onprem/n1; or a role.")
    ] = "",
    what: Annotated[str, typer.Option("--what", metavar="METHOD", help="Only this method: CancelJob.")] = "",
    object_: Annotated[
        str, typer.Option("--object", metavar="NAME", help="About this and all below it: queues/research.")
    ] = "",
    denied: Annotated[bool, typer.Option("--denied", help="Only what was refused or failed.")] = False,
    since: Since = "",
    until: Until = "",
    number: Annotated[int, typer.Option("-n", help="The newest so many.", min=1, max=100_000)] = 100,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """Who changed what, and who was refused, newest first. Operators see all, everybody else their own.

    \b
      whaleflux audit --since 1h                       every change of the last hour
      whaleflux audit --who user/ann --what CancelJob
      whaleflux audit --object queues/research -o json
      whaleflux audit --denied --since 1d              attempts that were refused
      whaleflux audit verify                           is the trail as it was written?

    Kept for 400 days (setting audit_days of inventory).
    """  # noqa: D301 - the escape tells click to keep the lines
    if call.invoked_subcommand:
        return
    from whaleflux.v1 import audit_pb2

    wanted = audit_pb2.AuditFilter(who=who, what=what, object=object_, denied=denied)
    _within(wanted, since, until)
    request = audit_pb2.ListAuditRequest(filter=wanted, page_size=min(number, _PAGE))
    with fleet() as client:
        found = pages(client.audit.ListAudit, request, "records", number)
    empty = "nothing of that is in the audit trail"
    output.show(found, _columns(), fmt, headers=not no_headers, empty=empty, name=lambda r: f"{r.writer}/{r.sequence}")


@audit.command("verify")
def verify(
    file: Annotated[Path | None, typer.Argument(help="An exported file; none: what the fleet keeps.")] = None,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """Whether the trail is as it was written: nothing changed, missing, inserted, reordered or cut off. Exit code 1: it is not.

    \b
      whaleflux audit verify
      whaleflux audit verify november.jsonl      an export, by itself: without the heads that the fleet's store keeps
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import audit_pb2

    if file is not None:
        from whaleflux.cli import audit_files

        found = audit_files.verified(file)
    else:
        with fleet() as client:
            found = client.audit.VerifyAudit(audit_pb2.VerifyAuditRequest(), timeout=300)
    if fmt.is_json:
        output.say_json(output.as_json(found), fmt)
    else:
        empty = f"sound: {_read(found)}"
        output.show(found.findings, _finding_columns(), fmt, headers=not no_headers, empty=empty)
    if found.findings:
        output.fail(
            f"the audit trail is not as it was written: {len(found.findings)} findings in {_read(found)}; keep an export "
            "(whaleflux audit export FILE) and look who could write to NATS"
        )
        raise typer.Exit(1)


@audit.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="Where to write, one record a line.", metavar="FILE")],
    since: Since = "",
    until: Until = "",
    fmt: Annotated[Format, typer.Option("-o", "--output", help="jsonl, the only form.")] = Format.jsonl,
) -> None:
    """Writes the trail as JSON lines, oldest first, each with the bytes that were hashed: for a SIEM, or to be verified later.

    \b
      whaleflux audit export audit.jsonl
      whaleflux audit export november.jsonl --since 2026-11-01 --until 2026-12-01
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import audit_files
    from whaleflux.v1 import audit_pb2

    wanted = audit_pb2.AuditFilter()
    _within(wanted, since, until)
    with fleet() as client:
        parts = client.audit.ExportAudit(audit_pb2.ExportAuditRequest(filter=wanted), timeout=None)
        count = audit_files.write(file, parts)
    output.note(f"{count} records in {file}; verify them with: whaleflux audit verify {file}")


def _within(wanted: AuditFilter, since: str, until: str) -> None:
    for field, text in (("since", since), ("until", until)):
        if text:
            getattr(wanted, field).FromNanoseconds(int(since_s(text, f"--{field}") * 1e9))


def _read(found: VerifyAuditResponse) -> str:
    from whaleflux.cli.kept_events import shown_time

    lost = f", {found.lost} that there was no room for" if found.lost else ""
    since = f" since {shown_time(found.oldest)}" if found.HasField("oldest") else ""
    return f"{found.records} records of {found.chains} processes{since}{lost}"


def _columns() -> list[Column]:
    from whaleflux.cli.kept_events import shown_time

    return [
        Column("TIME", lambda r: shown_time(r.time), value=lambda r: r.time.ToNanoseconds() / 1e9),
        Column("WHO", lambda r: r.subject),
        Column("WHAT", lambda r: r.method.rpartition("/")[2] if r.method.startswith("/") else r.method),
        Column("OBJECT", lambda r: r.object or "-"),
        Column("RESULT", _result),
        Column("CHANGE", _change),
        Column("FROM", lambda r: r.peer, wide=True),
        Column("CLIENT", lambda r: r.client, wide=True),
        Column("GROUPS", lambda r: ",".join(r.groups), wide=True),
        Column("SESSION", lambda r: r.session, wide=True),
        Column("TRACE", lambda r: r.trace_id, wide=True),
        Column("RECORD", lambda r: f"{r.writer}/{r.sequence}", wide=True),
    ]


def _result(record: AuditRecord) -> str:
    words = " ".join(filter(None, [record.result, record.reason]))
    return f"{words} x{record.count}" if record.count > 1 else words


def _change(record: AuditRecord) -> str:
    lost = f"({record.lost} records before it were lost) " if record.lost else ""
    if record.before and record.after:
        return f"{lost}{record.before} -> {record.after}"
    return lost + (record.after or record.before)


def _finding_columns() -> list[Column]:
    from whaleflux.v1 import audit_pb2

    def kind(finding: Any) -> str:
        return output.enum_name(audit_pb2.AuditFinding.Kind, finding.kind, "KIND_")

    return [
        Column("WHAT", kind),
        Column("WRITER", lambda f: f.writer or "-"),
        Column("RECORD", lambda f: str(f.sequence)),
        Column("MESSAGE", lambda f: f.message),
    ]
