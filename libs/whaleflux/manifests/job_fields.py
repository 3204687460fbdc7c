"""What a job may ask for: one table of fields.

`Spec` is the contract's JobSpec as frozen data, and each of its attributes says where its field stands in job files and in
the contract, what kind of value it is with its limits and default, and what it is for. Reading job files, conversion from
the contract, the checks at the border, `whaleflux explain-field`, docs/guide/job-file.md and the JSON Schema all come
from here: a new field is one line here, one in the contract, and the code that acts on it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any

from whaleflux import names
from whaleflux.manifests.arrays import ARRAY, MATRIX, MAX_MEMBERS, ArrayOf, MatrixOf
from whaleflux.manifests.field import Field
from whaleflux.manifests.gpu_values import GpuChoice, GpuOptions, GpuTypes, LeastSize, MigInstance
from whaleflux.manifests.job_values import (
    Datasets,
    Dependencies,
    Dependency,
    Gpus,
    Kind,
    KnownModel,
    Labels,
    Named,
    OnPartition,
    Placement,
    ReservationName,
    Rule,
    RunTime,
    Speeds,
)
from whaleflux.manifests.secret_values import Secrets, SecretUse
from whaleflux.manifests.text_values import Command, Digest, Folder, Id, Text, Texts, Variables, Workdir
from whaleflux.manifests.training_values import TrainedModel
from whaleflux.manifests.values import (
    Choice,
    Count,
    Dollars,
    Flag,
    Instant,
    OptionalWhole,
    Scaled,
    Seconds,
    Size,
    Value,
    Whole,
    WholeOrAuto,
)
from whaleflux.planning.wish import MOST_BATCH, MOST_SEQUENCE

__all__ = ["JOB_FIELDS", "JobKind", "Rule", "SecretUse", "Spec"]

MAX_GPUS = 100_000
MAX_NODES = 100_000
MAX_PARALLEL = 1024
MAX_SHARE_BYTES = 4 << 40
DEFAULT_RESTARTS = 3
DEFAULT_BACKOFF_S, LONGEST_BACKOFF_S = 5.0, 300.0
DEFAULT_CHECKPOINTS_KEPT = 3
DEFAULT_PARTITION_WAIT_S = 600.0
DEFAULT_STOP_GRACE_S = 30.0
DEFAULT_CPU_MILLICORES = 1000  # that a rank without GPUs counts as
# The contract between torchrun and a script, and our own: a job that set these would break its own gang.
RESERVED_ENVIRONMENT = frozenset({
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
})  # fmt: skip
RESERVED_PREFIXES = ("TORCHELASTIC_", "PET_", "WHALEFLUX_")
_GROUP = re.compile(rf"groups/{names.ID_PATTERN.pattern}")
_SITE = re.compile(rf"(sites/)?{names.ID_PATTERN.pattern}")


class JobKind(IntEnum):
    """Whether a job ends by itself."""

    UNSPECIFIED = 0
    TRAINING = 1
    SERVICE = 2


class Goal(IntEnum):
    """What decides among places; numbers of the contract's JobGoal."""

    UNSPECIFIED = 0
    CLOSEST = 1
    CHEAPEST = 2
    FASTEST = 3


def _field(start: Any, file: str, path: str, value: Value, about: str, **more: Any) -> Any:
    """An attribute of `Spec`, which is `start` where nothing was asked for."""
    return dataclasses.field(default=start, metadata={"field": Field(file, path, value, about, **more)})


