"""Fleets and requests of traces in columns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
WHOLE_MILLI = 1000  # capacities and requests of GPUs are thousandths of one GPU


class DeviceArrays(NamedTuple):
    """Empty nodes in columns; `free_milli` has a row per node and a column per GPU slot, 1000 or 0. `model` is a bit number."""

    cpu_millicores: Ints
    memory_bytes: Ints
    model: Ints
    free_milli: Ints


class Kinds(NamedTuple):
    """The distinct requests of a history in columns. `models` is a mask of allowed model bits, 0 for any."""

    cpu_millicores: Ints
    memory_bytes: Ints
    gpus: Ints
    gpu_milli: Ints
    models: Ints
