"""torchrun's contract: what a rank finds in its environment."""

from dataclasses import replace

import pytest

from whaleflux.manifests.job_fields import JobKind, Spec
from whaleflux_agent.core.environment import LaunchContext, node_environment, rank_command, rank_environment
from whaleflux_agent.core.inherited import passed_on
from whaleflux_agent.core.work import Work

WORK = Work(
    task="train-3-1",
    job="queues/q/jobs/train",
    epoch=3,
    gpu_uuids=("GPU-a", "GPU-b"),
    first_rank=2,
    group_rank=1,
    world_size=4,
    group_world_size=2,
    rendezvous="10.0.0.7:20123",
    restart_count=1,
    spec=Spec(
        max_restarts=5,
        command=("python", "train.py"),
        environment=(("SEED", "7"), ("RANK", "99"), ("WHALEFLUX_EPOCH", "99")),
    ),
    checkpoint_location="/ckpt/train",
)
PLACE = LaunchContext("sites/s/nodes/n", "secret", "/run/rank.sock", ("GPU-a", "GPU-b"), "00-aa-bb-01")


def environment(work=WORK, place=PLACE, local_rank=1, inherited=None):
    return rank_environment(work, place, local_rank, inherited=inherited or {}, error_file="/e.json")


def test_torchruns_variables_have_torchruns_values():
    found = environment()
    assert {name: found[name] for name in found if name in TORCHRUN} == TORCHRUN


TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_NAME": "default",
    "ROLE_RANK": "3",
    "ROLE_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "20123",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_MAX_RESTARTS": "5",
    "TORCHELASTIC_RUN_ID": "train",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
    "TORCHELASTIC_ERROR_FILE": "/e.json",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "OMP_NUM_THREADS": "1",
}


def test_a_job_may_add_but_not_override_what_the_agent_decides():
    found = environment()
    assert found["SEED"] == "7"
    assert found["RANK"] == "3"
    assert found["WHALEFLUX_EPOCH"] == "3"


def test_the_users_own_threads_are_respected_and_one_rank_gets_none_set():
    assert environment(inherited={"OMP_NUM_THREADS": "8"})["OMP_NUM_THREADS"] == "8"
    alone = Work("t", "queues/q/jobs/j", 1, ("GPU-a",), rendezvous="h:1")
    assert "OMP_NUM_THREADS" not in environment(alone, local_rank=0)


def test_the_agents_secrets_stay_with_the_agent():
    inherited = {
        "WHALEFLUX_JOIN_TOKEN": "s",
        "WHALEFLUX_NATS_PASSWORD": "s",
        "OTEL_EXPORTER_OTLP_HEADERS": "s",
        "TORCHELASTIC_RUN_ID": "outer",
        "PATH": "/bin",
    }
    found = environment(inherited=inherited)
    assert found["PATH"] == "/bin"
    assert found["TORCHELASTIC_RUN_ID"] == "train"
    assert not {"WHALEFLUX_JOIN_TOKEN", "WHALEFLUX_NATS_PASSWORD", "OTEL_EXPORTER_OTLP_HEADERS"} & set(found)


def test_of_the_agents_environment_only_what_is_known_to_be_harmless_is_passed_on():
    own = {"PATH": "/bin", "LC_ALL": "C", "NCCL_DEBUG": "WARN", "PYTHONPATH": "/p", "http_proxy": "http://p:1"}
    secret = {"AWS_SECRET_ACCESS_KEY": "s", "HF_TOKEN": "s", "KUBECONFIG": "/k", "CLOUD": "s", "SSH_AUTH_SOCK": "/a"}
    assert passed_on(own | secret) == own
    assert passed_on(own | secret, ["CLOUD", "SSH_*"]) == own | {"CLOUD": "s", "SSH_AUTH_SOCK": "/a"}
    assert environment(inherited=passed_on({"WHALEFLUX_JOIN_TOKEN": "s"}, ["*"])).get("WHALEFLUX_JOIN_TOKEN") is None


