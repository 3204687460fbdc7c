"""Errors name what was typed: every field of every request that a command sends has an option or argument there; every number its limits."""

import math
import re
from pathlib import Path

import pytest
import typer

from whaleflux.cli import next_step, state, submit_commands
from whaleflux.cli.__main__ import app
from whaleflux.cli.typed_words import argument_word, called, word_for
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.job_fields import MAX_GPUS
from whaleflux.v1 import console_pb2 as console
from whaleflux.v1 import identity_pb2 as identity
from whaleflux.v1 import inventory_pb2 as inventory
from whaleflux.v1 import router_pb2 as router
from whaleflux.v1 import scheduler_pb2 as scheduler
from whaleflux.v1 import secrets_pb2 as secrets

PROTOS = Path(__file__).parents[2] / "protos" / "whaleflux" / "v1"
PROGRAM = typer.main.get_command(app)
REQUESTS = {
    "queue create": scheduler.CreateQueueRequest, "queue set": scheduler.UpdateQueueRequest,
    "queue show": scheduler.GetQueueRequest, "queue rm": scheduler.DeleteQueueRequest,
    "reservation create": scheduler.CreateReservationRequest, "reservation update": scheduler.UpdateReservationRequest,
    "reservation show": scheduler.GetReservationRequest, "reservation rm": scheduler.DeleteReservationRequest,
    "rebalance plan": scheduler.PlanRebalanceRequest, "rebalance apply": scheduler.ApplyRebalanceRequest,
    "cancel": scheduler.CancelJobRequest, "hold": scheduler.HoldJobRequest, "release": scheduler.ReleaseJobRequest,
    "requeue": scheduler.RequeueJobRequest, "set-priority": scheduler.SetJobPriorityRequest, "delete": scheduler.DeleteJobRequest,
    "job": scheduler.GetJobRequest, "explain": scheduler.ExplainJobRequest,
    "cordon": inventory.CordonNodeRequest, "uncordon": inventory.UncordonNodeRequest, "drain": inventory.DrainNodeRequest,
    "retire": inventory.RetireNodeRequest, "replace": inventory.ReplaceNodeRequest,
    "token create": inventory.CreateJoinTokenRequest, "token delete": inventory.DeleteJoinTokenRequest,
    "datasets add": inventory.CreateDatasetRequest, "datasets show": inventory.GetDatasetRequest, "datasets rm": inventory.DeleteDatasetRequest,
    "datasets pin": inventory.PinDatasetRequest, "datasets unpin": inventory.UnpinDatasetRequest,
    "user add": identity.CreateUserRequest, "user set": identity.UpdateUserRequest, "user show": identity.GetUserRequest,
    "user disable": identity.DisableUserRequest, "user enable": identity.EnableUserRequest,
    "group create": identity.CreateGroupRequest, "group add": identity.AddGroupMemberRequest,
    "group remove": identity.RemoveGroupMemberRequest, "group rm": identity.DeleteGroupRequest,
    "tokens create": identity.CreateTokenRequest, "tokens rm": identity.RevokeTokenRequest,
    "secrets add": secrets.CreateSecretRequest, "secrets set": secrets.UpdateSecretRequest, "secrets show": secrets.GetSecretRequest, "secrets rm": secrets.DeleteSecretRequest,
    "keys create": router.CreateApiKeyRequest, "keys delete": router.DeleteApiKeyRequest, "unserve": router.DeleteModelRequest,
    "route": router.RouteRequest,
    "leases add": inventory.CreateLeaseRequest, "leases show": inventory.GetLeaseRequest, "leases end": inventory.EndLeaseRequest,
    "offers rm": inventory.DeleteOfferRequest,
    "prices set": console.CreatePriceRequest, "prices end": console.EndPriceRequest, "prices rm": console.DeletePriceRequest,
    "prices adjust": console.CreateAdjustmentRequest, "prices unadjust": console.DeleteAdjustmentRequest,
    "budget set": console.SetBudgetRequest, "budget rm": console.DeleteBudgetRequest,
    "cost": console.GetCostRequest, "waste": console.GetCostRequest, "cost job": console.GetJobCostRequest, "cost units": console.GetUnitCostsRequest,
    "cost forecast": console.GetForecastRequest, "cost export": console.ExportCostRequest,
    "cost recommendations": console.ListRecommendationsRequest, "cost recommendations dismiss": console.DismissRecommendationRequest,
}  # fmt: skip
NOT_TYPED = {"etag", "request_id", "validate_only", "update_mask", "page_size", "page_token"}  # the command's own
# What services fill in, by the message that holds it, and what people say otherwise than by these commands.
NOT_ASKED = {
    "Queue": {"create_time", "last_change", "use", "name"},
    "Reservation": {"state", "held", "short_gpus", "victims", "creator", "create_time", "state_time", "last_change"},
    "Dataset": {"create_time", "owner", "copies", "last_change", "name", "request_fingerprint"},
    "Principal": {
        "name", "create_time", "last_change", "disabled", "disabled_reason", "disabled_time", "issuer", "subject", "groups",
        "oidc_issuer", "oidc_subject", "login_time", "last_login_time", "creator", "email",
    },
    "Group": {"name", "create_time", "last_change"},
    "Token": {"name", "create_time", "expire_time", "last_use_time", "secret", "last_change"},
    "Secret": {"name", "owner", "create_time", "last_change", "version", "size_bytes", "update_time", "versions", "uid"},
    "RouteRequest": {"prompt_bytes"},
    "Ownership": {field.name for field in console.Ownership.DESCRIPTOR.fields},  # in files alone: prices import
}  # fmt: skip
NOT_ON = {
    ("queue set", "members"): "--member adds, --open empties",
    ("reservation update", "gpu_type"): "fixed",
    ("reservation update", "queue"): "fixed",
    ("reservation update", "maintenance"): "fixed",
    ("user set", "kind"): "fixed",
    ("secrets set", "value"): "secrets rotate",
    ("cost", "job"): "cost job",
    ("waste", "job"): "cost job",
    ("cost", "order_by"): "by the bill",
    ("waste", "order_by"): "by the bill",
}


