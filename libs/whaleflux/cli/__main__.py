"""`whaleflux`: the command line. A client like any other; heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from whaleflux.cli import fleet_commands, job_commands, model_commands, suite_commands
from whaleflux.cli.output import fail, note
from whaleflux.cli.state import GLOBAL
from whaleflux.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    Denied,
    Invalid,
    NotFound,
    OverLimit,
    Refusal,
    Unauthenticated,
    Unavailable,
)

_START = """Every GPU you own or rent as one cluster.

\b
  whaleflux up                     start everything on this machine
  whaleflux token create --site a  admit a node
  whaleflux gpus                   what there is, what is free, what it costs
  whaleflux submit job.yaml        plan, ask, run, follow
  whaleflux explain JOB            why it waits, or why it runs there
  whaleflux demo                   see a training run survive the loss of its node

\b
Exit codes: 0 done, 1 refused or failed, 2 wrong input, 3 fleet not reached.
"""

app = typer.Typer(
    help=_START,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PANELS: dict[str, list[Callable[..., None]]] = {
    "This machine": [suite_commands.up, suite_commands.down, suite_commands.demo],
    "Fleet": [
        fleet_commands.status, fleet_commands.nodes, fleet_commands.gpus, fleet_commands.sites, fleet_commands.incidents,
        fleet_commands.cordon, fleet_commands.uncordon, fleet_commands.drain, fleet_commands.retire,
        suite_commands.events, model_commands.datasets,
    ],
    "Jobs": [
        job_commands.submit, job_commands.validate, job_commands.jobs, job_commands.job, job_commands.logs,
        job_commands.explain, job_commands.cancel, job_commands.delete, job_commands.checkpoints, job_commands.queues,
    ],
    "Models": [model_commands.serve, model_commands.models, model_commands.replicas, model_commands.route, model_commands.unserve],
    "Client": [suite_commands.version, suite_commands.config],
}  # fmt: skip
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(_command.__name__, rich_help_panel=_panel)(_command)
app.command(
    "agent", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)(suite_commands.agent)
app.add_typer(model_commands.keys, name="keys")
app.add_typer(model_commands.token, name="token")


@app.callback()
def options(
    context: Annotated[
        str, typer.Option("--context", envvar="WHALEFLUX_CONTEXT", help="Context file of the fleet.")
    ] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    GLOBAL.context, GLOBAL.debug = context, debug


options.__doc__ = _START


def main() -> None:
    """Entry point: every refusal becomes one line that ends with what to do next."""
    try:
        app()
    except Refusal as refusal:
        if GLOBAL.debug:
            raise
        _explain(refusal)
        raise SystemExit(_code(refusal)) from None
    except KeyboardInterrupt:
        note("\ninterrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:  # `whaleflux jobs | head`
        sys.stderr.close()
        raise SystemExit(0) from None


def _explain(refusal: Refusal) -> None:
    """One line per mistake, each ending with what to do: the next command, where the message names none."""
    if isinstance(refusal, Invalid):
        for violation in refusal.violations[:-1]:
            fail(f"{violation.field}: {violation.description}")
    message = refusal.message
    if isinstance(refusal, Invalid) and refusal.violations:
        message = f"{refusal.violations[-1].field}: {refusal.violations[-1].description}"
    hint = _next_command(refusal)
    fail(message if "whaleflux " in message or not hint else f"{message.rstrip('.')}; {hint}")


_LISTS = {"apikey": "keys list", "join_token": "token list", "token": "token list", "health": "nodes", "datasets": "datasets"}  # fmt: skip


def _next_command(refusal: Refusal) -> str:
    called = " ".join(word for word in sys.argv[1:3] if word.isalpha())
    if isinstance(refusal, Invalid):
        return f"see: whaleflux {called} --help".replace("  ", " ")
    if isinstance(refusal, NotFound):
        return f"see what exists with: whaleflux {_LISTS.get(refusal.kind, refusal.kind + 's')}"
    if isinstance(refusal, Unavailable | DeadlineExceeded):
        return "is the fleet running? see: whaleflux config; start one with: whaleflux up"
    if isinstance(refusal, Unauthenticated | Denied):
        return "see who you are there with: whaleflux config"
    if isinstance(refusal, AlreadyExists):
        return f"see it with: whaleflux {refusal.kind}s"
    if isinstance(refusal, Conflict | OverLimit):
        return f"repeat: whaleflux {called}"
    return "see the state with: whaleflux status"


def _code(refusal: Refusal) -> int:
    return 2 if isinstance(refusal, Invalid) else 3 if isinstance(refusal, Unavailable | DeadlineExceeded) else 1


if __name__ == "__main__":
    main()
