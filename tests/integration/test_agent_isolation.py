"""Work is not control: what ranks, and commands beside them, try to get at on their node, and do not."""

import asyncio
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.attach_world import attach_world
from tests.support.fake_control_plane import JOB, ControlPlane, admit, agent, desired, flags, until
from whaleflux.embedded.processes import forget_secrets
from whaleflux.errors import StatusError
from whaleflux.sdk.sessions import SessionOver
from whaleflux.v1 import inventory_pb2
from whaleflux_agent.core.task_users import DEFAULT_IDS, uid_of
from whaleflux_agent.runtime import procfs
from whaleflux_agent.secret_files import choose_root
from whaleflux_agent.state import TaskMeta
from whaleflux_agent.task_folders import TaskFolders

HOSTILE_RANK = (Path(__file__).parents[1] / "support" / "hostile_rank.py").read_text()
PYTHON = "/usr/bin/python3"
HOSTILE, VICTIM = "queues/default/jobs/hostile", "queues/other/jobs/victim"
MEMORY_KEY = 0x77660000 + os.getpid() % 0xFFFF

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run work as somebody else"),
    pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason=f"{PYTHON} is what users without rights can run"),
]


@pytest.fixture
def place():
    """A folder that other users can pass through, as an agent's is: pytest's own is closed to them."""
    folder = Path(tempfile.mkdtemp(prefix="whaleflux-test-", dir="/var/tmp"))
    folder.chmod(0o711)
    yield folder
    for meta in folder.glob("state/tasks/*/meta.json"):
        procfs.signal_all(procfs.find(procfs.TASK_TOKEN, json.loads(meta.read_text())["token"]), procfs.SIGKILL)
    forget_secrets(folder)
    shutil.rmtree(folder, ignore_errors=True)  # an agent that was cancelled may still write


def folder_of(world, job):
    return world.state / "tasks" / f"{job.rpartition('/')[2]}-1-0"


def meta_of(world, job):
    return json.loads((folder_of(world, job) / "meta.json").read_text())


def rank_of(world, job):
    return json.loads((folder_of(world, job) / "started.json").read_text())["ranks"][0]["pid"]


def work_of(world, job):
    return world.state / "work" / quote(job, safe="")


async def run(world, job, command, gpu, environment=(), secret=""):
    def edit(wanted):
        if secret:
            wanted.spec.secrets.add(secret=secret, variable="KEY", file="key.pem")
        for name, value in dict(environment).items():
            wanted.spec.environment[name] = value

    wanted = desired(command, job=job, gpus=(gpu,), edit=edit)
    world.tasks.want(wanted)
    await until(
        lambda: (
            "RUNNING" in world.tasks.phases(wanted.task.id) or world.tasks.phases(wanted.task.id)[-1:] == ["REFUSED"]
        )
    )
    assert "RUNNING" in world.tasks.phases(wanted.task.id), world.tasks.last(wanted.task.id).message


def targets(world, litter):
    victim = meta_of(world, VICTIM)
    sockets = {path for path in (world.state / "ranks").glob("*/rank.sock") if path.stat().st_gid == victim["gid"]}
    return {
        "agent": os.getpid(),
        "state": str(world.state),
        "key": str(world.state / "identity" / "agent.key"),
        "folder": str(folder_of(world, HOSTILE)),
        "victim": rank_of(world, VICTIM),
        "victim_uid": victim["uid"],
        "victim_folder": str(folder_of(world, VICTIM)),
        "victim_work": str(work_of(world, VICTIM)),
        "victim_tmp": victim["tmp"],
        "victim_socket": str(*sockets),
        "victim_secrets": [str(path) for path in secrets_of(world, VICTIM).glob("*/*")],
        "peer": rank_of(world, JOB),
        "peer_folder": str(folder_of(world, JOB)),
        "peer_work": str(work_of(world, JOB)),
        "processes": 64,
        "litter": litter,
        "key_of_memory": MEMORY_KEY,
    }


def secrets_of(world, job):
    root = choose_root(None, world.state)
    return root / folder_of(world, job).name


def in_memory():
    with open("/proc/sysvipc/shm") as file:
        return {int(line.split()[0]) for line in file.readlines()[1:]}


