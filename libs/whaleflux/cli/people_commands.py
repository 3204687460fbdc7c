"""Users, service accounts, groups and tokens."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, UserArgument, Yes, confirm, fleet, pages

user = typer.Typer(no_args_is_help=True, help="Users and service accounts: who may do what here.")
group = typer.Typer(no_args_is_help=True, help="Groups: whom queues can name together.")
tokens = typer.Typer(no_args_is_help=True, help="Tokens: what programs log in by.")


class Role(StrEnum):
    """What somebody may do."""

    viewer = "viewer"
    user = "user"
    operator = "operator"
    admin = "admin"
    app = "app"


RoleOption = Annotated[
    Role | None,
    typer.Option(
        "--role", help="viewer reads, user runs jobs, operator runs the fleet, admin makes admins, app asks models."
    ),
]
Display = Annotated[str | None, typer.Option("--display-name", help="Name for people.")]
GroupName = Annotated[str, typer.Argument(metavar="GROUP", help="Group.")]
Hours = Annotated[float, typer.Option("--hours", min=0.01, max=168, help="The code ends after this.")]
_KINDS = "PRINCIPAL_KIND_"


@user.command("add")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who: a-z, 0-9 and '-'.")],
    role: RoleOption = None,
    service_account: Annotated[
        bool, typer.Option("--service-account", help="A program; it logs in by tokens.")
    ] = False,
    oidc: Annotated[
        bool, typer.Option("--oidc", help="Who logs in at the OpenID provider under this name becomes it.")
    ] = False,
    display_name: Display = None,
    hours: Hours = 24,
) -> None:
    """Makes somebody known, and prints the command by which they log in, once.

    \b
      whaleflux user add ann                         a person who runs jobs
      whaleflux user add olga --role operator
      whaleflux user add ci --service-account        then: whaleflux tokens create --user ci
      whaleflux user add ann --oidc                  logs in at the OpenID provider
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import identity_pb2 as pb
    from whaleflux.v1 import trust_pb2

    kind = trust_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT if service_account else trust_pb2.PRINCIPAL_KIND_USER
    wanted = trust_pb2.Principal(
        kind=kind, role=role.value if role else "", display_name=display_name or "", awaits_oidc=oidc
    )
    with fleet() as client:
        request = pb.CreateUserRequest(user_id=name, user=wanted, request_id=names.ulid())
        made = client.identity.CreateUser(request, timeout=10)
        output.note(f"{made.name} is known, with role {made.role}")
        if service_account:
            output.note(f"next: whaleflux tokens create --user {name}")
        elif oidc:
            output.note("they log in at the OpenID provider: whaleflux login --server " + _server(client))
        else:
            _say_link(client, made.name, hours)


@user.command("link")
def link(name: UserArgument, hours: Hours = 24) -> None:
    """Prints a command by which a person logs in once: on a new machine, or after the last login ended.

    \b
      whaleflux user link ann
    """  # noqa: D301 - the escape tells click to keep the lines
    with fleet() as client:
        _say_link(client, _user(name), hours)


def _say_link(client: Any, full: str, hours: float) -> None:
    from whaleflux.quantities import shown_duration
    from whaleflux.v1 import identity_pb2 as pb

    made = client.identity.CreateLoginLink(pb.CreateLoginLinkRequest(user=full, ttl_s=round(3600 * hours)), timeout=10)
    output.note(f"they log in by this command, once, within {shown_duration(3600 * hours)}:")
    output.say(f"whaleflux login --server {_server(client)} --code {made.code}")


def _server(client: Any) -> str:
    return client.context.server if client.context is not None else "HOST:PORT"


@user.command("set")
def set_(
    name: UserArgument,
    role: RoleOption = None,
    display_name: Display = None,
    oidc: Annotated[
        bool | None,
        typer.Option("--oidc/--no-oidc", help="Whether the OpenID provider's next login of this name becomes it."),
    ] = None,
) -> None:
    """Changes somebody. A lower role counts everywhere within a second.

    \b
      whaleflux user set ann --role operator
      whaleflux user set ann --oidc                  was made here, and is to log in at the provider from now on
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import identity_pb2 as pb
    from whaleflux.v1 import trust_pb2

    given = {"role": role.value if role else None, "display_name": display_name, "awaits_oidc": oidc}
    changed = {field: value for field, value in given.items() if value is not None}
    if not changed:
        raise InvalidArgument(FieldViolation("--role", "nothing to change; give --role, --display-name or --oidc"))
    request = pb.UpdateUserRequest(user=trust_pb2.Principal(name=_user(name), **changed))  # type: ignore[arg-type]
    request.update_mask.paths.extend(sorted(changed))
    with fleet() as client:
        made = client.identity.UpdateUser(request, timeout=10)
    output.note(f"{made.name}: role {made.role}")


@user.command("ls")
def list_users(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Users and service accounts; for role user, oneself."""
    from whaleflux.v1 import identity_pb2 as pb

    with fleet() as client:
        listed = pages(client.identity.ListUsers, pb.ListUsersRequest(page_size=1000), "users")
    columns = [
        Column("NAME", lambda u: names.last(u.name)),
        Column("KIND", _kind),
        Column("ROLE", lambda u: u.role),
        Column("STATE", _state),
        Column("LOGS IN BY", _logs_in_by),
        Column("DISPLAY NAME", lambda u: u.display_name, wide=True),
        Column("AGE", lambda u: output.age(u.create_time), value=lambda u: output.age_s(u.create_time)),
    ]
    output.show(
        listed,
        columns,
        fmt,
        headers=not no_headers,
        empty="nobody is known; make somebody so with: whaleflux user add NAME",
    )


