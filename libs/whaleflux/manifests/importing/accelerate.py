"""A configuration of Hugging Face Accelerate (`accelerate config`) as a job file. It says how, not what: the command is given. Pure."""

from __future__ import annotations

import shlex
from typing import Any

from whaleflux.manifests.importing.draft import Draft, positive, shaped

_KINDS = {"NO", "MULTI_GPU", "FSDP", "DEEPSPEED", "MEGATRON_LM"}


def read(content: dict[str, Any], file: str, command: str) -> Draft:
    """`file` is how the configuration is called beside the job file, `command` the script with its arguments."""
    draft = Draft("a configuration of accelerate")
    content = shaped(draft, content, ("deepspeed_config",))
    machines = positive(draft, "num_machines", content.get("num_machines", 1))
    processes = positive(draft, "num_processes", content.get("num_processes", 1))
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind not in _KINDS:
        draft.refuse("distributed_type", f"{kind} is not for GPUs of NVIDIA")
    if str(content.get("compute_environment", "LOCAL_MACHINE")) != "LOCAL_MACHINE":
        draft.refuse(
            "compute_environment",
            f"{content['compute_environment']} runs elsewhere; a configuration for LOCAL_MACHINE is needed",
        )
    if content.get("use_cpu") is True:
        draft.refuse("use_cpu", "trains without GPUs; a job asks for GPUs by number")
    launcher = (content.get("deepspeed_config") or {}).get("deepspeed_multinode_launcher", "pdsh")
    if kind == "DEEPSPEED" and machines > 1 and launcher != "standard":
        draft.refuse(
            "deepspeed_config.deepspeed_multinode_launcher",
            f"{launcher} reaches other nodes by ssh, which agents do not offer: write standard",
        )
    if processes % machines:
        draft.refuse("num_processes", f"{processes} cannot be spread evenly over {machines} machines")
    if not command:
        draft.refuse("--run", "the configuration does not say what to run: add --run 'train.py ARGUMENTS'")
    draft.gpus(machines, max(1, processes // machines))
    draft.put("launch", "once")
    draft.put("run", _command(file, machines, processes, command))
    draft.put("retry.max_restarts", 0)
    draft.put("directory", ".")
    draft.note(
        "directory",
        "the configuration and the script lie here; all nodes must mount the folder, else write workdir: . instead",
    )
    for name in ("machine_rank", "main_process_ip", "main_process_port", "gpu_ids"):
        if content.get(name) not in (None, 0, "all"):
            draft.note(name, f"{content[name]} is of other machines: the agents' own is used")
    return draft


def _command(file: str, machines: int, processes: int, command: str) -> str:
    options = [
        f"--config_file {shlex.quote(file)}",
        f"--num_processes {processes}",
        f"--num_machines {machines}",
        "--gpu_ids all",
    ]
    options += [
        "--machine_rank $WHALEFLUX_NODE_RANK",
        "--main_process_ip $MASTER_ADDR",
        "--main_process_port $MASTER_PORT",
    ]
    return "accelerate launch " + " ".join(options) + f" {command}"
