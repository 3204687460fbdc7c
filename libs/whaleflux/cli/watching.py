"""Watches in the terminal: a table that is drawn again at each change, or a line of JSON for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from whaleflux.cli import output
from whaleflux.cli.output import Format

if TYPE_CHECKING:
    from whaleflux.rpc.watching import Followed

OpenWatch = Callable[[int], Iterator[Any]]  # a Watch rpc, from a `resource_version` on


def watch(
    open_watch: OpenWatch,
    fmt: Format,
    draw: Callable[[list[Any]], None],
    keeps: Callable[[Any], bool] = lambda _: True,
) -> None:
    """Until it is interrupted: `draw` shows all resources that `keeps` keeps; JSON is one resource a line.

    What is not kept any more is told once more as it is then; what is gone as its name and `deleted`.
    """
    from whaleflux.errors import FieldViolation, InvalidArgument

    if fmt in {Format.csv, Format.name}:
        raise InvalidArgument(FieldViolation("-w", f"-o {fmt.value} has an end; watch with -o jsonl, or as a table"))
    show = _lines if fmt.is_json else _drawing(draw)
    try:
        for told, known in _known(open_watch, keeps):
            show(told, known)
    except KeyboardInterrupt:
        return


def _known(open_watch: OpenWatch, keeps: Callable[[Any], bool]) -> Iterator[tuple[Followed[Any], dict[str, Any]]]:
    """Each thing that is told, and what is there then, by name."""
    known: dict[str, Any] = {}
    for told in _followed(open_watch):
        if told.value is not None and keeps(told.value):
            known[told.name] = told.value
        elif not told.synced and known.pop(told.name, None) is None:
            continue  # of what was not shown nothing is told
        yield told, known


def _followed(open_watch: OpenWatch) -> Iterator[Followed[Any]]:
    """As `rpc.watching.follow`, waiting out a control plane that is away for a while."""
    from whaleflux.errors import OutOfRange, StatusError
    from whaleflux.rpc.watching import Following
    from whaleflux.sdk.resume import FOLLOW_OUTAGE_S, Patience

    following, patience = Following(), Patience(FOLLOW_OUTAGE_S)
    while True:
        pause_s = 0.2
        broken: StatusError | None = None
        try:
            for response in open_watch(following.since):
                patience.received()
                yield from following.received(response)
        except OutOfRange as error:
            broken = error
        except StatusError as error:
            if (longer_s := patience.pause_s(error, time.monotonic())) is None:
                raise
            pause_s, broken = longer_s, error
        following.ended(broken)
        time.sleep(pause_s)


def _lines(told: Followed[Any], _: dict[str, Any]) -> None:
    if told.value is not None:
        output.say_json(output.as_json(told.value), Format.jsonl)
    elif told.name:
        output.say_json({"name": told.name, "deleted": True}, Format.jsonl)


def _drawing(draw: Callable[[list[Any]], None]) -> Callable[[Followed[Any], dict[str, Any]], None]:
    """Draws from when everything that exists is known."""
    complete = False

    def show(told: Followed[Any], known: dict[str, Any]) -> None:
        nonlocal complete
        complete = complete or told.synced
        if complete:
            output.clear_screen()
            draw(list(known.values()))

    return show
