"""Nodes that are played beside an embedded suite: `whaleflux up --simulate h200x8,edge/rtx4090x2`. Pure, but for its file.

Which ones there are is kept in the state folder, so that the same suite comes back with the same nodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.profile import Profile
from whaleflux.rpc import pki
from whaleflux.rpc.pki import TlsFiles

NONE = "none"
MOST = 32  # an agent holds some 70 MB
_SITE = "local"
_A_START = timedelta(minutes=2)
# A machine begins with a letter, what belongs to the options of the one before (mig=3g.71gb,1g.18gb) with a digit.
_BETWEEN = re.compile(r",(?=[a-zA-Z./])")


@dataclass(frozen=True, slots=True)
class SimulatedNode:
    """One node: where it stands, what it is called, and the profile that its agent plays."""

    site: str
    node: str
    profile: str

    @property
    def name(self) -> str:
        return names.node(self.site, self.node)

    @property
    def part(self) -> str:
        """Its name among the parts of the suite: that of its log and its pid file."""
        return f"agent-{self.site}-{self.node}"


def wanted(texts: Iterable[str]) -> list[SimulatedNode]:
    """Of [SITE/]PROFILE, comma separated; nodes are called by their profile and numbered. Raises InvalidArgument."""
    found: list[SimulatedNode] = []
    for text in (part.strip() for whole in texts for part in _BETWEEN.split(whole)):
        if not text or text == NONE:
            continue
        site, profile = _split(text)
        _check(profile)
        kind = re.sub(r"[^a-z0-9]+", "-", Path(profile.partition(":")[0]).stem.lower()).strip("-")[:40]
        number = 1 + sum(one.node.rpartition("-")[0] == kind and one.site == site for one in found)
        found.append(SimulatedNode(site, f"{kind}-{number}", profile))
    if len(found) > MOST:
        raise InvalidArgument(
            FieldViolation("--simulate", f"names {len(found)} nodes; at most {MOST} fit on a machine")
        )
    return found


def _split(text: str) -> tuple[str, str]:
    """Site and profile; a file is a profile whatever slashes it has, and slashes of options are their own."""
    machine, colon, options = text.partition(":")
    if machine.endswith(".json"):
        return _SITE, f"{Path(machine).absolute()}{colon}{options}"
    site, slash, profile = machine.partition("/")
    if not slash:
        return _SITE, text
    return names.check_id("--simulate", site), f"{profile}{colon}{options}"


def _check(text: str) -> None:
    """Whether an agent could play it, with its options: told before anything starts."""
    try:
        Profile.load(text)
    except InvalidArgument as wrong:
        said = "; ".join(one.description for one in wrong.violations)
        raise InvalidArgument(FieldViolation("--simulate", f"{text[:80]}: {said}; see: whaleflux profiles")) from None


def has_certificate(state: Path, now: datetime) -> bool:
    """Whether the agent with this state folder is admitted to the fleet, and stays so for as long as a start takes."""
    try:
        return pki.expiry(TlsFiles.under(state / "identity", "agent").load().chain) > now + _A_START
    except (InvalidArgument, ValueError):
        return False


def remembered(file: Path) -> list[SimulatedNode]:
    """Those of last time; none where the file is missing or damaged."""
    try:
        return [SimulatedNode(**one) for one in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def remember(file: Path, nodes: Sequence[SimulatedNode]) -> None:
    """For the next start."""
    file.write_text(json.dumps([asdict(one) for one in nodes], indent=1) + "\n")
