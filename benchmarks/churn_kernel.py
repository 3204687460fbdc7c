"""The fleet in use: pods arrive at random, live as long as the trace says, and leave; placed by a table or by FGD, moved within a budget.

A pod that fits nowhere may be given room by moving others, each at the cost of `MOVE_S` on the GPUs that it holds (checkpoint, restart:
it stays that much longer and this time does not count as allocated); when there is no way or no budget, it is dropped.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from benchmarks.baselines_packing import Typical, _scored
from benchmarks.packing_columns import WHOLE_MILLI, DeviceArrays, Ints, Kinds
from benchmarks.packing_openb import Stream, Workload
from benchmarks.placement_lab.idle_table import (
    Floats,
    IdleTable,
    PartDemand,
    compiled,
    fits,
    node_value,
    placement_cost,
    take,
)

MOVE_S = 300.0
MOVE_BUDGET = 0.01  # GPU time spent on moves over GPU time allocated
BY_TABLE = -1  # instead of a baseline's policy number
MOST_PODS = 512  # on one node; openb's smallest request leaves room for fewer
TRIES = 6  # nodes that are looked at to make room for one pod


class Churn(NamedTuple):
    """What the measured time showed; GPU seconds in thousandths of a GPU."""

    allocated_milli_s: float
    moving_milli_s: float
    moves: int
    arrived: int
    dropped: int
    arrived_gangs: int  # more than one GPU
    dropped_gangs: int


class State(NamedTuple):
    """The fleet and who runs where; arrays are changed in place."""

    cpu: Ints
    memory: Ints
    free: Ints
    changes: Ints
    values: Floats
    pods: Ints  # row per node, its running pods in the first `counts[node]` columns
    counts: Ints
    node_of: Ints
    devices_of: Ints  # bit mask


class Scores(NamedTuple):
    """Kept per (kind, node), computed again when the node has changed."""

    known: Ints
    cost: Floats
    device: Ints


def by_time_in_use(work: Workload, size: int, longest_s: float, seed: int) -> Ints:
    """A history as a running fleet shows it: requests as often as they are found running, not as they arrive."""
    life_s = np.minimum(work.life_s, longest_s)
    return work.pods[np.random.default_rng(seed).choice(len(work.pods), size=size, p=life_s / life_s.sum())]


def run_churn(
    fleet: DeviceArrays,
    kinds: Kinds,
    stream: Stream,
    warm_up_s: float,
    table: IdleTable,
    typical: Typical,
    *,
    policy: int = BY_TABLE,
    move_budget: float = 0.0,
) -> Churn:
    return _run(fleet, kinds, stream, warm_up_s, table, typical, policy, move_budget)


@compiled
def _demand(kinds: Kinds, kind: int) -> PartDemand:
    return PartDemand(kinds.cpu_millicores[kind], kinds.memory_bytes[kind], kinds.gpus[kind], kinds.gpu_milli[kind])


@compiled
def _refresh(
    scores: Scores,
    fleet: DeviceArrays,
    kinds: Kinds,
    state: State,
    table: IdleTable,
    typical: Typical,
    policy: int,
    kind: int,
    n: int,
    scratch: Ints,
) -> None:
    scores.cost[kind, n] = np.inf
    demand = _demand(kinds, kind)
    models = kinds.models[kind] if demand.gpus > 0 else 0
    if models != 0 and not (models >> fleet.model[n]) & 1:
        return
    cpu, memory, free = state.cpu[n], state.memory[n], state.free[n]
    if not fits(demand, cpu, memory, free):
        return
    if policy == BY_TABLE:
        cost, device = placement_cost(table, demand, cpu, memory, free, scratch, state.values[n])
    else:
        score, device = _scored(policy, typical, demand, cpu, fleet.model[n], free, scratch)
        cost = -score
    scores.cost[kind, n] = cost
    scores.device[kind, n] = device


@compiled
def _cheapest(
    scores: Scores,
    fleet: DeviceArrays,
    kinds: Kinds,
    state: State,
    table: IdleTable,
    typical: Typical,
    policy: int,
    kind: int,
    barred: int,
    scratch: Ints,
) -> int:
    best, chosen = np.inf, -1
    known, changes, cost = scores.known[kind], state.changes, scores.cost[kind]
    for n in range(len(changes)):
        if known[n] != changes[n]:
            known[n] = changes[n]
            _refresh(scores, fleet, kinds, state, table, typical, policy, kind, n, scratch)
        if cost[n] < best and n != barred:
            best, chosen = cost[n], n
    return chosen


@compiled
def _put(state: State, table: IdleTable, demand: PartDemand, pod: int, n: int, device: int) -> None:
    before = state.free[n].copy()
    take(demand, device, state.free[n])
    mask = 0
    for slot in range(len(before)):
        if state.free[n, slot] != before[slot]:
            mask |= 1 << slot
    _settle(state, table, demand, pod, n, mask, 1)
    state.node_of[pod], state.devices_of[pod] = n, mask
    state.pods[n, state.counts[n]] = pod
    state.counts[n] += 1


@compiled
def _settle(state: State, table: IdleTable, demand: PartDemand, pod: int, n: int, mask: int, sign: int) -> None:
    state.cpu[n] -= sign * demand.cpu_millicores
    state.memory[n] -= sign * demand.memory_bytes
    state.changes[n] += 1
    state.values[n] = node_value(table, state.cpu[n], state.memory[n], state.free[n])


@compiled
def _remove(state: State, table: IdleTable, demand: PartDemand, pod: int) -> None:
    n, mask = state.node_of[pod], state.devices_of[pod]
    for slot in range(state.free.shape[1]):
        if (mask >> slot) & 1:
            state.free[n, slot] += demand.gpu_milli
    _settle(state, table, demand, pod, n, mask, -1)
    last = state.counts[n] - 1
    for i in range(last + 1):
        if state.pods[n, i] == pod:
            state.pods[n, i] = state.pods[n, last]
            break
    state.counts[n] = last
    state.node_of[pod] = -1


@compiled
def _devices_to_clear(
    demand: PartDemand, kinds: Kinds, kind_of: Ints, state: State, n: int, load: Ints
) -> tuple[int, int]:
    """The bit mask of devices that would be cleared for the demand and the thousandths on them; (0, -1) when no clearing helps.

    `load` is scratch: what movable pods hold per device. Pods that hold several devices stay.
    """
    slots = state.free.shape[1]
    load[:] = -1
    for slot in range(slots):
        if state.free[n, slot] > 0:
            load[slot] = 0
    cpu, memory = state.cpu[n], state.memory[n]
    for i in range(state.counts[n]):
        pod = state.pods[n, i]
        kind, mask = kind_of[pod], state.devices_of[pod]
        if kinds.gpus[kind] == 1:
            for slot in range(slots):
                if mask == 1 << slot:
                    load[slot] = max(load[slot], 0) + kinds.gpu_milli[kind]
                    cpu += kinds.cpu_millicores[kind]
                    memory += kinds.memory_bytes[kind]
    if cpu < demand.cpu_millicores or memory < demand.memory_bytes:
        return 0, -1
    mask = total = 0
    for _ in range(demand.gpus):
        best = -1
        for slot in range(slots):
            usable = load[slot] >= 0 and state.free[n, slot] + load[slot] == WHOLE_MILLI and not (mask >> slot) & 1
            if usable and (best < 0 or load[slot] < load[best]):
                best = slot
        if best < 0:
            return 0, -1
        mask |= 1 << best
        total += load[best]
    return mask, total


@compiled
def _run(
    fleet: DeviceArrays,
    kinds: Kinds,
    stream: Stream,
    warm_up_s: float,
    table: IdleTable,
    typical: Typical,
    policy: int,
    move_budget: float,
) -> Churn:
    """One loop over arrivals; departures due before each are taken from a heap first."""
    nodes, slots = fleet.free_milli.shape
    pods = len(stream.kind)
    kind_count = len(kinds.gpus)
    state = State(
        fleet.cpu_millicores.copy(),
        fleet.memory_bytes.copy(),
        fleet.free_milli.copy(),
        np.zeros(nodes, dtype=np.int64),
        np.zeros(nodes),
        np.zeros((nodes, MOST_PODS), dtype=np.int64),
        np.zeros(nodes, dtype=np.int64),
        np.full(pods, -1, dtype=np.int64),
        np.zeros(pods, dtype=np.int64),
    )
    scores = Scores(
        np.full((kind_count, nodes), -1, dtype=np.int64),
        np.empty((kind_count, nodes)),
        np.full((kind_count, nodes), -1, dtype=np.int64),
    )
    for n in range(nodes):
        state.values[n] = node_value(table, state.cpu[n], state.memory[n], state.free[n])
    scratch = np.empty(slots, dtype=np.int64)
    load = np.empty(slots, dtype=np.int64)
    late_s = np.zeros(pods)  # a moved pod stays longer
    due = [(0.0, -1)]
    heapq.heappop(due)
    end_s = stream.time_s[-1] if pods else 0.0
    held = 0  # thousandths allocated now
    now = allocated = moving = 0.0
    lifetime_allocated = lifetime_moving = 0.0
    moves = arrived = dropped = arrived_gangs = dropped_gangs = 0
    moved = np.empty((64, 2), dtype=np.int64)
    for pod in range(pods + 1):
        until = stream.time_s[pod] if pod < pods else end_s
        while len(due) > 0 and due[0][0] <= until:
            at, gone = heapq.heappop(due)
            if late_s[gone] > 0.0:
                heapq.heappush(due, (at + late_s[gone], gone))
                late_s[gone] = 0.0
                continue
            allocated += held * max(0.0, at - max(now, warm_up_s))
            lifetime_allocated += held * (at - now)
            now = at
            demand = _demand(kinds, stream.kind[gone])
            held -= demand.gpus * demand.gpu_milli
            _remove(state, table, demand, gone)
        allocated += held * max(0.0, until - max(now, warm_up_s))
        lifetime_allocated += held * (until - now)
        now = until
        if pod == pods:
            break
        kind = stream.kind[pod]
        demand = _demand(kinds, kind)
        milli = demand.gpus * demand.gpu_milli
        counted = now >= warm_up_s
        arrived += counted
        arrived_gangs += counted and demand.gpus > 1
        n = _cheapest(scores, fleet, kinds, state, table, typical, policy, kind, -1, scratch)
        if n < 0 and move_budget > 0.0 and demand.gpus > 0 and lifetime_moving < move_budget * lifetime_allocated:
            done = _make_room(
                scores, fleet, kinds, stream.kind, state, table, typical, policy, demand, kind, scratch, load, moved
            )
            if done > 0:
                for i in range(done):
                    other = moved[i, 0]
                    cost = MOVE_S * kinds.gpu_milli[stream.kind[other]]
                    late_s[other] += MOVE_S
                    lifetime_moving += cost
                    moving += counted * cost
                moves += counted * done
                n = _cheapest(scores, fleet, kinds, state, table, typical, policy, kind, -1, scratch)
        if n < 0:
            dropped += counted
            dropped_gangs += counted and demand.gpus > 1
            continue
        _put(state, table, demand, pod, n, scores.device[kind, n])
        held += milli
        heapq.heappush(due, (now + stream.life_s[pod], pod))
    return Churn(allocated, moving, moves, arrived, dropped, arrived_gangs, dropped_gangs)


@compiled
def _make_room(
    scores: Scores,
    fleet: DeviceArrays,
    kinds: Kinds,
    kind_of: Ints,
    state: State,
    table: IdleTable,
    typical: Typical,
    policy: int,
    demand: PartDemand,
    kind: int,
    scratch: Ints,
    load: Ints,
    moved: Ints,
) -> int:
    """Clears devices on the node where least has to move; returns the number of pods moved, listed in `moved`, 0 if it fails.

    Only whole GPUs are cleared. A failed attempt is undone.
    """
    if demand.gpu_milli < WHOLE_MILLI:
        return 0
    nodes = len(state.cpu)
    tried = np.full(TRIES, -1, dtype=np.int64)
    for attempt in range(TRIES):
        best, target, target_mask = WHOLE_MILLI * 64, -1, 0
        for n in range(nodes):
            models = kinds.models[kind]
            if (models != 0 and not (models >> fleet.model[n]) & 1) or n in tried[:attempt]:
                continue
            mask, total = _devices_to_clear(demand, kinds, kind_of, state, n, load)
            if 0 <= total < best:
                best, target, target_mask = total, n, mask
        if target < 0:
            return 0
        tried[attempt] = target
        done = _clear(scores, fleet, kinds, kind_of, state, table, typical, policy, target, target_mask, scratch, moved)
        fitting = done >= 0 and fits(demand, state.cpu[target], state.memory[target], state.free[target])
        if fitting and done > 0:
            return done
        _undo(kinds, kind_of, state, table, target, max(done, 0), moved)
    return 0


@compiled
def _clear(
    scores: Scores,
    fleet: DeviceArrays,
    kinds: Kinds,
    kind_of: Ints,
    state: State,
    table: IdleTable,
    typical: Typical,
    policy: int,
    target: int,
    mask: int,
    scratch: Ints,
    moved: Ints,
) -> int:
    """Moves every pod off the devices of `mask` to where it costs least; on a pod that fits nowhere undoes all and returns -1."""
    done = 0
    i = 0
    while i < state.counts[target]:
        pod = state.pods[target, i]
        if state.devices_of[pod] & mask == 0 or kinds.gpus[kind_of[pod]] != 1 or done == len(moved):
            i += 1
            continue
        other = kind_of[pod]
        n = _cheapest(scores, fleet, kinds, state, table, typical, policy, other, target, scratch)
        if n < 0:
            _undo(kinds, kind_of, state, table, target, done, moved)
            return -1
        demand = _demand(kinds, other)
        moved[done, 0], moved[done, 1] = pod, state.devices_of[pod]
        _remove(state, table, demand, pod)
        _put(state, table, demand, pod, n, scores.device[other, n])
        done += 1
    return done


@compiled
def _undo(kinds: Kinds, kind_of: Ints, state: State, table: IdleTable, target: int, done: int, moved: Ints) -> None:
    for i in range(done - 1, -1, -1):
        pod, mask = moved[i, 0], moved[i, 1]
        demand = _demand(kinds, kind_of[pod])
        _remove(state, table, demand, pod)
        for slot in range(state.free.shape[1]):
            if (mask >> slot) & 1:
                state.free[target, slot] -= demand.gpu_milli
        _settle(state, table, demand, pod, target, mask, 1)
        state.node_of[pod], state.devices_of[pod] = target, mask
        state.pods[target, state.counts[target]] = pod
        state.counts[target] += 1
