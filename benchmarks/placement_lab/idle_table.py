"""What a placement strands: the idle GPU capacity that a node is expected to be left with once the fleet has filled up.

Fragmentation is a forecast. A hole of 190 thousandths of a GPU is waste when nothing that small ever arrives, and none when it does;
a free GPU is waste when its host's CPU is gone. So each node is valued by what becomes of its holes:

    value(node) = sum over its GPUs of table[scarcity(node), free part of that GPU]
    cost(placement) = value(node after) - value(node before) + tightness * (what is left on the node)

in thousandths of a GPU; the cheapest placement wins. `scarcity` is the host CPU or memory (the scarcer) left per idle GPU, in multiples
of what the usual request takes per GPU. The table is learned from the history of arrivals; no running scheduler
sets one yet (docs/not-yet.md). Nothing in the cost
depends on a node's name or position: nodes in equal state cost the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from benchmarks.packing_columns import WHOLE_MILLI, Ints

STEP_MILLI = 10  # width of a column of the table: a hole is rounded down to it
USUAL_GPUS = 8  # of a node; wholly free GPUs are told apart by how many of them their node has, up to this many
PARTS = WHOLE_MILLI // STEP_MILLI  # columns of partly free GPUs
COLUMNS = PARTS + USUAL_GPUS
FREE_MILLI = np.minimum(np.arange(COLUMNS) * STEP_MILLI, WHOLE_MILLI)  # what a column's GPU has free
# Rows of the table, finest around 1, where a node has just the CPU and memory that its idle GPUs will ask for.
SCARCITY = np.concatenate(
    [[0, 0.1, 0.2, 0.3, 0.4], np.arange(0.5, 1.475, 0.05), [1.5, 1.6, 1.7, 1.8, 2, 2.25, 2.5, 3, 4, 6]]
)
LAST = len(SCARCITY) - 1  # plenty is plenty
TIGHTNESS_MILLI = 3.0  # breaks ties for the fuller node; more keeps nodes whole for gangs, and strands more

Floats = NDArray[np.float64]
_Function = TypeVar("_Function", bound=Callable[..., object])


def compiled(function: _Function) -> _Function:
    """Machine code on the first call, kept on disk; typed, unlike the decorator that it stands for."""
    return cast("_Function", numba.njit(cache=True, nogil=True)(function))


class PartDemand(NamedTuple):
    """What one request takes of one node: `gpus` devices, and `gpu_milli` of each (1000 unless it shares a single one)."""

    cpu_millicores: int
    memory_bytes: int
    gpus: int
    gpu_milli: int


class IdleTable(NamedTuple):
    """Expected final idle part of a GPU, thousandths, by `SCARCITY` (rows) and free part (columns, see `column_of`).

    `cpu_millicores` and `memory_bytes` are what the history's requests took per GPU: the unit of scarcity, above zero.
    `tightness_milli` is what leaving a wholly idle node of the usual size costs, and a fuller one in proportion.
    """

    idle_milli: Floats
    cpu_millicores: float
    memory_bytes: float
    tightness_milli: float = TIGHTNESS_MILLI


def untaught(cpu_millicores: float, memory_bytes: float) -> IdleTable:
    """Without a history, only the means per GPU asked for: idle GPUs are used as far as the host's CPU and memory reach.

    On openb this alone packs better than FGD; a tenth of even the best hole is taken to stay idle.
    """
    usable = 0.9 * np.minimum(1.0, SCARCITY)[:, None]
    idle_milli = (1.0 - usable) * FREE_MILLI
    return IdleTable(idle_milli, max(cpu_millicores, 1.0), max(memory_bytes, 1.0))


def placement_costs(
    table: IdleTable, demand: PartDemand, cpu_left: Ints, memory_left: Ints, free_milli: Ints
) -> tuple[Floats, Ints]:
    """The cost of `demand` on each node: rows of `free_milli`, which has a column per GPU slot, 0 where there is no GPU.

    Returns thousandths of a GPU, infinite where the demand does not fit, and the device that a share should take (-1 for whole GPUs:
    any of the wholly free). The caller filters by everything else, such as model, labels and health.
    """
    costs = np.full(len(cpu_left), np.inf)
    devices = np.full(len(cpu_left), -1, dtype=np.int64)
    _fill_costs(costs, devices, table, demand, cpu_left, memory_left, free_milli)
    return costs, devices


@compiled
def row_of(scarcity: float) -> float:
    """Where `scarcity` falls among the table's rows, with a fraction between two of them."""
    if scarcity >= SCARCITY[LAST]:
        return float(LAST)
    row = int(np.searchsorted(SCARCITY, scarcity, side="right")) - 1
    return float(row + (scarcity - SCARCITY[row]) / (SCARCITY[row + 1] - SCARCITY[row]))