def of_group(gid):
    found = set()
    for pid in procfs.snapshot():
        try:
            found |= {pid} if os.stat(f"/proc/{pid}").st_gid == gid else set()
        except FileNotFoundError:
            pass
    return found


# What cannot be had without namespaces: the kernel shows everybody what runs, and with which arguments.
NEEDS_VIEW = {"reads_the_command_of_another_queue", "sees_others_in_the_list_of_processes"}


@pytest.mark.parametrize("flag", ["--private-folders", "--no-private-folders"])
async def test_a_hostile_rank_gains_nothing(place, flag):
    assert (place / "x").parent.stat().st_mode & stat.S_IXOTH
    key = place / "state" / "identity" / "agent.key"
    plant = f"echo mine > kept; ln -s {key} pointed; ln {key} linked; ln {place}/state/desired.pb wanted; sleep 600"
    litter = [f"{shared}/whaleflux-litter-{os.getpid()}" for shared in ("/dev/shm", "/tmp", "/var/tmp")]
    flags = ("--task-isolation", "required", "--task-processes", "64", flag)
    async with attach_world(place, ["sh", "-c", plant], 1, *flags) as world:
        world.tasks.secrets = {"secrets/key": b"of the victim"}
        await run(
            world,
            VICTIM,
            ["sh", "-c", "echo secret; echo private > private; sleep 600"],
            1,
            {"TOKEN": "of the victim"},
            "secrets/key",
        )
        hostile = work_of(world, HOSTILE)
        hostile.mkdir()
        shutil.copy(shutil.which("id"), hostile / "setuid-id")
        os.chmod(hostile / "setuid-id", 0o4755)
        environment = {"TARGETS": json.dumps(targets(world, litter))}
        await run(world, HOSTILE, [PYTHON, "-c", HOSTILE_RANK], 2, environment)
        await until((hostile / "attempts.json").exists)
        attempts = json.loads((hostile / "attempts.json").read_text())
        gained = {name: told for name, told in attempts.items() if "gained" in told}
        assert gained.keys() <= (NEEDS_VIEW if flag == "--no-private-folders" else set()), gained
        assert len(attempts) >= 35
        meta = meta_of(world, HOSTILE)
        assert (
            meta["uid"]
            == uid_of("default", DEFAULT_IDS, {})
            == meta_of(world, JOB)["uid"]
            != meta_of(world, VICTIM)["uid"]
        )
        assert meta["gid"] != meta_of(world, JOB)["gid"]
        assert f"uid {meta['uid']}" in world.tasks.last("hostile-1-0").isolation

        await nothing_by_a_session(world, key, meta_of(world, JOB))
        (hostile / "stop").touch()
        await until(
            lambda: world.tasks.phases("hostile-1-0")[-1] == "EXITED" and not world.tasks.last("hostile-1-0").ending
        )
        assert world.tasks.last("hostile-1-0").exit_code == 0
        await until(lambda: not Path(meta["tmp"]).exists())
        await until(lambda: not any(map(os.path.exists, litter)))
        assert of_group(meta["gid"]) == set()
        assert MEMORY_KEY not in in_memory()
        world.tasks.unwant("victim-1-0")
        await until(lambda: world.tasks.phases("victim-1-0")[-1] == "KILLED")


async def nothing_by_a_session(world, key, meta):
    """A command beside a rank is its rank's user, and so is who copies files."""
    show = "import os; print(os.getresuid(), os.getresgid(), os.getgroups()); print(open('/proc/self/status').read())"
    code, out, err = await world.exec(PYTHON, "-c", show)
    assert code == 0, err
    ids, _, status = out.decode().partition("\n")
    assert ids == f"{(meta['uid'],) * 3} {(meta['gid'],) * 3} {meta['groups']}"
    assert "NoNewPrivs:\t1" in status and "CapBnd:\t0000000000000000" in status
    for attempt in (
        f"cat {key}",
        f"cat /proc/{os.getpid()}/environ",
        f"kill -9 {os.getpid()}",
        f"cat {world.state}/desired.pb",
    ):
        code, out, _ = await world.exec("sh", "-c", attempt)
        assert (code != 0, out) == (True, b""), attempt
    code, out, _ = await world.exec("sh", "-c", "cat kept; echo again > /dev/stderr")
    assert (code, out) == (0, b"mine\n")
    copies = world.folder / "copies"
    copies.mkdir()
    for name in ("pointed", "linked", "wanted"):
        with pytest.raises((StatusError, SessionOver)):
            await world.fetch(name, copies / name)
    await world.fetch(".", copies / "all")
    content = b"".join(path.read_bytes() for path in (copies / "all").rglob("*") if path.is_file())
    assert content == b"mine\n"
    await world.send(copies / "all" / "kept", "sent")
    assert (world.work / "sent").stat().st_uid == meta["uid"]


