"""What a rank tries over the wires of its machine: goes before the last line of `tests/support/hostile_rank.py`, whose names it uses.

Imports nothing of ours. Beside that script's targets it is given ports and frames that are ready to be sent.
"""

import ctypes
import json
import os
import socket
import ssl
import struct
import time

from tests.support.hostile_rank import T, checked, denied, libc, read, wrote  # isort: skip  # taken out before it is run


def _frame(name, token):
    content = b"\x0a" + bytes([len(token)]) + token.encode() + bytes.fromhex(T["frames"][name])
    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(5)
        agent.connect(os.environ["WHALEFLUX_AGENT_SOCKET"])
        agent.sendall(struct.pack("!I", len(content)) + content)
        answer = agent.recv(65536)
    if b"PERMISSION_DENIED" in answer or b"UNAUTHENTICATED" in answer:
        raise PermissionError(answer[-300:].decode(errors="replace"))
    return answer


def asks_the_agent_with_a_guessed_token():
    return _frame("progress", "0" * 32)


def asks_the_agent_without_a_token():
    return _frame("progress", "")


def calls_anothers_checkpoint_damaged():
    return _frame("restore", os.environ["WHALEFLUX_TASK_TOKEN"])


def finishes_anothers_checkpoint():
    return _frame("finish", os.environ["WHALEFLUX_TASK_TOKEN"])


def calls_anothers_checkpoint_intact():
    return _frame("intact", os.environ["WHALEFLUX_TASK_TOKEN"])


def gives_up_anothers_checkpoint():
    return _frame("fail", os.environ["WHALEFLUX_TASK_TOKEN"])


def _tls(port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    connection = socket.create_connection(("127.0.0.1", port), 5)
    connection.settimeout(5)
    return context.wrap_socket(connection)


def _over_tls(port, request):
    """What is answered to somebody without a certificate; TLS 1.3 refuses at the first read."""
    with _tls(port) as connection:
        connection.sendall(request)
        answer = connection.recv(4096)
    if not answer or b" 401 " in answer[:30] or b" 403 " in answer[:30]:
        raise ConnectionError(answer[:60])
    return answer


def _get(port, path):
    return _over_tls(port, f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())


def reads_the_store():
    return _get(T["ports"]["etcd"], "/version")


def is_a_member_of_the_store():
    return _get(T["ports"]["etcd_peer"], "/members")


def reads_the_figures_of_a_service():
    return _get(T["ports"]["scheduler_metrics"], "/metrics")


def asks_the_policy():
    return _get(T["ports"]["policy"], "/v1/models")


def asks_a_service_behind_the_door():
    return _over_tls(T["ports"]["scheduler"], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5))


def asks_its_agents_own_port():
    return _over_tls(T["agent_port"], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5))


def subscribes_to_the_bus():
    with socket.create_connection(("127.0.0.1", T["ports"]["nats"]), 5) as bus:
        bus.settimeout(1)
        bus.sendall(b"CONNECT {}\r\nSUB > 1\r\nPING\r\n")
        told = b""
        try:
            while part := bus.recv(4096):
                told += part
        except OSError:
            pass
    return told if b"PONG" in told else denied()


def _plain(port, method, path, body=b""):
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.settimeout(5)
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)
        answer = connection.recv(4096)
    status = answer.split(b" ")[1:2]
    if status in ([b"401"], [b"403"], [b"404"]):
        raise PermissionError(answer[:80].decode())
    return answer[:300]


def stops_the_front_door():
    return _plain(T["ports"]["admin"], "POST", "/quitquitquit")


def reads_the_front_doors_configuration():
    return _plain(T["ports"]["admin"], "GET", "/config_dump?include_eds")


def drains_the_front_door():
    return _plain(T["ports"]["admin"], "POST", "/drain_listeners")


def asks_a_model_without_a_key():
    return _plain(T["ports"]["http"], "POST", "/v1/chat/completions", b'{"model": "anns-model"}')


