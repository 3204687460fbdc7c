"""Learns the table of `fragmentation` by replaying the history of arrivals against the fleet.

Each replay fills an empty fleet with arrivals drawn with replacement from the history, placing each by the table learned so far, until
requests for `PRESSURE` times the fleet's GPUs have arrived. Every hole that appeared on the way is followed to the end: the mean of what
was then still idle is the next table (Monte Carlo policy iteration). A replay of 1,200 nodes and 11,000 arrivals takes about 50 ms, so
a table is relearned in seconds whenever the mix of requests has drifted. What is known of the future is only that it resembles the past.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.packing_columns import WHOLE_MILLI, DeviceArrays, Ints, Kinds
from benchmarks.placement_lab.idle_table import (
    LAST,
    Floats,
    IdleTable,
    PartDemand,
    column_of,
    compiled,
    count_whole,
    fits,
    node_row,
    node_value,
    placement_cost,
    take,
    untaught,
)

PRESSURE = 1.3  # requested over existing GPU capacity in one replay
EQUAL_MILLI = 1e-6  # costs closer than this are equal
FIRST = -1  # tie: the first of the equally cheap nodes


class Filled(NamedTuple):
    """The end of a replay: node of each arrival (-1: fitted nowhere), what is left, allocated GPU thousandths."""

    node: Ints
    cpu_left: Ints
    memory_left: Ints
    free_milli: Ints
    allocated_milli: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long to learn. The defaults take 128 replays and were chosen on samples that no benchmark uses."""

    rounds: int = 32
    replays: int = 4  # per round
    memory: float = 0.9  # weight that the past rounds' observations keep in the next
    step: float = 0.3  # how far each round moves the table
    doubt: float = 5.0  # observations that the old table counts for in each cell


def learn(
    fleet: DeviceArrays, kinds: Kinds, history: Ints, *, seed: int, schedule: Schedule | None = None
) -> IdleTable:
    """The table for a fleet and its history (indices into `kinds`, in any order). Deterministic in its arguments.

    Returns the table of the round whose replays allocated most.
    """
    schedule = schedule or Schedule()
    random = np.random.default_rng(seed)
    table = best = untaught(*needs_per_gpu(kinds, history))
    most = -1.0
    total, count = np.zeros_like(table.idle_milli), np.zeros_like(table.idle_milli)
    for done in range(schedule.rounds):
        total *= schedule.memory
        count *= schedule.memory
        samples = [draw(fleet, kinds, history, random) for _ in range(schedule.replays)]
        allocated = float(np.mean([observe(fleet, kinds, s, table, total, count) for s in samples]))
        if allocated > most:
            best, most = table, allocated
        table = _moved(table, total, count, schedule.doubt, 1.0 if done < 4 else schedule.step)
    return best


def needs_per_gpu(kinds: Kinds, history: Ints) -> tuple[float, float]:
    """CPU millicores and memory bytes per GPU asked for, over the requests that ask for GPUs; (0, 0) when none does."""
    gpu = history[kinds.gpus[history] > 0]
    if not len(gpu):
        return 0.0, 0.0
    gpus = float((kinds.gpus[gpu] * kinds.gpu_milli[gpu]).sum()) / WHOLE_MILLI
    return float(kinds.cpu_millicores[gpu].sum()) / gpus, float(kinds.memory_bytes[gpu].sum()) / gpus


def draw(fleet: DeviceArrays, kinds: Kinds, history: Ints, random: np.random.Generator) -> Ints:
    """Arrivals drawn from the history with replacement until they ask for `PRESSURE` times the fleet's GPUs."""
    wanted = PRESSURE * float(fleet.free_milli.sum())
    mean = float((kinds.gpus[history] * kinds.gpu_milli[history]).mean())
    if mean <= 0.0:  # no request asks for GPUs: there is nothing to strand
        return history
    arrivals = history[random.integers(len(history), size=int(1.2 * wanted / mean) + 100)]
    asked = np.cumsum(kinds.gpus[arrivals] * kinds.gpu_milli[arrivals])
    return arrivals[: int(np.searchsorted(asked, wanted)) + 1]


def fill(fleet: DeviceArrays, kinds: Kinds, arrivals: Ints, table: IdleTable, *, tie_seed: int = FIRST) -> Filled:
    """Places arrivals in order, each where it costs least; one that fits nowhere is dropped.

    Ties go to the first node, or to one drawn at random with `tie_seed` >= 0.
    """
    none = np.zeros((1, 1))
    return _replay(fleet, kinds, arrivals, table, tie_seed, False, none, none)


def observe(fleet: DeviceArrays, kinds: Kinds, arrivals: Ints, table: IdleTable, total: Floats, count: Floats) -> int:
    """Replays, and adds what each hole came to into `total` and `count`. Returns the allocated thousandths."""
    return int(_replay(fleet, kinds, arrivals, table, FIRST, True, total, count).allocated_milli)


