"""What a machine's own metadata service says of its end, as EC2 words it. Pure.

docs.aws.amazon.com/AWSEC2/latest/UserGuide: spot-instance-termination-notices, rebalance-recommendations, monitoring-instances-status-check_sched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from whaleflux.reasons import NodeReason

AHEAD_S = 3600.0  # what is announced for later than that is not told yet: work goes on until then
REBALANCE_S = 120.0  # a recommendation names no end; the machine may be announced to go at any time after it
_MAX_TEXT = 200


@dataclass(frozen=True, slots=True)
class Notice:
    """The machine is taken away or restarted at `taken_s` (Unix seconds), by whoever owns it."""

    reason: NodeReason
    taken_s: float
    message: str


def of_spot(text: str) -> Notice:
    """spot/instance-action: {"action": "terminate", "time": "2026-01-01T08:22:00Z"}. Raises ValueError."""
    said = _object(text)
    action = str(said.get("action", ""))[:40]
    return Notice(NodeReason.SPOT_TAKEN, _instant_s(said.get("time")), f"AWS takes the spot machine away ({action})")


def of_rebalance(text: str) -> Notice:
    """events/recommendations/rebalance: {"noticeTime": "2026-01-01T08:22:00Z"}. Raises ValueError."""
    taken_s = _instant_s(_object(text).get("noticeTime")) + REBALANCE_S
    return Notice(
        NodeReason.SPOT_AT_RISK, taken_s, "AWS expects to take the spot machine away, and advises to leave it"
    )


def of_maintenance(text: str) -> list[Notice]:
    """events/maintenance/scheduled: [{"NotBefore": "21 Jan 2026 09:00:43 GMT", "Code": "system-reboot", "State": "active"}].

    Those that are over are left out. Raises ValueError.
    """
    listed = json.loads(text)
    if not isinstance(listed, list):
        raise ValueError("scheduled maintenance is no list")
    return [
        _maintenance(one) for one in listed if not (isinstance(one, dict) and one.get("State", "active") != "active")
    ]


def first(notices: Iterable[Notice], now_s: float) -> Notice | None:
    """The one that comes first, if it is near; None: the machine stays."""
    near = [one for one in notices if one.taken_s - now_s <= AHEAD_S]
    return min(near, key=lambda one: (one.taken_s, one.reason), default=None)


def _maintenance(one: Any) -> Notice:
    said = _as_object(one)
    try:
        at = parsedate_to_datetime(str(said.get("NotBefore")))
    except (TypeError, ValueError):
        raise ValueError("scheduled maintenance without a time") from None
    code, words = str(said.get("Code", ""))[:40], str(said.get("Description", ""))[:_MAX_TEXT]
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return Notice(NodeReason.HOST_MAINTENANCE, at.timestamp(), f"AWS has scheduled {code}: {words}")


def _object(text: str) -> dict[str, Any]:
    return _as_object(json.loads(text))


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _instant_s(said: Any) -> float:
    at = datetime.fromisoformat(str(said))
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
