"""What the docs of dstack and SkyPilot ask for in each task of `benchmarks/first_day.py`: commands and files, and the page that says so.

Counted is what a person types and writes for the task alone: not installing, not setting up clouds or clusters, not cleaning up afterwards, and
not the program itself (train.py), which is the same for all. A loop in a shell counts as one command. Where pages show several ways, the
shortest is taken. `None`: their docs name no way. Read on 2026-11-30.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Way:
    """`files` are those that the tool needs; `page` says it."""

    commands: tuple[str, ...]
    files: tuple[str, ...]
    page: str
    note: str = ""


DSTACK, SKYPILOT = "dstack", "SkyPilot"
_TASKS = "https://dstack.ai/docs/concepts/tasks"
_TROUBLE = "https://dstack.ai/docs/guides/troubleshooting"
_JOBS = "https://docs.skypilot.co/en/latest/examples/managed-jobs.html"
_DEV = "https://docs.skypilot.co/en/latest/examples/interactive-development.html"

PEERS: dict[str, dict[str, Way | None]] = {
    "a DDP script from a folder": {
        DSTACK: Way(("dstack apply -f .dstack.yml",), (".dstack.yml",), _TASKS,
                    "torchrun with its options is written into the file; `files` or `repos` name the folder"),
        SKYPILOT: Way(("sky launch -c train train.yaml",), ("train.yaml",),
                      "https://docs.skypilot.co/en/latest/running-jobs/distributed-jobs.html",
                      "torchrun with its options is written into the file; `workdir` names the folder"),
    },
    "a crash at start: why": {
        DSTACK: Way(("dstack apply -f .dstack.yml",), (".dstack.yml",), _TROUBLE,
                    "output is streamed; `dstack ps -v` has the reason, `dstack logs -d` more"),
        SKYPILOT: Way(("sky jobs launch -n train train.yaml",), ("train.yaml",), _JOBS, "output is streamed"),
    },
    "a hang: that, and where": {
        DSTACK: None,
        SKYPILOT: None,
    },
    "a sweep of ten": {
        DSTACK: Way(("for LR in ...; do dstack apply -f .dstack.yml -e LR=$LR -y -d; done", "dstack ps -a"),
                    (".dstack.yml",), "https://dstack.ai/docs/guides/protips",
                    "no page on sweeps; the loop is made of documented options"),
        SKYPILOT: Way(("for ...; do sky jobs launch -n job-$i -y -d train.yaml --env LR=$LR; done", "sky jobs queue"),
                      ("train.yaml",), "https://docs.skypilot.co/en/latest/running-jobs/many-jobs.html",
                      "the page keeps the values in ten files; --env needs none"),
    },
    "a notebook": {
        DSTACK: Way(("dstack apply -f .dstack.yml",), (".dstack.yml",), "https://dstack.ai/docs/guides/protips",
                    "`ports` of the file are forwarded by the same command"),
        SKYPILOT: Way(("sky launch -c jupyter jupyter.yaml", "ssh -L 8888:localhost:8888 jupyter"), ("jupyter.yaml",),
                      _DEV),
    },
    "debugging inside of a rank": {
        DSTACK: Way(("dstack attach train", "ssh train"), (), "https://dstack.ai/docs/reference/cli/dstack/attach",
                    "one command while `dstack apply` is still attached"),
        SKYPILOT: Way(("ssh train",), (), _DEV, "clusters; managed jobs cannot be logged in to"),
    },
    "again with another value": {
        DSTACK: Way(("dstack apply -f .dstack.yml -e LR=0.01 -n train-2",), (), "https://dstack.ai/docs/guides/protips"),
        SKYPILOT: Way(("sky launch -c train train.yaml --env LR=0.01",), (),
                      "https://docs.skypilot.co/en/latest/running-jobs/many-jobs.html"),
    },
    "a queue for two teams": {
        DSTACK: None,
        SKYPILOT: Way(
            ("kubectl create namespace team1", "kubectl create namespace team2",
             "kubectl apply -f kueue-resource-flavor.yaml", "kubectl apply -f kueue-two-cluster-queues.yaml",
             "kubectl config set-context --current --namespace=team1", "sky launch team1.yaml",
             "kubectl config set-context --current --namespace=team2", "sky launch team2.yaml"),
            ("kueue-resource-flavor.yaml", "kueue-two-cluster-queues.yaml", "team1.yaml", "team2.yaml"),
            "https://docs.skypilot.co/en/latest/reference/kubernetes/examples/kueue-example.html",
            "Kueue does it; its installation and the optional admission check are not counted"),
    },
    "serve and call": {
        DSTACK: Way(("dstack apply -f .dstack.yml", "curl .../v1/chat/completions"), (".dstack.yml",),
                    "https://dstack.ai/docs/concepts/services"),
        SKYPILOT: Way(("sky serve up service.yaml", "sky serve status", "curl -L .../v1/chat/completions"),
                      ("service.yaml",), "https://docs.skypilot.co/en/latest/serving/sky-serve.html",
                      "status tells when a replica is READY"),
    },
    "yesterday's bill of a job": {
        DSTACK: None,
        SKYPILOT: Way(("sky cost-report",), (), "https://docs.skypilot.co/en/latest/reference/cli.html",
                      "an estimate for each cluster, not for each job of it"),
    },
}  # fmt: skip
NOTES: dict[tuple[str, str], str] = {
    ("a hang: that, and where", DSTACK): f"`dstack metrics` shows GPUs that idle, and `utilization_policy` ends such a run ({_TASKS}); nothing says where",
    ("a hang: that, and where", SKYPILOT): f"output and ssh ({_DEV}); nothing says where",
    ("a queue for two teams", DSTACK): f"runs have a `priority` ({_TASKS}) and projects separate teams; no shares or limits of one fleet are described",
    ("yesterday's bill of a job", DSTACK): "prices per hour in `dstack ps`, duration and price as metrics for Prometheus (https://dstack.ai/docs/guides/metrics)",
}  # fmt: skip
