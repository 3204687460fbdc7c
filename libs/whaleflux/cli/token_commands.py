"""Join tokens: each admits one agent, once."""

from __future__ import annotations

from typing import Annotated

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, Yes, confirm, fleet, pages

token = typer.Typer(no_args_is_help=True, help="Join tokens: each admits one agent, once.")
_LONGEST_S = 7 * 86_400.0


@token.command("create")
def create_token(
    site: Annotated[str, typer.Option(help="Site that it admits to; made when it does not exist.")],
    node: Annotated[
        str, typer.Option("--node", help="Id of the only node that it admits; none: any of the site.")
    ] = "",
    ttl: Annotated[str, typer.Option("--ttl", help="Ends after this: 30m, 2h, 7d at most.")] = "1h",
    replace: Annotated[
        bool, typer.Option("--replace", help="Another machine takes the node over; the one that has it is refused.")
    ] = False,
    yes: Yes = False,
    fmt: Output = Format.table,
) -> None:
    """Makes a join token; it is shown once and admits one agent.

    \b
      whaleflux token create --site onprem
      whaleflux token create --site onprem --node n7 --ttl 30m     n7 and nobody else
      whaleflux token create --site onprem --node n7 --replace     a new machine in the place of a dead one
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import inventory_pb2

    site_id, ttl_s = site.removeprefix("sites/"), _seconds(ttl)
    named = names.node(site_id, node.rpartition("/")[2]) if node else ""
    if replace and not named:
        raise InvalidArgument(FieldViolation("--replace", "needs --node: which one is another machine from now on"))
    with fleet() as client:
        if replace:
            confirm(f"refuse the machine that is {named} from now on?", yes)
            client.inventory.ReplaceNode(inventory_pb2.ReplaceNodeRequest(name=named), timeout=10)
        request = inventory_pb2.CreateJoinTokenRequest(site=names.site(site_id), ttl_s=round(ttl_s), node=named)
        made = client.inventory.CreateJoinToken(request, timeout=10)
        context = client.context
    if fmt.is_json:
        output.show_one(made, [], fmt)
        return
    output.say(made.secret)
    if context is not None:
        output.note(
            "on the new node: WHALEFLUX_JOIN_TOKEN=<token> whaleflux agent "
            f"--server {context.server} --server-name {context.server_name} --ca-file {context.ca} --site {site_id} "
            f"--node-id {names.last(named) if named else 'NAME'}"
        )


def _seconds(ttl: str) -> float:
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.quantities import seconds

    try:
        ttl_s = seconds(ttl)
    except ValueError as wrong:
        raise InvalidArgument(FieldViolation("--ttl", str(wrong))) from None
    if not 1 <= ttl_s <= _LONGEST_S:
        raise InvalidArgument(FieldViolation("--ttl", f"{ttl} is not within 1s to 7d"))
    return ttl_s


@token.command("list")
def list_tokens(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Join tokens, without their secrets."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        listed = pages(client.inventory.ListJoinTokens, inventory_pb2.ListJoinTokensRequest(), "join_tokens")
    columns = [
        Column("NAME", lambda t: t.name),
        Column("ADMITS", lambda t: t.node or t.site),
        Column("USED BY", lambda t: t.used_by or "-"),
        Column("ENDS IN", lambda t: output.ends_in(t.expire_time), value=lambda t: t.expire_time.seconds),
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
