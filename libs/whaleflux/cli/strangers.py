"""Members that nobody has heard of: a queue may name people before they come, and a slip of the fingers looks the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from whaleflux.cli import output
from whaleflux.errors import NotFound, StatusError

_MOST_LOOKED_FOR, _MOST_NAMED = 50, 5
_WITHIN_S = 5


def note_strangers(client: Any, members: Iterable[str]) -> None:
    """Says on stderr which of these users/NAME and groups/NAME are not known; nothing where the caller may not look."""
    try:
        unknown = _unknown(client, list(dict.fromkeys(members))[:_MOST_LOOKED_FOR])
    except StatusError:  # advice that nobody can give now
        return
    more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
    if unknown:
        output.note(
            f"nobody is known here as {', '.join(unknown[:_MOST_NAMED])}{more} so far; whoever comes by that name is meant by it. "
            "Who is known: whaleflux user ls, whaleflux group ls"
        )


def _unknown(client: Any, members: list[str]) -> list[str]:
    groups = _groups(client) if any(member.startswith("groups/") for member in members) else frozenset[str]()
    return [one for one in members if one not in groups and not (one.startswith("users/") and _is_user(client, one))]


def _groups(client: Any) -> frozenset[str]:
    from whaleflux.cli.state import pages
    from whaleflux.v1 import identity_pb2 as pb

    return frozenset(
        one.name for one in pages(client.identity.ListGroups, pb.ListGroupsRequest(page_size=1000), "groups")
    )


def _is_user(client: Any, name: str) -> bool:
    from whaleflux.v1 import identity_pb2 as pb

    try:
        client.identity.GetUser(pb.GetUserRequest(name=name), timeout=_WITHIN_S)
    except NotFound:
        return False
    return True
