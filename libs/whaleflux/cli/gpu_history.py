"""What the GPUs of one node did over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from whaleflux.cli import output
from whaleflux.cli.filters import since_s
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import fleet, node_name

_WHOLE_PPM = 1_000_000


def show(node: str, since: str, until: str, points: int, fmt: Format, *, headers: bool) -> None:
    """A row for each device and point. Raises InvalidArgument for a time or a number that cannot be asked for."""
    from whaleflux.v1 import console_pb2 as pb

    request = pb.GetDeviceHistoryRequest(points=points)
    for field, text, flag in (("start_time", since, "--since"), ("end_time", until, "--until")):
        if text:
            getattr(request, field).FromNanoseconds(int(since_s(text, flag) * 1e9))
    with fleet() as client:
        request.node = node_name(client, node)
        answer = client.console.GetDeviceHistory(request, timeout=20)
    if fmt.is_json:
        output.say_json(output.as_json(answer), fmt)
        return
    empty = f"nothing was reported of GPUs of {request.node} in that time; see: whaleflux cost status"
    output.show(answer.points, _columns(), fmt, headers=headers, empty=empty, name=lambda point: str(point.device))


def _columns() -> list[Column]:
    from whaleflux.cli.kept_events import shown_time
    from whaleflux.quantities import shown_bytes

    return [
        Column("DEVICE", lambda p: p.device),
        Column("FROM", lambda p: shown_time(p.start_time), value=lambda p: p.start_time.ToMilliseconds() / 1000),
        Column("UNTIL", lambda p: shown_time(p.end_time), value=lambda p: p.end_time.ToMilliseconds() / 1000),
        *_figures("TENSOR", "tensor_ppm", _percent),
        *_figures("SM", "sm_active_ppm", _percent),
        *_figures("BUSY", "busy_ppm", _percent),
        *_figures("MEMORY BANDWIDTH", "dram_active_ppm", _percent, wide=True),
        *_figures("POWER", "power_mw", lambda mw: f"{mw / 1000:.0f} W"),
        *_figures("MEMORY", "memory_used_bytes", shown_bytes),
        Column("SOURCE", lambda p: p.source, wide=True),
    ]


def _figures(header: str, field: str, shown: Callable[[int], str], *, wide: bool = False) -> list[Column]:
    """The mean, with the least and greatest behind it for people who ask for more."""

    def part(of: str) -> Column:
        name = header if of == "mean" else f"{header} {'LEAST' if of == 'min' else 'MOST'}"
        return Column(
            name,
            lambda point: shown(getattr(getattr(point, field), of)) if point.HasField(field) else "-",
            wide or of == "min",
            lambda point: float(getattr(getattr(point, field), of)) if point.HasField(field) else "",
        )

    return [part("mean"), part("min"), part("max")]


def _percent(ppm: int) -> str:
    return f"{ppm * 100 / _WHOLE_PPM:.0f} %"


def refuse(flags: dict[str, Any], why: str) -> None:
    """Raises InvalidArgument for one of these flags that is given."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    if given := [flag for flag, value in flags.items() if value]:
        raise InvalidArgument(FieldViolation(given[0], why))
