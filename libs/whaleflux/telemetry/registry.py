"""Every attribute, metric and log event that WhaleFlux emits. Add a name here before you use it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class UnregisteredName(ValueError):  # like our status errors, named for what is wrong
    """A name that is not in this file; add it here, with its meaning, or correct the spelling."""


class Attribute(StrEnum):
    """Span attributes. Resource names are full names (sites/a/nodes/n1)."""

    RPC_SYSTEM = "rpc.system"  # always "grpc"
    RPC_SERVICE = "rpc.service"
    RPC_METHOD = "rpc.method"
    RPC_STATUS = "rpc.grpc.status_code"  # number
    RPC_ATTEMPTS = "whaleflux.rpc.attempts"  # client: how often it was tried
    CALLER = "whaleflux.caller"  # spiffe URI
    REASON = "whaleflux.reason"  # of a status error, UPPER_SNAKE
    CAUSE = "whaleflux.cause"  # the event or request that led here
    SITE = "whaleflux.site"
    NODE = "whaleflux.node"
    NODES = "whaleflux.nodes"
    GPUS = "whaleflux.gpus"  # number
    JOB = "whaleflux.job"
    QUEUE = "whaleflux.queue"
    EPOCH = "whaleflux.epoch"  # attempt number of a job
    TASK = "whaleflux.task"
    RANK = "whaleflux.rank"
    PHASE = "whaleflux.phase"
    INCIDENT = "whaleflux.incident"
    CHECKPOINT = "whaleflux.checkpoint"
    STEP = "whaleflux.step"  # training step
    BYTES = "whaleflux.bytes"
    MODEL = "whaleflux.model"
    REPLICA = "whaleflux.replica"
    DATASET = "whaleflux.dataset"
    REVISION = "whaleflux.revision"  # of the store
    SIMULATED = "whaleflux.simulated"  # true where a machine's profile is played


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """What a metric is; `labels` have few values (methods, kinds), ids only where the id is the point (a job's loss).

    None is named job, instance or service: Prometheus gives these to what it scrapes, and renames ours.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_WAITS_S = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)


class Metric(StrEnum):
    """Prometheus metrics; described in `METRICS`."""

    RPC_REQUESTS = "whaleflux_rpc_requests_total"
    RPC_DURATION = "whaleflux_rpc_duration_seconds"
    RPC_IN_FLIGHT = "whaleflux_rpc_in_flight"
    RPC_STREAMS = "whaleflux_rpc_open_streams"
    CERTIFICATE_EXPIRY = "whaleflux_certificate_expiry_seconds"
    LOOP_LAG = "whaleflux_event_loop_lag_seconds"
    PLAN_DURATION = "whaleflux_plan_duration_seconds"
    RAY_START_DELAY = "whaleflux_ray_start_delay_seconds"
    JOB_WAIT = "whaleflux_job_wait_seconds"
    QUEUE_DEPTH = "whaleflux_queue_depth"
    STORE_DURATION = "whaleflux_store_duration_seconds"
    CAS_CONFLICTS = "whaleflux_cas_conflicts_total"
    LEADER = "whaleflux_leader"
    EVENTS_PUBLISHED = "whaleflux_events_published_total"
    EVENTS_CONSUMED = "whaleflux_events_consumed_total"
    AUDIT_LOST = "whaleflux_audit_lost_total"
    NODES = "whaleflux_nodes"
    NODES_SICK = "whaleflux_nodes_with_broken_gpus"
    SITES_CUT_OFF = "whaleflux_sites_cut_off"
    GPU_FAULTS = "whaleflux_gpu_faults_total"
    GPUS = "whaleflux_gpus"
    GPUS_ALLOCATED = "whaleflux_gpus_allocated"
    JOBS = "whaleflux_jobs"
    RECOVERIES = "whaleflux_recoveries_total"
    RECOVERY_DURATION = "whaleflux_recovery_duration_seconds"
    DETECTION_DURATION = "whaleflux_detection_duration_seconds"
    CHECKPOINT_COMMITS = "whaleflux_checkpoint_commits_total"
    CLAIMS_REFUSED = "whaleflux_agent_claims_refused_total"
    ROUTE_DURATION = "whaleflux_route_duration_seconds"
    ROUTE_DECISIONS = "whaleflux_route_decisions_total"
    ENDPOINTS_REFUSED = "whaleflux_endpoints_refused_total"
    MODELS_SHORT = "whaleflux_models_below_minimum"
    REPLICAS = "whaleflux_replicas"
    FIRST_TOKEN = "whaleflux_first_token_seconds"  # tokens of text
    TASKS = "whaleflux_tasks"
    TRAINING_STEP = "whaleflux_training_step"
    TRAINING_LOSS = "whaleflux_training_loss"
    LEDGER_RESIDUAL = "whaleflux_ledger_residual_micros"
    LEDGER_WATERMARK = "whaleflux_ledger_watermark_timestamp_seconds"
    SPENDING = "whaleflux_spending_micros"
    BUDGETS = "whaleflux_budgets"


