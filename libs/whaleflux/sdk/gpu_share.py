"""Keeps a training script within its part of a GPU: PyTorch then says "out of memory" itself, before its agent ends the rank."""

from __future__ import annotations

import os

_SHARE = "WHALEFLUX_GPU_MEMORY_BYTES"
CONTEXT_BYTES = 700 * 10**6  # what CUDA and its libraries take beside the tensors, about; part of the share


def keep_to_share() -> int:
    """Bytes that PyTorch's allocator may take on each GPU from now on; 0 where the job has whole GPUs, or there is none.

    Call it once, before the first tensor is on the GPU. `Checkpointer` does so by itself.
    """
    share_bytes = int(os.environ.get(_SHARE) or 0)
    if not share_bytes:
        return 0
    import torch

    if not torch.cuda.is_available():
        return 0
    least = 0
    for device in range(torch.cuda.device_count()):
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        allowed_bytes = allocator_bytes(share_bytes, total_bytes)
        torch.cuda.set_per_process_memory_fraction(allowed_bytes / total_bytes, device)
        least = min(least or allowed_bytes, allowed_bytes)
    return least


def allocator_bytes(share_bytes: int, total_bytes: int) -> int:
    """What tensors may take of a share: all but what CUDA itself needs, and at least half of it."""
    return min(max(share_bytes - CONTEXT_BYTES, share_bytes // 2), total_bytes)
