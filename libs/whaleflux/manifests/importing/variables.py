"""Variables that other systems give to their jobs: set from WhaleFlux's own where they mean the same, refused where not. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from whaleflux.manifests.importing.draft import Draft
from whaleflux.manifests.shell_text import own_commands

# Exact on every node, where the command is started once per node.
PER_NODE = {
    "SLURM_NODEID": "$WHALEFLUX_NODE_RANK",
    "SLURM_NNODES": "$WHALEFLUX_NODES",
    "SLURM_JOB_NUM_NODES": "$WHALEFLUX_NODES",
    "SLURM_GPUS_ON_NODE": "$WHALEFLUX_GPUS_PER_NODE",
    "SLURM_GPUS_PER_NODE": "$WHALEFLUX_GPUS_PER_NODE",
    "SLURM_JOB_ID": "${WHALEFLUX_JOB##*/}-$WHALEFLUX_EPOCH",
    "SLURM_JOBID": "${WHALEFLUX_JOB##*/}-$WHALEFLUX_EPOCH",
    "SLURM_JOB_NAME": "${WHALEFLUX_JOB##*/}",
    "SLURM_SUBMIT_DIR": "$PWD",
    "SLURM_LAUNCH_NODE_IPADDR": "$MASTER_ADDR",
    "SLURM_RESTART_COUNT": "$((WHALEFLUX_EPOCH - 1))",
    "SKYPILOT_NODE_RANK": "$WHALEFLUX_NODE_RANK",
    "SKYPILOT_NUM_NODES": "$WHALEFLUX_NODES",
    "SKYPILOT_NUM_GPUS_PER_NODE": "$WHALEFLUX_GPUS_PER_NODE",
    "SKYPILOT_TASK_ID": "${WHALEFLUX_JOB##*/}",
    "DSTACK_NODE_RANK": "$WHALEFLUX_NODE_RANK",
    "DSTACK_NODES_NUM": "$WHALEFLUX_NODES",
    "DSTACK_GPUS_PER_NODE": "$WHALEFLUX_GPUS_PER_NODE",
    "DSTACK_GPUS_NUM": "$WHALEFLUX_GPUS",
    "DSTACK_MASTER_NODE_IP": "$MASTER_ADDR",
    "DSTACK_RUN_NAME": "${WHALEFLUX_JOB##*/}",
}
# One process per GPU.
PER_RANK = PER_NODE | {
    "SLURM_PROCID": "$RANK",
    "SLURM_LOCALID": "$LOCAL_RANK",
    "SLURM_NTASKS": "$WORLD_SIZE",
    "SLURM_NPROCS": "$WORLD_SIZE",
    "SLURM_NTASKS_PER_NODE": "$LOCAL_WORLD_SIZE",
}
# One process per node.
PER_TASK_OF_A_NODE = PER_NODE | {
    "SLURM_PROCID": "$WHALEFLUX_NODE_RANK",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "$WHALEFLUX_NODES",
    "SLURM_NPROCS": "$WHALEFLUX_NODES",
    "SLURM_NTASKS_PER_NODE": "1",
}
ON_ONE_NODE = {"SKYPILOT_NODE_IPS": "$MASTER_ADDR", "DSTACK_NODES_IPS": "$MASTER_ADDR"}
_NAMES = re.compile(r"\b(?:SLURM|SLURMD|SKYPILOT|DSTACK)_[A-Z0-9_]+\b")


def prologue(
    draft: Draft, script: str, known: Mapping[str, str], nodes: int, more: Iterable[tuple[str, str]] = ()
) -> str:
    """Lines that set what `script` uses of another system's variables; what cannot be known is refused."""
    equal = dict(known) | (ON_ONE_NODE if nodes == 1 else {}) | dict(more)
    lines = []
    for name in dict.fromkeys(_NAMES.findall(script)):
        if name in equal:
            lines.append(f"export {name}={equal[name]}")
        elif not re.search(rf"(?m)^\s*(?:export\s+)?{name}=", script):
            draft.refuse(name, "the script reads it, and WhaleFlux has nothing that means the same")
    return "".join(f"{line}\n" for line in lines)


def must_be_given(name: str) -> str:
    """A line that ends the job at once when a variable was left out at submission, as the other system would."""
    return f': "${{{name}:?is not set: submit with --env {name}}}"\n'


_LOOKS = re.compile(
    r"SKYPILOT_NODE_IPS|DSTACK_NODES_IPS|scontrol show host|SLURM_(?:JOB_)?NODELIST|hostname (?:-I|-i|--ip)"
)
_FIRST = re.compile(r"head -n ?1\b|head -1\b|hostname (?:-I|-i|--ip)|\[0\]|sed -n 1p")
_FIRST_INLINE = re.compile(
    r"""\$\(\s*echo\s+"?\$\{?(?:SKYPILOT_NODE_IPS|DSTACK_NODES_IPS)\}?"?\s*\|\s*head\s+-(?:n\s?)?1\s*\)"""
)
_ASSIGNED = re.compile(r"^(\s*(?:export\s+)?)(\w+)=(.*)$")


def with_meeting_point(draft: Draft, script: str) -> str:
    """Lines that look for the first node's address take the one that is given; MASTER_ADDR and MASTER_PORT are given."""
    found, lists = list[str](), list[str]()
    for line in script.split("\n"):
        one = _ASSIGNED.match(line)
        if _sets_meeting_point(line):
            draft.note(
                "MASTER_ADDR, MASTER_PORT",
                "are given by the agents (a free port on the first node); the lines that set them are left out",
            )
            found += _in_its_place(line)
        elif one and _LOOKS.search(one[3]) and _FIRST.search(one[3]):
            found.append(f"{one[1]}{one[2]}=$MASTER_ADDR")
            draft.note(one[2], "is the address of the first node, which agents give as MASTER_ADDR")
        elif one and ("scontrol" in one[3] or any(re.search(rf"\$\{{?{name}\b", one[3]) for name in lists)):
            lists.append(one[2])
            found += _in_its_place(line)
        else:
            found.append(_FIRST_INLINE.sub("$MASTER_ADDR", line))
    text = "\n".join(found)
    for name in lists:
        if re.search(rf"\$\{{?{name}\b", text):
            draft.refuse(
                name,
                "is made from names of nodes, which ranks do not have: only the first node's address is given (MASTER_ADDR)",
            )
    return text


def _in_its_place(line: str) -> list[str]:
    """A block does not become empty: bash takes none for a mistake."""
    indent = line[: len(line) - len(line.lstrip())]
    return [f"{indent}:"] if indent else []


_ARGUMENT = re.compile(r"\$(?:[1-9]|\{[1-9][^}]*\})")


def note_arguments(draft: Draft, script: str) -> None:
    """Says that nothing is given to a script that reads its arguments."""
    if found := _ARGUMENT.search(re.sub(r"'[^']*'|#.*", "", script)):
        draft.note(
            found[0], "is empty: a job's script has no arguments; write the value, or submit with --env NAME=VALUE"
        )


def _sets_meeting_point(line: str) -> bool:
    """Whether all that a line does is to set MASTER_ADDR or MASTER_PORT."""
    commands = [[word for word in words if word != "export"] for words in own_commands(line)]
    words = [word for words in commands for word in words]
    return bool(words) and all(re.match(r"MASTER_(?:ADDR|PORT)=", word) for word in words)
