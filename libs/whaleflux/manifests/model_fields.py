"""What a model file may say: one table of fields, as for jobs (`manifests.job_fields`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whaleflux import hostport, names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.field import Field
from whaleflux.manifests.reader import Reader
from whaleflux.manifests.secret_values import Secrets
from whaleflux.manifests.site_values import MAX_REPLICAS, Sites
from whaleflux.manifests.text_values import Command, Folder, Id, Text, Texts, Variables, items, text, texts
from whaleflux.manifests.training_values import TrainedModel
from whaleflux.manifests.values import Choice, Flag, Schema, Seconds, Size, Value, Violations, Whole

ENGINES = ("openai", "vllm", "sglang")
MAX_TOKENS = 10**9
MAX_GPUS_PER_REPLICA = 64
MAX_CANARY_PERCENT = 50
MAX_REQUESTS_PER_S = 10**6
WATCH_S, READY_WITHIN_S = (1.0, 86_400.0), (1.0, 7 * 86_400.0)  # least and most


@dataclass(frozen=True)
class ModelId(Id):
    """The id of a model; capitals and dots of the names that models have elsewhere are folded."""

    def parse(self, value: object, base: Path) -> Any:
        return names.check_id("model", text(value).lower().replace(".", "-"))

    def schema(self) -> Schema:
        return {"type": ["string", "number"]}


@dataclass(frozen=True)
class QueueName(Id):
    """A queue by its id, queues/{queue} in messages."""

    def parse(self, value: object, base: Path) -> Any:
        return names.queue(names.check_id("queue", text(value).removeprefix("queues/")))

    def written(self, value: Any) -> str:
        return names.last(value)

    def violations(self, at: str, value: Any) -> Violations:
        try:
            names.split(value or names.DEFAULT_QUEUE, "queues")
        except InvalidArgument as wrong:
            yield FieldViolation(at, wrong.violations[0].description)


@dataclass(frozen=True)
class Addresses(Texts):
    """Servers that run already: host:port, or a URL of which only those count."""

    shown: str = "`http://HOST:PORT`, or a list of them"

    def parse(self, value: object, base: Path) -> Any:
        return [self._address(item) for item in texts(value)]

    def _address(self, item: str) -> str:
        address = item.removeprefix("http://").rstrip("/").removesuffix("/v1")
        try:
            return str(hostport.parse(address))
        except InvalidArgument as error:
            wanted = f"must be http://host:port of servers that run already; {error.violations[0].description}"
            raise ValueError(wanted) from None


@dataclass(frozen=True)
class Weights(Text):
    """A dataset (`dataset:llama-3-8b`), or where the bytes are, of which `deploy` makes one: a URL or a folder."""

    shown: str = "`dataset:ID`, a URL, or a folder that all nodes mount"

    def parse(self, value: object, base: Path) -> Any:
        found = text(value, self.most)
        if found.startswith(("dataset:", "datasets/")):
            return names.dataset(names.check_id("weights", found.removeprefix("dataset:").removeprefix("datasets/")))
        return found if "://" in found else str((base / found).resolve())

    def violations(self, at: str, value: Any) -> Violations:
        try:
            names.split(value or "datasets/none", "datasets")
        except InvalidArgument:
            yield FieldViolation(at, f"{value[:80]!r} is not the name of a dataset, such as datasets/llama-3-8b")


@dataclass(frozen=True)
class Classes(Value):
    """Requests up to a length and the GPUs that they go to."""

    def words(self) -> str:
        return "list of `{up_to_tokens: N, on: [GPU types]}`"

    def take(self, reader: Reader, key: str, base: Path, absent: Any) -> list[tuple[int, list[str]]]:
        return [self._one(inner, base) for inner in reader.items(key, items)]

    def _one(self, reader: Reader, base: Path) -> tuple[int, list[str]]:
        found = Whole(1, MAX_TOKENS).take(reader, "up_to_tokens", base, 0), Texts().take(reader, "on", base, [])
        reader.done()
        return found

    def write(self, message: Any, name: str, value: Any) -> None:
        for tokens, gpu_models in value:
            getattr(message, name).add(max_prompt_tokens=tokens, gpu_models=gpu_models)

    def schema(self) -> Schema:
        one = {"up_to_tokens": Whole(1, MAX_TOKENS).schema(), "on": Texts().schema()}
        return {"type": "array", "items": {"type": "object", "properties": one, "additionalProperties": False}}


@dataclass(frozen=True)
class Rate(Value):
    """Requests a second; 0: not set."""

    def words(self) -> str:
        return f"number above 0, at most {MAX_REQUESTS_PER_S}"

    def parse(self, value: object, base: Path) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_REQUESTS_PER_S:
            raise ValueError(f"must be a number of requests a second above 0, at most {MAX_REQUESTS_PER_S}")
        return float(value)

    def schema(self) -> Schema:
        return {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_REQUESTS_PER_S}


MODEL = Field(
    "model", "model_id", ModelId(shown="id"), "Name that clients ask for.", required="give the name that clients ask for",
    example="llama-3-8b",
)  # fmt: skip
MODEL_FIELDS: tuple[Field, ...] = (
    MODEL,
    Field(
        "engine.kind", "engine.kind", Choice({k: k for k in ENGINES}), "What serves it: `openai` is any server of that API.",
        default="openai", absent="openai", example="vllm",
    ),
    Field(
        "engine.run", "engine.command", Command(), "Starts one replica; `{port}` is replaced by the port to listen on.",
        default="the image's own command", example="vllm serve {weights} --served-model-name llama-3-8b --port {port}",
    ),
    Field("engine.args", "engine.command", Texts(), "More words of the command.", default="none", example="[--max-model-len, 8192]"),
    Field("engine.image", "engine.image", Text(), "Container image.", default="a process of the host", example="vllm/vllm-openai:v0.11.0"),
    Field(
        "engine.url", "engine.addresses", Addresses(), "Servers that run elsewhere; nothing is started then.", default="none",
        apart=True, example="[http://10.0.0.7:8000/v1]",
    ),
    Field(
        "shape", "engine.shape", TrainedModel(),
        "What is served, as plans know it. Each replica gets the GPU type and number of GPUs that serve it within `slo` and `context` at the least cost.",
        default="`engine.gpus` GPUs of any type", example="llama-3.1-8b",
    ),
    Field("fp8", "engine.fp8", Flag(), "With `shape`: weights and linear layers are in 8 bit.", default="false", example="true"),
    Field(
        "engine.gpus", "engine.gpus", Whole(1, MAX_GPUS_PER_REPLICA), "GPUs per replica. `{gpus}` in `run` is replaced by their number.",
        default="1, or with `shape` what serves it", example="2",
    ),
    Field(
        "engine.environment", "engine.environment", Variables(), "Added to the environment of each replica.", default="none",
        example="{HF_HOME: /mnt/models}",
    ),
    Field(
        "engine.secrets", "engine.secrets", Secrets(), "Secrets that each replica is given, as in job files: variables, or files in WHALEFLUX_SECRETS_DIR.",
        default="none", example="[hf-token]",
    ),
    Field(
        "engine.health", "engine.health_path", Text(), "Path that answers 200 when a replica can serve.", default="/health",
        example="/health",
    ),
    Field(
        "engine.directory", "engine.working_directory", Folder(shown="folder; a relative one is taken from where the file lies"),
        "Working directory of each replica.", default="a fresh one", example=".",
    ),
    Field(
        "weights", "engine.weights", Weights(),
        "What the engine reads: on each node's disk before the engine starts. `{weights}` in `run` is replaced by the folder.",
        default="the engine sees to it", example="dataset:llama-3-8b",
    ),
    Field(
        "engine.kv_memory", "engine.kv_memory_bytes", Size(),
        "GPU memory of a replica beside 1.1 times its weights: keys and values of requests under way.", default="2 GB", example="8 GB",
    ),
    Field(
        "sites", "sites", Sites(), "Sites that run it, each with its replicas, and what is otherwise there: GPU types, words of the command, variables.",
        default="wherever the scheduler places it", example="{onprem: 2, edge: {replicas: 1, on: [RTX4090], environment: {NCCL_P2P_DISABLE: 1}}}",
    ),
    Field("replicas.min", "replicas.min", Whole(0, MAX_REPLICAS), "Fewest replicas.", default="1", absent=1, example="2"),
    Field("replicas.max", "replicas.max", Whole(1, MAX_REPLICAS), "Most replicas.", not_yet=True, default="as min", example="8"),
    Field("replicas.on", "engine.gpu_models", Texts(shown="GPU types"), "GPU types that will do.", default="any", example="[RTX4090, L40S]"),
    Field(
        "rollout.share", "rollout_policy.canary_percent", Whole(1, MAX_CANARY_PERCENT),
        "Share of the requests, percent, that the first replica of a changed engine gets.", default="10", example="5",
    ),
    Field("rollout.watch", "rollout_policy.watch", Seconds(), "For how long it is compared with the others.", default="60 s", example="5 min"),
    Field(
        "rollout.ready_within", "rollout_policy.ready_within", Seconds(),
        "Within what time each new replica has to be READY; else the engine of before goes on.", default="30 min", example="10 min",
    ),
    Field("slo.first_token", "objective.first_token", Seconds(), "With `shape`: at most so long to the first token.", default="none", example="500 ms"),
    Field("slo.per_token", "objective.per_token", Seconds(), "With `shape`: at most so long for each further one.", default="none", example="50 ms"),
    Field(
        "slo.prompt", "objective.prompt_tokens", Whole(1, MAX_TOKENS), "With `shape`: tokens of a usual prompt.",
        default="2000, or less where `context` is short", example="3000",
    ),
    Field(
        "slo.answer", "objective.answer_tokens", Whole(1, MAX_TOKENS), "With `shape`: tokens of a usual answer.",
        default="500, or less", example="400",
    ),
    Field(
        "slo.requests", "objective.requests_per_s", Rate(), "With `shape`: requests a second of all replicas together.",
        default="as many as they can", example="4",
    ),
    Field(
        "context", "context_window_tokens", Whole(0, MAX_TOKENS), "Most tokens of prompt and answer together.",
        default="not checked; with `shape` the model's own", example="8192",
    ),
    Field(
        "queue", "queue", QueueName(shown="queue"),
        "Queue in which its replicas run: the model is for those whom the queue is for, and changed by the groups that it names.",
        default="serving, which is for all users", example="research",
    ),
    Field(
        "classes", "classes", Classes(), "Requests up to a length go to certain GPUs.", default="none",
        example="[{up_to_tokens: 2000, on: [RTX4090]}, {on: [H200]}]",
    ),
)  # fmt: skip
