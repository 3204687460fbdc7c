"""The words by which programs tell what happened: one list for errors, one for nodes and GPUs, one for events.

Each is written here once, with its meaning, and used by name everywhere else (a test looks for stray literals);
docs/guide/reasons.md is made from here. States of resources are enums of the contract and not repeated.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class _Words(StrEnum):
    """Members are their own names; `meaning` is for people."""

    meaning: str

    def __new__(cls, name: str, meaning: str) -> Self:
        made = str.__new__(cls, name)
        made._value_, made.meaning = name, meaning
        return made


class ErrorReason(_Words):
    """`google.rpc.ErrorInfo.reason` of a refused call. Beside these: {KIND}_NOT_FOUND and {KIND}_EXISTS."""

    ADDRESS_REFUSED = "ADDRESS_REFUSED", "the address is none that requests may be sent to; an operator can allow it"
    AGENT_BUSY = "AGENT_BUSY", "the agent reads too slowly for more to be sent to it; try again"
    ALREADY_RUNNING = "ALREADY_RUNNING", "a suite runs on this state folder"
    AUDIT_FULL = "AUDIT_FULL", "the audit trail has no room, and nothing is changed without it; see to the event bus"
    BUS_REFUSED = "BUS_REFUSED", "NATS does not take what was published or asked for"
    BUS_UNAVAILABLE = "BUS_UNAVAILABLE", "NATS does not answer"
    CACHE_BEHIND = "CACHE_BEHIND", "this replica has not read the asked revision yet; try again"
    CALL_CANCELLED = "CALL_CANCELLED", "the caller or a proxy on the way gave the call up"
    CAPACITY_SHORT = (
        "CAPACITY_SHORT",
        "all registered nodes together, or the queue's limit, could never give what the job asks for",
    )
    CERTIFICATE_ENDED = "CERTIFICATE_ENDED", "the certificate has ended while its connection was open"
    CERTIFICATE_REFUSED = (
        "CERTIFICATE_REFUSED",
        "the ended certificate does not bring its node back: of another authority or key, or ended too long ago",
    )
    CHANNEL_CLOSED = "CHANNEL_CLOSED", "the client was closed"
    CHECKPOINT_UNREACHABLE = "CHECKPOINT_UNREACHABLE", "the job has checkpoints and none of them can be read from here"
    CLOSED = "CLOSED", "the subscription was closed"
    CODE_DAMAGED = "CODE_DAMAGED", "what was sent is not the code that was announced; send it again"
    CODE_MISSING = "CODE_MISSING", "the job's code is not in the store; UploadCode, or `whaleflux submit`, sends it"
    CODE_STORE_FULL = "CODE_STORE_FULL", "the store of code takes no more; delete jobs, or give it more room"
    COMMIT_UNKNOWN = "COMMIT_UNKNOWN", "the store did not answer a commit: it may have happened, read before repeating"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED", "the work did not finish in the caller's time"
    DISABLED = "DISABLED", "the caller's account is disabled; an operator enables it again"
    DRAINING = "DRAINING", "this replica stops; nothing was begun, another one takes the call"
    ENGINE_FIXED = (
        "ENGINE_FIXED",
        "a model's queue, or servers that run elsewhere, cannot be changed in place; declare another model",
    )
    DATA_QUOTA = "DATA_QUOTA", "the queue, or one above it, may not hold as much data on nodes (queue set --data-quota)"
    EPOCH_FENCED = "EPOCH_FENCED", "the attempt that asks is over; a later one runs"
    ETAG_MISMATCH = "ETAG_MISMATCH", "the resource changed since it was read; read it and try again"
    FIELD_INVALID = "FIELD_INVALID", "fields are wrong; BadRequest names each"
    FILES_GONE = "FILES_GONE", "the folder of the job is not on its node any more"
    FENCED = "FENCED", "a condition of a commit did not hold: a record changed, or leadership or an epoch moved on"
    GPUS_HELD = "GPUS_HELD", "the job still holds GPUs of a node that cannot be reached; retire the node or wait for it"
    GPU_TAKEN = "GPU_TAKEN", "another placement holds the GPU"
    GROUPS_CHANGED = "GROUPS_CHANGED", "the caller is in other groups than when the stream was opened; open it again"
    HOST_UNKNOWN = "HOST_UNKNOWN", "the name of a server cannot be resolved here"
    IDENTITY_MISSING = "IDENTITY_MISSING", "no valid certificate or token was shown"
    INTERNAL = "INTERNAL", "a fault of ours; the answer's trace id finds it in the logs"
    LAST_ADMIN = "LAST_ADMIN", "the fleet would have no admin left; make another one first"
    LOGIN_FROM_ELSEWHERE = (
        "LOGIN_FROM_ELSEWHERE",
        "the certificate came from no login of this fleet, so that there is none to renew or end",
    )
    LOGIN_NOT_OFFERED = "LOGIN_NOT_OFFERED", "the fleet, or its OpenID provider, has no such way to log in"
    LOGIN_REFUSED = "LOGIN_REFUSED", "the code, token or ID token admits nobody (any more)"
    PROVIDER_UNREACHABLE = "PROVIDER_UNREACHABLE", "the OpenID provider does not answer as one"
    USER_NAME_TAKEN = "USER_NAME_TAKEN", "the name belongs to another person than the OpenID provider vouches for"
    IN_TRANSACTION = "IN_TRANSACTION", "not possible within a transaction of the engine"
    JOB_NOT_RUNNING = "JOB_NOT_RUNNING", "no rank of the job runs now"
    JOB_ENDED = "JOB_ENDED", "the job has ended"
    JOB_NOT_ENDED = "JOB_NOT_ENDED", "the job has not ended; cancel it first"
    KMS_UNAVAILABLE = "KMS_UNAVAILABLE", "the key management service that opens secrets does not answer; try again"
    KEY_MISSING = "KEY_MISSING", "the request had no API key"
    KEY_UNKNOWN = "KEY_UNKNOWN", "the request's API key does not exist, was revoked, or has ended"
    LAST_MEMBER = "LAST_MEMBER", "a queue without members is open to all users, which has to be said"
    NODES_UNREACHABLE = "NODES_UNREACHABLE", "no agent that has these logs, ranks or files can be reached"
    LEDGER_DAMAGED = (
        "LEDGER_DAMAGED",
        "a file of the usage ledger is not what was written; the message names it and what brings it back",
    )
    LEDGER_FOLDER = (
        "LEDGER_FOLDER",
        "the usage ledger's folder is another one than its head in the store names, or empty",
    )
    NODE_NAME_TAKEN = (
        "NODE_NAME_TAKEN",
        "the node's name belongs to another machine; choose another, or replace that one",
    )
    NODE_NOT_DRAINED = "NODE_NOT_DRAINED", "work is still on the node; drain it first"
    NODE_RUNS_TWICE = (
        "NODE_RUNS_TWICE",
        "another machine with the same identity is connected: a copy of its disk, or this one before it was rebooted",
    )
    NODE_RETIRED = "NODE_RETIRED", "the node was retired and may not come back under this name"
    NOT_LEADER = "NOT_LEADER", "this replica does not lead; nothing was done, metadata names the leader"
    NOT_OWNER = "NOT_OWNER", "it belongs to somebody else, and the caller is in no group that shares it"
    NOT_OWN_NODE = "NOT_OWN_NODE", "an agent may speak for its own node only"
    NO_SUCH_PATH = "NO_SUCH_PATH", "the inference API has no such path"
    NO_AUTHORITY = "NO_AUTHORITY", "this fleet's certificates come from elsewhere; ask there"
    NO_FREE_PORT = "NO_FREE_PORT", "no port of the agent's range is free"
    NO_READY_REPLICA = "NO_READY_REPLICA", "no replica of the model can take a request now"
    OUT_OF_RANGE = "OUT_OF_RANGE", "what was asked for lies outside of what there is"
    PIN_DOES_NOT_FIT = "PIN_DOES_NOT_FIT", "a node has no room for a dataset beside what is pinned there"
    PLANNER_BUSY = "PLANNER_BUSY", "too many questions wait for the planner; try again"
    PORT_TAKEN = "PORT_TAKEN", "another process listens on the port"
    PRIORITY_CAPPED = "PRIORITY_CAPPED", "the priority is above what users may give in the queue; operators may"
    PROGRAM_MISSING = "PROGRAM_MISSING", "a program that is needed is not installed; the message names its package"
    QUEUE_NOT_IN_TOKEN = "QUEUE_NOT_IN_TOKEN", "the caller's token is for other queues"
    QUEUE_RESERVED = "QUEUE_RESERVED", "a reservation keeps GPUs for the queue"
    QUEUE_HAS_CHILDREN = "QUEUE_HAS_CHILDREN", "other queues are below the queue"
    QUEUE_NOT_EMPTY = "QUEUE_NOT_EMPTY", "the queue has unfinished jobs"
    QUEUE_PERMANENT = "QUEUE_PERMANENT", "the default queue always exists"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED", "a quota, a rate or a size was reached"
    READER_TOO_SLOW = "READER_TOO_SLOW", "logs came faster than they were read; ask again from where they stopped"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE", "the message is larger than the method takes"
    REVISION_COMPACTED = "REVISION_COMPACTED", "the asked history is gone; list again and watch from there"
    REVOKED = "REVOKED", "the caller, or what its certificate came from, is not admitted any more"
    RESERVATION_DENIED = (
        "RESERVATION_DENIED",
        "operators reserve, and those whom a queue names within what it is guaranteed",
    )
    ROLE_MISSING = "ROLE_MISSING", "the caller's role may not do this"
    RUNTIME_UNREACHABLE = "RUNTIME_UNREACHABLE", "the container engine does not answer"
    SAVES_FULL = "SAVES_FULL", "too many checkpoints wait to be reported; the control plane is away"
    SECRETS_KEY_MISSING = "SECRETS_KEY_MISSING", "inventory has no key for secrets, or not the one that wraps this one"
    SECRET_DAMAGED = "SECRET_DAMAGED", "a sealed record is not as it was stored; nothing of it is given out"
    SESSION_LOST = (
        "SESSION_LOST",
        "the connection to the rank's agent, or to the fleet, was lost; run the command again",
    )
    SESSION_ENDED = "SESSION_ENDED", "the login or token behind the certificate has ended; log in again"
    RAY_UNREACHABLE = "RAY_UNREACHABLE", "the Ray cluster does not answer, or what waits in it is not known now"
    SERVER_UNREACHABLE = "SERVER_UNREACHABLE", "no connection to the server"
    STORE_BUSY = "STORE_BUSY", "too many writes wait; try again"
    RECORD_UNREADABLE = "RECORD_UNREADABLE", "a newer version wrote the record; update the service that is to change it"
    STORE_CLOSED = "STORE_CLOSED", "the store's client was closed"
    STORE_FULL = "STORE_FULL", "etcd has reached its quota; nothing is written until space is made"
    STORE_REPLACED = "STORE_REPLACED", "the store's history is another one than before: it was restored or replaced"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE", "the store does not answer; try again"
    TOKEN_REFUSED = "TOKEN_REFUSED", "the join token is unknown, used, or has ended"
    TOKEN_UNKNOWN = "TOKEN_UNKNOWN", "no task of this agent has the token"
    TOO_MANY = "TOO_MANY", "the service has as many calls as it takes; try again"
    TOO_MANY_READERS = "TOO_MANY_READERS", "as many follow logs as the service takes"
    TOO_OFTEN = "TOO_OFTEN", "the caller asks faster than its share allows; RetryInfo says when"
    TOO_MANY_SESSIONS = "TOO_MANY_SESSIONS", "as many sessions with jobs are open as are taken; end some"
    WRONG_NODE = "WRONG_NODE", "the join token admits another node; it was not used up"
    WRONG_SITE = "WRONG_SITE", "the join token admits to another site than was expected; it was not used up"
    WRONG_STATE = "WRONG_STATE", "the resource's state does not allow this"


class NodeReason(_Words):
    """Why a node is in its phase, what of it does not work, and what an incident is about. Xids are XID_{number}."""

    AGENT_HUNG = "AGENT_HUNG", "no sign of life, though something listens where the agent did"
    AGENT_RESTARTING = "AGENT_RESTARTING", "the agent announced a restart"
    AGENT_SILENT_RANKS_ALIVE = "AGENT_SILENT_RANKS_ALIVE", "the agent is silent while its ranks make progress"
    AGENT_STOPPED = "AGENT_STOPPED", "the agent announced that its host shuts down"
    ALIVE = "ALIVE", "signs of life arrive"
    CLEARED = "CLEARED", "a condition that did not hold holds again"
    DRAIN_AND_RESET = "DRAIN_AND_RESET", "the driver asks that a GPU be emptied and reset"
    DRAIN_PEERS = "DRAIN_PEERS", "the driver asks that work which reaches a GPU from its peers ends"
    DRIVER_FAILS = "DRIVER_FAILS", "the driver answers with an error"
    FENCE_BREAKER_OPEN = (
        "FENCE_BREAKER_OPEN",
        "it would be fenced, but too many were in a short time: an operator decides",
    )
    FLEET_SILENT = "FLEET_SILENT", "nearly everybody is silent: the fault is more likely here than there"
    GPU_LOST = "GPU_LOST", "a GPU fell off the bus"
    HEARTBEAT_LOST = "HEARTBEAT_LOST", "no heartbeat arrives"
    HOST_MAINTENANCE = "HOST_MAINTENANCE", "the owner of the machine stops or restarts it soon"
    HOST_REFUSES = "HOST_REFUSES", "the host lives and nothing listens where the agent did"
    ISOLATION_IMPOSSIBLE = "ISOLATION_IMPOSSIBLE", "ranks must run as users of their own, and cannot there"
    NEVER_HEARD = "NEVER_HEARD", "registered, and no heartbeat came yet"
    NO_DRIVER = "NO_DRIVER", "there are GPUs and no driver"
    NO_GPU = "NO_GPU", "the driver lists no GPU, or none is on the bus"
    NO_MIG_INSTANCE = "NO_MIG_INSTANCE", "MIG is on and a GPU has no instance, so that no program can use it"
    NO_UUID = "NO_UUID", "the driver gives a GPU no UUID, so that no program can be bound to it"
    RESET_GPU = "RESET_GPU", "the driver asks for a reset of a GPU before it is used again"
    RESET_REQUIRED = "RESET_REQUIRED", "the driver asks for a reset of a GPU"
    RESTART_HOST = "RESTART_HOST", "the driver asks for a restart of the host before a GPU is used again"
    RETIRED = "RETIRED", "an operator retired it"
    ROW_REMAP_FAILED = "ROW_REMAP_FAILED", "broken rows of a GPU's memory could not be replaced"
    SILENT_TOO_LONG = "SILENT_TOO_LONG", "no sign of life from agent or ranks for longer than is waited"
    SITE_PARTITIONED = "SITE_PARTITIONED", "its whole site is silent: cut off, not dead"
    SPOT_AT_RISK = "SPOT_AT_RISK", "the provider advises to leave the spot machine before it is taken away"
    SPOT_TAKEN = "SPOT_TAKEN", "the provider takes the spot machine away"
    STREAM_LOST = "STREAM_LOST", "the agent's stream broke and did not come back"
    UNHEALTHY = "UNHEALTHY", "the agent says that a GPU does not work, without a cause"
    UNREADABLE = "UNREADABLE", "a GPU does not answer its driver"


class ConditionType(_Words):
    """What may or may not hold on a node."""

    DRIVER_WORKS = "DriverWorks", "the driver answers and lists GPUs"
    GPU_HEALTHY = "GpuHealthy", "every GPU answers and may be used"
    ISOLATION_WORKS = "IsolationWorks", "work runs apart from its agent, where the agent's settings require it"
    MACHINE_STAYS = (
        "MachineStays",
        "nobody has announced to take the machine away; while it does not hold, work leaves the node",
    )


class What(_Words):
    """What an event says happened, where it is no new state: records that came and went, and observations of agents."""

    BUDGET_REACHED = "BUDGET_REACHED", "a month has cost a share of its budget at which somebody wants to know"
    CHANGED = "CHANGED", "the record's content changed"
    CLOSED = "CLOSED", "an incident is over"
    COPIES = "COPIES", "where copies of a dataset are changed"
    CREATED = "CREATED", "the record was made"
    DELETED = "DELETED", "the record is gone"
    FENCED = "FENCED", "an incident led to the fence of a node"
    HELD = "HELD", "somebody holds the job: it is not placed until it is released"
    LOSS_NOT_FINITE = "LOSS_NOT_FINITE", "a training's loss is infinite or not a number"
    MOVE_ORDERED = "MOVE_ORDERED", "the job is to go on elsewhere, for a job that waits or to run closer or cheaper"
    MOVE_UNDONE = "MOVE_UNDONE", "a move came to nothing: the job runs where it was, or at a third place"
    MOVED = "MOVED", "the job runs again, where it was moved to"
    OPENED = "OPENED", "an incident began"
    PEER_CONNECTED = "PEER_CONNECTED", "another node reaches the agent asked about"
    PEER_REFUSED = "PEER_REFUSED", "another node reaches its host, and nothing listens there"
    PEER_SILENT = "PEER_SILENT", "another node does not reach its host either"
    PRIORITY_SET = "PRIORITY_SET", "somebody gave the job another priority"
    REBALANCE_PROPOSED = (
        "REBALANCE_PROPOSED",
        "moves of running jobs are worth it, for this one or of it; an operator can have them carried out",
    )
    ROLLED_BACK = "ROLLED_BACK", "a model's changed engine was given up: the one of before serves again"
    ROLLOUT = "ROLLOUT", "a model's changed engine takes the place of the one that serves: a step of it"
    SHORT = "SHORT", "a reservation lacks GPUs: nodes were lost, and no others are left"
    WHOLE_AGAIN = "WHOLE_AGAIN", "a reservation that lacked GPUs has all of them again"
    PROMISED = (
        "PROMISED",
        "a job that waits has GPUs of its own and a time by which it starts, or an earlier one than before",
    )
    PROMISE_LOST = (
        "PROMISE_LOST",
        "a promised start is off: its place was lost, or taken by who goes before it; another is looked for",
    )
    RENT_PROPOSED = (
        "RENT_PROPOSED",
        "renting machines for this job is worth it; an operator can rent, or let the fleet do so",
    )
    RESIZED = "RESIZED", "an elastic job runs again, with more or fewer GPUs than before"
    RELEASED = "RELEASED", "a job that was held may be placed again"
    SAVE_FAILED = "SAVE_FAILED", "a checkpoint could not be saved; training goes on without it"
    SESSION_OPENED = "SESSION_OPENED", "somebody works inside of the job: a command, a port, or its files"
    TASK_EXIT = "TASK_EXIT", "a task's processes ended"
    TASK_STUCK = "TASK_STUCK", "something of a task cannot be ended on its node; its GPUs stay taken"
    RANK_REFUSED = "RANK_REFUSED", "a process of a job asked its node's agent for what is not its own"
    UNKNOWN_PROCESS = "UNKNOWN_PROCESS", "a process carries a token of no task of the agent"
    USED = "USED", "a node joined by the token"
    XID = "XID", "the driver reports an Xid"


LISTS: tuple[type[_Words], ...] = (ErrorReason, NodeReason, ConditionType, What)


def page() -> str:
    """docs/guide/reasons.md."""
    lines = ["# Reasons", "", "<!-- Made from libs/whaleflux/reasons.py by `make generate`. -->", ""]
    lines += ["The words by which errors, nodes and events say what happened; programs match on these, never on texts."]
    for words in LISTS:
        lines += ["", f"## {words.__name__}", "", (words.__doc__ or "").partition("\n")[0], "", "| | |", "|---|---|"]
        lines += [f"| `{word.value}` | {word.meaning} |" for word in words]
    return "\n".join(lines) + "\n"