def _moved(table: IdleTable, total: Floats, count: Floats, doubt: float, step: float) -> IdleTable:
    seen = (total + doubt * table.idle_milli) / (count + doubt)
    return table._replace(idle_milli=table.idle_milli + step * (seen - table.idle_milli))


@compiled
def _replay(
    fleet: DeviceArrays,
    kinds: Kinds,
    arrivals: Ints,
    table: IdleTable,
    tie_seed: int,
    record: bool,
    total: Floats,
    count: Floats,
) -> Filled:
    """One loop, read straight down: costs are kept per (kind, node) and computed again only for nodes that changed since."""
    if tie_seed >= 0:
        np.random.seed(tie_seed)  # noqa: NPY002  numba's own generator, private to compiled code
    cpu, memory = fleet.cpu_millicores.copy(), fleet.memory_bytes.copy()
    free = fleet.free_milli.copy()
    nodes, slots = free.shape
    changes = np.zeros(nodes, dtype=np.int64)
    known = np.full((len(kinds.gpus), nodes), -1, dtype=np.int64)
    costs = np.empty((len(kinds.gpus), nodes))
    devices = np.empty((len(kinds.gpus), nodes), dtype=np.int64)
    values = np.empty(nodes)
    for n in range(nodes):
        values[n] = node_value(table, cpu[n], memory[n], free[n])
    placed = np.full(len(arrivals), -1, dtype=np.int64)
    scratch = np.empty(slots, dtype=np.int64)
    seen_node = np.empty(len(arrivals) + nodes if record else 0, dtype=np.int64)
    seen_row = np.empty(len(seen_node))
    seen_free = np.empty((len(seen_node), slots), dtype=np.int64)
    seen = allocated = 0
    for arrival in range(len(arrivals)):
        kind = arrivals[arrival]
        demand = PartDemand(
            kinds.cpu_millicores[kind], kinds.memory_bytes[kind], kinds.gpus[kind], kinds.gpu_milli[kind]
        )
        models = kinds.models[kind] if demand.gpus > 0 else 0
        best, chosen, equal = np.inf, -1, 0
        for n in range(nodes):
            if known[kind, n] != changes[n]:
                known[kind, n] = changes[n]
                costs[kind, n] = np.inf
                if (models == 0 or (models >> fleet.model[n]) & 1) and fits(demand, cpu[n], memory[n], free[n]):
                    costs[kind, n], devices[kind, n] = placement_cost(
                        table, demand, cpu[n], memory[n], free[n], scratch, values[n]
                    )
            cost = costs[kind, n]
            if cost < best - EQUAL_MILLI:
                best, chosen, equal = cost, n, 1
            elif tie_seed >= 0 and chosen >= 0 and cost <= best + EQUAL_MILLI:
                equal += 1
                if np.random.randint(equal) == 0:  # noqa: NPY002
                    chosen = n
        if chosen < 0:
            continue
        n = chosen
        if record and free[n].sum() > 0:
            seen_node[seen], seen_row[seen] = n, node_row(table, cpu[n], memory[n], free[n].sum())
            seen_free[seen] = free[n]
            seen += 1
        cpu[n] -= demand.cpu_millicores
        memory[n] -= demand.memory_bytes
        take(demand, devices[kind, n], free[n])
        allocated += demand.gpus * demand.gpu_milli
        changes[n] += 1
        values[n] = node_value(table, cpu[n], memory[n], free[n])
        placed[arrival] = n
    if record:
        for n in range(nodes):
            if free[n].sum() > 0:
                seen_node[seen], seen_row[seen] = n, node_row(table, cpu[n], memory[n], free[n].sum())
                seen_free[seen] = free[n]
                seen += 1
        _account(seen_node[:seen], seen_row[:seen], seen_free[:seen], free, total, count)
    return Filled(placed, cpu, memory, free, allocated)


@compiled
def _account(node: Ints, exact_row: Floats, free_then: Ints, free_now: Ints, total: Floats, count: Floats) -> None:
    """Adds, for each hole seen, what of it is idle now, shared between the two rows that it lay between."""
    for s in range(len(node)):
        row = int(exact_row[s])
        above = min(row + 1, LAST)
        part = exact_row[s] - row
        whole = count_whole(free_then[s])
        for slot in range(free_then.shape[1]):
            if free_then[s, slot] > 0:
                column = column_of(free_then[s, slot], whole)
                total[row, column] += (1 - part) * free_now[node[s], slot]
                count[row, column] += 1 - part
                total[above, column] += part * free_now[node[s], slot]
                count[above, column] += part
