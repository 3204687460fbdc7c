"""How a changed engine takes the place of the one that serves: which replicas of which version there should be, and what comes next. Pure.

One replica of the new version starts beside the old ones (SURGING), gets a share of the requests and is compared (WATCHING); then the others
follow one at a time, site after site (SHIFTING), each old one leaving when a new one is READY. Whatever goes wrong before all are new leads back:
the old engine is the model's again, and what is new leaves as old ones are READY in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

SHARE, WATCH_S, READY_WITHIN_S = 0.10, 60.0, 1800.0  # where the model says nothing


class Stage(Enum):
    """Where a rollout stands; the names are those of the contract without their prefix."""

    NONE = "UNSPECIFIED"
    SURGING = "SURGING"
    WATCHING = "WATCHING"
    SHIFTING = "SHIFTING"
    DONE = "DONE"
    ROLLED_BACK = "ROLLED_BACK"


NEXT: dict[Stage, frozenset[Stage]] = {
    Stage.SURGING: frozenset({Stage.WATCHING, Stage.ROLLED_BACK}),
    Stage.WATCHING: frozenset({Stage.SHIFTING, Stage.ROLLED_BACK}),
    Stage.SHIFTING: frozenset({Stage.DONE, Stage.ROLLED_BACK}),
    Stage.NONE: frozenset({Stage.SURGING}),
    Stage.DONE: frozenset({Stage.SURGING}),
    Stage.ROLLED_BACK: frozenset({Stage.SURGING}),
}
UNDER_WAY = frozenset({Stage.SURGING, Stage.WATCHING, Stage.SHIFTING})


@dataclass(frozen=True, slots=True)
class Policy:
    """`share` of the requests for the first new replica, for `watch_s`; `ready_within_s`: for each new replica."""

    share: float = SHARE
    watch_s: float = WATCH_S
    ready_within_s: float = READY_WITHIN_S


@dataclass(frozen=True, slots=True)
class Count:
    """Replicas of a version at a site: those that exist and are not leaving, those that are READY, and what one of the others waits for."""

    existing: int = 0
    ready: int = 0
    waits_for: str = ""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One, under way or over. `wanted`: replicas by site, in the order in which sites follow ("" where the model names none); `before`: of the old."""

    stage: Stage
    from_version: int
    to_version: int
    wanted: Mapping[str, int]
    before: Mapping[str, int] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)


Counts = Mapping[tuple[int, str], Count]  # by version and site
_NOTHING = Count()


def counts(rollout: Rollout, seen: Counts) -> dict[tuple[int, str], int]:
    """How many replicas of each version there should be at each site."""
    planned = _planned(rollout, seen)
    return planned | _stopgaps(rollout, seen, planned)


def _planned(rollout: Rollout, seen: Counts) -> dict[tuple[int, str], int]:
    if rollout.stage is Stage.ROLLED_BACK:
        return {(rollout.from_version, site): number for site, number in rollout.wanted.items()}
    if rollout.stage not in UNDER_WAY:
        return {(rollout.to_version, site): number for site, number in rollout.wanted.items()}
    if rollout.stage is not Stage.SHIFTING:
        first = next((site for site, number in rollout.wanted.items() if number), None)
        old = {(rollout.from_version, site): number for site, number in rollout.before.items()}
        return old if first is None else old | {(rollout.to_version, first): 1}
    found = dict[tuple[int, str], int]()
    for site, number in rollout.wanted.items():
        new = seen.get((rollout.to_version, site), _NOTHING)
        its_turn = new.existing or all_ready_before(rollout, seen, site)
        found[rollout.to_version, site] = min(number, max(new.existing, new.ready + 1)) if its_turn else 0
    all_ready = all_ready_before(rollout, seen)
    for site, number in rollout.before.items():  # what exists never grows again: it would come too late to help
        ready = seen.get((rollout.to_version, site), _NOTHING).ready if site in rollout.wanted else 0
        existing = seen.get((rollout.from_version, site), _NOTHING).existing
        found[rollout.from_version, site] = 0 if all_ready else min(max(0, number - ready), existing)
    return found