@dataclass(frozen=True, slots=True)
class Spec:
    """What a job asks for, as the contract's JobSpec; durations in seconds, None where a default applies."""

    command: tuple[str, ...] = _field(
        (), "run", "command", Command(),
        "Starts one rank (one process per GPU), with torchrun's environment. Text is a script for `bash -euo pipefail`, of one or "
        "more lines; a list is executed as it is, without a shell.",
        default="needed, unless the image has its own command", example="python train.py --config sft.yaml",
    )  # fmt: skip
    setup: tuple[str, ...] = _field(
        (), "setup", "setup", Command(),
        "Runs once on each node of each attempt, before the ranks, in their directory and environment; with an `image` only under "
        "`launch: once`, in its container.",
        default="nothing", example="pip install -r requirements.txt",
    )  # fmt: skip
    launch_once: bool = _field(
        False, "launch", "launch_once", Choice({"per_rank": False, "once": True}),
        "How often `run` is started on a node: once per rank, or once, when it starts the processes of all GPUs itself "
        "(torchrun, accelerate launch).",
        default="per_rank", example="once",
    )  # fmt: skip
    image: str = _field(
        "",
        "image",
        "image",
        Text(),
        "Container image.",
        default="a process of the host",
        example="nvcr.io/nvidia/pytorch:25.10-py3",
    )
    gpus: int = _field(
        0, "gpus", "gpus", Gpus(0, MAX_GPUS), "GPUs in all, one rank each. 0: work on CPUs alone, one rank unless `ranks` says more.",
        required="say how many GPUs the job needs, one rank each; 0 for work without GPUs", unless="model", example="64",
    )  # fmt: skip
    ranks: int = _field(
        0, "ranks", "ranks", Whole(1, MAX_GPUS),
        "Ranks of work without GPUs, each with `cpus_per_rank` (it counts as one core when that is not set) and `memory_per_rank`.",
        default="one for each GPU; 1 with `gpus: 0`", example="64",
    )  # fmt: skip
    elastic_min: int = _field(
        0, "elastic.min", "elastic.min", Whole(1, MAX_GPUS),
        "Fewest GPUs that it can run with. It starts with as many as there are, up to `gpus`, and shrinks instead of being stopped when "
        "others need GPUs.", default="`gpus`: it is not elastic", example="16", apart=True,
    )  # fmt: skip
    elastic_max: int = _field(
        0, "elastic.max", "elastic.max", Whole(1, MAX_GPUS),
        "Most GPUs: it grows into idle ones where that pays for the restart from its checkpoint.", default="`gpus`", example="128", apart=True,
    )  # fmt: skip
    elastic_step: int = _field(
        0, "elastic.step", "elastic.step", Whole(1, MAX_GPUS),
        "Every size is a multiple of it: 8 for whole nodes of 8, or what its parallelism needs.", default="1", example="8", apart=True,
    )  # fmt: skip
    elastic_resumes: bool = _field(
        False, "elastic.resumes", "elastic.resumes", Flag(),
        "Its program goes on from where it was by itself; needed where the file has no `checkpoint`.", default="false", example="true", apart=True,
    )  # fmt: skip
    elastic_speeds: tuple[tuple[int, float], ...] = _field(
        (), "elastic.speeds", "elastic.speeds", Speeds(MAX_GPUS),
        "How fast it is with some numbers of GPUs, in any unit (samples per second), to be resized where that brings most.",
        default="each doubling brings 87 %", example="{16: 1.0, 64: 3.6, 128: 6.1}", apart=True,
    )  # fmt: skip
    min_nodes: int = _field(
        0, "nodes.min", "nodes.min", Whole(1, MAX_NODES), "Fewest nodes to spread over.", default="1", example="2"
    )
    max_nodes: int = _field(
        0, "nodes.max", "nodes.max", Whole(1, MAX_NODES), "Most nodes to spread over.", default="no limit", example="8"
    )
    node_labels: tuple[tuple[str, str], ...] = _field(
        (), "nodes.labels", "nodes.labels", Labels(),
        "Only nodes that have all of these labels, which their agent's settings or an operator gave them (`whaleflux nodes -o json` shows them).",
        default="any node", example="{pool: research}",
    )  # fmt: skip
    needs_nvme: bool = _field(
        False, "nodes.nvme", "nodes.nvme", Flag(), "Only nodes with a local NVMe disk, for what the job caches or spills.",
        default="false", example="true",
    )  # fmt: skip
    no_spot: bool = _field(
        False, "nodes.spot", "nodes.no_spot", Choice({"any": False, "never": True}),
        "`never`: no spot machines, which their owner may take back at any time (price kind `spot`).", default="any", example="never",
    )  # fmt: skip
    any_of: tuple[str, ...] = _field(
        (), "gpu.any", "gpu.any_of", GpuTypes(),
        "GPU types that will do; `gpu: H200` is short for this. The whole gang gets one of them. `gpus` counts the first; with "
        "`2 x A100-80GB` two of that type count as one, and each has a rank. `speed` says how fast they are together, the GPU that "
        "`expected` is meant for being 1.0.",
        default="any", example="[H200, 2 x A100-80GB, {type: H100-80GB, speed: 0.8}]", short=True,
    )  # fmt: skip
    gpu_options: tuple[GpuChoice, ...] = _field(
        (), "", "gpu.options", GpuOptions(), "Set by `gpu.any`: what types count as, and how fast they are."
    )
    min_memory_bytes: int = _field(
        0,
        "gpu.memory",
        "gpu.min_memory_bytes",
        LeastSize(instead="share"),
        "Least memory of each GPU; the rank has the whole GPU.",
        default="any",
        example='">= 80 GB"',
    )
    min_compute_capability: int = _field(
        0, "gpu.compute_capability", "gpu.min_compute_capability", Scaled(10, 999),
        "Least CUDA compute capability.", default="any", example="8.9",
    )  # fmt: skip
    share_memory_bytes: int = _field(
        0, "gpu.share", "gpu.share_memory_bytes", Size(MAX_SHARE_BYTES, none="whole GPUs"),
        "Each rank gets this much of a GPU's memory, and other jobs may have the rest of that GPU. Nothing isolates them: the "
        "agent watches and ends a rank that stays above its share. `gpus` counts such shares, each on another GPU.",
        default="whole GPUs", example="20 GB", apart=True,
    )  # fmt: skip
    mig_profile: str = _field(
        "", "gpu.mig", "gpu.mig_profile", MigInstance(),
        "Each rank gets a MIG instance instead of a GPU: of this profile, or of the smallest free one whose name says at least "
        "this size. `gpus` counts instances. The operator makes them (`nvidia-smi mig`); jobs use those that exist.",
        default="whole GPUs", example="1g.18gb", apart=True,
    )  # fmt: skip
    mig_memory_bytes: int = _field(0, "", "gpu.mig_memory_bytes", Size(MAX_SHARE_BYTES), "Set by `gpu: {mig: 20 GB}`.")
    placement: tuple[Rule, ...] = _field(
        (), "place", "placement", Placement(MAX_GPUS),
        "Groups of ranks, each with the level of the network that must hold it together: `{tensor: nvlink}`, or "
        "`{pipeline: {level: leaf, size: 16, preferred: true}}` for runs of 16 ranks and a wish instead of a condition.",
        default="no condition", example="{tensor: nvlink, pipeline: leaf}",
    )  # fmt: skip
    tensor_parallel: int = _field(
        0, "parallel.tensor", "parallelism.tensor", Whole(1, MAX_PARALLEL),
        "Ranks that share each layer. With any of `parallel`, ranks are laid on the GPUs of each attempt so that a step is fastest there: the program counts "
        "them tensor first, then context, data, pipeline, as Megatron-Core and torchtitan do; what is left of `gpus` is data parallel.",
        default="1", example="8", apart=True,
    )  # fmt: skip
    context_parallel: int = _field(
        0, "parallel.context", "parallelism.context", Whole(1, MAX_PARALLEL), "Ranks that share each sequence.", default="1", example="2", apart=True,
    )  # fmt: skip
    expert_parallel: int = _field(
        0, "parallel.expert", "parallelism.expert", Whole(1, MAX_PARALLEL),
        "Ranks over which experts are spread; divides context x data.", default="1", example="2", apart=True,
    )  # fmt: skip
    pipeline_parallel: int = _field(
        0, "parallel.pipeline", "parallelism.pipeline", Whole(1, MAX_PARALLEL), "Stages of layers.", default="1", example="4", apart=True,
    )  # fmt: skip
    parallel_model: str = _field(
        "", "parallel.model", "parallelism.model", KnownModel(),
        "A model that `whaleflux fits --list` shows, by whose communication places of ranks are compared.",
        default="a dense one of 70 billion parameters", example="llama-3.1-70b", apart=True,
    )  # fmt: skip
    train_model: str = _field(
        "", "model", "training.model", TrainedModel(),
        "What is trained. Without `gpus`, `submit` asks the scheduler how to train it on what is free and fills in GPUs, their type and `parallel`; "
        "ranks find the plan in their environment (MESH, for `whaleflux.sdk.device_mesh`).",
        default="the program's own affair", example="llama-3.1-8b", apart=True,
    )  # fmt: skip
    train_batch: int = _field(
        0, "batch", "training.batch", Whole(1, MOST_BATCH), "Samples of a step.", default="about 4M tokens", example="512", apart=True,
    )  # fmt: skip
    train_batch_tokens: int = _field(
        0, "batch_tokens", "training.batch_tokens", Count(1, 10**12), "Tokens of a step, 5 % more or less, in place of `batch`.",
        default="4M", example="4M", apart=True,
    )  # fmt: skip
    train_sequence: int = _field(
        0, "sequence", "training.sequence", Whole(1, MOST_SEQUENCE), "Tokens of a sample.", default="the model's, at most 8192", example="8192", apart=True,
    )  # fmt: skip
    train_adapters: bool = _field(
        False, "adapters", "training.adapters", Flag(), "Adapters on frozen weights (LoRA) are trained.", default="false", example="true", apart=True,
    )  # fmt: skip
    train_fp8: bool = _field(
        False, "fp8", "training.fp8", Flag(), "Linear layers run in 8 bit; only GPUs that have it will do.", default="false", example="true", apart=True,
    )  # fmt: skip
    datasets: tuple[str, ...] = _field(
        (),
        "data",
        "datasets",
        Datasets(),
        "Datasets to have near the ranks.",
        default="none",
        example="[dataset:c4-en]",
    )
    require_local_data: bool = _field(
        False, "require_local_data", "require_local_data", Flag(),
        "Refuse nodes that do not hold the data, rather than fetch it.", default="false", example="true",
    )  # fmt: skip
    partial_data: bool = _field(
        False, "partial_data", "partial_data", Flag(),
        "Its code reads datasets with `whaleflux.sdk.Dataset`: of one in an object store that exceeds a node's cache a fixed part is pulled, and the "
        "rest is read at the source.", default="false", example="true", apart=True,
    )  # fmt: skip
    datasets_by_rank: tuple[str, ...] = _field(
        (), "data_by_rank", "datasets_by_rank", Datasets(),
        "Those of `data` whose files are divided among the ranks, as `whaleflux.sdk.Dataset.part()` says: a node pulls those of its own ranks alone.",
        default="none", example="[dataset:c4-en]", apart=True,
    )  # fmt: skip
    environment: tuple[tuple[str, str], ...] = _field(
        (), "environment", "environment", Variables(RESERVED_ENVIRONMENT, RESERVED_PREFIXES),
        "Added to the environment of each rank: any text, also of several lines; what is no text in YAML (1.10, yes) is taken as it is "
        "written. What torchrun or the agent set (RANK, WORLD_SIZE, MASTER_ADDR, WHALEFLUX_...) may not be set.", default="none", example="{NCCL_DEBUG: WARN}",
    )  # fmt: skip
    secrets: tuple[SecretUse, ...] = _field(
        (), "secrets", "secrets", Secrets(RESERVED_ENVIRONMENT, RESERVED_PREFIXES),
        "Secrets (`whaleflux secrets add`) that each rank is given when an attempt begins: `hf-token` as variable HF_TOKEN, or as `env` says; "
        "with `file` as a file of that name in the folder that WHALEFLUX_SECRETS_DIR names, and with both, `env` has its path.",
        default="none", example="[hf-token, {name: gcs-key, file: key.json, env: GOOGLE_APPLICATION_CREDENTIALS}]",
    )  # fmt: skip
    priority: int = _field(
        0,
        "priority",
        "priority",
        Whole(0, 1000),
        "Higher goes first and may preempt lower.",
        default="0",
        example="100",
    )
    max_restarts: int | None = _field(
        None, "retry.max_restarts", "retry.max_restarts", OptionalWhole(0, 1_000_000),
        "How often a failure of the work itself is retried; lost nodes are not counted.",
        default=f"{DEFAULT_RESTARTS}; a service is restarted without limit", example="5",
    )  # fmt: skip
    backoff_s: float | None = _field(
        None, "retry.backoff", "retry.backoff", Seconds(LONGEST_BACKOFF_S),
        f"Pause before the first retry; doubles each time up to {LONGEST_BACKOFF_S:g} s.",
        default=f"{DEFAULT_BACKOFF_S:g} s", example="30 s",
    )  # fmt: skip
    checkpoint_every_steps: int = _field(
        0, "checkpoint.every", "checkpoint.every_steps", WholeOrAuto(1, 1_000_000_000), "Steps between checkpoints.",
        default="auto: the program decides", example="100",
    )  # fmt: skip
    checkpoint_keep: int = _field(
        0, "checkpoint.keep", "checkpoint.keep", Whole(1, 1_000), "Newest committed checkpoints to keep.",
        default=str(DEFAULT_CHECKPOINTS_KEPT), example="5",
    )  # fmt: skip
    checkpoint_location: str = _field(
        "", "checkpoint.location", "checkpoint.location", Text(), "Folder or URL prefix that all nodes of the job can read.",
        default="the agent's folder for checkpoints", example="/mnt/shared/checkpoints",
    )  # fmt: skip
    partition_wait_s: float | None = _field(
        None, "on_partition", "on_partition.wait", OnPartition(),
        "What happens while the site of a running job cannot be reached: it is placed elsewhere after a wait, or never.",
        default=f"wait {DEFAULT_PARTITION_WAIT_S / 60:g} min", example="wait 10 min",
    )  # fmt: skip
    never_reroute: bool = _field(
        False, "", "on_partition.never_reroute", Flag(), "Set by `on_partition: never reroute`."
    )
    deadline: datetime | None = _field(
        None,
        "deadline",
        "deadline_time",
        Instant(),
        "When it should have ended. `goal` keeps it where it can; plans and `explain` say when it will be missed.",
        default="none",
        example="2036-12-01T08:00Z",
    )
    goal: Goal = _field(
        Goal.UNSPECIFIED, "goal", "goal", Named(Goal),
        "What decides among GPU types and prices: `cheapest` that ends by `deadline`, `fastest` that costs no more than `budget`, or `closest`, "
        "the least time lost to communication. For what a run costs in all it needs `expected`, or runs like it to learn from.",
        default="closest", example="cheapest",
    )  # fmt: skip
    budget_usd: float = _field(
        0.0, "budget", "budget_usd", Dollars(), "Most that it may cost.", default="no limit", example="12000 USD"
    )
    kind: JobKind = _field(
        JobKind.UNSPECIFIED, "kind", "kind", Kind(JobKind), "A training ends by itself; a service runs until it is cancelled.",
        default="training", absent=JobKind.TRAINING, example="training",
    )  # fmt: skip
    working_directory: str = _field(
        "", "directory", "working_directory", Folder(shown="folder; a relative one is taken from where the file lies"), "Working directory on the node.",
        default="a fresh one per job", example=".",
    )  # fmt: skip
    cpu_millicores_per_rank: int = _field(
        0, "cpus_per_rank", "cpu_millicores_per_rank", Scaled(1000, 10_000_000), "CPU cores per rank.",
        default="no limit", example="7.5",
    )  # fmt: skip
    memory_bytes_per_rank: int = _field(
        0,
        "memory_per_rank",
        "memory_bytes_per_rank",
        Size(),
        "Main memory per rank; on nodes whose kernel does not limit it (`nodes -o wide`) agents look every few seconds.",
        default="no limit",
        example="100 GB",
    )
    stop_grace_s: float | None = _field(
        None, "stop_grace", "stop_grace", Seconds(3600.0), "Time between SIGTERM and SIGKILL.",
        default=f"{DEFAULT_STOP_GRACE_S:g} s", example="2 min",
    )  # fmt: skip
    sites: tuple[str, ...] = _field(
        (),
        "sites",
        "sites",
        Texts(_SITE, "the id of a site"),
        "Sites that may run it.",
        default="all",
        example="[onprem, cloud]",
    )
    time_limit_s: float | None = _field(
        None, "time_limit", "time_limit", RunTime(least=1.0),
        "Most time that it may run, all attempts together; waiting is not counted. Then its ranks get SIGTERM, `stop_grace` to "
        "save, SIGKILL, and it ends as FAILED, without a retry.", default="no limit", example="2 h",
    )  # fmt: skip
    expected_s: float | None = _field(
        None, "expected", "expected", RunTime(least=1.0),
        "How long it probably runs, all attempts together. Short work starts on GPUs that are promised to others for later. It ends "
        "nothing, but one that runs longer may be suspended through a checkpoint where its GPUs are promised.",
        default="learned from jobs of its name, queue and size", example="6 h",
    )  # fmt: skip
    reservation: str = _field(
        "", "reservation", "reservation", ReservationName(shown="id of a reservation"),
        "It runs on GPUs that this reservation keeps, and waits for its begin. What still runs at its end goes on as an ordinary job.",
        default="any GPUs", example="launch-week",
    )  # fmt: skip
    depends_on: tuple[Dependency, ...] = _field(
        (), "depends_on", "depends_on", Dependencies(),
        "Jobs that must have ended before this one is placed: by default SUCCEEDED; `ended` in whatever way, `failed` without success. "
        "When that can never be so any more, this job is CANCELLED.", default="none", example="[prep, {job: research/old, when: ended}]",
    )  # fmt: skip
    stop_on_nan: bool = _field(
        False, "on_nan", "stop_on_nan", Choice({"continue": False, "stop": True}),
        "What happens when the reported loss is NaN or infinite: the job goes on, or it ends as FAILED.",
        default="continue", example="stop",
    )  # fmt: skip
    code: str = _field("", "", "code", Digest(), "Set by `workdir`: sha256 of the packed folder.")
    secrets_groups: tuple[str, ...] = _field(
        (), "", "secrets_groups", Texts(_GROUP, "a group, such as groups/nlp", 1_000), "Set by the scheduler: the submitter's groups."
    )  # fmt: skip

    @property
    def gpu_choices(self) -> tuple[GpuChoice, ...]:
        """The types that will do, in the order of the file; none: any."""
        told = {choice.model: choice for choice in self.gpu_options if choice.model in self.any_of}
        return tuple(told.get(model, GpuChoice(model)) for model in self.any_of)

    @property
    def wants_mig(self) -> bool:
        """Whether each rank gets a MIG instance instead of a GPU."""
        return bool(self.mig_profile or self.mig_memory_bytes)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.ranks or self.gpus

    @property
    def counted_cpu_millicores(self) -> int:
        """CPU that each rank takes of its node: what it asks for; without GPUs at least a core, so that nodes fill up."""
        return self.cpu_millicores_per_rank or (0 if self.gpus else DEFAULT_CPU_MILLICORES)

    array_name: str = _field("", "", "array.name", Text(63), "Set by `array` and `matrix`: what the array is called.")
    array_index: int = _field(0, "", "array.index", Whole(0, 999_999), "Set by `array` and `matrix`: which member.")
    array_size: int = _field(
        0, "", "array.size", Whole(0, MAX_MEMBERS), "Set by `array` and `matrix`: how many members."
    )
    array_max_running: int = _field(
        0, "", "array.max_running", Whole(0, MAX_MEMBERS), "Set by `array`: so many at a time."
    )

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one copy of the model; 0: nothing is said of how it is split."""
        sizes = (self.tensor_parallel, self.context_parallel, self.pipeline_parallel)
        if not any(sizes) and not self.expert_parallel:
            return 0
        return math.prod(max(1, size) for size in sizes)

    @property
    def is_elastic(self) -> bool:
        """Whether it can run with different numbers of GPUs."""
        return self.elastic_min > 0

    @property
    def is_service(self) -> bool:
        return self.kind is JobKind.SERVICE

    @property
    def grace_s(self) -> float:
        """Between SIGTERM and SIGKILL."""
        return DEFAULT_STOP_GRACE_S if self.stop_grace_s is None else self.stop_grace_s

    @property
    def allowed_restarts(self) -> int:
        """How often a failure of a training is retried."""
        return DEFAULT_RESTARTS if self.max_restarts is None else self.max_restarts


ATTRIBUTES: dict[str, Field] = {one.name: one.metadata["field"] for one in dataclasses.fields(Spec)}
# What a job file says beside its spec: these go into the request that creates the job.
NAME = Field(
    "name", "job_id", Id(shown="id"), "Name of the job in its queue.", default="one is made", example="llama-70b-sft"
)
QUEUE = Field(
    "queue",
    "queue",
    Id(shown="id"),
    "Queue that it waits in.",
    default=names.last(names.DEFAULT_QUEUE),
    example="research",
)
WORKDIR = Field(
    "workdir",
    "code",
    Workdir(shown="folder, or `none`; a relative one is taken from where the file lies"),
    "Folder that is packed, sent and unpacked for each attempt; the ranks start in it. Excludes `directory`. "
    "What .gitignore and .whalefluxignore name stays behind.",
    default="the file's folder where code lies beside it (you are asked once per folder), else none",
    example="none",
)
ARRAY_OF = Field(
    ARRAY,
    "array.max_running",
    ArrayOf(),
    "Many jobs from this file, called NAME-0, NAME-1, ...; each finds WHALEFLUX_ARRAY_INDEX in its environment.",
    default="one job",
    example="'%3'",
)
MATRIX_OF = Field(
    MATRIX,
    "array.size",
    MatrixOf(),
    "A job for every combination of these values, which it finds in its environment; `${{ matrix.lr }}` stands for one anywhere in the file.",
    default="one job",
    example="{lr: [1e-3, 1e-4], seed: [1, 2]}",
)
JOB_FIELDS: tuple[Field, ...] = (NAME, QUEUE, WORKDIR, ARRAY_OF, MATRIX_OF, *ATTRIBUTES.values())
