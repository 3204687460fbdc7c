"""As whom one works with a fleet: login, logout, whoami."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import GLOBAL, Output, Yes, confirm, fleet

if TYPE_CHECKING:
    from whaleflux.context import Context
    from whaleflux.contexts import Contexts
    from whaleflux.login.first_contact import FrontDoor
    from whaleflux.v1 import identity_pb2

_MOST_CODE = 200  # characters that are read of one


def login(
    server: Annotated[
        str,
        typer.Option(
            "--server", envvar="WHALEFLUX_SERVER", help="Front door, host:port; none: that of the fleet in use."
        ),
    ] = "",
    code: Annotated[
        str,
        typer.Option(
            "--code", envvar="WHALEFLUX_LOGIN_CODE", help="One-time code or token; -: read it from standard input."
        ),
    ] = "",
    name: Annotated[str, typer.Option("--name", help="What to call the fleet here; none: after its host.")] = "",
    ca_file: Annotated[Path | None, typer.Option("--ca-file", help="The fleet's authority, PEM.")] = None,
    ca_sha256: Annotated[str, typer.Option("--ca-sha256", help="SHA-256 of the fleet's authority.")] = "",
    browser: Annotated[
        bool, typer.Option("--browser", help="Log in at the OpenID provider in this machine's browser.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Logs in to a fleet, by a code that somebody made for you or at your organisation's OpenID provider.

    \b
      whaleflux login --server HOST:7443 --code CODE      as `whaleflux user add` printed it
      whaleflux login --server HOST:7443                  at the OpenID provider
      whaleflux login                                     again, at the fleet in use

    A key is made here and never leaves this machine; its certificate is renewed by itself until the login ends, also after days asleep.
    """  # noqa: D301 - the escape tells click to keep the lines
    request = _by_code(_code(code)) if code else None  # one that was cut when it was pasted is shown to nobody
    known = _known(server)
    at = server or (known.server if known is not None else "")
    door = _believed(at, request.code or request.token if request else "", known, ca_file, ca_sha256, yes=yes)
    request = request or _at_the_provider(door, browser=browser)
    contexts, called = _place(door.server, name)
    from whaleflux.login import signing_in

    folder = contexts.folder / "logins" / called
    context, answer = signing_in.log_in(door, folder, request, known.inference_url if known is not None else "")
    contexts.link(called, folder / signing_in.FILE)
    contexts.use(called)
    ends = _day(answer.session_expire_time.seconds)
    output.note(f"you are {answer.subject} at {context.server} until {ends}; this fleet is {called} here, and in use")
    _note_another(folder / signing_in.FILE)


def logout(
    all_: Annotated[bool, typer.Option("--all", help="All of your logins there: a machine was lost.")] = False,
    yes: Yes = False,
) -> None:
    """Ends the login at the fleet in use, there and here."""
    from whaleflux.context import Context, find
    from whaleflux.errors import FailedPrecondition, StatusError, Unauthenticated
    from whaleflux.login import signing_in

    path = find(GLOBAL.context)
    context = Context.load(path)
    if not signing_in.is_login(context):
        raise FailedPrecondition(f"{path} came from no login; see: whaleflux config")
    confirm(f"end {'all your logins' if all_ else 'the login'} at {context.server}?", yes)
    try:
        signing_in.log_out(context, everywhere=all_)
    except Unauthenticated:
        output.note("the fleet had ended it already")
    except StatusError as error:
        output.note(
            f"the fleet was not told ({error.message}); the key is gone here, and the login ends there by itself"
        )
    signing_in.forget(context)
    if (contexts := _contexts()) is not None:
        for called in [n for n in contexts.names() if contexts.file(n).is_symlink() and not contexts.file(n).exists()]:
            if contexts.file(called).readlink() == Path(context.key).parent / signing_in.FILE:
                contexts.remove(called)
    output.note(f"logged out of {context.server}")


def whoami(fmt: Output = Format.table) -> None:
    """As whom you work with which fleet, and until when."""
    from whaleflux.v1 import identity_pb2

    with fleet() as client:
        who = client.identity.WhoAmI(identity_pb2.WhoAmIRequest(), timeout=10)
        context = client.context
    if fmt.is_json:
        here = {"server": context.server, "certificate_expire_time": _instant(context)} if context is not None else {}
        output.say_json({**output.as_json(who), **{key: value for key, value in here.items() if value}}, fmt)
        return
    lines = [
        ("subject", who.subject),
        ("groups", ", ".join(who.groups)),
        ("queues", ", ".join(who.queues)),
        (
            "login",
            f"{who.session} ({who.method or 'ended'})"
            if who.session
            else "a certificate that was made beside the fleet",
        ),
        ("ends", _day(who.session_expire_time.seconds)),
        ("fleet", f"{who.fleet} at {context.server}" if context is not None else who.fleet),
        ("from", who.peer),
    ]
    output.show_one(who, lines, fmt)