@pytest.fixture
async def control(place):
    plane = ControlPlane(place)
    await plane.start()
    yield plane
    await plane.stop()


SHARES = """
import json, os, socket, time
def connects():
    with socket.socket(socket.AF_UNIX) as tried:
        try:
            tried.connect(os.environ["WHALEFLUX_AGENT_SOCKET"])
            return True
        except OSError:
            return False
def until(true):
    while not true():
        time.sleep(0.02)
rank = os.environ["RANK"]
open(f"/dev/shm/of-rank-{rank}", "w").close()
until(lambda: all(os.path.exists(f"/dev/shm/of-rank-{r}") for r in "01"))
os.makedirs(os.environ["WHALEFLUX_CHECKPOINT_LOCATION"] + "/step", exist_ok=True)
open(os.path.expanduser("~/cached"), "a").close()
found = {
    "setup": open(os.environ["TMPDIR"] + "/of-setup").read(),
    "data": open(os.environ["WHALEFLUX_DATASET_WORDS"] + "/words").read(),
    "secrets": os.environ["TOKEN"] + " " + open(os.environ["WHALEFLUX_SECRETS_DIR"] + "/key.pem").read(),
    "tmp": os.environ["TMPDIR"],
    "socket": connects(),
}
json.dump(found, open(f"found-{rank}.part", "w"))
os.rename(f"found-{rank}.part", f"found-{rank}.json")
until(lambda: not connects())
open(f"alone-{rank}", "w").close()
until(connects)
open(f"again-{rank}", "w").close()
until(lambda: os.path.exists("stop"))
"""
ISOLATED = ("--task-isolation", "required")


def file_dataset(path):
    return inventory_pb2.Dataset(name=f"datasets/{path.name}", uri=str(path))