@compiled
def node_row(table: IdleTable, cpu_left: int, memory_left: int, idle_milli: int) -> float:
    """The row of a node with `idle_milli` > 0 in all."""
    share = min(cpu_left / table.cpu_millicores, memory_left / table.memory_bytes)
    return row_of(share * WHOLE_MILLI / idle_milli)


@compiled
def column_of(free_milli: int, whole: int) -> int:
    """The column of a GPU with so much free, on a node with `whole` wholly free ones."""
    return PARTS - 1 + min(whole, USUAL_GPUS) if free_milli == WHOLE_MILLI else free_milli // STEP_MILLI


@compiled
def count_whole(free_milli: Ints) -> int:
    whole = 0
    for free in free_milli:
        if free == WHOLE_MILLI:
            whole += 1
    return whole


@compiled
def node_value(table: IdleTable, cpu_left: int, memory_left: int, free_milli: Ints) -> float:
    """How much of one node's idle GPU capacity is expected to stay idle, in thousandths of a GPU."""
    idle_milli = free_milli.sum()
    if idle_milli == 0:
        return 0.0
    exact = node_row(table, cpu_left, memory_left, idle_milli)
    row = int(exact)
    above = min(row + 1, LAST)
    part = exact - row
    whole = count_whole(free_milli)
    value = 0.0
    for free in free_milli:
        if free > 0:
            column = column_of(free, whole)
            value += (1.0 - part) * table.idle_milli[row, column] + part * table.idle_milli[above, column]
    return value


@compiled
def fits(demand: PartDemand, cpu_left: int, memory_left: int, free_milli: Ints) -> bool:
    """Whether one node has room, looking at each device by itself."""
    if cpu_left < demand.cpu_millicores or memory_left < demand.memory_bytes:
        return False
    able = 0
    for free in free_milli:
        if free >= demand.gpu_milli:
            able += 1
    return able >= demand.gpus


@compiled
def take(demand: PartDemand, device: int, free_milli: Ints) -> None:
    """Takes a share of `device`, or the lowest wholly free devices when it is -1. The caller knows that it fits."""
    if device >= 0:
        free_milli[device] -= demand.gpu_milli
        return
    missing = demand.gpus
    for slot in range(len(free_milli)):
        if missing > 0 and free_milli[slot] == WHOLE_MILLI:
            free_milli[slot] = 0
            missing -= 1


@compiled
def placement_cost(
    table: IdleTable,
    demand: PartDemand,
    cpu_left: int,
    memory_left: int,
    free_milli: Ints,
    scratch: Ints,
    value_before: float,
) -> tuple[float, int]:
    """The cost of a demand that fits, and the device of a share. `scratch` is as long as `free_milli` and is overwritten."""
    scratch[:] = free_milli
    cpu, memory = cpu_left - demand.cpu_millicores, memory_left - demand.memory_bytes
    device = -1
    if demand.gpus == 1 and demand.gpu_milli < WHOLE_MILLI:
        value, device = _best_share(table, demand.gpu_milli, cpu, memory, scratch)
    else:
        take(demand, -1, scratch)
        value = node_value(table, cpu, memory, scratch)
    idle = free_milli.sum() - demand.gpus * demand.gpu_milli
    left = 0.5 * cpu / (table.cpu_millicores * USUAL_GPUS) + 0.5 * idle / (WHOLE_MILLI * USUAL_GPUS)
    return value - value_before + table.tightness_milli * left, device


@compiled
def _best_share(table: IdleTable, milli: int, cpu: int, memory: int, free_milli: Ints) -> tuple[float, int]:
    """The node's value after the best device gave `milli`, and that device. `free_milli` is left as it was."""
    best, chosen = np.inf, -1
    for device in range(len(free_milli)):
        before = free_milli[device]
        if before < milli or before in free_milli[:device]:  # devices in equal state are equal
            continue
        free_milli[device] = before - milli
        value = node_value(table, cpu, memory, free_milli)
        free_milli[device] = before
        if value < best:
            best, chosen = value, device
    return best, chosen


@compiled
def _fill_costs(
    costs: Floats,
    devices: Ints,
    table: IdleTable,
    demand: PartDemand,
    cpu_left: Ints,
    memory_left: Ints,
    free_milli: Ints,
) -> None:
    scratch = np.empty(free_milli.shape[1], dtype=np.int64)
    for node in range(len(cpu_left)):
        cpu, memory, free = cpu_left[node], memory_left[node], free_milli[node]
        if fits(demand, cpu, memory, free):
            before = node_value(table, cpu, memory, free)
            costs[node], devices[node] = placement_cost(table, demand, cpu, memory, free, scratch, before)
