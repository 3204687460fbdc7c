"""torchrun's contract: what a rank finds in its environment."""

import pytest

from whaleflux_agent.core.environment import Place, rank_command, rank_environment
from whaleflux_agent.core.work import Work

WORK = Work(
    task="train-3-1",
    job="queues/q/jobs/train",
    epoch=3,
    gpu_indices=(4, 5),
    first_rank=2,
    group_rank=1,
    world_size=4,
    group_world_size=2,
    rendezvous="10.0.0.7:20123",
    restart_count=1,
    max_restarts=5,
    command=("python", "train.py"),
    environment=(("SEED", "7"), ("RANK", "99"), ("WHALEFLUX_EPOCH", "99")),
    checkpoint_location="/ckpt/train",
)
PLACE = Place("sites/s/nodes/n", "secret", "/run/rank.sock", ("GPU-a", "GPU-b"), "00-aa-bb-01")


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
    alone = Work("t", "queues/q/jobs/j", 1, (0,), rendezvous="h:1")
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


def test_gpus_are_named_by_uuid_and_hidden_where_they_are_played():
    assert environment()["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    played = Place("sites/s/nodes/n", "t", "/s", (), "")
    assert environment(place=played)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("rendezvous", "interface"), [("127.0.0.1:1", "lo"), ("[::1]:1", "lo"), ("10.0.0.1:1", None)])
def test_gloo_is_told_the_interface_on_loopback_only(rendezvous, interface):
    work = Work("t", "queues/q/jobs/j", 1, (0,), rendezvous=rendezvous)
    assert environment(work, local_rank=0).get("GLOO_SOCKET_IFNAME") == interface


def test_services_get_a_port_each_in_variable_and_command():
    work = Work("t", "queues/q/jobs/j", 1, (0, 1), command=("serve", "--port={port}"), service=True)
    place = Place("sites/s/nodes/n", "t", "/s", (), "", ports=(7001, 7002))
    assert environment(work, place, 1)["PORT"] == "7002"
    assert rank_command(work, place, 0) == ("serve", "--port=7001")


def test_datasets_are_found_by_name():
    place = Place("sites/s/nodes/n", "t", "/s", (), "", datasets=(("datasets/c4-en", "/cache/c4-en"),))
    assert environment(place=place)["WHALEFLUX_DATASET_C4_EN"] == "/cache/c4-en"