async def test_ranks_share_what_is_their_tasks_and_the_next_agent_takes_them_over_and_cleans_up(control, place):
    words, work = place / "words", place / "state" / "work" / quote(JOB, safe="")
    words.write_text("for everybody")
    words.chmod(0o644)
    key = place / "state" / "identity" / "agent.key"
    control.inventory.datasets = {
        "datasets/words": file_dataset(words),
        "datasets/keys": inventory_pb2.Dataset(name="datasets/keys", uri=str(key.parent)),
    }
    control.tasks.secrets = {"secrets/token": b"one", "secrets/key": b"two"}
    admit(control, place / "state")

    def edit(wanted):
        wanted.spec.secrets.add(secret="secrets/token", variable="TOKEN")
        wanted.spec.secrets.add(secret="secrets/key", variable="KEY", file="key.pem")
        wanted.spec.setup[:] = ["sh", "-c", "echo prepared > $TMPDIR/of-setup"]
        wanted.spec.datasets[:] = ["datasets/words"]

    def reads_keys(wanted):
        wanted.spec.datasets[:] = ["datasets/keys"]

    async with agent(control, place / "state", *ISOLATED):
        control.tasks.want(desired([PYTHON, "-c", SHARES], gpus=(0, 1), edit=edit))
        control.tasks.want(desired(["true"], job=VICTIM, gpus=(2,), edit=reads_keys))
        await until(lambda: all((work / f"found-{rank}.json").exists() for rank in (0, 1)))
        await until(lambda: control.tasks.phases("victim-1-0")[-1:] == ["REFUSED"])
        assert "users of tasks must be able to read it" in control.tasks.last("victim-1-0").message
        facts = control.inventory.registered[-1].facts.isolation
        assert (facts.kind, facts.private_folders, facts.limits) == ("uid", True, "watched")
    found = [json.loads((work / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    wanted = {"setup": "prepared\n", "data": "for everybody", "secrets": "one two", "tmp": "/tmp", "socket": True}
    assert found == [wanted, wanted]
    await until(lambda: all((work / f"alone-{rank}").exists() for rank in (0, 1)))
    meta = json.loads((place / "state" / "tasks" / "train-1-0" / "meta.json").read_text())
    async with agent(control, place / "state", *ISOLATED):
        await until(lambda: all((work / f"again-{rank}").exists() for rank in (0, 1)))
        (work / "stop").touch()
        await until(
            lambda: control.tasks.phases("train-1-0")[-1] == "EXITED" and not control.tasks.last("train-1-0").ending
        )
        assert control.tasks.last("train-1-0").exit_code == 0
        await until(lambda: not Path(meta["tmp"]).exists())
        await until(lambda: not list((place / "state" / "ranks").glob("*/rank.sock")))
    (saved,) = (place / "state" / "checkpoints").glob("*/step")
    assert (saved.stat().st_uid, stat.S_IMODE(saved.stat().st_mode)) == (meta["uid"], 0o700)
    assert key.stat().st_uid == 0


NOBODY = 65534


def command_of(agent_flags):
    """An agent that somebody without rights can start: by an interpreter that they reach."""
    try:
        subprocess.run([sys.executable, "-c", ""], user=NOBODY, group=NOBODY, check=True, capture_output=True)
        python = sys.executable
    except (OSError, subprocess.CalledProcessError):
        python = PYTHON
    return [python, "-m", "whaleflux_agent", *agent_flags], {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the system's Python takes the packages of this one only at one version"
)
async def test_an_agent_without_rights_says_so_and_its_ranks_gain_none(control, place):
    """The same user as its agent: no wall, which is said; nothing gained by setuid programs, nothing left in memory."""
    state = place / "state"
    admit(control, state)
    for path in (state, *state.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    left = Path(f"/dev/shm/torch_{2**22 + 1}_whaleflux_test")  # of a process that does not live: no pid is as high
    show = f"touch {left} $TMPDIR/x; grep NoNewPrivs /proc/self/status; umask; ulimit -c; echo $TMPDIR"
    command, environment = command_of(flags(control, state))
    process = await asyncio.create_subprocess_exec(
        *command, user=NOBODY, group=NOBODY, extra_groups=[], env=environment | {"PATH": os.environ["PATH"]}, cwd="/"
    )
    try:
        control.tasks.want(desired(["sh", "-c", show]))
        await until(lambda: "EXITED" in control.tasks.phases("train-1-0"))
        report = control.tasks.last("train-1-0")
        assert (report.exit_code, report.isolation) == (
            0,
            "none (this machine is played; to isolate all the same: --task-isolation required), memory watched",
        )
        said = (state / "tasks" / "train-1-0" / "rank-0.log").read_text().split("\n")
        assert said[:3] == ["NoNewPrivs:\t1", "0077", "0"]
        await until(lambda: not left.exists() and not Path(said[3]).exists())
        facts = control.inventory.registered[-1].facts.isolation
        assert (facts.kind, facts.private_folders) == ("none", False)
    finally:
        process.terminate()
        await process.wait()


def test_checkpoints_beside_the_root_of_all_get_no_folder_from_root(place):
    """A job's location that begins like the node's root and leads out of it again."""
    (place / "checkpoints").mkdir()
    folders = TaskFolders(place / "state", place / "checkpoints", everybody=1, private=False, own_checkpoints=True)
    meta = TaskMeta("token", uid=DEFAULT_IDS.last, gid=DEFAULT_IDS.last)
    folders.own_checkpoints(meta, f"{place}/checkpoints/own")
    folders.own_checkpoints(meta, f"{place}/checkpoints/../beside")
    assert (place / "checkpoints" / "own").stat().st_uid == DEFAULT_IDS.last
    assert not (place / "beside").exists()


async def test_a_node_that_must_isolate_and_cannot_takes_no_work_and_says_what_to_do(control, place):
    admit(control, place / "state")
    place.chmod(0o700)  # as a home folder is: users of tasks cannot pass
    async with agent(control, place / "state", *ISOLATED):
        control.tasks.want(desired(["true"]))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["REFUSED"])
        assert f"users of tasks cannot pass {place}" in control.tasks.last("train-1-0").message
        facts = control.inventory.registered[-1].facts
        assert list(facts.runtimes) == []
        (condition,) = (c for c in facts.conditions if c.type == "IsolationWorks")
        assert condition.reason == "ISOLATION_IMPOSSIBLE" and "--state-dir" in condition.message
