"""What a caller may send into a session with a job. Pure."""

from __future__ import annotations

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.names import last
from whaleflux.rpc.window import CHUNK_BYTES
from whaleflux.v1 import scheduler_pb2 as pb

_ARGV_BYTES, _PATH_BYTES, _SIDE, _TERM_CHARS = 128 << 10, 4096, 10_000, 100
_SIGNALS = 64


def check_open(opened: pb.AttachOpen) -> None:
    """Raises InvalidArgument for what no agent should be asked."""
    match opened.WhichOneof("what"):
        case "command":
            _check_command(opened.command)
        case "port" if not 1 <= opened.port <= 65535:
            raise _wrong("port", f"{opened.port} is no port: use 1 to 65535")
        case "read" | "write" as what:
            path = getattr(opened, what)
            if max(len(path.path.encode()), len(path.base_name.encode())) > _PATH_BYTES or "\0" in path.path:
                raise _wrong("path", f"is no path: at most {_PATH_BYTES} bytes, none of them 0")
            if what == "write" and (path.base_name in ("", ".", "..") or {"/", "\0"} & set(path.base_name)):
                raise _wrong("base_name", f"{path.base_name[:100]!r} is no name of a file or folder")
        case None:
            raise _wrong("what", "is not set: a command, a port, or files to read or write")


def _check_command(command: pb.AttachCommand) -> None:
    if sum(len(word.encode()) + 1 for word in command.argv) > _ARGV_BYTES:
        raise _wrong("argv", f"has more than {_ARGV_BYTES} bytes; put it into a file of the job (whaleflux cp)")
    if any("\0" in word for word in (*command.argv, command.term)):
        raise _wrong("argv", "has a zero byte")
    if len(command.term) > _TERM_CHARS:
        raise _wrong("term", f"has more than {_TERM_CHARS} characters")
    if command.HasField("terminal"):
        _check_size(command.terminal)


def check_message(request: pb.AttachJobRequest) -> None:
    """Raises InvalidArgument for what does not belong into a session that is open."""
    if request.HasField("open"):
        raise _wrong("open", "came before; one stream is one session")
    if request.HasField("data") and not request.data:
        raise _wrong("data", "is empty; send `end` when nothing more comes")
    if len(request.data) > CHUNK_BYTES:
        raise _wrong("data", f"has {len(request.data)} bytes; send at most {CHUNK_BYTES} at a time")
    if request.HasField("signal") and not 1 <= request.signal <= _SIGNALS:
        raise _wrong("signal", f"{request.signal} is no signal: use 1 to {_SIGNALS}")
    if request.HasField("resize"):
        _check_size(request.resize)


def _check_size(size: pb.TerminalSize) -> None:
    if not (0 <= size.rows <= _SIDE and 0 <= size.columns <= _SIDE):
        raise _wrong("terminal", f"{size.columns} x {size.rows} is no size of a terminal: use at most {_SIDE} a side")


def _wrong(field: str, what: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation(field, what))


def shown(opened: pb.AttachOpen) -> str:
    """What a session is for, for the record: of a command its first word alone, since arguments may be secrets."""
    match opened.WhichOneof("what"):
        case "command":
            return f"command {last(opened.command.argv[0])[:100]}" if opened.command.argv else "shell"
        case "port":
            return f"port {opened.port}"
        case "read" | "write" as what:
            return f"{what} {getattr(opened, what).path[:200]!r}"
    return "nothing"