def output_only():
    """(message, field) of what the contract's comments say is for services to fill in."""
    found, message, comments = set(), "", ""
    for line in "\n".join(file.read_text() for file in sorted(PROTOS.glob("*.proto"))).splitlines():
        if begins := re.match(r"message (\w+)", line):
            message = begins[1]
        if line.strip().startswith("//"):
            comments += line
            continue
        if (field := re.match(r"  [\w. <>,]+ (\w+) = \d+", line)) and "// Output only." in comments:
            found.add((message, field[1]))
        comments = ""
    return found


OUTPUT_ONLY = output_only()


def test_what_services_fill_in_is_read_from_the_contract():
    assert {("Reservation", "held"), ("Dataset", "manifest_digest")} <= OUTPUT_ONLY
    assert not {("Reservation", "gpus"), ("Queue", "weight")} & OUTPUT_ONLY


def refused(*words):
    """What is said of a command line, (field, description)."""
    with pytest.raises(InvalidArgument) as found:
        PROGRAM.main(list(words), standalone_mode=False)  # not made anew for each, as a runner does
    return [(one.field, one.description) for one in found.value.violations]


def leaves(message, path=""):
    """Each field that people could get wrong, as violations call it."""
    for field in message.fields:
        asked = field.name not in NOT_ASKED.get(message.name, ()) and (message.name, field.name) not in OUTPUT_ONLY
        if field.name in NOT_TYPED or not asked:
            continue
        inner = field.message_type
        if inner is not None and inner.file.package.startswith("whaleflux") and not field.is_repeated:
            yield from leaves(inner, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}"


def told(words):
    """The words of a command's options and arguments."""
    command = called(PROGRAM, words)[1]
    return {option for param in command.params for option in param.opts} | {
        argument_word(param) for param in command.params if param.param_type_name == "argument"
    }


FIELDS = [(words, field) for words, kind in REQUESTS.items() for field in leaves(kind.DESCRIPTOR)]


@pytest.mark.parametrize(("words", "field"), FIELDS)
def test_each_field_of_a_request_has_a_word_of_the_command(words, field):
    if (words, field.rpartition(".")[2]) in NOT_ON:
        return
    named, command = called(PROGRAM, words.split())
    assert named == words.split()
    for at in (field, f"{field}[3]"):
        assert word_for(at, command) in told(words.split()), (words, at, word_for(at, command))


@pytest.mark.parametrize(
    ("option", "value"),
    [("--for", "nan"), ("--for", "-1h"), ("--cap", "1e400"), ("--cap", "3 EUR"), ("--cap", "0"), ("--cap", "0 USD")],
)
def test_of_two_values_the_wrong_one_is_named(option, value):
    said = {"--for": "1h", "--cap": "5 USD"} | {option: value}
    ((field, words),) = refused("leases", "add", "o", "-y", *(word for pair in said.items() for word in pair))
    assert field == option and value in words


