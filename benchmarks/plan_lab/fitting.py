"""How the constants of the cost model are found, and held against runs that took no part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from benchmarks.plan_lab.predict import Array, batches, seconds
from benchmarks.plan_lab.tables import Run
from whaleflux.planning.constants import FITTED, Constants

NAMES = tuple(one.name for one in fields(Constants) if getattr(FITTED, one.name))  # what is 0 only a calibration knows
_SHARES = {name for name in NAMES if name.endswith("_share") or name.startswith("overlap")}
# How much a table's mean error counts: all equally, but those twice and more whose stack is described best.
_WEIGHTS = {"vtrain_single": 2.0, "korthikanti_2022": 4.0, "megatron_2021": 1.5}
_MOST_OF_A_FAMILY = 360  # vtrain_single has 1,440 rows that differ little


def fit(runs: Sequence[Run], seed: int, start: Constants = FITTED) -> Constants:
    """Least squares on the logarithm of predicted over measured time; soft, so that single odd rows do not decide."""
    from scipy.optimize import least_squares

    some = _thinned(runs, seed)
    made, measured, weights = batches(some), np.array([run.step_s for run in some]), _weights(some)
    scale = np.array([max(getattr(start, name), 1e-9) for name in NAMES])
    low = np.array([1e-3 for _ in NAMES])
    high = np.array([1.0 / value if name in _SHARES else 20.0 for name, value in zip(NAMES, scale, strict=True)])

    def residuals(relative: Array) -> Array:
        return np.asarray(weights * np.log(seconds(made, _constants(relative * scale)) / measured))

    first = np.clip(np.ones(len(NAMES)), low * 1.01, high * 0.99)
    found = least_squares(
        residuals, first, bounds=(low, high), loss="soft_l1", f_scale=0.05, diff_step=1e-3, max_nfev=40
    )
    return _constants(found.x * scale)


def _constants(values: Array) -> Constants:
    return replace(FITTED, **{name: float(value) for name, value in zip(NAMES, values, strict=True)})


def _thinned(runs: Sequence[Run], seed: int) -> list[Run]:
    rng = np.random.default_rng(seed)
    count = Counter(run.family for run in runs)
    keep = {family: min(1.0, _MOST_OF_A_FAMILY / number) for family, number in count.items()}
    return [run for run in runs if rng.random() < keep[run.family]]


def _weights(runs: Sequence[Run]) -> Array:
    count = Counter(run.family for run in runs)
    return np.array([_WEIGHTS.get(run.family, 1.0) / np.sqrt(count[run.family]) for run in runs])


def held_out(runs: Sequence[Run], keys: Sequence[str], folds: int, seed: int, fitted: Sequence[bool]) -> Array:
    """The prediction of each run by constants that were fitted without all runs of its fold. Only those marked in `fitted` are ever fitted on."""
    names = sorted(set(keys))
    order = np.random.default_rng(seed).permutation(len(names))
    fold = {names[place]: number % folds for number, place in enumerate(order)}
    of = np.array([fold[key] for key in keys])
    result = np.empty(len(runs))
    for one in range(folds):
        constants = fit([run for run, where, use in zip(runs, of, fitted, strict=True) if where != one and use], seed)
        asked = [number for number in range(len(runs)) if of[number] == one]
        result[asked] = seconds(batches([runs[number] for number in asked]), constants)
    return result
