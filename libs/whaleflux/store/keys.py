"""Where each owner keeps what: the one table of key prefixes (architecture, section 2). One writer per prefix."""

ROOT = "/whaleflux/v1/"

# inventory
SITES = ROOT + "sites/"  # {site}
NODES = ROOT + "nodes/"  # {site}/{node}
DATASETS = ROOT + "datasets/"  # {dataset}
DATASET_MANIFESTS = ROOT + "dataset_manifests/"  # {dataset}: packed
DATASET_PINS_EPOCH = ROOT + "dataset_pins_epoch"  # written with each new pin, so that two never count the same room
NODE_IDENTITIES = ROOT + "node_identities/"  # {site}/{node}: which machine has the name
JOIN_TOKENS = ROOT + "join_tokens/"  # {token}
SECRETS = ROOT + "secrets/"  # {secret}: what people may see, and wrapped keys
SECRET_VALUES = ROOT + "secret_values/"  # {secret}/{version}: sealed
OFFERS = ROOT + "offers/"  # {offer}
LEASES = ROOT + "leases/"  # {lease}: machines that are rented
LEASES_OVER = ROOT + "leases_over/"  # {lease}: those that were, apart: looking at live ones costs the same for ever
ALL_LEASES = ROOT + "leases"  # both
LEASE_REQUESTS = ROOT + "requests/leases/"  # {digest}: name of the lease that a request with an id made
RENTAL_FLEET = ROOT + "rental_fleet"  # by what tag providers know this fleet's machines
TRUST = ROOT + "trust/"  # who is known, who is not admitted any more: read by every service (`trust.view`)
PRINCIPALS = TRUST + "principals/"  # {user}
GROUPS = TRUST + "groups/"  # {group}
SESSIONS = TRUST + "sessions/"  # {session}
REVOKED = TRUST + "revoked/"  # {role}/{name}, or {session}
LOGIN_CODES = ROOT + "credentials/codes/"  # {session}: one-time codes, hashed
ID_TOKENS = ROOT + "credentials/id_tokens/"  # {digest}: those that were used
TOKENS = ROOT + "credentials/tokens/"  # {session}: hashed
OIDC_SUBJECTS = ROOT + "oidc_subjects/"  # {digest of issuer and sub}: which user it is

# scheduler
QUEUES = ROOT + "queues/"  # {queue}
JOBS = ROOT + "jobs/"  # {queue}/{job}
RESERVATIONS = ROOT + "reservations/"  # {reservation}
RAY_CLUSTERS = ROOT + "ray_clusters/"  # {ray_cluster}
JOB_FENCES = ROOT + "fences/jobs/"  # {queue}/{job}: the epoch in decimal; others compare it, never write it
JOB_PLACEMENTS = (
    ROOT + "fences/placements/"
)  # {queue}/{job}: the nodes of the newest attempt; others read it (`store.placements`)
JOB_DECISIONS = ROOT + "decisions/jobs/"  # {queue}/{job}: what was decided about it, the newest
IDLE_TIMES = ROOT + "rented_idle_times"  # how long rented machines were not needed
JOB_REQUESTS = ROOT + "requests/jobs/"  # {digest}: name of the unnamed job that a request with an id made

# health_monitor
NODE_HEALTH = ROOT + "node_health/"  # {site}/{node}
INCIDENTS = ROOT + "incidents/"  # {incident}

# checkpoint
CHECKPOINTS = ROOT + "checkpoints/"  # {queue}/{job}/{checkpoint}
CHECKPOINT_PIECES = ROOT + "checkpoint_pieces/"  # {queue}/{job}/{checkpoint}/{ranks of a report}
CHECKPOINTS_DELETABLE = (
    ROOT + "checkpoints_deletable/"
)  # {queue}/{job}/{checkpoint}: its bytes may go; the value is its name

# inference_router
MODELS = ROOT + "models/"  # {model}
REPLICAS = ROOT + "replicas/"  # {model}/{replica}
API_KEYS = ROOT + "api_keys/"  # {key}
ROUTER_VIEWS = (
    ROOT + "router_views/"
)  # {router}: what each router knows of rollouts and of replicas that leave; lives with its lease

# console
PRICES = ROOT + "prices/"  # {price}: what GPUs cost, where nodes do not say it
ADJUSTMENTS = ROOT + "adjustments/"  # {adjustment}: what invoices have more or less
# {budget}: what a month may cost, which thresholds were told, and whether it stops new work, which schedulers read
BUDGETS = ROOT + "budgets/"
BUDGET_LOOK = ROOT + "budget_look"  # when budgets that stop work were last held against what is spent
RECOMMENDATIONS = ROOT + "recommendations/"  # {recommendation}: those that were accepted or dismissed
LEDGER = ROOT + "ledger/"
LEDGER_PRICES = LEDGER + "prices"  # those that closed hours are priced by
LEDGER_HEAD = LEDGER + "head"  # which manifest of the usage ledger's files is the newest

# shared machinery
LEADERS = ROOT + "leaders/"  # {service}
AUDIT_HEADS = ROOT + "audit/heads/"  # {role}/{replica}/{start}: each process its own; inventory forgets old ones
PUBLISHERS = ROOT + "publishers/"  # {service}: last published revision


def of_name(prefix: str, name: str) -> str:
    """Key of a resource name: `of_name(JOBS, "queues/q/jobs/j")` is "/whaleflux/v1/jobs/q/j"."""
    return prefix + "/".join(name.split("/")[1::2])


_COLLECTIONS = {
    SITES: ("sites",),
    NODES: ("sites", "nodes"),
    DATASETS: ("datasets",),
    JOIN_TOKENS: ("joinTokens",),
    OFFERS: ("offers",),
    LEASES: ("leases",),
    LEASES_OVER: ("leases",),
    SECRETS: ("secrets",),
    PRINCIPALS: ("users",),
    GROUPS: ("groups",),
    TOKENS: ("tokens",),
    QUEUES: ("queues",),
    JOBS: ("queues", "jobs"),
    RESERVATIONS: ("reservations",),
    RAY_CLUSTERS: ("rayClusters",),
    JOB_PLACEMENTS: ("queues", "jobs"),
    JOB_DECISIONS: ("queues", "jobs"),
    NODE_HEALTH: ("sites", "nodes"),
    INCIDENTS: ("incidents",),
    CHECKPOINTS: ("queues", "jobs", "checkpoints"),
    CHECKPOINTS_DELETABLE: ("queues", "jobs", "checkpoints"),
    MODELS: ("models",),
    REPLICAS: ("models", "replicas"),
    API_KEYS: ("apiKeys",),
    PRICES: ("prices",),
    ADJUSTMENTS: ("adjustments",),
    BUDGETS: ("budgets",),
    RECOMMENDATIONS: ("recommendations",),
}


def name_of(key: str) -> str:
    """The resource name of a key: `name_of(of_name(prefix, name))` is the name. Other keys stay as they are."""
    for prefix, collections in _COLLECTIONS.items():
        ids = key.removeprefix(prefix).split("/") if key.startswith(prefix) else []
        if len(ids) == len(collections):
            return "/".join(f"{collection}/{item}" for collection, item in zip(collections, ids, strict=True))
    return key
