"""What cannot be true of usage: agents ask it of what ranks say, the console of what agents say. Pure.

Each function returns what is wrong, with the field, its value and what would be right; "" where nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from whaleflux.v1 import usage_pb2

MOST_PPM = 2_000_000  # clocks can be above what the driver calls the highest
MOST_INTERVAL_S = 86_400.0
MOST_BYTES_PER_S = 1 << 44  # of one device or node: 17 TB/s
_MOST_STEPS, _MOST_STEP = 1_000_000, 1 << 53
_MOST_TOKENS_PER_S, _MOST_FLOPS_PER_S = 1e9, 1e17  # of one rank
_MOST_POWER_MW = 10_000_000
_MOST_MEMORY_BYTES = 1 << 43
MOST_LOSS = 1e100  # so that a sum of many is a number
_SHARES = ("tensor_ppm", "sm_active_ppm", "dram_active_ppm", "busy_ppm", "clock_ppm")
_DEVICE_RATES = ("nvlink_sent_bytes", "nvlink_received_bytes", "pcie_sent_bytes", "pcie_received_bytes")
NETWORK_RATES = ("rdma_sent_bytes", "rdma_received_bytes", "kernel_sent_bytes", "kernel_received_bytes")
_PARTS = ("data_us", "host_us", "save_us", "comm_in_node_us", "comm_cross_us")


def wrong_steps(times: usage_pb2.StepTimes, took_us: int) -> str:
    """Of steps that took `took_us` together."""
    return next(_wrong_steps(times, took_us), "")


def wrong_device(seen: usage_pb2.GpuUsage, interval_s: float) -> str:
    """Of one device in one interval."""
    if not 0 < len(seen.device) <= 100:
        return "device is not set or longer than 100 characters; use the UUID that the driver gives it"
    return next(_wrong_device(seen, interval_s), "")


def wrong_network(seen: usage_pb2.NetworkUsage, interval_s: float) -> str:
    """Of a node's ports in one interval."""
    most = math.ceil(interval_s * MOST_BYTES_PER_S)
    return next((_above(seen, name, most) for name in NETWORK_RATES if _above(seen, name, most)), "")


def _wrong_steps(times: usage_pb2.StepTimes, took_us: int) -> Iterator[str]:
    if not 0 <= took_us <= MOST_INTERVAL_S * 1e6:
        yield f"end_time is {took_us / 1e6:g} s behind start_time; use 0 to {MOST_INTERVAL_S:g} s"
    if not 1 <= times.first_step <= times.last_step <= _MOST_STEP:
        yield f"first_step {times.first_step} and last_step {times.last_step}: steps count from 1 on, the first is not above the last"
    if times.last_step - times.first_step >= _MOST_STEPS:
        yield f"last_step {times.last_step} is {times.last_step - times.first_step} above first_step; report at most {_MOST_STEPS} steps together"
    for name in _PARTS:
        if wrong := _above(times, name, took_us):
            yield wrong
    if (parts := sum(getattr(times, name) for name in _PARTS)) > took_us:
        yield f"{', '.join(_PARTS)} are {parts} together; they fit into the {took_us} us of the steps"
    if wrong := _wrong_losses(times):
        yield wrong
    seconds = took_us / 1e6
    if wrong := _above(times, "tokens", math.ceil(seconds * _MOST_TOKENS_PER_S)):
        yield wrong
    if not 0 <= times.flops <= seconds * _MOST_FLOPS_PER_S:  # also of what is no number
        yield f"flops is {times.flops}; use 0 to {seconds * _MOST_FLOPS_PER_S:g} for {seconds:g} s"


def _wrong_losses(times: usage_pb2.StepTimes) -> str:
    """A sum may be off by what rounding makes of it."""
    loss, steps = times.loss, times.last_step - times.first_step + 1
    if min(loss.count, loss.not_finite) < 0 or loss.count + loss.not_finite > steps:
        return f"loss.count is {loss.count}, loss.not_finite {loss.not_finite}; use 0 or more, together at most the {steps} steps"
    if not all(abs(value) <= MOST_LOSS for value in (loss.min, loss.max, loss.sum / max(loss.count, 1))):
        return f"loss.min, loss.max or the mean is no number up to {MOST_LOSS:g}; count such steps as loss.not_finite"
    slack = 1e-6 * max(abs(loss.min), abs(loss.max)) * loss.count
    if not loss.min * loss.count - slack <= loss.sum <= loss.max * loss.count + slack:
        return f"loss.sum is {loss.sum:g}; use {loss.count} times something from loss.min {loss.min:g} to loss.max {loss.max:g}"
    return ""


def _wrong_device(seen: usage_pb2.GpuUsage, interval_s: float) -> Iterator[str]:
    limits = dict.fromkeys(_SHARES, MOST_PPM)
    limits |= dict.fromkeys(_DEVICE_RATES, math.ceil(interval_s * MOST_BYTES_PER_S))
    limits |= {"power_mw": _MOST_POWER_MW, "memory_used_bytes": _MOST_MEMORY_BYTES}
    for name, most in limits.items():
        if wrong := _above(seen, name, most):
            yield wrong


def _above(message: usage_pb2.GpuUsage | usage_pb2.StepTimes | usage_pb2.NetworkUsage, name: str, most: int) -> str:
    value = getattr(message, name)
    return "" if 0 <= value <= most else f"{name} is {value}; use 0 to {most}"