@user.command("show")
def show_user(name: UserArgument, fmt: Output = Format.table) -> None:
    """One user or service account."""
    from whaleflux.v1 import identity_pb2 as pb

    with fleet() as client:
        found = client.identity.GetUser(pb.GetUserRequest(name=_user(name)), timeout=10)
        groups = pages(client.identity.ListGroups, pb.ListGroupsRequest(page_size=1000), "groups")
    last = found.last_change
    lines = [
        ("name", found.name),
        ("kind", _kind(found)),
        ("role", found.role),
        ("state", _state(found)),
        ("display name", found.display_name),
        ("groups", ", ".join(names.last(g.name) for g in groups if found.name in g.members)),
        ("logs in by", _logs_in_by(found)),
        ("provider", f"{found.oidc_issuer}, sub {found.oidc_subject}" if found.oidc_subject else ""),
        ("last change", f"by {last.actor or 'the fleet'}" + (f": {last.reason}" if last.reason else "")),
    ]
    output.show_one(found, lines, fmt)


@user.command("disable")
def disable(
    name: UserArgument, message: Annotated[str, typer.Option("-m", "--message", help="Why.")] = "", yes: Yes = False
) -> None:
    """Refuses somebody everywhere within a second. Their jobs run on, and belong to them still.

    \b
      whaleflux user disable ann -m "left" --yes
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import identity_pb2 as pb

    with fleet() as client:
        confirm(f"refuse {name} from now on?", yes)
        client.identity.DisableUser(pb.DisableUserRequest(name=_user(name), reason=message), timeout=10)
    output.note(f"{name} is refused from now on; their jobs run on (whaleflux jobs, whaleflux cancel JOB)")


@user.command("enable")
def enable(name: UserArgument) -> None:
    """Admits somebody again, who then logs in anew."""
    from whaleflux.v1 import identity_pb2 as pb

    with fleet() as client:
        client.identity.EnableUser(pb.EnableUserRequest(name=_user(name)), timeout=10)
    output.note(f"{name} may log in again; a new code: whaleflux user link {name}")


@group.command("create")
def create_group(
    name: GroupName,
    member: Annotated[list[str] | None, typer.Option("--member", help="A user; may be given again.")] = None,
) -> None:
    """Makes a group.

    \b
      whaleflux group create research --member ann --member bob
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import identity_pb2 as pb
    from whaleflux.v1 import trust_pb2

    members = [_user(one) for one in member or []]
    with fleet() as client:
        request = pb.CreateGroupRequest(group_id=name, group=trust_pb2.Group(members=members))
        made = client.identity.CreateGroup(request, timeout=10)
    output.note(f"{made.name}: {_members(made) or 'nobody yet'}")


@group.command("add")
def add_member(name: GroupName, member: UserArgument) -> None:
    """Puts somebody into a group; counts within a second."""
    from whaleflux.v1 import identity_pb2 as pb

    with fleet() as client:
        made = client.identity.AddGroupMember(
            pb.AddGroupMemberRequest(name=_group(name), member=_user(member)), timeout=10
        )
    output.note(f"{made.name}: {_members(made)}")


@group.command("remove")
def remove_member(name: GroupName, member: UserArgument) -> None:
    """Takes somebody out of a group; counts within a second."""
    from whaleflux.v1 import identity_pb2 as pb

    with fleet() as client:
        request = pb.RemoveGroupMemberRequest(name=_group(name), member=_user(member))
        made = client.identity.RemoveGroupMember(request, timeout=10)
    output.note(f"{made.name}: {_members(made) or 'nobody'}")


@group.command("rm")
def remove_group(name: GroupName, yes: Yes = False) -> None:
    """Deletes a group; queues that name it name nobody by that."""
    from whaleflux.v1 import identity_pb2 as pb

    with fleet() as client:
        confirm(f"delete {_group(name)}?", yes)
        client.identity.DeleteGroup(pb.DeleteGroupRequest(name=_group(name)), timeout=10)
    output.note(f"{_group(name)} is deleted")


