"""The placement engine keeps its promises under a long random history.

Random places, finishes, partial releases, failures, drains, hardware changes, removals, preemptions, roll-backs and restarts on a small
mixed fleet. After every operation an independent ledger (a dictionary of who holds which device, written here) is compared with what
was answered; at intervals the engine's columns are compared with a rebuild, and a restarted engine must decide byte-identically.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations

from benchmarks.common import Options, Report, Target, main
from whaleflux.fleet import Gpu, Level, Link, LinkKind, Node, Price
from whaleflux_scheduler.core.placement.api import (
    GpuOption,
    GpuRequirement,
    GroupRequest,
    NodeAssignment,
    Placement,
    PlaceRequest,
    PreemptionPlan,
    Share,
    Subgroup,
    Victim,
)
from whaleflux_scheduler.core.placement.engine import Engine

GB = 10**9
MIG = "3g.71gb"
MODELS = {"H200": 141 * GB, "H100-80GB": 80 * GB, "A100-80GB": 80 * GB, "RTX4090": 24 * GB}


def make_node(random_: random.Random, at: int) -> Node:
    """Sites of different hardware: NVSwitch, two islands, PCIe only, MIG; some links are broken."""
    model = random_.choice(list(MODELS))
    gpus = 2 if model == "RTX4090" else random_.choice([4, 8, 8])
    islands = {"RTX4090": [], "A100-80GB": [range(gpus // 2), range(gpus // 2, gpus)]}.get(model, [range(gpus)])
    links = tuple(
        Link(a, b, LinkKind.NVLINK, 347e9)
        for island in islands
        for a, b in combinations(island, 2)
        if random_.random() > 0.01
    )
    devices = [Gpu(i, f"{at}-{i}", model, MODELS[model], (9, 0)) for i in range(gpus)]
    if model == "H200" and random_.random() < 0.1:
        devices = cut_first(devices)
        links = tuple(link for link in links if link.a)
    return Node(
        name=f"sites/s{at % 3}/nodes/n{at}",
        site=f"s{at % 3}",
        gpus=tuple(devices),
        links=links,
        spine=f"p{at // 3 % 2}",
        leaf=f"l{at // 6 % 2}",
        cpu_millicores=96_000,
        memory_bytes=1000 * GB,
        network_bytes_per_s=50e9 * gpus,
        labels=(("pool", "a" if at % 2 else "b"),),
        price=Price(usd_per_gpu_hour=random_.choice([1.0, 2.0, 3.0])),
    )


def cut_first(gpus: list[Gpu]) -> list[Gpu]:
    """The first GPU is cut into two MIG instances, each a device."""
    first = gpus[0]
    half = replace(first, model=f"{first.model} {MIG}", memory_bytes=first.memory_bytes // 2, mig_profile=MIG)
    half = replace(half, parent_uuid=first.uuid, parent_memory_bytes=first.memory_bytes)
    instances = [replace(half, index=i, uuid=f"MIG-{first.uuid}-{i}") for i in (0, len(gpus))]
    return [instances[0], *gpus[1:], instances[1]]


@dataclass
class Ledger:
    """Who holds what, kept by the plainest means."""

    whole: dict[tuple[str, int], str] = field(default_factory=dict)
    milli: Counter[tuple[str, int]] = field(default_factory=Counter)
    memory: Counter[tuple[str, int]] = field(default_factory=Counter)
    cpu: Counter[str] = field(default_factory=Counter)

    def add(self, placement: Placement, nodes: dict[str, Node], sign: int = 1) -> None:
        for part in placement.nodes:
            self.cpu[part.node] += sign * part.cpu_millicores
            assert self.cpu[part.node] >= 0
            for gpu in part.gpus:
                self._device(placement.id, part, gpu, nodes, sign)

    def _device(self, id_: str, part: NodeAssignment, gpu: int, nodes: dict[str, Node], sign: int) -> None:
        key, share = (part.node, gpu), part.share
        if share is None:
            if sign > 0:
                assert key not in self.whole, f"{key} given to {self.whole[key]} and {id_}"
                assert not self.memory[key], f"{key} is shared already"
                self.whole[key] = id_
            else:
                assert self.whole.pop(key) == id_
            return
        assert key not in self.whole, f"{key} is wholly held by {self.whole.get(key)}"
        facts = nodes[part.node].gpus[gpu] if part.node in nodes else None
        self.memory[key] += sign * share.memory_bytes
        if sign > 0 and facts:
            assert self.memory[key] <= facts.memory_bytes, f"{key}: memory over-committed"


class History:
    """One random run: the engine, the ledger, and the facts that the engine was told."""

    def __init__(self, seed: int, nodes: int = 36) -> None:
        self.random = random.Random(seed)
        self.nodes = {n.name: n for n in (make_node(self.random, at) for at in range(nodes))}
        self.gone: dict[str, Node] = {}
        self.unschedulable: dict[str, str] = {}
        self.engine = Engine()
        for node in self.nodes.values():
            self.engine.upsert_node(node)
        self.ledger = Ledger()
        self.next_id = 0
        self.done: Counter[str] = Counter()

    def step(self) -> None:
        roll = self.random.random()
        for chance, operation in (
            (0.48, self.place),
            (0.86, self.finish),
            (0.89, self.partial),
            (0.93, self.fail_or_return),
            (0.97, self.roll_back),
            (0.985, self.preempt),
            (0.994, self.hardware),
            (0.998, self.remove_or_add),
            (1.0, self.restart),
        ):
            if roll < chance:
                operation()
                self.done[operation.__name__] += 1
                return

    def request(self) -> PlaceRequest:
        pick = self.random
        self.next_id += 1
        kind = pick.random()
        id_ = f"job-{self.next_id}"
        need = GpuRequirement(
            any_of=pick.choice(
                [(GpuOption(),), (GpuOption("H100-80GB"),), (GpuOption("H200"), GpuOption("A100-80GB", 2, 0.9))]
            ),
            min_memory_bytes=pick.choice([0, 0, 40 * GB, 100 * GB]),
            cpu_millicores_per_gpu=pick.choice([0, 0, 4000, 12_000]),
            labels=pick.choice([(), (), (("pool", "a"),)]),
        )
        if kind < 0.25:
            if pick.random() < 0.2:
                return PlaceRequest(id_, GroupRequest(pick.choice([1, 2])), GpuRequirement(mig_profile=MIG))
            share = pick.choice([Share(4 * GB), Share(10 * GB), Share(1 * GB), Share(20 * GB, apart=True)])
            parts = pick.choice([1, 1, 3])
            level = pick.choice([None, None, Level.NODE if share.apart else Level.GPU, Level.NODE, Level.LEAF])
            group = GroupRequest(parts, share=share, level=level)
            light = GpuRequirement(cpu_millicores_per_gpu=need.cpu_millicores_per_gpu, labels=need.labels)
            spread = pick.choice([0, 2]) if parts > 1 and level in (None, Level.LEAF) else 0
            return PlaceRequest(id_, group, light, min_nodes=spread)
        gpus = pick.choice([1, 1, 2, 2, 4, 8, 12, 16, 24])
        size = pick.choice([1, 1, 2, 4])
        group = GroupRequest(
            gpus=gpus,
            level=pick.choice([None, None, None, Level.NODE, Level.LEAF]),
            subgroups=(Subgroup(size, pick.choice([Level.ISLAND, Level.NODE]), required=True),)
            if gpus % size == 0 and size > 1
            else (),
        )
        return PlaceRequest(
            id_,
            group,
            need,
            level=pick.choice([None, None, Level.SITE]),
            min_nodes=pick.choice([0, 0, 2]) if gpus >= 2 else 0,
            priority=pick.randrange(3),
            exclude_nodes=tuple(pick.sample(sorted(self.nodes), 2)) if pick.random() < 0.2 else (),
        )

    def place(self) -> None:
        request = self.request()
        answer = self.engine.fits(request)
        if answer is None:
            if self.random.random() < 0.05:
                said = self.engine.place(request)
                assert not isinstance(said, Placement)
                self.done["explained"] += 1
            return
        self.verify(request, answer)
        self.engine.apply(answer)
        self.ledger.add(answer, self.nodes)
        self.done["placed"] += 1

    def verify(self, request: PlaceRequest, answer: Placement) -> None:
        """Every promise of the request, checked against the facts alone."""
        nodes = [self.nodes[a.node] for a in answer.nodes]
        assert answer.gpus == request.units * answer.option.per_unit or request.group.share
        assert sorted(r for a in answer.nodes for r in a.ranks) == list(range(answer.gpus))
        assert not {n.name for n in nodes} & (set(request.exclude_nodes) | set(self.unschedulable))
        assert len(answer.node_names) >= request.min_nodes
        need = request.requirement
        for node, part in zip(nodes, answer.nodes, strict=True):
            for gpu in part.gpus:
                facts = node.gpus[gpu]
                assert facts.healthy
                assert facts.memory_bytes >= need.min_memory_bytes
                assert answer.option.model in ("", facts.model)
                assert answer.option.model or facts.mig_profile == need.mig_profile
            assert not (part.share and part.share.apart) or len(set(part.gpus)) == len(part.gpus)
            assert set(need.labels) <= set(node.labels)
            assert self.ledger.cpu[node.name] + part.cpu_millicores <= node.cpu_millicores
        group = request.group
        if group.level is Level.NODE:
            assert len(answer.node_names) == 1
        if group.level is Level.GPU:
            assert len({(a.node, g) for a in answer.nodes for g in a.gpus}) == 1
        if group.level is Level.LEAF:
            assert len({(n.site, n.spine, n.leaf) for n in nodes}) == 1
        if request.level is Level.SITE:
            assert len({n.site for n in nodes}) == 1

    def finish(self) -> None:
        if self.engine.free_gpus() > 30 and self.random.random() < 0.8:
            self.place()  # keeps the fleet nearly full, where mistakes show
        elif self.engine.placements:
            id_ = self.random.choice(sorted(self.engine.placements))
            self.ledger.add(self.engine.placements[id_], self.nodes, -1)
            self.engine.release(id_)

    def partial(self) -> None:
        """A gang moves on and leaves what is on an unreachable node behind."""
        several = [p for p in self.engine.placements.values() if len(p.node_names) > 1]
        if several:
            placement = self.random.choice(several)
            out = placement.node_names[:1]
            self.ledger.add(
                replace(placement, nodes=tuple(a for a in placement.nodes if a.node in out)), self.nodes, -1
            )
            self.engine.release(placement.id, out)

    def fail_or_return(self) -> None:
        name = self.random.choice(sorted(self.nodes))
        if name in self.unschedulable:
            self.engine.set_schedulable(name, True)
            del self.unschedulable[name]
        elif len(self.unschedulable) < 6:
            self.unschedulable[name] = self.random.choice(["suspect", "draining"])
            self.engine.set_schedulable(name, False, self.unschedulable[name])

    def roll_back(self) -> None:
        before = self.engine.digest()
        with self.engine.transaction():
            for _ in range(self.random.randrange(1, 5)):
                self._tentative()
            with self.engine.transaction() as inner:
                self._tentative()
                if self.random.random() < 0.5:
                    inner.commit()
        assert self.engine.digest() == before, "a roll-back left a trace"

    def _tentative(self) -> None:
        if self.random.random() < 0.5 and self.engine.placements:
            id_ = self.random.choice(sorted(self.engine.placements))
            nodes = self.engine.placements[id_].node_names
            self.engine.release(id_, nodes[:1] if self.random.random() < 0.3 else None)
        elif self.random.random() < 0.4:
            placed = sorted(self.engine.placements)
            self.engine.release_all(self.random.sample(placed, min(len(placed), 12)))
        answer = self.engine.fits(self.request())
        if answer:
            self.engine.apply(answer)

    def preempt(self) -> None:
        request = replace(self.request(), priority=5)
        victims = [
            Victim(id_, self.random.randrange(6), self.random.random() * 100) for id_ in sorted(self.engine.placements)
        ]
        plan = self.engine.preempt(request, victims)
        if not isinstance(plan, PreemptionPlan):
            return
        priorities = {v.id: v.priority for v in victims}
        assert all(priorities[v] < 5 for v in plan.victims)
        for id_ in plan.victims:
            self.ledger.add(self.engine.placements[id_], self.nodes, -1)
        self.engine.release_all(plan.victims)
        self.verify(request, plan.placement)
        self.engine.apply(plan.placement)
        self.ledger.add(plan.placement, self.nodes)
        self.done["preempted"] += bool(plan.victims)

    def hardware(self) -> None:
        """A GPU falls off the bus or comes back; what runs there is not touched."""
        name = self.random.choice(sorted(self.nodes))
        node = self.nodes[name]
        at = self.random.randrange(len(node.gpus))
        gpus = tuple(replace(g, healthy=not g.healthy) if i == at else g for i, g in enumerate(node.gpus))
        self.nodes[name] = replace(node, gpus=gpus)
        self.engine.upsert_node(self.nodes[name])

    def remove_or_add(self) -> None:
        if self.gone and self.random.random() < 0.6:
            name = self.random.choice(sorted(self.gone))
            self.nodes[name] = self.gone.pop(name)
            self.engine.upsert_node(self.nodes[name])
        elif len(self.nodes) > 25:
            name = self.random.choice(sorted(self.nodes))
            self.gone[name] = self.nodes.pop(name)
            self.unschedulable.pop(name, None)
            self.engine.remove_node(name)

    def restart(self) -> None:
        """A new leader reads nodes and placements in its own order and must stand where the old one stood."""
        fresh = Engine()
        for name in self.random.sample(sorted(self.nodes), len(self.nodes)):
            fresh.upsert_node(self.nodes[name])
            if name in self.unschedulable:
                fresh.set_schedulable(name, False, self.unschedulable[name])
        for id_ in self.random.sample(sorted(self.engine.placements), len(self.engine.placements)):
            fresh.apply(self.engine.placements[id_])
        assert fresh.digest() == self.engine.digest(), "a restart changed the state"
        for _ in range(3):
            request = self.request()
            assert repr(fresh.place(request)) == repr(self.engine.place(request)), "a restart changed a decision"
        self.engine = fresh

    def check(self) -> None:
        self.engine.check()
        held = {
            (a.node, g): p.id for p in self.engine.placements.values() for a in p.nodes if not a.share for g in a.gpus
        }
        assert held == self.ledger.whole, "the ledger and the engine disagree"
        free = sum(
            g.healthy
            and (n.name, g.index) not in self.ledger.whole
            and not (self.ledger.milli[n.name, g.index] or self.ledger.memory[n.name, g.index])
            for n in self.nodes.values()
            if n.name not in self.unschedulable
            for g in n.gpus
        )
        assert free == self.engine.free_gpus(), f"{free - self.engine.free_gpus()} GPUs leaked"


def run(operations: int, seed: int, every: int = 250) -> Counter[str]:
    """Runs a history; raises AssertionError at the first broken promise. Returns how often each operation ran."""
    history = History(seed)
    for at in range(operations):
        history.step()
        if at % every == 0:
            history.check()
    history.check()
    return history.done


def measure(options: Options) -> Report:
    """Random histories with an independent ledger: nothing over-committed, nothing leaked, decisions repeatable."""
    operations, part = (20_000, 20_000) if options.quick else (1_000_000, 50_000)
    report = Report(simulated="the fleet (36 nodes, mixed hardware) and every event")
    total: Counter[str] = Counter()
    begun, broken = time.perf_counter(), 0
    for at in range(operations // part):
        try:
            total += run(part, options.seed + at)
        except AssertionError as broke:
            broken += 1
            report.notes.append(f"seed {options.seed + at}: {broke}")
    seconds = time.perf_counter() - begun
    report.rows = [{"operation": name, "times": count} for name, count in total.most_common()]
    report.rows.append({"operation": "all, per second", "times": int(operations / seconds)})
    report.targets = [Target("broken_promises", broken, 0, f"in {operations:,} operations")]
    return report


if __name__ == "__main__":
    sys.exit(main("placement_invariants", measure))
