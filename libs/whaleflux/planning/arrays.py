"""What the package computes with: arrays of float64, one element for each plan, or one number for all."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]
Value: TypeAlias = float | Array


def array(value: Value) -> Array:
    return np.asarray(value, dtype=np.float64)