def test_gpus_are_named_by_uuid_and_hidden_where_they_are_played():
    assert environment()["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    played = LaunchContext("sites/s/nodes/n", "t", "/s", (), "")
    assert environment(place=played)["CUDA_VISIBLE_DEVICES"] == ""


def test_a_rank_sees_its_own_mig_instance_only_since_cuda_uses_one():
    cut = replace(WORK, gpu_uuids=("MIG-a", "MIG-b"))
    place = replace(PLACE, gpu_uuids=cut.gpu_uuids)
    assert [environment(cut, place, at)["CUDA_VISIBLE_DEVICES"] for at in (0, 1)] == ["MIG-a", "MIG-b"]
    assert environment(cut, replace(place, gpu_uuids=()), 1)["WHALEFLUX_GPU_UUID"] == "MIG-b", "also where it is played"


@pytest.mark.parametrize(("rendezvous", "interface"), [("127.0.0.1:1", "lo"), ("[::1]:1", "lo"), ("10.0.0.1:1", None)])
def test_gloo_is_told_the_interface_on_loopback_only(rendezvous, interface):
    work = Work("t", "queues/q/jobs/j", 1, ("GPU-a",), rendezvous=rendezvous)
    assert environment(work, local_rank=0).get("GLOO_SOCKET_IFNAME") == interface


def test_services_get_a_port_each_in_variable_and_command():
    work = Work(
        "t",
        "queues/q/jobs/j",
        1,
        ("GPU-a", "GPU-b"),
        spec=Spec(command=("serve", "--port={port}"), kind=JobKind.SERVICE),
    )
    place = LaunchContext("sites/s/nodes/n", "t", "/s", (), "", ports=(7001, 7002))
    assert environment(work, place, 1)["PORT"] == "7002"
    assert rank_command(work, place, 0) == ("serve", "--port=7001")


def test_datasets_are_found_by_name():
    place = LaunchContext(
        "sites/s/nodes/n",
        "t",
        "/s",
        (),
        "",
        datasets=(("datasets/c4-en", "/cache/c4-en", "s3://data/c4"), ("datasets/all", "/cache/all", "")),
    )
    found = environment(place=place)
    assert (found["WHALEFLUX_DATASET_C4_EN"], found["WHALEFLUX_DATASET_ALL"]) == ("/cache/c4-en", "/cache/all")
    assert found["WHALEFLUX_DATASOURCE_C4_EN"] == "s3://data/c4"
    assert "WHALEFLUX_DATASOURCE_ALL" not in found


def test_a_command_that_is_started_once_per_node_finds_what_launchers_need_and_no_rank():
    found = node_environment(WORK, PLACE, inherited={"PET_NNODES": "9"}, error_file="/e.json")
    assert {name: found[name] for name in found if name.startswith(("PET_", "MASTER_"))} == {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "10.0.0.7",
        "PET_MASTER_PORT": "20123",
        "PET_RDZV_ID": "train-3",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "20123",
    }
    ours = ("NODES", "NODE_RANK", "GPUS", "GPUS_PER_NODE")
    assert [found[f"WHALEFLUX_{name}"] for name in ours] == ["2", "1", "4", "2"]
    assert found["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"} & set(found)


def test_in_a_container_setup_is_the_first_thing_of_the_one_process():
    spec = Spec(command=("serve", "a b"), setup=("pip", "install", "x"), image="i", launch_once=True)
    command = rank_command(Work("t", "queues/q/jobs/j", 1, ("GPU-a",), spec=spec), PLACE, 0)
    assert command[:4] == ("bash", "-euo", "pipefail", "-c")
    assert command[4].startswith("trap 'wait; exit 143' TERM; pip install x || ")
    assert command[4].endswith("\nserve 'a b'")


def test_python_says_where_it_was_when_it_crashes_or_is_aborted_unless_the_job_says_otherwise():
    assert environment()["PYTHONFAULTHANDLER"] == "1"
    assert environment(inherited={"PYTHONFAULTHANDLER": ""})["PYTHONFAULTHANDLER"] == ""
