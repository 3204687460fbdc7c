"""Every method of the contract has a role rule and an owner rule."""

import importlib
import pkgutil

import pytest
from google.protobuf.descriptor import FileDescriptor

from whaleflux import v1
from whaleflux.errors import InvalidArgument, PermissionDenied
from whaleflux.rpc import owners, roles
from whaleflux.rpc.auth import Identity, acting_as
from whaleflux.v1 import inventory_pb2


def contract():
    """Each method of the contract, with the type of its request."""
    for module in pkgutil.iter_modules(v1.__path__):
        if module.name.endswith("_pb2"):
            file: FileDescriptor = importlib.import_module(f"whaleflux.v1.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                for method in service.methods:
                    yield f"/{service.full_name}/{method.name}", method.input_type


METHODS = dict(contract())


def test_the_walk_sees_the_contract():
    assert len(METHODS) > 70


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_a_role_rule_and_an_owner_rule(method):
    assert roles.allowed(method, roles.TABLE), f"{method}: who may call it? (rpc/roles.py)"
    assert method in owners.TABLE, f"{method}: whose things does it touch? (rpc/owners.py)"


def test_no_row_is_of_a_method_that_is_gone():
    assert [method for method in owners.TABLE if method not in METHODS] == []


@pytest.mark.parametrize("method", [method for method, rule in owners.TABLE.items() if rule.node])
def test_the_field_that_names_an_agents_node_exists(method):
    at = METHODS[method]
    *path, last = owners.TABLE[method].node.split(".")
    for part in path:
        at = at.fields_by_name[part].message_type
    assert at.fields_by_name[last].cpp_type == at.fields_by_name[last].CPPTYPE_STRING


def test_an_agent_speaks_for_its_own_node_and_names_it():
    rule = owners.own_node("copy.node")
    with acting_as(Identity("agent", "a/n1")):
        own = inventory_pb2.ReportCachedDatasetRequest()
        with pytest.raises(InvalidArgument, match=r"copy.node"):
            rule.check(own)
        own.copy.node = "sites/a/nodes/n1"
        rule.check(own)
        own.copy.node = "sites/a/nodes/n2"
        with pytest.raises(PermissionDenied, match="may touch only"):
            rule.check(own)


def test_reads_are_no_changes_and_what_agents_say_all_the_time_is_none():
    assert owners.is_change("/whaleflux.v1.SchedulerService/CancelJob")
    for routine in (
        "SchedulerService/GetJob",
        "HealthService/Heartbeat",
        "TaskService/Sync",
        "RouterService/EstimateDeployment",
    ):
        assert not owners.is_change(f"/whaleflux.v1.{routine}")
    assert not owners.is_change("/grpc.health.v1.Health/Check")