def _known(server: str) -> Context | None:
    """What this machine knows of the fleet that is meant: its authority, so that nobody has to compare it again."""
    from whaleflux.context import Context, find
    from whaleflux.errors import InvalidArgument

    try:
        context = Context.load(find(GLOBAL.context))
    except InvalidArgument:
        if server:
            return None
        raise
    return context if server in {"", context.server} else None


def _code(code: str) -> str:
    return sys.stdin.read(_MOST_CODE).strip() if code == "-" else code.strip()


def _by_code(code: str) -> identity_pb2.LoginRequest:
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.login import signing_in

    if (request := signing_in.shown(code)) is None:
        raise InvalidArgument(
            FieldViolation(
                "--code", "is neither a code nor a token; copy the whole of it, from wfc. or wft. to its end"
            )
        )
    return request


def _believed(
    server: str, code: str, known: Context | None, ca_file: Path | None, ca_sha256: str, *, yes: bool
) -> FrontDoor:
    """The front door, by the best that says which one is right: the code, an authority that was given, or known; else the person."""
    from whaleflux.login import credential, first_contact

    if (parsed := credential.parse(code)) is not None:
        return first_contact.believe(server, parsed.authority)
    if ca_sha256:
        return first_contact.believe(server, first_contact.parsed_fingerprint(ca_sha256))
    if ca_file is not None or known is not None:
        return first_contact.known(server, _authority_in(ca_file or Path(known.ca if known is not None else "")))
    options = first_contact.told(server)
    shown = _hex(credential.fingerprint(options.authority_pem.encode()))
    output.note(f"{server} says that its authority is\n  SHA-256 {shown}\ncompare that with what an operator tells you")
    confirm("is it the same?", yes)
    return first_contact.believe(server, credential.fingerprint(options.authority_pem.encode()))


def _authority_in(path: Path) -> bytes:
    from whaleflux.errors import FieldViolation, InvalidArgument

    content = path.read_bytes()
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise InvalidArgument(FieldViolation("--ca-file", f"{path} is no PEM certificate"))
    return content


def _at_the_provider(door: FrontDoor, *, browser: bool) -> identity_pb2.LoginRequest:
    import time
    import webbrowser

    from whaleflux.errors import FailedPrecondition
    from whaleflux.login import oidc_client
    from whaleflux.reasons import ErrorReason
    from whaleflux.v1 import identity_pb2

    told = door.options
    if not told.oidc_issuer:
        raise FailedPrecondition(
            f"{door.server} has no OpenID provider; ask an operator for a code (whaleflux user link NAME), and log in with it",
            reason=ErrorReason.LOGIN_NOT_OFFERED,
        )
    client = oidc_client.discover(
        oidc_client.Client(
            told.oidc_issuer,
            told.oidc_client_id,
            told.oidc_client_secret,
            tuple(told.oidc_scopes),
            told.oidc_authority_pem,
        )
    )
    asked = oidc_client.Asked(time.monotonic, time.sleep)
    got = oidc_client.log_in(
        client, client.post, output.note, asked, browser=browser, open_browser=webbrowser.open if browser else _nothing
    )
    return identity_pb2.LoginRequest(oidc=identity_pb2.OidcLogin(id_token=got.id_token, nonce=got.nonce))


def _nothing(_: str) -> None:
    """No browser is opened without being asked for: the person may sit at another machine."""


def _place(server: str, name: str) -> tuple[Contexts, str]:
    """Under which name the login is kept: the one that was asked for, that of an earlier login there, or one after the host."""
    from whaleflux import hostport
    from whaleflux.errors import FieldViolation, InvalidArgument

    contexts = _contexts()
    if contexts is None:
        raise InvalidArgument(
            FieldViolation(
                "HOME", "is not set, so that no login can be kept; set it or XDG_CONFIG_HOME, or use WHALEFLUX_TOKEN"
            )
        )
    if name:
        contexts.check_is_login_or_free(name)
        return contexts, name
    return contexts, contexts.login_at(server) or contexts.free(hostport.parse(server, "--server").host)


def _contexts() -> Contexts | None:
    from whaleflux.contexts import Contexts, config_folder

    folder = config_folder()
    return Contexts(folder) if folder is not None else None


def _note_another(file: Path) -> None:
    """Says so where commands from here would still reach another fleet, or as somebody else."""
    from whaleflux.context import find

    if (found := find("")).resolve() != file.resolve():
        output.note(f"commands in this folder use {found}; for this login: whaleflux --context {file.parent.name} ...")


def _hex(fingerprint: str) -> str:
    import base64

    return base64.urlsafe_b64decode(fingerprint + "=").hex(":").upper()


def _day(seconds: int) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC" if seconds else ""


def _instant(context: Any) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(int(context.expires), UTC):%Y-%m-%dT%H:%M:%SZ}" if context.expires else ""