METRICS: dict[Metric, MetricSpec] = {
    Metric.RPC_REQUESTS: MetricSpec("counter", "Calls answered, by gRPC status name.", ("method", "code")),
    Metric.RPC_DURATION: MetricSpec("histogram", "Time to answer a unary call.", ("method",), _SECONDS),
    Metric.RPC_IN_FLIGHT: MetricSpec("gauge", "Unary calls being answered."),
    Metric.RPC_STREAMS: MetricSpec("gauge", "Open streams.", ("method",)),
    Metric.CERTIFICATE_EXPIRY: MetricSpec("gauge", "Unix time at which this process's certificate ends."),
    Metric.LOOP_LAG: MetricSpec("histogram", "How late a timer of the event loop fires.", (), _SECONDS),
    Metric.PLAN_DURATION: MetricSpec("histogram", "Time that one decision takes.", ("kind",), _SECONDS),
    Metric.RAY_START_DELAY: MetricSpec(
        "histogram", "From what waits in a Ray cluster coming to the scheduler to workers for it.", (), _SECONDS
    ),
    Metric.JOB_WAIT: MetricSpec("histogram", "Submission of a job to its first placement.", (), _WAITS_S),
    Metric.QUEUE_DEPTH: MetricSpec("gauge", "Items that wait.", ("queue",)),
    Metric.STORE_DURATION: MetricSpec(
        "histogram", "Time in which the store answers a get or a commit, or fails to.", ("call",), _SECONDS
    ),
    Metric.CAS_CONFLICTS: MetricSpec("counter", "Compare-and-swap writes that lost.", ("kind",)),
    Metric.LEADER: MetricSpec("gauge", "1 while this process leads, 0 while it stands by.", ("name",)),
    Metric.EVENTS_PUBLISHED: MetricSpec("counter", "Events published.", ("what",)),
    Metric.EVENTS_CONSUMED: MetricSpec("counter", "Events handled, by outcome.", ("what", "outcome")),
    Metric.AUDIT_LOST: MetricSpec("counter", "Records of the audit trail that there was no room for; alarm on any."),
    Metric.NODES: MetricSpec("gauge", "Nodes by phase, of each site.", ("site", "phase")),
    Metric.NODES_SICK: MetricSpec("gauge", "Nodes with a GPU that is out of use, of each site.", ("site",)),
    Metric.SITES_CUT_OFF: MetricSpec("gauge", "1 while all of a site is silent as one, else 0.", ("site",)),
    Metric.GPU_FAULTS: MetricSpec(
        "counter",
        "Xids of the hardware that agents told of, by what the GPU needs before it is used again.",
        ("action",),
    ),
    Metric.GPUS: MetricSpec("gauge", "GPUs of nodes that take work, by model.", ("model",)),
    Metric.GPUS_ALLOCATED: MetricSpec("gauge", "GPUs held by jobs, lost ones too, by model.", ("model",)),
    Metric.JOBS: MetricSpec("gauge", "Jobs by state.", ("state",)),
    Metric.RECOVERIES: MetricSpec("counter", "Attempts started after a failure, by cause.", ("cause",)),
    Metric.RECOVERY_DURATION: MetricSpec("histogram", "Failure to running again.", (), (*_SECONDS, 60.0, 120.0, 300.0)),
    Metric.DETECTION_DURATION: MetricSpec("histogram", "Last sign of life to verdict.", ("verdict",), _SECONDS),
    Metric.CHECKPOINT_COMMITS: MetricSpec("counter", "Manifests, by outcome.", ("outcome",)),
    Metric.CLAIMS_REFUSED: MetricSpec(
        "counter", "What agents said of tasks that are not placed on their node, dropped.", ("what",)
    ),
    Metric.ROUTE_DURATION: MetricSpec("histogram", "Time that one routing decision takes.", (), _SECONDS),
    Metric.ROUTE_DECISIONS: MetricSpec("counter", "Routing decisions, by outcome.", ("outcome",)),
    Metric.ENDPOINTS_REFUSED: MetricSpec(
        "counter", "Updates of addresses that a front door refused; alarm on any.", ()
    ),
    Metric.MODELS_SHORT: MetricSpec("gauge", "Models with fewer replicas that are ready than their file asks for."),
    Metric.REPLICAS: MetricSpec("gauge", "Replicas by state.", ("state",)),
    Metric.FIRST_TOKEN: MetricSpec("histogram", "Request to first byte of the answer.", ("model",), _SECONDS),
    Metric.TASKS: MetricSpec("gauge", "Tasks on this node by phase.", ("phase",)),
    Metric.TRAINING_STEP: MetricSpec("gauge", "Newest step that a job reported.", ("training",)),
    Metric.LEDGER_RESIDUAL: MetricSpec(
        "gauge", "Micro-dollars by which bill and classes of the newest hour differ; alarm on any."
    ),
    Metric.LEDGER_WATERMARK: MetricSpec("gauge", "Unix time until which usage is in the ledger."),
    Metric.SPENDING: MetricSpec(
        "gauge", "Micro-dollars of the last 24 hours in the ledger, by class.", ("cost_class",)
    ),
    Metric.BUDGETS: MetricSpec(
        "gauge", "Budgets by what this month is expected to have cost in the end: within, over, unknown.", ("forecast",)
    ),
    Metric.TRAINING_LOSS: MetricSpec("gauge", "Newest loss that a job reported.", ("training",)),
}


