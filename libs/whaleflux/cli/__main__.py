"""`whaleflux`: the command line. A client like any other; heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from whaleflux.cli import (
    attach_commands,
    audit_commands,
    budget_commands,
    burst_commands,
    calibrate_command,
    check_config_command,
    config_commands,
    cost_commands,
    dataset_commands,
    deploy_commands,
    describe_commands,
    event_commands,
    file_commands,
    fits_command,
    fleet_commands,
    gpu_commands,
    history_commands,
    import_command,
    job_commands,
    job_verb_commands,
    log_commands,
    login_commands,
    model_commands,
    next_step,
    node_commands,
    people_commands,
    plan_command,
    price_commands,
    progress_command,
    queue_commands,
    ray_cluster_commands,
    rebalance_commands,
    recommendation_commands,
    rental_commands,
    reservation_commands,
    secret_commands,
    simulate_command,
    submit_commands,
    suite_commands,
    token_commands,
    typed_words,
)
from whaleflux.cli.examples import epilog
from whaleflux.cli.help import WIDEST, GroupedCommands
from whaleflux.cli.output import fail, note, say
from whaleflux.cli.state import GLOBAL
from whaleflux.errors import InvalidArgument, StatusError

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
    cls=GroupedCommands,
    help=_START,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
)

_PANELS: dict[str, list[Callable[..., None]]] = {
    "This machine": [
        suite_commands.up, suite_commands.down, suite_commands.profiles, suite_commands.demo, suite_commands.demo_elastic, simulate_command.simulate,
    ],
    "Fleet": [
        fleet_commands.status, fleet_commands.nodes, gpu_commands.gpus, fleet_commands.sites, fleet_commands.incidents,
        node_commands.cordon, node_commands.uncordon, node_commands.drain, node_commands.retire, node_commands.replace,
        event_commands.events, describe_commands.describe,
    ],
    "Jobs": [
        submit_commands.submit, file_commands.validate, file_commands.explain_field, import_command.import_, job_commands.jobs,
        job_commands.job, progress_command.progress, history_commands.history,
        log_commands.logs, job_commands.explain, job_commands.checkpoints, job_verb_commands.cancel, job_verb_commands.hold,
        job_verb_commands.release, job_verb_commands.requeue, job_verb_commands.set_priority, job_verb_commands.delete,
        queue_commands.queues,
    ],
    "Inside of a job": [attach_commands.exec_, attach_commands.shell, attach_commands.port_forward, attach_commands.cp],
    "Cost": [cost_commands.waste],
    "Planning": [plan_command.plan, fits_command.fits, check_config_command.check_config, calibrate_command.calibrate],
    "Models": [deploy_commands.deploy, model_commands.models, model_commands.replicas, model_commands.route, model_commands.unserve],
    "People": [login_commands.login, login_commands.logout, login_commands.whoami],
    "Client": [suite_commands.version],
}  # fmt: skip
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        _name = _command.__name__.strip("_").replace("_", "-")
        app.command(_name, rich_help_panel=_panel, epilog=epilog(_name))(_command)
app.command("serve", hidden=True, rich_help_panel="Models", epilog=epilog("deploy"))(
    deploy_commands.deploy
)  # its name of before
app.command(
    "agent",
    rich_help_panel="This machine",
    epilog=epilog("agent"),
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(suite_commands.agent)
_GROUPS = [
    ("audit", audit_commands.audit, "Fleet"),
    ("config", config_commands.config, "Client"),
    ("keys", model_commands.keys, "Models"),
    ("datasets", dataset_commands.datasets, "Fleet"),
    ("offers", rental_commands.offers, "Fleet"),
    ("burst", burst_commands.burst, "Fleet"),
    ("leases", rental_commands.leases, "Fleet"),
    ("cost", cost_commands.cost, "Cost"),
    ("prices", price_commands.prices, "Cost"),
    ("budget", budget_commands.budget, "Cost"),
    ("queue", queue_commands.queue, "Jobs"),
    ("rollout", deploy_commands.rollout, "Models"),
    ("ray", ray_cluster_commands.ray, "Jobs"),
    ("rebalance", rebalance_commands.rebalance, "Fleet"),
    ("reservation", reservation_commands.reservation, "Jobs"),
    ("secrets", secret_commands.secrets, "Jobs"),
    ("token", token_commands.token, "Fleet"),
    ("user", people_commands.user, "People"),
    ("group", people_commands.group, "People"),
    ("tokens", people_commands.tokens, "People"),
]
cost_commands.cost.add_typer(recommendation_commands.recommendations, name="recommendations")
for _name, _group, _panel in _GROUPS:
    app.add_typer(_group, name=_name, rich_help_panel=_panel)
    for _registered in _group.registered_commands:
        _registered.epilog = _registered.epilog or epilog(f"{_name} {_registered.name}")


def _show_version(asked: bool) -> None:
    if asked:
        from whaleflux.version import version

        say(f"whaleflux {version()}")
        raise typer.Exit


@app.callback()
def options(
    context: Annotated[
        str, typer.Option("--context", envvar="WHALEFLUX_CONTEXT", help="Name or context file of the fleet.")
    ] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("-V", "--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    GLOBAL.context, GLOBAL.debug = context, debug


options.__doc__ = _START


def main() -> None:
    """Entry point: every error becomes one line that ends with what to do next."""
    try:
        _run()
        sys.stdout.flush()
    except BrokenPipeError:  # `whaleflux jobs | head`
        _write_no_more()
        raise SystemExit(0) from None
    except OSError as error:  # a file or folder that was named, or what the output goes to
        if GLOBAL.debug:
            raise
        fail(next_step.of_the_system(error))
        _write_no_more()
        raise SystemExit(1) from None


def _run() -> None:
    try:
        app()
    except SystemExit:
        sys.stdout.flush()
        raise
    except StatusError as error:
        if GLOBAL.debug:
            raise
        _explain(error)
        raise SystemExit(next_step.exit_code(error)) from None
    except KeyboardInterrupt:
        note("\ninterrupted")
        raise SystemExit(130) from None


def _write_no_more() -> None:
    """What is left in buffers has nowhere to go; the interpreter would complain about it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno() if sys.__stdout__ else 1)


def _explain(error: StatusError) -> None:
    """One line per mistake, each ending with what to do: the next command, where the message names none."""
    message = error.message
    called, command = typed_words.called(GLOBAL.program, sys.argv[1:])
    if isinstance(error, InvalidArgument) and error.violations:
        *others, message = [
            f"{next_step.field_as_typed(v.field, called, command)}: {v.description}" for v in error.violations
        ]
        for other in others:
            fail(other)
    hint = next_step.after(error, called)
    fail(message if "whaleflux " in message or not hint else f"{message.rstrip('.')}; {hint}")


if __name__ == "__main__":
    main()