def test_what_is_left_out_is_really_there():
    assert {words for words, _ in NOT_ON} <= set(REQUESTS)
    assert {field for _, field in NOT_ON} <= {field.rpartition(".")[2] for _, field in FIELDS}


@pytest.mark.parametrize(
    ("line", "field", "word"),
    [
        ("queue create q --member bob", "queue.members[0]", "--member"),
        ("queue set q --lend 5", "queue.lending_limit_gpus", "--lend"),
        ("--context x queue rm q", "name", "NAME"),
        ("--context=x --debug reservation create a --nodes n", "node", "--nodes"),
        ("reservation update a", "reservation.start_time", "--start"),
        ("prices set p", "price.micros_per_gpu_hour", "--usd-per-gpu-hour"),
        ("prices set p", "start_time", "--from"),
        ("prices end p", "end_time", "--at"),
        ("cost", "filter.start_time", "--since"),
        ("cost export", "end_time", "--until"),
        ("budget set b", "budget.alert_percents", "--alert"),
        ("prices import -f x", "prices/edge: owned.residual_percent", "prices/edge: owned.residual_percent"),
        ("cordon n1", "node", "NODE"),
        ("rebalance apply 5f", "etag", "ETAG"),
        ("submit job.yaml", "job.spec.deadline_time", "deadline"),
        ("submit job.yaml", "parent", "queue"),
        ("submit two.yaml", "queues/q/jobs/a: job.spec.deadline_time", "queues/q/jobs/a: deadline"),
        ("submit job.yaml", "--yes", "--yes"),
        ("serve model.yaml", "model.engine.args", "engine.args"),
        ("status", "context", "context"),
    ],
)
def test_what_is_wrong_is_called_as_it_was_typed(line, field, word):
    assert next_step.field_as_typed(field, *called(PROGRAM, line.split())) == word


def test_help_is_that_of_the_command():
    wrong = InvalidArgument(FieldViolation("queue.weight", "x"))
    assert next_step.after(wrong, ["queue", "create"]) == "see: whaleflux queue create --help"


def numbers(command, path=()):
    for param in command.params:
        if param.type_descriptor is not None and param.type_descriptor.annotation in (int, float):
            yield path, command, param
    for name, inner in getattr(command, "commands", {}).items():
        yield from numbers(inner, (*path, name))


NUMBERS = [pytest.param(*one, id=f"{' '.join(one[0])} {one[2].opts[0]}") for one in numbers(PROGRAM)]


@pytest.mark.parametrize(("path", "command", "param"), NUMBERS)
def test_a_number_that_cannot_be_is_refused_with_its_option_and_both_limits(path, command, param):
    words = [*path]
    if param.param_type_name != "argument":
        words += ["x" for one in command.params if one.param_type_name == "argument" and one.required]
    words += [w for one in command.params if one.required and one.opts[0][:1] == "-" for w in (one.opts[0], "x")]
    for given in ("nan", "inf", "1e400", "word", str(param.min - 1), str(int(param.max) + 1)):
        at = ["--", "x", given] if param.param_type_name == "argument" else [f"{max(param.opts, key=len)}={given}"]
        if at[0].startswith("-n="):
            at = ["-n", given]
        ((field, said),) = refused(*words, *at)
        assert field in told(path) and repr(given)[:40] in said
        assert f"{param.min:.15g} to {param.max:.15g}" in said and math.isfinite(param.max)


def test_the_gpus_of_submit_are_those_of_the_file():
    assert submit_commands.MOST_GPUS == MAX_GPUS


WRITTEN = [
    ("queue create q --lend", "--lend"),
    ("reservation create r --gpus 1 --for", "--for"),
    ("reservation create r --gpus 1 --for 1h --start", "--start"),
    ("reservation create r --gpus 1 --end", "--end"),
    ("datasets add d --source /d --size", "--size"),
    ("token create --site a --ttl", "--ttl"),
    ("keys create --expires", "--expires"),
    ("events --since", "--since"),
    ("logs j --since", "--since"),
]


@pytest.mark.parametrize(("line", "flag"), WRITTEN)
@pytest.mark.parametrize("value", ["nan", "inf", "-5", "1e400", "9" * 400, "+nan"])
def test_sizes_and_times_that_cannot_be_name_their_option_too(line, flag, value, monkeypatch):
    monkeypatch.setattr(state.GLOBAL, "context", "/nowhere/context.json")
    assert [field for field, _ in refused(*line.split(), value)] == [flag]