def _stopgaps(rollout: Rollout, seen: Counts, planned: Mapping[tuple[int, str], int]) -> dict[tuple[int, str], int]:
    """Of versions that are not planned any more: those that are READY stay, as many as others are missing to serve as before."""
    serving = rollout.before if rollout.stage in UNDER_WAY else rollout.wanted
    ready = Counter[str]()
    for (version, site), number in planned.items():
        ready[site] += min(number, seen.get((version, site), _NOTHING).ready)
    missing = {site: max(0, number - ready[site]) for site, number in serving.items()}
    in_all, versions = max(0, sum(serving.values()) - ready.total()), {version for version, _ in planned}
    found = dict[tuple[int, str], int]()
    for version, site in sorted(seen):
        if version not in versions and (stays := min(seen[version, site].ready, missing.get(site, in_all))):
            found[version, site] = stays
            missing[site] = missing.get(site, in_all) - stays
    return found


def share_of(stage: Stage, policy: Policy) -> float | None:
    """Of the requests, how many go to the new version first; None: all replicas are alike."""
    return {Stage.WATCHING: policy.share, Stage.SURGING: 0.0, Stage.ROLLED_BACK: 0.0}.get(stage)


def all_ready_before(rollout: Rollout, seen: Counts, site: str | None = None) -> bool:
    """Whether the sites that come first have all of their new replicas READY; None: all sites."""
    for earlier, number in rollout.wanted.items():
        if earlier == site:
            return True
        if seen.get((rollout.to_version, earlier), _NOTHING).ready < number:
            return False
    return True


def step(
    rollout: Rollout, seen: Counts, age_s: float, verdict: str = "", unproven: str = ""
) -> tuple[Stage, str] | None:
    """The stage that follows and one sentence why; None: it stays.

    `age_s`: since the stage began or the last new replica became READY, as long as this leader has seen it. `verdict`: why the new version is
    worse than the old one, "" where it is not known to be. `unproven`: why nothing speaks for it although it was asked; it is watched for longer
    then, and rolled back when that goes on.
    """
    if rollout.stage not in UNDER_WAY:
        return None
    new = [seen.get((rollout.to_version, site), _NOTHING) for site in rollout.wanted]
    ready, total = sum(count.ready for count in new), sum(rollout.wanted.values())
    if verdict:
        return Stage.ROLLED_BACK, f"v{rollout.to_version} was rolled back: {verdict}"
    if rollout.stage is Stage.WATCHING:
        return _watched(rollout, ready, new, age_s, unproven)
    if rollout.stage is Stage.SURGING and (ready or not total):
        share = f"{100 * rollout.policy.share:.0f} %"
        return Stage.WATCHING, f"a replica of v{rollout.to_version} answers; it gets {share} of the requests"
    left = sum(count.existing for (version, _), count in seen.items() if version != rollout.to_version)
    if rollout.stage is Stage.SHIFTING and ready >= total and not left:
        return Stage.DONE, f"all {total} replicas are v{rollout.to_version}"
    if age_s >= rollout.policy.ready_within_s and ready < total:
        why = next((count.waits_for for count in new if count.existing > count.ready), "") or "none has come"
        within = f"{rollout.policy.ready_within_s:g} s"
        return (
            Stage.ROLLED_BACK,
            f"v{rollout.to_version} was rolled back: a replica was not READY within {within}: {why}",
        )
    return None


def _watched(rollout: Rollout, ready: int, new: list[Count], age_s: float, unproven: str) -> tuple[Stage, str] | None:
    total: int = sum(rollout.wanted.values())
    if not ready and total:
        why = next((count.waits_for for count in new if count.existing), "") or "it is gone"
        return Stage.ROLLED_BACK, f"v{rollout.to_version} was rolled back: its replica answered and stopped: {why}"
    if age_s < rollout.policy.watch_s:
        return None
    if unproven and age_s < rollout.policy.watch_s + rollout.policy.ready_within_s:
        return None
    if unproven:
        return Stage.ROLLED_BACK, f"v{rollout.to_version} was rolled back: {unproven}"
    return Stage.SHIFTING, f"v{rollout.to_version} is no worse than v{rollout.from_version}; the others follow"
