"""Eve's program as a rank, at its agent, at its node, and at whatever listens there: a real process below a real, isolating agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.authz.fleet import MINE, OPEN, PRIVATE
from tests.robustness.hostile.attempts import DOOR, HANDSHAKE, KERNEL, NOTHING, TRAIL, Attempt, Outcome, Reply
from tests.robustness.hostile.place import ISOLATED, PYTHON, Place
from tests.support.suite import until
from whaleflux import checkpoint_storage, names
from whaleflux.v1 import agent_pb2, checkpoint_pb2, inventory_pb2, scheduler_pb2
from whaleflux_agent.runtime import procfs
from whaleflux_agent.secret_files import choose_root

SUPPORT = Path(__file__).parents[2] / "support" / "hostile_rank.py"
WIRES = Path(__file__).with_name("rank_script.py")
VICTIM, PEER, HOSTILE = names.job("anns", "victim"), names.job("open", "peer"), names.job("open", "hostile")
NOBODY, ITSELF = "anonymous/-", f"rank/{HOSTILE}"
_STOPPED = frozenset({"stopped"})

# Who notices each: what is not here stands in hostile_rank.py, and is between the rank and the kernel.
SEEN: dict[str, tuple[str, ...]] = {
    "asks_the_agent_with_a_guessed_token": (TRAIL, "rank/-", "rank socket report_progress", "PERMISSION_DENIED"),
    "asks_the_agent_without_a_token": (TRAIL, "rank/-", "rank socket report_progress", "PERMISSION_DENIED"),
    "calls_anothers_checkpoint_damaged": (TRAIL, ITSELF, "rank socket get_restore", "PERMISSION_DENIED"),
    "finishes_anothers_checkpoint": (TRAIL, ITSELF, "rank socket finish_save", "PERMISSION_DENIED"),
    "calls_anothers_checkpoint_intact": (TRAIL, ITSELF, "rank socket confirm_intact", "PERMISSION_DENIED"),
    "gives_up_anothers_checkpoint": (TRAIL, ITSELF, "rank socket fail_save", "PERMISSION_DENIED"),
    "asks_a_model_without_a_key": (TRAIL, NOBODY, "POST /v1/chat/completions", "UNAUTHENTICATED"),
    "asks_the_front_door_without_a_certificate": (
        TRAIL, NOBODY, "/whaleflux.v1.SchedulerService/GetJob", "UNAUTHENTICATED",
    ),
    "asks_the_front_door_as_an_admin_by_a_header": (
        TRAIL, NOBODY, "/whaleflux.v1.IdentityService/ListUsers", "UNAUTHENTICATED",
    ),
    "opens_secrets_as_its_agent_by_a_header": (
        TRAIL, NOBODY, "/whaleflux.v1.TaskService/OpenTaskSecrets", "UNAUTHENTICATED",
    ),
    "stops_the_front_door": (DOOR,),
    "reads_the_front_doors_configuration": (DOOR,),
    "drains_the_front_door": (DOOR,),
    **dict.fromkeys(
        ("reads_the_store", "is_a_member_of_the_store", "reads_the_figures_of_a_service", "asks_the_policy",
         "asks_a_service_behind_the_door", "asks_its_agents_own_port", "subscribes_to_the_bus"),
        (HANDSHAKE,),
    ),
    "finds_credentials_in_its_environment": (NOTHING,),
    "leaves_a_daemon": (NOTHING,),
}  # fmt: skip
_NO_ATTEMPT = "waits_until_told"  # goes first, so that all five begin together


async def attempts(place: Place) -> list[Attempt]:
    assert place.isolated is not None
    state = place.isolated.folder(ISOLATED.name)
    await _victims(place)
    script = script_text()
    spec = scheduler_pb2.JobSpec(command=[PYTHON, "-c", script], gpus=1)
    spec.environment["TARGETS"] = json.dumps(await _targets(place, state))
    await place.submit("stranger", OPEN, "hostile", spec)
    await place.runs(HOSTILE)
    work = _work(state, HOSTILE)
    found: dict[str, dict[str, str]] = {}

    async def all_of_them() -> None:
        if not found:
            (work / "go").touch()
            await until((work / "attempts.json").exists, "the rank has tried all", 60)
            found.update(json.loads((work / "attempts.json").read_text()))

    return [_attempt(name, all_of_them, found) for name in _names(script) if name != _NO_ATTEMPT]


def script_text() -> str:
    """Both parts in one: a rank gets one text, and may read none of our files."""
    wires = re.sub(r"^from tests\..*$", "", WIRES.read_text(), flags=re.MULTILINE)
    base, last = SUPPORT.read_text().rsplit("\n\nmain()\n", 1)
    first = base.index("def reads_the_key_by_path")
    return f"{base[:first]}{wires[wires.index('def waits_until_told') :]}\n\n{base[first:]}\n\n{_without_first(wires)}\n\nmain()\n{last}"


def _without_first(wires: str) -> str:
    return wires[: wires.index("def waits_until_told")]


def _names(script: str) -> list[str]:
    helpers = {"checked", "read", "connected", "wrote", "denied", "litters", "leaves_a_daemon", "main"}
    return [name for name in re.findall(r"^def ([a-z]\w*)\(", script, re.MULTILINE) if name not in helpers]


def _attempt(name: str, all_of_them: Callable[[], Awaitable[None]], found: dict[str, dict[str, str]]) -> Attempt:
    async def do() -> Reply:
        await all_of_them()
        told = found[name]
        return Reply("gained", told["gained"]) if "gained" in told else Reply("stopped", told["stopped"])

    seen, who, what, result = (*SEEN.get(name, (KERNEL,)), "", "", "")[:4]
    return Attempt(name.replace("_", " "), do, _STOPPED, seen, who, what, result)


async def outlive(place: Place) -> Outcome:
    """The last attempt: its job ends, and what it left (a daemon in a session of its own, without environment) does not."""
    assert place.isolated is not None
    state = place.isolated.folder(ISOLATED.name)
    gid = _meta(state, HOSTILE)["gid"]
    (_work(state, HOSTILE) / "stop").touch()

    async def ended() -> bool:
        found = await place.world.admin.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=HOSTILE))
        return found.state == scheduler_pb2.JOB_STATE_SUCCEEDED

    await until(ended, "the hostile rank has ended", 20)
    with contextlib.suppress(AssertionError):
        await until(lambda: not _of_group(gid), "nothing of it is left", 15)
    left = _of_group(gid)
    gained = f"still run: {left}" if left else ""
    tried = _attempt("leaves_a_daemon", asyncio.Event().wait, {})
    return Outcome(tried, Reply("gained" if left else "stopped"), gained)


def _of_group(gid: int) -> set[int]:
    """Processes of an attempt, by the group that is its alone."""
    found = set()
    for pid in procfs.snapshot():
        with contextlib.suppress(FileNotFoundError):
            found |= {pid} if os.stat(f"/proc/{pid}").st_gid == gid else set()
    return found


async def _victims(place: Place) -> None:
    """A job of Ann's in her own queue, with a secret, and one in the queue where Eve's runs too."""
    saves = "mkdir -p $WHALEFLUX_CHECKPOINT_LOCATION/step-1"
    command = ["sh", "-c", f"echo secret; echo private > private; {saves}; sleep 600"]
    victim = scheduler_pb2.JobSpec(command=command, gpus=1, environment={"TOKEN": PRIVATE})
    victim.secrets.add(secret="secrets/anns-secret", variable="KEY", file="key.pem")
    await place.submit("owner", MINE, "victim", victim)
    await place.submit("owner", OPEN, "peer", scheduler_pb2.JobSpec(command=command, gpus=1))
    await asyncio.gather(place.runs(VICTIM), place.runs(PEER))


def _root(place: Place) -> Path:
    assert place.isolated is not None
    return place.isolated.state / "checkpoints"


async def _targets(place: Place, state: Path) -> dict[str, Any]:
    assert place.isolated is not None
    agent = place.isolated.agents[ISOLATED.name].pid
    meta, folder = _meta(state, VICTIM), _folder(state, VICTIM)
    secrets = choose_root(None, state) / folder.name
    sockets = [path for path in (state / "ranks").glob("*/rank.sock") if path.stat().st_gid == meta["gid"]]
    return {
        "agent": agent,
        "agent_port": await _agent_port(place),
        "state": str(state),
        "key": str(state / "identity" / "agent.key"),
        "folder": str(_folder(state, HOSTILE)),
        "victim": _pid(state, VICTIM),
        "victim_uid": meta["uid"],
        "victim_folder": str(folder),
        "victim_work": str(_work(state, VICTIM)),
        "victim_tmp": meta["tmp"],
        "victim_socket": str(*sockets),
        "victim_secrets": [str(path) for path in secrets.glob("*/*")],
        "victim_checkpoints": await _checkpoints(place),
        "peer": _pid(state, PEER),
        "peer_folder": str(_folder(state, PEER)),
        "peer_work": str(_work(state, PEER)),
        "processes": 64,
        "litter": [f"/tmp/wf-hostile-litter-{os.getpid()}"],
        "key_of_memory": 0x77670000 + os.getpid() % 0xFFFF,
        "ports": place.world.suite.ports,
        "frames": _frames(),
    }


def _frames() -> dict[str, str]:
    """Calls to the agent about a checkpoint of Ann's; the rank puts the token before them."""
    theirs = names.checkpoint(names.job("anns", "train"), 1, 1, 1)
    piece = checkpoint_pb2.Piece(path="x", size_bytes=1, checksum="xxh3-128:0")
    refused = [agent_pb2.RefusedCheckpoint(checkpoint=theirs, message="damaged", read=piece)]
    calls = {
        "progress": agent_pb2.RankRequest(report_progress=agent_pb2.ReportProgressRequest(rank=0, step=1)),
        "restore": agent_pb2.RankRequest(get_restore=agent_pb2.GetRestoreRequest(refused=refused)),
        "finish": agent_pb2.RankRequest(finish_save=agent_pb2.FinishSaveRequest(checkpoint=theirs, pieces=[piece])),
        "intact": agent_pb2.RankRequest(confirm_intact=agent_pb2.ConfirmIntactRequest(checkpoint=theirs)),
        "fail": agent_pb2.RankRequest(fail_save=agent_pb2.FailSaveRequest(checkpoint=theirs, step=1)),
    }
    return {name: call.SerializeToString().hex() for name, call in calls.items()}


async def _checkpoints(place: Place) -> str:
    """Where the victim's lie."""
    uid = (await place.world.admin.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=VICTIM))).uid
    folder = Path(checkpoint_storage.job_folder(str(_root(place)), VICTIM, uid))
    await until((folder / "step-1").exists, "the victim has saved", 20)
    return str(folder)


async def _agent_port(place: Place) -> int:
    """Where neighbours look at it."""
    node = await place.world.admin.inventory.GetNode(inventory_pb2.GetNodeRequest(name=ISOLATED.name))
    port = int(node.facts.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 5):
        return port


def _folder(state: Path, job: str) -> Path:
    return state / "tasks" / f"{names.top(job)}.{names.last(job)}.1.0"


def _meta(state: Path, job: str) -> dict[str, Any]:
    return dict(json.loads((_folder(state, job) / "meta.json").read_text()))


def _pid(state: Path, job: str) -> int:
    return int(json.loads((_folder(state, job) / "started.json").read_text())["ranks"][0]["pid"])


def _work(state: Path, job: str) -> Path:
    return state / "work" / quote(job, safe="")
