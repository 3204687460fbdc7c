"""The openb trace in columns: its nodes, its pod lists, and the order in which the published protocol lets pods arrive."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.packing_columns import WHOLE_MILLI, DeviceArrays, Ints, Kinds

MIB = 1 << 20
PREFIX, SUFFIX = "openb_pod_list_", ".csv.gz"
DAY_S = 86_400.0
Floats = NDArray[np.float64]
LATEST_LIFE_S = 7 * 86_400  # lives are capped for the track with departures


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """One pod list: its distinct requests, and for each pod (in the order of names) the index of its request and its life."""

    name: str
    kinds: Kinds
    pods: Ints
    life_s: Ints


class Stream(NamedTuple):
    """Pods in the order of arrival: when, what, for how long."""

    time_s: Floats
    kind: Ints
    life_s: Floats


def rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def read_fleet(folder: Path) -> tuple[DeviceArrays, dict[str, int]]:
    """The nodes with GPUs, in the order of the file, and the bit number of each GPU model."""
    nodes = list(rows(folder / "openb_node_list_gpu_node.csv.gz"))
    models = {model: bit for bit, model in enumerate(sorted({n["model"] for n in nodes}))}
    gpus = np.array([int(n["gpu"]) for n in nodes], dtype=np.int64)
    free = np.where(np.arange(gpus.max())[None, :] < gpus[:, None], WHOLE_MILLI, 0).astype(np.int64)
    return DeviceArrays(
        np.array([int(n["cpu_milli"]) for n in nodes], dtype=np.int64),
        np.array([int(n["memory_mib"]) * MIB for n in nodes], dtype=np.int64),
        np.array([models[n["model"]] for n in nodes], dtype=np.int64),
        free,
    ), models


def workload_names(folder: Path) -> list[str]:
    return sorted(p.name[len(PREFIX) : -len(SUFFIX)] for p in folder.glob(f"{PREFIX}*{SUFFIX}"))


def read_workload(folder: Path, name: str, models: dict[str, int]) -> Workload:
    pods = sorted(rows(folder / f"{PREFIX}{name}{SUFFIX}"), key=lambda pod: pod["name"])
    asks = [_ask(pod, models) for pod in pods]
    distinct = sorted(set(asks))
    number = {ask: i for i, ask in enumerate(distinct)}
    columns = np.array(distinct, dtype=np.int64).T.copy()
    return Workload(
        name,
        Kinds(*columns),
        np.array([number[ask] for ask in asks], dtype=np.int64),
        np.array([_life_s(pod) for pod in pods], dtype=np.int64),
    )


def _ask(pod: dict[str, str], models: dict[str, int]) -> tuple[int, int, int, int, int]:
    gpus = int(pod["num_gpu"])
    mask = 0
    for model in (pod.get("gpu_spec") or "").split("|"):
        # An allowed model that no node has leaves a bit that no node sets: such a pod fits nowhere, rather than everywhere.
        mask |= 1 << models.get(model, 62) if model else 0
    return (
        int(pod["cpu_milli"]),
        int(pod["memory_mib"]) * MIB,
        gpus,
        int(pod["gpu_milli"]) if gpus else 0,
        mask,
    )


def _life_s(pod: dict[str, str]) -> int:
    """From being scheduled to being deleted; 0 for a pod list without times."""
    begun = pod.get("scheduled_time") or pod.get("creation_time") or ""
    ended = pod.get("deletion_time") or ""
    return min(max(int(float(ended)) - int(float(begun)), 1), LATEST_LIFE_S) if begun and ended else 0


def arrivals(work: Workload, capacity_milli: int, seed: int, pressure: float = 1.3) -> Ints:
    """The published order: the list shuffled, then pods drawn from it with replacement while demand stays within `pressure`.

    As in the source, the check counts the thousandths of a pod once, however many GPUs it takes; drawn pods stay at the end.
    """
    random = np.random.default_rng(seed)
    order = list(work.pods[random.permutation(len(work.pods))])
    asked = int(work.kinds.gpu_milli[work.pods].sum())
    while True:
        kind = work.pods[random.integers(len(work.pods))]
        asked += int(work.kinds.gpu_milli[kind])
        if asked > pressure * capacity_milli:
            return np.array(order, dtype=np.int64)
        order.append(kind)


def ordered(fleet: DeviceArrays, order: Ints) -> DeviceArrays:
    """The same nodes in another order."""
    return DeviceArrays(*(column[order] for column in fleet))


def draw_stream(work: Workload, capacity_milli: int, load: float, days: float, longest_s: float, seed: int) -> Stream:
    """Poisson arrivals of (request, life) pairs drawn with replacement, asking on the mean for `load` times the GPUs; lives are capped."""
    random = np.random.default_rng(seed)
    life_s = np.minimum(work.life_s, longest_s).astype(np.float64)
    per_pod = float((work.kinds.gpus * work.kinds.gpu_milli)[work.pods] @ life_s) / len(work.pods)
    rate_per_s = load * capacity_milli / per_pod
    count = random.poisson(rate_per_s * days * DAY_S)
    chosen = random.integers(len(work.pods), size=count)
    time_s = np.sort(random.uniform(0, days * DAY_S, size=count))
    return Stream(time_s, work.pods[chosen], life_s[chosen])
