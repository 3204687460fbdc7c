"""Where each owner keeps what: the one table of key prefixes (architecture, section 2). One writer per prefix."""

ROOT = "/whaleflux/v1/"

# inventory
SITES = ROOT + "sites/"  # {site}
NODES = ROOT + "nodes/"  # {site}/{node}
DATASETS = ROOT + "datasets/"  # {dataset}
JOIN_TOKENS = ROOT + "join_tokens/"  # {token}

# scheduler
QUEUES = ROOT + "queues/"  # {queue}
JOBS = ROOT + "jobs/"  # {queue}/{job}
JOB_FENCES = ROOT + "fences/jobs/"  # {queue}/{job}: the epoch in decimal; others compare it, never write it

# health_monitor
NODE_HEALTH = ROOT + "node_health/"  # {site}/{node}
INCIDENTS = ROOT + "incidents/"  # {incident}

# checkpoint
CHECKPOINTS = ROOT + "checkpoints/"  # {queue}/{job}/{checkpoint}
CHECKPOINT_PIECES = ROOT + "checkpoint_pieces/"  # {queue}/{job}/{checkpoint}/{lowest rank of a report}

# inference_router
MODELS = ROOT + "models/"  # {model}
REPLICAS = ROOT + "replicas/"  # {model}/{replica}
API_KEYS = ROOT + "api_keys/"  # {key}

# shared machinery
LEADERS = ROOT + "leaders/"  # {service}
PUBLISHERS = ROOT + "publishers/"  # {service}: last published revision


def of_name(prefix: str, name: str) -> str:
    """Key of a resource name: `of_name(JOBS, "queues/q/jobs/j")` is "/whaleflux/v1/jobs/q/j"."""
    return prefix + "/".join(name.split("/")[1::2])
