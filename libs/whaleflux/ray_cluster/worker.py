"""A Ray node as a task: joins a cluster with what the task was given, leaves when it is idle, drains when it has to go.

    python worker.py --address HOST:PORT --gpus N --cpus N --gpu-memory-mib N --gpu-type NAME --site NAME --idle-s S --grace-s S
                     --memory-bytes N --label KEY=VALUE

A program for the interpreter that has the cluster's Ray, inside of a job; it imports nothing of WhaleFlux. Idle for `--idle-s`, or
for a moment where others wait for its GPUs, the node asks Ray to drain itself: a raylet that has got work meanwhile refuses that, and the node stays. Told to stop (SIGTERM), it drains as one that is
preempted, so that nothing new comes, what runs may end within `--grace-s`, and what dies then uses up no retries. Exit codes: 0 it
left, 3 it could not join, else those of `ray start`.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

JOIN_S, LEAVE_S, LOOK_S = 300.0, 30.0, 1.0
NODES_A_LOOK = 100  # of larger clusters each worker looks less often: all of them together ask the GCS as much
WANTED_S, KV_S = 2.0, 5.0  # idle for so long, it goes where others want its GPUs; most that it waits to hear of it
DRAIN_S = 5.0  # so long a GCS that does not answer is asked to drain a node that has to go
STORE_SHARE, LEAST_STORE_BYTES = (
    0.2,
    100_000_000,
)  # of a node's memory for objects; less than Ray takes by itself, as workers share hosts
HOST_GPUS = "/proc/driver/nvidia/gpus"
IN_USE = "in-use"  # file of a session's folder, locked as long as that is used
JOINS_NOT = 3  # exit code
TRIES = 3
IDLE, PREEMPTED = 1, 2  # DrainNodeReason of Ray
RUNNING_STATUS, DEAD_STATUS, IDLE_STATUS = 1, 2, 3  # NodeStatus of Ray
KV_SPACE, LEAVE_KEY = b"whaleflux", b"leave"  # in the GCS: JSON, instances of workers whose GPUs others wait for


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="worker.py")
    parser.add_argument("--address", required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--cpus", type=int, required=True)
    parser.add_argument("--gpu-memory-mib", type=int, default=0)
    parser.add_argument("--gpu-type", default="")
    parser.add_argument("--memory-bytes", type=int, default=0)
    parser.add_argument("--site", default="")
    parser.add_argument("--label", action="append", default=[])
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--grace-s", type=float, default=25.0)
    return parser.parse_args()


@contextmanager
def short_folder() -> Iterator[str]:
    """Where a session lies: Ray's sockets need a short path, and programs on this host that run as other users find it there, too.

    It goes with its session. A lock says that it is in use: what one that was killed has left goes when the next one comes.
    """
    root = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()
    _sweep(root)
    folder = tempfile.mkdtemp(prefix="wfray", dir=root)
    with open(os.path.join(folder, "new"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, os.path.join(folder, IN_USE))  # nobody sees it without its lock
        Path(folder).chmod(0o1777)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: str) -> None:
    """Removes our folders that nobody uses; one without a lock is about to get it."""
    for folder in Path(root).glob("wfray*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / IN_USE).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def object_store_bytes(memory_bytes: int, cpus: int, gpus: int = 0) -> int:
    """Memory for objects: a part of what was asked for, else of the node's share of the host's, by processors or GPUs.

    Ray by itself takes three tenths of the host's for each node, and there are several on one host.
    """
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = min(1.0, max(cpus / (os.cpu_count() or 1), gpus / (host_gpus() or math.inf)))
    return max(LEAST_STORE_BYTES, int((memory_bytes or host_bytes * share) * STORE_SHARE))


def host_gpus() -> int:
    """GPUs of the host, others' included; 0: not known."""
    with suppress(OSError):
        return len(os.listdir(HOST_GPUS))
    return 0


