"""Job files of other systems: what becomes of each is either a file that passes `validate`, or a refusal with its reason."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument
from whaleflux.manifests.importing.formats import format_of, imported
from whaleflux.manifests.job_fields import SecretUse
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.yaml_files import job_from_yaml, jobs_from_yaml, model_from_yaml

FILES = Path(__file__).parent / "data" / "imports"
# What the job asks for, what its script says, and what is noted.
ACCEPTED = {
    "ddp_one_node.sbatch": (
        {"gpus": 4, "max_nodes": 1, "launch_once": False, "time_limit_s": 43200.0, "cpu_millicores_per_rank": 8000, "max_restarts": 0},
        ["export SLURM_CPUS_PER_TASK=8", "\npython train.py --data"],
        ["--partition=gpu", "--output", "module", "ResNet50_DDP", "'a100' may be any of"],
    ),
    "ddp_many_nodes.sbatch": (
        {"gpus": 32, "min_nodes": 4, "launch_once": False, "time_limit_s": 172800.0},
        ["export SLURM_PROCID=$RANK", "export SLURM_LOCALID=$LOCAL_RANK", "\nbash -c 'RANK=$SLURM_PROCID"],
        ["MASTER_ADDR", "--exclusive"],
    ),
    "torchrun_many_nodes.sbatch": (
        {"gpus": 8, "min_nodes": 2, "max_nodes": 2, "launch_once": True, "cpu_millicores_per_rank": 4000},
        ["head_node_ip=$MASTER_ADDR", "\ntorchrun \\\n  --nnodes 2", "--rdzv_id $PET_RDZV_ID"],
        ["head_node_ip", "--rdzv-id"],
    ),
    "accelerate_launch.sbatch": (
        {"gpus": 32, "min_nodes": 4, "launch_once": True},
        ["export SLURM_PROCID=$WHALEFLUX_NODE_RANK", 'bash -c "$LAUNCHER $SCRIPT --bf16"', "set -e\n"],
        ["--signal=USR1@120", "--requeue"],
    ),
    "shell_step.sbatch": (
        {"gpus": 16, "min_nodes": 2, "launch_once": True},
        ["export SLURM_NODEID=$WHALEFLUX_NODE_RANK", "\nbash -c 'cd code && torchrun", "> log.txt 2>&1 &\nwait", '--rdzv_id="$PET_RDZV_ID"'],
        ["--account=project_1", "srun --cpu-bind=none", "behind > after srun"],
    ),
    "single_gpu.sbatch": (
        {"gpus": 1, "time_limit_s": 5400.0, "memory_bytes_per_rank": 32 << 30, "launch_once": True},
        ["source /etc/profile", "cd $SLURM_SUBMIT_DIR\npython finetune.py --seed 1\npython evaluate.py"],
        ["--mail-type=END,FAIL", "conda activate", "bash -l"],
    ),
    "array.sbatch": (
        {"gpus": 1, "launch_once": True},
        ["export SLURM_ARRAY_TASK_ID=$WHALEFLUX_ARRAY_INDEX\npython train.py --seed $SLURM_ARRAY_TASK_ID"],
        [],
    ),
    "cpu_only.sbatch": ({"gpus": 0, "cpu_millicores_per_rank": 16000}, ["python tokenize_corpus.py"], []),
    "pyxis.sbatch": ({"gpus": 16, "image": "nvcr.io/nvidia/pytorch:24.10-py3"}, ["\npython pretrain_gpt.py"], ["container-mounts"]),
    "ddp_two_nodes.sky.yaml": (
        {"gpus": 16, "min_nodes": 2, "any_of": ("A100-80GB",), "launch_once": True, "environment": (("WANDB_MODE", "offline"),)},
        ["export SKYPILOT_NODE_RANK=$WHALEFLUX_NODE_RANK", "--master_addr=$MASTER_ADDR"],
        ["MASTER_ADDR", "minGPT-ddp"],
    ),
    "finetune.sky.yaml": (
        {"gpus": 1, "any_of": ("A100-80GB", "A100-40GB", "L40S"), "image": "nvcr.io/nvidia/pytorch:24.10-py3",
         "secrets": (SecretUse("secrets/wandb-api-key", 0, "WANDB_API_KEY"),)},
        ['"${HF_TOKEN:?is not set'],
        ["use_spot", "autostop", "file_mounts /checkpoints", "secrets WANDB_API_KEY", "envs HF_TOKEN", "ports"],
    ),
    "any_of.sky.yaml": ({"gpus": 8, "max_restarts": 3, "max_nodes": 1}, ["deepspeed train.py"], ["resources.infra", "conda activate"]),
    "no_gpu.sky.yaml": ({"gpus": 0}, ['echo "$SKYPILOT_TASK_ID"'], ["resources.cpus"]),
    "sft.dstack.yml": (
        {"gpus": 1, "min_memory_bytes": 24 * 10**9, "time_limit_s": 21600.0, "max_restarts": 0},
        ["uv pip install trl &&\ntrl sft", '"${HF_TOKEN:?'],
        ["python", "spot_policy", "env HF_TOKEN", "shm_size"],
    ),
    "distributed.dstack.yml": (
        {"gpus": 16, "min_nodes": 2, "launch_once": True, "image": "nvcr.io/nvidia/pytorch:25.04-py3"},
        ["export DSTACK_MASTER_NODE_IP=$MASTER_ADDR", "cd examples/distributed/ddp-tutorial-series &&\n{ torchrun"],
        [],
    ),
    "board.dstack.yml": (
        {"gpus": 4, "priority": 50, "min_memory_bytes": 80 * 10**9},
        ["{ tensorboard --logdir runs &\n} &&\npython train.py"],
        ["ports", "retry", "4..8 GPUs"],
    ),
    "notebook.dstack.yml": ({"gpus": 1, "launch_once": True}, ["exec sleep infinity"], ["dev-environment", "inactivity_duration", "ide"]),
    "fsdp.accelerate.yaml": (
        {"gpus": 16, "min_nodes": 2, "launch_once": True},
        ["--config_file fsdp.accelerate.yaml", "--machine_rank $WHALEFLUX_NODE_RANK", "train.py --lr 1"],
        ["main_process_ip", "main_process_port"],
    ),
    "train.torchrun.sh": ({"gpus": 8, "max_nodes": 1, "launch_once": True}, ["set -eux\ntorchrun --standalone"], []),
}  # fmt: skip
REFUSED = {
    "dependency.sbatch": ("--dependency", "depends_on"),
    "two_steps.sbatch": ("srun", "2 times"),
    "prepares_outside.sbatch": ("run", "would run 4 times"),
    "idle_nodes.sbatch": ("run", "on the first of 2 nodes only"),
    "mpi.sbatch": ("run", "on the first of 4 nodes only"),
    "pmix.sbatch": ("srun --mpi", "PMI"),
    "random_name.sbatch": ("run", "differs in each of 16 copies"),
    "all_hosts.sbatch": ("hosts", "names of nodes"),
    "serve.sky.yaml": ("service", "model file"),
    "all_ips.sky.yaml": ("SKYPILOT_NODE_IPS", "nothing that means the same"),
    "tpu.sky.yaml": ("resources.accelerators", "no GPU of NVIDIA"),
    "mpi.dstack.yml": ("DSTACK_MPI_HOSTFILE", "nothing that means the same"),
    "amd.dstack.yml": ("resources.gpu", "only GPUs of NVIDIA"),
    "nightly.dstack.yml": ("schedule", "calendar"),
    "pdsh.accelerate.yaml": ("deepspeed_config.deepspeed_multinode_launcher", "ssh"),
    "fixed_hosts.torchrun.sh": ("--master-addr", "10.1.2.3"),
}


def made(name):
    command = "train.py --lr 1" if "accelerate" in name else ""
    return imported((FILES / name).read_text(), name, command=command)


def test_every_file_is_in_one_of_the_tables():
    names = {file.name for file in FILES.iterdir()}
    assert names == {*ACCEPTED, *REFUSED, "vllm.dstack.yml"}
    assert len(names) >= 30


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_can_be_kept_becomes_a_file_that_passes(name):
    asked, said, noted = ACCEPTED[name]
    found = made(name)
    spec = spec_of(job_from_yaml(found.text, Path("/base")).spec)
    assert {field: getattr(spec, field) for field in asked} == asked
    for piece in said:
        assert piece in spec.command[-1]
    notes = "\n".join(f"{what}: {why}" for what, why in found.notes)
    for word in noted:
        assert word in notes
    for what, _ in found.notes:
        assert f"# note: {what}"[:60] in found.text, "what is noted stands in the file too"


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_mean_something_else_is_refused_with_the_reason(name):
    with pytest.raises(InvalidArgument) as error:
        made(name)
    found = {violation.field: violation.description for violation in error.value.violations}
    field, word = REFUSED[name]
    assert word in found[field]


def test_an_array_of_slurm_is_one_here():
    found = made("array.sbatch")
    assert "array: 0-9%4\n" in found.text
    assert "name: sweep\n" in found.text


def test_the_first_address_is_known_also_in_the_middle_of_a_line():
    text = (FILES / "ddp_two_nodes.sky.yaml").read_text()
    address = '$(echo "$SKYPILOT_NODE_IPS" | head -n1)'
    inline = text.replace(f"  MASTER_ADDR={address}\n", "").replace(
        "master_addr=$MASTER_ADDR", f"master_addr={address}"
    )
    spec = spec_of(job_from_yaml(imported(inline).text, Path("/base")).spec)
    assert "--master_addr=$MASTER_ADDR" in spec.command[-1]
    assert "NODE_IPS" not in spec.command[-1]


def test_a_service_of_dstack_becomes_a_model_file():
    found = made("vllm.dstack.yml")
    model = model_from_yaml(found.text, Path("/base"))
    assert (found.kind, model.model_id, model.model.replicas.max, model.model.engine.image) == (
        "model",
        "llama31",
        4,
        "vllm/vllm-openai:latest",
    )
    assert model.model.engine.command[-1].endswith("--port {port}")
    assert list(model.model.engine.gpu_models) == ["L40S"]


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
def test_the_system_is_found_out(name):
    expected = {
        "sbatch": "sbatch",
        "sky": "skypilot",
        "dstack": "dstack",
        "accelerate": "accelerate",
        "torchrun": "torchrun",
    }
    assert format_of((FILES / name).read_text()) == expected[name.split(".")[1]]


@pytest.mark.parametrize("text", ["", "- a", "a: 1", "run: x\ngpus: 1"])
def test_what_is_of_no_system_says_so(text):
    with pytest.raises(InvalidArgument):
        imported(text)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("1:00:00", 3600),
        ("1-12", 129600),
        ("2-00:30", 174600),
        ("1-01:01:01", 90061),
        ("UNLIMITED", None),
    ],
)
def test_times_of_slurm(time, seconds):
    text = f"#!/bin/bash\n#SBATCH --gpus=1\n#SBATCH -t {time}\npython x\n"
    assert spec_of(job_from_yaml(imported(text).text, Path("/b")).spec).time_limit_s == seconds


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="#SBATCH -=:nodesgpu0123456789\n$()\"'srun", max_size=200))
def test_any_script_becomes_a_file_or_is_refused(text):
    try:
        imported("#!/bin/bash\n#SBATCH --gpus=1\n" + text)
    except InvalidArgument as refused:
        assert all(one.field and one.description for one in refused.violations)


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
TREES = st.recursive(
    SCALARS, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=8), t, max_size=3), max_leaves=6
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["skypilot", "dstack", "accelerate"]),
    st.dictionaries(
        st.sampled_from(
            [
                "type",
                "name",
                "run",
                "setup",
                "resources",
                "num_nodes",
                "envs",
                "env",
                "commands",
                "nodes",
                "file_mounts",
                "num_processes",
                "port",
                "replicas",
            ]
        ),
        TREES,
    ),
)
def test_any_content_becomes_a_file_or_is_refused(source, content):
    import yaml

    try:
        imported(yaml.safe_dump(content), source=source)
    except InvalidArgument as refused:
        assert all(one.field and one.description for one in refused.violations)


class TestCommand:
    def run(self, *arguments, **more):
        return CliRunner().invoke(app, ["import", *map(str, arguments)], **more)

    def test_the_file_goes_where_it_is_told_and_is_valid(self, tmp_path):
        out = tmp_path / "job.yaml"
        assert self.run(FILES / "ddp_two_nodes.sky.yaml", "-o", out).exit_code == 0
        assert CliRunner().invoke(app, ["validate", str(out)]).exit_code == 0
        again = self.run(FILES / "ddp_two_nodes.sky.yaml", "-o", out)
        assert isinstance(again.exception, InvalidArgument)

    def test_without_a_place_it_goes_to_stdout(self):
        assert "gpus: 4" in self.run(FILES / "ddp_one_node.sbatch").stdout


@pytest.mark.parametrize(
    ("text", "says", "noted"),
    [
        ("#!/bin/bash -e\nfalse\ntorchrun --nproc_per_node=8 t.py", ["\nset -e\nfalse"], ""),
        ("if [ -z $MASTER_ADDR ]; then\n  export MASTER_ADDR=localhost\nfi\ntorchrun --nproc_per_node=8 t.py", ["then\n  :\nfi"], "MASTER_ADDR"),
        ('torchrun --nproc_per_node=8 t.py "$1"', [], "$1"),
        ("torchrun --nproc_per_node=8 t.py | awk '{print $1}' # $2", [], ""),
    ],
)  # fmt: skip
def test_a_script_means_the_same(text, says, noted):
    made = imported(text, source="torchrun")
    command = job_from_yaml(made.text, FILES).spec.command[-1]
    assert all(one in command for one in says)
    assert any(noted in what for what, _ in made.notes) and (bool(noted) or "$" not in str(made.notes))


@pytest.mark.parametrize(("array", "indices"), [("5", [5]), ("5%1", [5]), ("0-2%2", [0, 1, 2]), ("1,3", [1, 3])])
def test_an_array_of_slurm_has_the_same_members_here(array, indices):
    made = imported(f"#!/bin/bash\n#SBATCH --array={array} --gpus=1 -J a\npython x\n")
    assert [one.spec.array.index for one in jobs_from_yaml(made.text, FILES)] == indices


def test_options_behind_the_first_command_are_passed_over_as_sbatch_does():
    made = imported("#!/bin/bash\n#SBATCH --gpus=1\n# why\n\npython x\n#SBATCH --gpus=8\n")
    assert job_from_yaml(made.text, FILES).spec.gpus == 1
    assert any("passes over it" in why for _, why in made.notes)


@pytest.mark.parametrize(
    ("gpu", "gpus", "memory"),
    [
        ("{memory: 24, count: 2}", 2, 24), ("{memory: 24..80, count: 1..2}", 1, 24), ("{memory: '..80GB'}", 1, 0),
        ("{memory: {min: 40GB, max: 80GB}, count: {min: 2, max: 4}}", 2, 40), ("24GB:4", 4, 24),
    ],
)  # fmt: skip
def test_gpus_of_dstack(gpu, gpus, memory):
    spec = job_from_yaml(imported(f"type: task\ncommands: [x]\nresources: {{gpu: {gpu}}}").text, FILES).spec
    assert (spec.gpus, spec.gpu.min_memory_bytes) == (gpus, memory * 10**9)


@pytest.mark.parametrize(
    "text",
    [
        "#SBATCH --comment='it\npython x",
        "type: task\ncommands: [x]\nenv: 5",
        "type: task\ncommands: [x]\nresources: {gpu: {count: {least: 1}}}",
    ],
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(InvalidArgument):
        imported(text)
