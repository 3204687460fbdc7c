"""What `whaleflux up` and `profiles` say: where everything listens, what to do next, and what went wrong."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whaleflux.cli import output
from whaleflux.cli.output import Column

if TYPE_CHECKING:
    from whaleflux.embedded.suite import Suite

EXAMPLE = "examples/hello/job.yaml"
DEFAULT_STATE = ".whaleflux"


def say_ready(suite: Suite, *, register: bool) -> None:
    """Where everything is, and the next command."""
    output.say("", "WhaleFlux is up:")
    output.table([], [[f"  {what}", where] for what, where in suite.where()])
    output.say("")
    for node in suite.simulated:
        output.say(f"  {node.name} plays {node.profile}: its GPUs are simulated")
    if register:
        _register(suite.layout.context_file)
    stop = f"stop with Ctrl-C or: whaleflux down{state_flag(suite.layout.root)}"
    output.say(f"next, in another terminal: {_next(suite)}", stop)


def _next(suite: Suite) -> str:
    if not suite.simulated:
        return "whaleflux token create --site NAME (or start again with --simulate h200x8)"
    example = f"whaleflux submit {EXAMPLE}" if Path(EXAMPLE).exists() else "whaleflux submit JOB.yaml"
    return f"{example}, whaleflux status"


def _register(context_file: Path) -> None:
    """Lets commands in other folders find this fleet; says so where another one stays in use, or where it cannot be."""
    from whaleflux.contexts import Contexts, config_folder
    from whaleflux.errors import InvalidArgument

    if (folder := config_folder()) is None:
        output.note(f"HOME is not set: in other folders, export WHALEFLUX_CONTEXT={context_file}")
        return
    state = context_file.parent
    wanted = state.parent.name if state.name == DEFAULT_STATE else state.name
    try:
        known = Contexts(folder).register(context_file, wanted)
    except (OSError, InvalidArgument) as error:
        said = error.message if isinstance(error, InvalidArgument) else f"{folder}: {error.strerror}"
        output.note(f"not known by name ({said}): in other folders, export WHALEFLUX_CONTEXT={context_file}")
        return
    if known.still_in_use:
        output.note(
            f"known as {known.name}; other folders go on with {known.still_in_use}; "
            f"to change that: whaleflux config use {known.name}"
        )
    else:
        output.note(f"commands reach it from any folder, as {known.name} (whaleflux config list)")


def state_flag(state: Path) -> str:
    """What has to stand behind `whaleflux up` to mean this folder again."""
    return "" if state.resolve() == Path(DEFAULT_STATE).resolve() else f" --state {state}"


def state_of_this_fleet() -> Path:
    """The state folder of the suite that commands reach from here, where it is one of this machine; else the default one."""
    from whaleflux.cli.state import GLOBAL
    from whaleflux.context import find
    from whaleflux.contexts import is_state
    from whaleflux.errors import InvalidArgument

    try:
        folder = find(GLOBAL.context).resolve().parent
    except InvalidArgument:
        return Path(DEFAULT_STATE)
    return folder if is_state(folder) else Path(DEFAULT_STATE)


@contextlib.contextmanager
def clear_errors(state: Path) -> Iterator[None]:
    """What the system refuses and what does not start, in words with what to do: FailedPrecondition or InvalidArgument."""
    from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, Unavailable

    try:
        yield
    except Unavailable as error:  # a part of it that does not start: nobody has to look for a fleet
        raise FailedPrecondition(f"{error.message}\nmend that, then repeat: whaleflux up{state_flag(state)}") from None
    except OSError as error:
        where = error.filename or state
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                raise FailedPrecondition(
                    f"no space is left for {where}; free some, or keep the state elsewhere: whaleflux up --state FOLDER"
                ) from None
            case errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOTDIR | errno.EEXIST | errno.ENAMETOOLONG:
                why = f"{where}: {error.strerror}; name a folder that you may write to"
                raise InvalidArgument(FieldViolation("--state", why)) from None
            case _:
                raise


def played_machines() -> list[dict[str, Any]]:
    """One row for each machine that the table of GPU types lists."""
    from whaleflux.fleet.gpu_types import CATALOGUE

    rows = []
    for name in CATALOGUE.profiles():
        if (found := CATALOGUE.profile(name)) is not None:
            gpu, shape = found
            links = [group for group in shape.links if len(group.gpus) > 1]
            rows.append(
                {
                    "name": name,
                    "gpus": shape.count,
                    "model": gpu.name,
                    "gpu_memory_bytes": gpu.memory_bytes,
                    "links": links[0].kind.value if links else "",
                    "link_bytes_per_s": links[0].bandwidth_bytes_per_s if links else 0.0,
                    "cpu_cores": shape.cpu_millicores // 1000,
                    "memory_bytes": shape.memory_bytes,
                    "network_bytes_per_s": shape.network_bytes_per_s,
                    "usd_per_gpu_hour": shape.price.usd_per_gpu_hour,
                }
            )
    return rows


def _bytes(key: str, per: str = "") -> Any:
    def shown(row: dict[str, Any]) -> str:
        from whaleflux.quantities import shown_bytes

        return f"{shown_bytes(row[key])}{per}" if row[key] else "-"

    return shown


PROFILE_COLUMNS = [
    Column("NAME", lambda row: row["name"]),
    Column("GPUS", lambda row: f"{row['gpus']} x {row['model']}"),
    Column("GPU MEMORY", _bytes("gpu_memory_bytes"), value=lambda row: int(row["gpu_memory_bytes"])),
    Column("LINKS", lambda row: f"{row['links']} {_bytes('link_bytes_per_s', '/s')(row)}" if row["links"] else "-"),
    Column("CORES", lambda row: str(row["cpu_cores"]), value=lambda row: int(row["cpu_cores"])),
    Column("MEMORY", _bytes("memory_bytes"), value=lambda row: int(row["memory_bytes"])),
    Column("NETWORK", _bytes("network_bytes_per_s", "/s"), value=lambda row: float(row["network_bytes_per_s"])),
    Column("$/GPU-H", lambda row: f"{row['usd_per_gpu_hour']:.2f}", value=lambda row: float(row["usd_per_gpu_hour"])),
]
