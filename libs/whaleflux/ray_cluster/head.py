"""The head of a Ray cluster as a task, and what reads it: starts `ray start --head` unless it is there, and tells its agent what waits.

    python -m ray_beside.head --port N --host H --memory-bytes N      or      --address HOST:PORT

A program for the interpreter that has the cluster's Ray, inside of a job; it imports nothing of WhaleFlux. No autoscaler of Ray runs, and no
monitor: demand and nodes go to the agent's socket when they change, else that they have not, once a second, and the decisions that come
back go to Ray, so that `ray status` shows them. Exit codes: 0 it was told to stop, 2 wrong input, 3 the GCS does not answer, 4 no Ray here, else
those of `ray start`.
"""

import argparse
import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from .reader import CONNECT_S, demand_of, without_time
from .worker import KV_SPACE, LEAVE_KEY, end, object_store_bytes, short_folder

LOOK_S, SAY_S = 0.25, 1.0  # between looks at the GCS; between words to the agent while nothing changes
SILENT_S = 60.0  # a GCS that does not answer so long is not waited for
HEAD_CPUS = 2  # whose share of the host's memory it takes where nothing is said
MOST_BYTES = 1 << 20  # of a reading, packed
MOST_SHAPES = 800  # of what waits: the scheduler takes a thousand
_LENGTH = struct.Struct("!I")
_REPORT_RAY_CALL, _REPORT_RAY_RESULT, _ERROR = 9, 8, 7  # fields of RankRequest and RankResponse


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="head.py")
    parser.add_argument("--address", default="")
    parser.add_argument("--host", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--memory-bytes", type=int, default=0)
    return parser.parse_args()


def command(host: str, port: int, dashboard: int, client: int, folder: str, memory_bytes: int) -> list[str]:
    """`ray start --head`, which ends with its raylet. Programs' tasks find no CPU there: they run on workers."""
    found = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--no-monitor", "--disable-usage-stats",
        f"--port={port}", f"--node-ip-address={host}", "--num-cpus=0", "--num-gpus=0", f"--temp-dir={folder}",
        f"--dashboard-host={host}", f"--dashboard-port={dashboard}",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    if importlib.util.find_spec("grpc") is not None:  # Ray's own client needs it, and plain `ray` comes without
        found.append(f"--ray-client-server-port={client}")
    return [*found, f"--object-store-memory={object_store_bytes(memory_bytes, HEAD_CPUS)}"]


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nobody listens on at this moment, all different."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probes = [socket.socket(family) for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


# what is said to the agent: frames of RankRequest and RankResponse, in protobuf's wire format by hand


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value if value else b""


def _varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


def fields(content: bytes) -> dict[int, Any]:
    """A message's fields by number, as ints and bytes; of repeated ones the last. Raises ValueError, IndexError for what is none."""
    found: dict[int, Any] = {}
    at = 0
    while at < len(content):
        tag, at = _read_varint(content, at)
        if tag & 7 == 0:
            found[tag >> 3], at = _read_varint(content, at)
        elif tag & 7 == 2:
            size, at = _read_varint(content, at)
            found[tag >> 3], at = content[at : at + size], at + size
        else:
            raise ValueError(f"a field of wire type {tag & 7}")
    return found


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def request(token: str, number: int, demand: bytes, dashboard: str, known: int) -> bytes:
    """A RankRequest that reports a reading."""
    report = _number(1, number) + _bytes(2, demand) + _bytes(3, dashboard.encode()) + _number(4, known)
    return _bytes(1, token.encode()) + _varint(_REPORT_RAY_CALL << 3 | 2) + _varint(len(report)) + report


def ask(path: str, content: bytes) -> dict[int, Any]:
    """The fields of the agent's answer to a report. Raises OSError when there is none, or it says no."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(CONNECT_S)
        connection.connect(path)
        connection.sendall(_LENGTH.pack(len(content)) + content)
        (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
        answer = fields(_exactly(connection, min(size, 16 << 20)))
    if _ERROR in answer:
        raise OSError(fields(answer[_ERROR]).get(3, b"the agent refuses").decode(errors="replace"))
    return fields(answer.get(_REPORT_RAY_RESULT, b""))


def _exactly(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise ConnectionResetError("the agent closed the connection")
        content += part
    return content


# what is decided, for Ray


def autoscaling_state(decision: dict[str, Any], pb: Any, now_s: float) -> bytes:
    """An AutoscalingState: what is on its way, and what can never be had."""
    infeasible = [one for one in decision.get("infeasible", []) for _ in range(min(100, int(one.get("count", 1))))]
    return bytes(
        pb.AutoscalingState(
            last_seen_cluster_resource_state_version=int(decision.get("version", 0)),
            autoscaler_state_version=int(now_s * 1000),
            pending_instance_requests=[
                pb.PendingInstanceRequest(
                    instance_type_name=one["type"], ray_node_type_name=one["type"], count=int(one["count"]), request_ts=int(now_s)
                )
                for one in decision.get("pending", [])
            ],
            infeasible_resource_requests=[pb.ResourceRequest(resources_bundle=one["resources"]) for one in infeasible[:1000]],
        ).SerializeToString()
    )  # fmt: skip


class Beside:
    """Reads the cluster and tells the agent."""

    def __init__(self, address: str, dashboard: str) -> None:
        import ray
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        self._address, self._dashboard, self._version = address, dashboard, ray.__version__
        self._client, self._pb = GcsClient(address=address), autoscaler_pb2
        self._socket = os.environ.get("WHALEFLUX_AGENT_SOCKET", "")
        self._token = os.environ.get("WHALEFLUX_TASK_TOKEN", "")
        self._told, self._number, self._whole = "", 0, b""
        self._sent, self._said_at = 0, 0.0  # number of the reading that the agent has; when something was said last
        self._decision = 0

    def look(self) -> None:
        """Reads once, and tells what is to be told. Raises what Ray raises when the GCS is gone."""
        reply = self._pb.GetClusterResourceStateReply.FromString(self._client.get_cluster_resource_state())
        found = bounded(demand_of(reply.cluster_resource_state, self._pb.NodeStatus.Name))
        if news := (key := without_time(found)) != self._told:
            self._told, self._number = key, self._number + 1
            self._whole = zlib.compress(json.dumps({**found, "ray_version": self._version}).encode(), 1)
        if news or time.monotonic() - self._said_at >= SAY_S:
            self._say()

    def _say(self) -> None:
        self._said_at = time.monotonic()
        content = b"" if self._sent == self._number else self._whole
        if len(content) > MOST_BYTES:
            print(f"what waits takes {len(content)} bytes, at most {MOST_BYTES} are told", file=sys.stderr, flush=True)
            return
        try:
            answer = ask(self._socket, request(self._token, self._number, content, self._dashboard, self._decision))
        except (OSError, ValueError, IndexError) as error:  # the agent restarts: said again in a moment
            print(f"the agent does not take what waits: {error}", file=sys.stderr, flush=True)
            return
        self._sent = 0 if answer.get(1) else self._number
        if answer.get(3):
            self._decision = int(answer.get(2, 0))
            self._report(json.loads(answer[3]) | {"number": self._decision})

    def _report(self, decision: dict[str, Any]) -> None:
        try:  # each worker looks there whether it is named
            self._client.internal_kv_put(
                LEAVE_KEY, json.dumps(decision.get("leave", [])).encode(), True, KV_SPACE, CONNECT_S
            )
        except Exception as error:  # they leave when their own time is over
            print(f"idle workers are not told to leave: {str(error)[:200]}", file=sys.stderr, flush=True)
        try:
            self._client.report_autoscaling_state(autoscaling_state(decision, self._pb, time.time()))
        except Exception as error:  # another version of Ray's private interface: only `ray status` misses it
            print(f"`ray status` is not told what was decided: {str(error)[:200]}", file=sys.stderr, flush=True)


def bounded(found: dict[str, Any]) -> dict[str, Any]:
    """What waits most often, where there are more shapes than are taken; nodes that are dead are left out."""
    bundles = sorted(found["bundles"], key=lambda one: -one["count"])[: MOST_SHAPES // 2]
    gangs, room = [], MOST_SHAPES // 2 - min(len(found["constraints"]), 100)
    for gang in sorted(found["gangs"], key=lambda one: -one["count"]):
        if (room := room - len(gang["bundles"])) >= 0:
            gangs.append(gang)
    nodes = [node for node in found["nodes"] if node["status"] != "DEAD"]
    return {**found, "bundles": bundles, "gangs": gangs, "constraints": found["constraints"][:100], "nodes": nodes}


class Head:
    """Watches over `ray start --head`, or over one that is there."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self._asked, self._told = asked, False
        self._ray: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Until it is told to stop, or the head has ended."""
        signal.signal(signal.SIGTERM, self._stop)
        if self._asked.address:
            return self._watch(self._asked.address, "")
        with short_folder() as folder:
            return self._start(folder)

    def _start(self, folder: str) -> int:
        host = self._asked.host
        dashboard, client = free_ports(host, 2)
        words = command(host, self._asked.port, dashboard, client, folder, self._asked.memory_bytes)
        environment = {**os.environ, "RAY_enable_autoscaler_v2": "1"}  # so that `ray status` shows what is decided here
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        self._ray = subprocess.Popen(words, env=environment, start_new_session=True)
        joined = f"[{host}]" if ":" in host else host
        try:
            return self._watch(f"{joined}:{self._asked.port}", f"{joined}:{dashboard}")
        finally:
            end(self._ray)

    def _stop(self, *_: object) -> None:
        self._told = True

    def _ended(self) -> bool:
        return self._told or (self._ray is not None and self._ray.poll() is not None)

    def _watch(self, address: str, dashboard: str) -> int:
        heard = time.monotonic()
        beside: Beside | None = None
        while not self._ended():
            try:
                if beside is None:
                    _reach(address)
                    beside = Beside(address, dashboard)
                    print(f"RAY_ADDRESS={address}" + f" dashboard http://{dashboard}" * bool(dashboard), flush=True)
                beside.look()
                heard = time.monotonic()
            except ImportError as error:
                print(f"{sys.executable} has no Ray: {error}", file=sys.stderr, flush=True)
                return 4
            except Exception as error:  # Ray says in many ways that the GCS is not there
                if time.monotonic() - heard > SILENT_S:
                    print(f"the GCS at {address} does not answer: {str(error)[:300]}", file=sys.stderr, flush=True)
                    return 3
            time.sleep(LOOK_S)
        return 0 if self._told or self._ray is None else self._ray.returncode or 1


def _reach(address: str) -> None:
    """Ray's own client waits for a minute, and ends the process then. Raises OSError."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()


if __name__ == "__main__":
    sys.exit(Head(options()).run())
