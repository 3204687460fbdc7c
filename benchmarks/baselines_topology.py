"""How others choose the hosts of a gang: Kueue's best-fit, KAI's order, Slurm's block plugin, and two that ignore topology.

Re-implemented from their sources' rules as public documents and code readings describe them. A gang is `pods` equal pods of `gpus` GPUs; each
function takes the tree and the free GPUs of every host and returns (host, GPUs) in rank order, or None.
`tests/unit/test_baselines_topology.py` holds each to its own rules on small cases.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Given = list[tuple[int, int]]  # (host, GPUs) in rank order
Policy = Callable[["Tree", Sequence[int], int, int], Given | None]


@dataclass(frozen=True, slots=True)
class Tree:
    """Hosts are numbered in the order of (spine, leaf, name); `leaf[h]` and `spine[h]` are consecutive numbers too."""

    leaf: tuple[int, ...]
    spine: tuple[int, ...]

    def spine_of_leaf(self) -> dict[int, int]:
        return dict(zip(self.leaf, self.spine, strict=True))


def _room(tree: Tree, free: Sequence[int], gpus: int) -> dict[int, dict[int, int]]:
    """Pods that fit, by leaf and host; hosts without room are left out."""
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for host, left in enumerate(free):
        if left >= gpus:
            found[tree.leaf[host]][host] = left // gpus
    return found


def kueue_best_fit(tree: Tree, free: Sequence[int], pods: int, gpus: int) -> Given | None:
    """Kueue TAS, profile BestFit, leaf preferred: the smallest domain that fits at the requested level, else one level up.

    Going down, all children of the chosen domains form one list, largest first; as soon as one holds what remains, the smallest
    such one takes it. Ties by name. Ranks follow the order of domain names, as its ungater assigns them.
    """
    hosts = _room(tree, free, gpus)
    leaves = {leaf: sum(h.values()) for leaf, h in hosts.items()}
    if any(room >= pods for room in leaves.values()):
        chosen = _minimum(leaves, pods)
    else:
        spine_of = tree.spine_of_leaf()
        spines: dict[int, int] = defaultdict(int)
        for leaf, room in leaves.items():
            spines[spine_of[leaf]] += room
        above = _minimum(spines, pods)
        if above is None:
            return None
        chosen = _minimum({d: room for d, room in leaves.items() if spine_of[d] in above}, pods)
    assert chosen is not None
    merged = {host: room for leaf in chosen for host, room in hosts[leaf].items()}
    taken = _minimum(merged, pods)
    assert taken is not None
    return [(host, count * gpus) for host, count in sorted(taken.items())]


def _minimum(room: dict[int, int], count: int) -> dict[int, int] | None:
    """Largest domains first; the smallest that holds all that remains comes last."""
    order = sorted(room, key=lambda d: (-room[d], d))
    chosen: dict[int, int] = {}
    for domain in order:
        if room[domain] >= count:
            fitting = [d for d in order if room[d] >= count and d not in chosen]
            chosen[min(fitting, key=lambda d: (room[d], d))] = count
            return chosen
        chosen[domain] = room[domain]
        count -= room[domain]
    return None


def kai_order(tree: Tree, free: Sequence[int], pods: int, gpus: int) -> Given | None:
    """KAI, leaf preferred: the domain with the highest ratio of request to free on the lowest level where all pods fit.

    Inside it pods go one by one to the node with the best score: its leaf's place among the leaves of that domain, scaled to 0-10 and
    floored (leaves beyond ten collide), then the fuller node (bin packing), then the name.
    """
    hosts = _room(tree, free, gpus)
    leaves = {leaf: sum(h.values()) for leaf, h in hosts.items()}
    fitting = [leaf for leaf, room in leaves.items() if room >= pods]
    if fitting:
        inside = [max(fitting, key=lambda d: (pods / leaves[d], -d))]
    else:
        spine_of = tree.spine_of_leaf()
        spines: dict[int, list[int]] = defaultdict(list)
        for leaf in leaves:
            spines[spine_of[leaf]].append(leaf)
        room = {spine: sum(leaves[d] for d in members) for spine, members in spines.items()}
        whole = [spine for spine in room if room[spine] >= pods]
        inside = spines[max(whole, key=lambda s: (pods / room[s], -s))] if whole else list(leaves)
    order = sorted(inside, key=lambda d: (-leaves[d], d))
    score = {leaf: (10 * (len(order) - at)) // len(order) for at, leaf in enumerate(order)}
    return _one_by_one([h for d in inside for h in hosts[d]], free, pods, gpus, lambda h: (-score[tree.leaf[h]], h))


def _one_by_one(
    hosts: list[int], free: Sequence[int], pods: int, gpus: int, score: Callable[[int], tuple[int, ...]]
) -> Given | None:
    """Pods in turn to the best host; of equal topology score the one with least left."""
    left = {h: free[h] for h in hosts}
    taken: Counter[int] = Counter()
    for _ in range(pods):
        fitting = [h for h in hosts if left[h] >= gpus]
        if not fitting:
            return None
        best = min(fitting, key=lambda h: (score(h)[0], left[h], *score(h)[1:]))
        taken[best] += gpus
        left[best] -= gpus
    return sorted(taken.items())


def slurm_block(tree: Tree, free: Sequence[int], pods: int, gpus: int) -> Given | None:
    """Slurm topology/block with leaves as base blocks: aggregates of 2^k consecutive blocks, the smallest k that could hold the job.

    Among aggregates with enough room the one with least; inside, blocks that hold all that remains (least room first), else the
    fullest; inside a block the nodes with least left. When no aggregate of that size fits, the next larger one is tried.
    """
    hosts = _room(tree, free, gpus)
    leaves = {leaf: sum(h.values()) for leaf, h in hosts.items()}
    blocks = max(tree.leaf) + 1
    size = Counter(tree.leaf).most_common(1)[0][1] * (8 // gpus)
    level = 0
    while size << level < pods:
        level += 1
    while True:
        width = 1 << level
        room = [sum(leaves.get(d, 0) for d in range(a, min(a + width, blocks))) for a in range(0, blocks, width)]
        fitting = [a for a, nodes in enumerate(room) if nodes >= pods]
        if fitting:
            best = min(fitting, key=lambda a: (room[a], a))
            members = [d for d in range(best * width, min((best + 1) * width, blocks)) if d in hosts]
            return _inside_aggregate({d: hosts[d] for d in members}, pods, gpus)
        if width >= blocks:
            return None
        level += 1


def _inside_aggregate(hosts: dict[int, dict[int, int]], pods: int, gpus: int) -> Given:
    taken: Given = []
    left = {d: sum(h.values()) for d, h in hosts.items()}
    while pods:
        holding = [d for d in left if left[d] >= pods]
        block = min(holding, key=lambda d: (left[d], d)) if holding else max(left, key=lambda d: (left[d], -d))
        del left[block]
        for host, room in sorted(hosts[block].items(), key=lambda item: (item[1], item[0])):
            if take := min(room, pods):
                taken.append((host, take * gpus))
                pods -= take
    return sorted(taken)


def blind_random(seed: int) -> Policy:
    """Each pod on any host with room; ranks as they come."""
    pick = random.Random(seed)

    def choose(_tree: Tree, free: Sequence[int], pods: int, gpus: int) -> Given | None:
        slots = [h for h, left in enumerate(free) for _ in range(left // gpus)]
        if len(slots) < pods:
            return None
        return list(Counter(pick.sample(slots, pods) if pods > 1 else [pick.choice(slots)]).items())

    return _gpus(choose)


def blind_first_fit(seed: int) -> Policy:
    """The first hosts with room of a list whose order has nothing to do with the network, as names from a cloud have not."""
    order: list[int] = []

    def choose(_tree: Tree, free: Sequence[int], pods: int, gpus: int) -> Given | None:
        if not order:
            order.extend(range(len(free)))
            random.Random(seed).shuffle(order)
        taken: Given = []
        for host in order:
            if take := min(free[host] // gpus, pods):
                taken.append((host, take))
                pods -= take
            if not pods:
                return taken
        return None

    return _gpus(choose)


def _gpus(choose: Policy) -> Policy:
    """From pods to GPUs."""

    def scaled(tree: Tree, free: Sequence[int], pods: int, gpus: int) -> Given | None:
        found = choose(tree, free, pods, gpus)
        return None if found is None else [(host, count * gpus) for host, count in found]

    return scaled