def _grpc(path, *headers):
    """A call without a certificate; only an answer has a frame of data."""

    def frame(kind, flags, stream, content):
        return struct.pack("!I", len(content))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + content

    def field(name, value):
        return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

    fields = [(":method", "POST"), (":scheme", "https"), (":path", path), (":authority", "frontdoor.whaleflux")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *headers]
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    sent += frame(1, 4, 1, b"".join(field(*pair) for pair in fields)) + frame(0, 1, 1, bytes(5))
    with _tls(T["ports"]["frontdoor"]) as door:
        door.sendall(sent)
        told, ended = b"", False
        while not ended:
            told += door.recv(65536)
            while len(told) >= 9 and len(told) >= 9 + int.from_bytes(told[:3], "big"):
                size, kind, flags = int.from_bytes(told[:3], "big"), told[3], told[4]
                if kind == 0 and size:
                    return told[9 : 9 + size]
                ended = ended or (kind in (0, 1) and flags & 1) or kind in (3, 7)
                told = told[9 + size :]
    denied()


def asks_the_front_door_without_a_certificate():
    return _grpc("/whaleflux.v1.SchedulerService/GetJob")


def asks_the_front_door_as_an_admin_by_a_header():
    return _grpc(
        "/whaleflux.v1.IdentityService/ListUsers", ("x-forwarded-client-cert", "URI=spiffe://whaleflux/admin/ada")
    )


def opens_secrets_as_its_agent_by_a_header():
    return _grpc(
        "/whaleflux.v1.TaskService/OpenTaskSecrets", ("x-forwarded-client-cert", "URI=spiffe://whaleflux/agent/c/n1")
    )


def finds_credentials_in_its_environment():
    own = ("TARGETS", "WHALEFLUX_TASK_TOKEN")
    words = ("SECRET", "PASSWORD", "TOKEN", "CREDENTIAL", "JOIN", "PRIVATE", "TLS_")
    return [name for name in os.environ if name not in own and any(word in name for word in words)] or denied()


def speaks_to_the_container_engine():
    with socket.socket(socket.AF_UNIX) as engine:
        engine.connect("/var/run/docker.sock")
        return "connected"


def reads_the_machines_memory():
    return read("/dev/mem")


def reads_the_kernels_memory():
    return read("/proc/kcore")


def copies_pages_of_the_agent():
    class Area(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

    kept = ctypes.create_string_buffer(16)
    here, there = Area(ctypes.addressof(kept), 16), Area(0x400000, 16)
    return checked(libc.process_vm_readv(T["agent"], ctypes.byref(here), 1, ctypes.byref(there), 1, 0), "readv")


def reads_the_key_as_root_of_its_own_namespace():
    source, sink = os.pipe()
    if (child := os.fork()) == 0:
        told = b""
        try:
            checked(libc.unshare(0x10000000), "unshare")
            told = read(T["key"]).encode()
        except OSError:
            pass
        os.write(sink, told)
        os._exit(0)
    os.close(sink)
    os.waitpid(child, 0)
    return os.read(source, 4096) or denied()


def reads_keys_of_others_from_the_kernels_keyrings():
    with open("/proc/keys") as file:
        others = [line for line in file if line.split()[5] != str(os.getuid())]
    return [line for line in others if not line.endswith("_ses: empty\n")] or denied()  # that one was made for it


def writes_into_checkpoints_of_another_queue():
    return wrote(f"{T['victim_checkpoints']}/planted")


def reads_checkpoints_of_another_queue_by_a_link():
    own = os.environ["WHALEFLUX_CHECKPOINT_LOCATION"]
    os.makedirs(own, exist_ok=True)
    os.symlink(T["victim_checkpoints"], f"{own}/step-9")
    return os.listdir(f"{own}/step-9")


def writes_its_own_group():
    return wrote("/sys/fs/cgroup/cgroup.procs", "0")


def waits_until_told():
    while not os.path.exists("go"):
        time.sleep(0.02)
    raise PermissionError(json.dumps("told"))