def command(asked: argparse.Namespace, folder: str) -> list[str]:
    """`ray start`, which ends with the raylet. Ports of workers are free ones, so that several nodes find room on one host."""
    family = asked.gpu_type.partition("-")[0]
    resources = (
        {"gpu_memory": asked.gpu_memory_mib * asked.gpus, f"accelerator_type:{family}": asked.gpus}
        if asked.gpus
        else {}
    )
    labels = [f"whaleflux/gpu={asked.gpu_type}", f"whaleflux/site={asked.site}", *asked.label]
    return [
        str(Path(sys.executable).with_name("ray")), "start", f"--address={asked.address}", "--block", "--disable-usage-stats",
        f"--num-cpus={asked.cpus}", f"--num-gpus={asked.gpus}", f"--resources={json.dumps(resources)}",
        "--labels=" + ",".join(label for label in labels if not label.endswith("=")),
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0", f"--temp-dir={folder}",
        f"--object-store-memory={object_store_bytes(asked.memory_bytes, asked.cpus, asked.gpus)}",
        *([f"--memory={asked.memory_bytes}"] if asked.memory_bytes else []),
    ]  # fmt: skip


class Node:
    """The node as the cluster sees it. `instance` ties the two."""

    def __init__(self, address: str, instance: str) -> None:
        from ray._raylet import GcsClient

        self.client, self._instance = GcsClient(address=address), instance
        self.cluster: Any = None  # the ClusterResourceState as it was read last

    def state(self) -> Any:
        """Its NodeState, also of a dead one; None before it has joined, and while the GCS does not answer."""
        from ray.core.generated import autoscaler_pb2 as pb

        try:
            reply = pb.GetClusterResourceStateReply.FromString(self.client.get_cluster_resource_state())
        except Exception as error:  # Ray says in many ways that the GCS is gone; the raylet ends by itself then
            print(f"the GCS does not answer: {str(error)[:200]}", flush=True)
            return None
        self.cluster = reply.cluster_resource_state
        mine = [one for one in self.cluster.node_states if one.instance_id == self._instance]
        return min(mine, key=lambda one: one.status == DEAD_STATUS, default=None)  # an earlier try may be dead

    def is_wanted(self) -> bool:
        """Whether others wait for its GPUs."""
        return is_named(self.client, self._instance)

    def drain(self, state: Any, reason: int, words: str, within_s: float) -> bool:
        """Whether Ray lets it go; not where the GCS does not answer."""
        deadline_ms = int((time.time() + within_s) * 1000) if within_s else 0
        try:
            accepted, why = self.client.drain_node(state.node_id.hex(), reason, words, deadline_ms)
        except Exception as error:  # Ray says in many ways that the GCS is gone
            accepted, why = False, f"the GCS does not answer: {str(error)[:200]}"
        if not accepted:
            print(f"stays: {why}", flush=True)
        return bool(accepted)


def is_named(client: Any, instance: str) -> bool:
    """Whether the scheduler has told the cluster's reader that others wait for this worker's GPUs."""
    try:
        named = json.loads(client.internal_kv_get(LEAVE_KEY, KV_SPACE, KV_S) or b"[]")
    except Exception:  # it leaves when its own time is over
        return False
    return isinstance(named, list) and instance in named


def is_spare(cluster: Any, mine: Any) -> bool:
    """Whether a node may leave: what the cluster should hold in all (`request_resources`) is there without it, and nobody is idle for longer.

    By sums, since it is only asked whether somebody stays. Where nothing is to be held each idle node may leave.
    """
    wanted: Counter[str] = Counter()
    for group in cluster.cluster_resource_constraints:
        for one in group.resource_requests:
            wanted.update({name: amount * one.count for name, amount in one.request.resources_bundle.items()})
    if not wanted:
        return True
    others = [n for n in cluster.node_states if n.node_id != mine.node_id and n.status in (RUNNING_STATUS, IDLE_STATUS)]
    idle = [(n.idle_duration_ms, n.node_id) for n in others if n.status == IDLE_STATUS and n.instance_id]
    if any(longer > (mine.idle_duration_ms, mine.node_id) for longer in idle):
        return False
    there: Counter[str] = Counter()
    for node in others:
        there.update(dict(node.total_resources))
    return all(there[name] >= amount for name, amount in wanted.items())


