"""What `small_training` imports, also late, for a process whose forks are its ranks. As there, one thread for each."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.nn.parallel
import torch.utils.data.distributed  # noqa: F401

from whaleflux.sdk import Checkpointer  # noqa: F401