@group.command("ls")
def list_groups(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Groups and who is in them; for role user, one's own."""
    from whaleflux.v1 import identity_pb2 as pb

    with fleet() as client:
        listed = pages(client.identity.ListGroups, pb.ListGroupsRequest(page_size=1000), "groups")
    columns = [
        Column("NAME", lambda g: names.last(g.name)),
        Column("MEMBERS", _members),
        Column("AGE", lambda g: output.age(g.create_time), value=lambda g: output.age_s(g.create_time)),
    ]
    output.show(
        listed, columns, fmt, headers=not no_headers, empty="no groups; make one with: whaleflux group create NAME"
    )


@tokens.command("create")
def create_token(
    user: Annotated[str, typer.Option("--user", help="As whom it logs in; none: as you.")] = "",
    role: RoleOption = None,
    queue: Annotated[
        list[str] | None, typer.Option("--queue", help="May act in this queue alone; may be given again.")
    ] = None,
    days: Annotated[float, typer.Option("--days", min=0.001, max=366, help="Ends after this.")] = 90,
    for_: Annotated[str, typer.Option("--for", help="What it is for; shown in lists.")] = "",
    fmt: Output = Format.table,
) -> None:
    """Makes a token; it is shown once.

    \b
      whaleflux tokens create --user ci --queue nightly --for "nightly builds"
      WHALEFLUX_SERVER=HOST:7443 WHALEFLUX_TOKEN=wft... whaleflux submit job.yaml -y
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import identity_pb2 as pb

    wanted = pb.Token(
        user=_user(user) if user else "",
        display_name=for_,
        role=role.value if role else "",
        queues=[names.queue(one.removeprefix("queues/")) for one in queue or []],
    )
    with fleet() as client:
        made = client.identity.CreateToken(pb.CreateTokenRequest(token=wanted, ttl_s=round(86_400 * days)), timeout=10)
        server = _server(client)
    if fmt.is_json:
        output.show_one(made, [], fmt)
        return
    output.say(made.secret)
    output.note(
        f"{made.name} logs in as {names.last(made.user)} with role {made.role}, for {days:g} days; where it is used, set "
        f"WHALEFLUX_SERVER={server} and WHALEFLUX_TOKEN to it"
    )


@tokens.command("ls")
def list_tokens(
    user: Annotated[str, typer.Option("--user", help="Of this one alone.")] = "",
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """Tokens without their secrets: yours, and for operators those of all."""
    from whaleflux.v1 import identity_pb2 as pb

    request = pb.ListTokensRequest(page_size=1000, user=_user(user) if user else "")
    with fleet() as client:
        listed = pages(client.identity.ListTokens, request, "tokens")
    columns = [
        Column("ID", lambda t: names.last(t.name)),
        Column("USER", lambda t: names.last(t.user)),
        Column("ROLE", lambda t: t.role),
        Column("QUEUES", lambda t: ", ".join(map(names.last, t.queues)) or "-"),
        Column("FOR", lambda t: t.display_name),
        Column("ENDS IN", lambda t: output.ends_in(t.expire_time), value=lambda t: t.expire_time.seconds),
        Column("LAST USED", lambda t: f"{output.age(t.last_use_time)} ago" if t.last_use_time.seconds else "never"),
    ]
    output.show(listed, columns, fmt, headers=not no_headers, empty="no tokens; make one with: whaleflux tokens create")


@tokens.command("rm")
def remove_token(
    token: Annotated[str, typer.Argument(metavar="ID", help="As in: whaleflux tokens ls.")], yes: Yes = False
) -> None:
    """Ends a token; whoever logged in by it is refused within a second."""
    from whaleflux.v1 import identity_pb2 as pb

    full = names.token(token.removeprefix("tokens/"))
    with fleet() as client:
        confirm(f"end {full}?", yes)
        client.identity.RevokeToken(pb.RevokeTokenRequest(name=full), timeout=10)
    output.note(f"{full} is ended")


def _user(name: str) -> str:
    return names.user(name.removeprefix("users/"))


def _group(name: str) -> str:
    return names.group(name.removeprefix("groups/"))


def _members(group: Any) -> str:
    return ", ".join(names.last(member) for member in group.members)


def _kind(user: Any) -> str:
    from whaleflux.v1 import trust_pb2

    return output.enum_name(trust_pb2.PrincipalKind, user.kind, _KINDS).lower().replace("_", " ")


def _state(user: Any) -> str:
    return f"disabled: {user.last_change.reason}".rstrip(": ") if user.disabled else "enabled"


def _logs_in_by(user: Any) -> str:
    from whaleflux.v1 import trust_pb2

    if user.kind == trust_pb2.PRINCIPAL_KIND_SERVICE_ACCOUNT:
        return "tokens"
    if user.oidc_subject:
        return "provider"
    return "provider, from the next login on" if user.awaits_oidc else "code"
