"""One call of a rank to its agent: a frame there, a frame back, on a Unix socket that is opened for it.

No threads, nothing kept open: a process that forks its data loaders hands nothing on to them.
"""

from __future__ import annotations

import socket
import struct
import time

from whaleflux.v1 import agent_pb2

MOST_BYTES = 16 << 20
_ANSWER_S = 1.0  # the agent keeps the deadline itself, and says what was late
LENGTH = struct.Struct("!I")


def call(path: str, request: agent_pb2.RankRequest, timeout_s: float) -> agent_pb2.RankResponse:
    """The agent's answer. Raises OSError when there is none in time."""
    request.timeout_s = timeout_s
    end_s = time.monotonic() + timeout_s + _ANSWER_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(path)
        content = request.SerializeToString()
        connection.sendall(LENGTH.pack(len(content)) + content)
        (length,) = LENGTH.unpack(_read(connection, LENGTH.size, end_s))
        if length > MOST_BYTES:
            raise OSError(f"the agent answers with {length} bytes, at most {MOST_BYTES} are read")
        return agent_pb2.RankResponse.FromString(_read(connection, length, end_s))


def _read(connection: socket.socket, size: int, end_s: float) -> bytes:
    content = b""
    while len(content) < size:
        connection.settimeout(max(0.001, end_s - time.monotonic()))
        part = connection.recv(size - len(content))
        if not part:
            raise ConnectionResetError("the agent closed the connection")
        content += part
    return content