class Worker:
    """Watches over `ray start`."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self._asked, self._told, self.joined = asked, threading.Event(), False
        self._instance = os.environ.get("WHALEFLUX_JOB", "worker") + "/" + os.environ.get("WHALEFLUX_EPOCH", "0")

    def run(self) -> int:
        """Until it has left. A node that did not come up is begun anew: Ray waits half a minute for it, whatever the host has to do."""
        signal.signal(signal.SIGTERM, self.stop)
        with short_folder() as folder:
            return self._try(folder, time.monotonic() + JOIN_S)

    def _try(self, folder: str, join_until: float) -> int:
        code = JOINS_NOT
        for _ in range(TRIES):
            ray = subprocess.Popen(command(self._asked, folder), env=self._environment(), start_new_session=True)
            try:
                code = self.watch(ray, Node(self._asked.address, self._instance), join_until)
            finally:
                end(ray)
            if self._told.is_set() or self.joined or time.monotonic() > join_until:
                break
        return code

    def _environment(self) -> dict[str, str]:
        kind = f"{self._asked.gpu_type or 'cpu'}x{self._asked.gpus}"
        found = {**os.environ, "RAY_CLOUD_INSTANCE_ID": self._instance, "RAY_NODE_TYPE_NAME": kind}
        if self._asked.gpus and not found.get("CUDA_VISIBLE_DEVICES"):  # they are played: Ray would find none of them
            found.pop("CUDA_VISIBLE_DEVICES", None)
        return found

    def stop(self, *_: object) -> None:
        """It has to go."""
        self._told.set()

    def watch(self, ray: Any, node: Any, join_until: float) -> int:
        """Until the node has left, or `ray start` has ended; the exit code."""
        while ray.poll() is None:
            state = node.state()
            self.joined |= state is not None and state.status != DEAD_STATUS
            if self._told.is_set():
                if self.joined:
                    self._go(ray, node, state)
                return 0
            if self.may_leave(state, node) and is_spare(node.cluster, state) and node.drain(state, IDLE, "idle", 0):
                print(f"leaves: idle for {state.idle_duration_ms / 1000:.0f} s", flush=True)
                self._leave(ray, node, LEAVE_S)
                return 0
            if not self.joined and time.monotonic() > join_until:
                break
            nodes = len(node.cluster.node_states) if node.cluster is not None else 0
            self._told.wait(LOOK_S * max(1.0, nodes / NODES_A_LOOK))
        if not self.joined:
            print(f"has not joined {self._asked.address}", file=sys.stderr, flush=True)
            return JOINS_NOT
        return ray.returncode or 0

    def _go(self, ray: Any, node: Any, state: Any) -> None:
        """Drains what has to go. A GCS that does not answer for a moment is asked again: what runs there would be lost without notice."""
        began, grace_s = time.monotonic(), self._asked.grace_s
        while ray.poll() is None and (state is None or state.status != DEAD_STATUS):
            left_s = grace_s - (time.monotonic() - began)
            if state is not None and node.drain(state, PREEMPTED, "preempted", left_s):
                self._leave(ray, node, left_s)
                return
            if time.monotonic() - began > min(DRAIN_S, grace_s):
                print("ends without having drained: the GCS does not answer", flush=True)
                return
            time.sleep(LOOK_S / 2)
            state = node.state()

    def _leave(self, ray: Any, node: Any, within_s: float) -> None:
        """Waits for the raylet, which ends itself once it is drained and nothing runs; `ray start` may stay for a while after it."""
        until = time.monotonic() + within_s
        while ray.poll() is None and (state := node.state()) is not None and state.status != DEAD_STATUS:
            if time.monotonic() > until:
                print("ends what still runs: its time is over", flush=True)
                return
            time.sleep(LOOK_S)

    def may_leave(self, state: Any, node: Any) -> bool:
        """Idle for its time, or for a moment where others want its GPUs."""
        idle_s = state.idle_duration_ms / 1000 if state is not None and state.status == IDLE_STATUS else -1.0
        return idle_s >= self._asked.idle_s or (idle_s >= WANTED_S and bool(node.is_wanted()))


def end(ray: "subprocess.Popen[bytes]") -> None:
    """All that `ray start` began, and nothing else on this host."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(ray.pid, signal_)
            ray.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


if __name__ == "__main__":
    sys.exit(Worker(options()).run())