class Event(StrEnum):
    """Names of log events: what happened, in the past tense; the circumstances are the event's fields."""

    SERVICE_STARTED = "service_started"
    SERVICE_STOPPING = "service_stopping"
    SERVICE_STOPPED = "service_stopped"
    LOOP_LOST = "loop_lost"
    RPC_FAILED = "rpc_failed"
    CERTIFICATE_RENEWED = "certificate_renewed"
    NODE_REVOKED = "node_revoked"
    CERTIFICATE_UNREADABLE = "certificate_unreadable"
    SETTING_IGNORED = "setting_ignored"
    LEADERSHIP_GAINED = "leadership_gained"
    LEADERSHIP_LOST = "leadership_lost"
    STORE_UNREACHABLE = "store_unreachable"
    STORE_REACHABLE = "store_reachable"
    BUS_UNREACHABLE = "bus_unreachable"
    BUS_REACHABLE = "bus_reachable"
    BUS_ERROR = "bus_error"
    AUDIT_WAITING = "audit_waiting"
    AUDIT_LOST = "audit_lost"
    PULL_INTERRUPTED = "pull_interrupted"
    PULL_RESUMED = "pull_resumed"
    PUBLISHER_WAITING = "publisher_waiting"
    PUBLISHER_RELISTED = "publisher_relisted"
    HISTORY_LOST = "history_lost"
    RECORD_UNREADABLE = "record_unreadable"
    EVENT_DELAYED = "event_delayed"
    EVENT_SKIPPED = "event_skipped"
    SITE_LINKED = "site_linked"
    SITE_CUT_OFF = "site_cut_off"
    STREAM_LINKS_WAITING = "stream_links_waiting"
    FEED_BROKEN = "feed_broken"
    HOUR_CLOSED = "hour_closed"  # in the usage ledger
    LEDGER_FAULT = "ledger_fault"  # what an hour cost does not add up
    LEDGER_TROUBLE = "ledger_trouble"
    PLAN_REFUSED = "plan_refused"  # of a model, for a job that is planned anew
    HEALTH_AWAITED = "health_awaited"
    CLOCK_AHEAD = "clock_ahead"  # of most agents' clocks
    HEALTH_KNOWN = "health_known"
    NODE_JOINED = "node_joined"
    NODE_CONNECTED = "node_connected"
    NODE_DISCONNECTED = "node_disconnected"
    NODE_CORDONED = "node_cordoned"
    NODE_DRAINED = "node_drained"
    NODE_RETIRED = "node_retired"
    NODE_SUSPECTED = "node_suspected"
    NODE_FENCED = "node_fenced"
    NODE_RECOVERED = "node_recovered"
    JOB_SUBMITTED = "job_submitted"
    JOB_PLACED = "job_placed"
    JOB_STARTED = "job_started"
    JOB_FAILED = "job_failed"
    JOB_RECOVERING = "job_recovering"
    JOB_FINISHED = "job_finished"
    TASK_STARTED = "task_started"
    TASK_ADOPTED = "task_adopted"
    TASK_EXITED = "task_exited"
    TASK_REFUSED = "task_refused"
    SESSION_OPENED = "session_opened"  # who, job, rank, node, what (a command's first word, never its arguments)
    SESSION_ENDED = "session_ended"  # the same, seconds, bytes, reason
    TASK_STUCK = "task_stuck"  # task, job, epoch, reason
    PROCESS_UNKNOWN = "process_unknown"
    STREAM_OPENED = "stream_opened"
    STREAM_BROKEN = "stream_broken"
    DEVICES_UNREADABLE = "devices_unreadable"
    GPU_UNHEALTHY = "gpu_unhealthy"
    ISOLATION_PARTIAL = "isolation_partial"  # reason
    ISOLATION_CHOSEN = "isolation_chosen"  # kind, reason, private_folders
    DISK_FULL = "disk_full"  # folder, reason
    SAVE_REFUSED = "save_refused"
    SAVE_FAILED = "save_failed"
    RANK_CALL_FAILED = "rank_call_failed"
    USAGE_DROPPED = "usage_dropped"  # folder, reason: batches of usage that found no room
    USAGE_REFUSED = "usage_refused"  # reason
    USAGE_UNREADABLE = "usage_unreadable"  # reason: what devices did is not known while it lasts
    DATASET_CACHED = "dataset_cached"  # dataset, bytes; of them pulled, from peers, and from other copies there
    DATASET_UNCACHED = "dataset_uncached"  # dataset, reason: not even a part of it could be kept
    DATASET_PEER_WRONG = "dataset_peer_wrong"  # dataset, node, reason
    CODE_CACHED = "code_cached"
    SECRETS_KEY_MISSING = "secrets_key_missing"  # the file of keys that a setting names is not there
    SECRETS_GIVEN = "secrets_given"  # to a task, by name and version
    CODE_DELETED = "code_deleted"
    CHECKPOINT_COMMITTED = "checkpoint_committed"
    CHECKPOINT_ABANDONED = "checkpoint_abandoned"
    CHECKPOINT_EXPIRED = "checkpoint_expired"
    ROUTE_FAILED = "route_failed"
    POLICY_REFUSED = "policy_refused"
    ENDPOINTS_REFUSED = "endpoints_refused"
    MODEL_ROLLOUT = "model_rollout"
    REPLICA_UP = "replica_up"
    REPLICA_DOWN = "replica_down"
