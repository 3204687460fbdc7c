"""A shell script, or one line, with a torchrun in it as a job file. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux.manifests.importing.draft import GO_ON, Draft, positive, without_shebang
from whaleflux.manifests.importing.variables import note_arguments, with_meeting_point
from whaleflux.manifests.launchers import find_launcher
from whaleflux.manifests.shell_text import as_command, simple_commands


def read(text: str) -> Draft:
    """The draft of a script that starts torchrun on one node, or on each of several."""
    draft = Draft("a script with torchrun")
    script = without_shebang(draft, text.lstrip("\n"))
    found = [words for words in simple_commands(as_command(script)) if _is_torchrun(words)]
    if not found:
        draft.refuse(
            "file",
            "is a script without #SBATCH and without torchrun, so nothing says how many GPUs it wants: write them into a "
            "job file, such as: {run: bash FILE, gpus: 1}",
        )
        return draft
    if len(found) > 1:
        draft.refuse("torchrun", f"stands {len(found)} times: a job is one; make a script, and a job, of each")
        return draft
    nodes, each = _option(found[0], "nnodes", "1"), _option(found[0], "nproc", "")
    if not each.isdigit():
        draft.refuse(
            "--nproc-per-node",
            f"{each or 'nothing'!r} is no number of GPUs: write gpus in the job file, and launch: once",
        )
    if ":" in nodes:
        draft.note("--nnodes", f"{nodes}: a job does not grow or shrink while it runs; it gets the least")
    number = positive(draft, "--nnodes", nodes.partition(":")[0] if nodes.partition(":")[0].isdigit() else 0)
    draft.gpus(number, positive(draft, "--nproc-per-node", each if each.isdigit() else 1))
    for name in ("master-addr", "rdzv-endpoint", "node-rank"):
        value = _option(found[0], name, "")
        if (
            value
            and "$" not in value
            and not (number == 1 and value.startswith(("localhost", "127.", "0")))
            and not (name == "node-rank" and number == 1)
        ):
            draft.refuse(
                f"--{name}", f"{value} is of one machine: leave it out, torchrun finds it in the environment here"
            )
    draft.put("launch", "once")
    draft.put("retry.max_restarts", 0)
    draft.put("directory", ".")
    draft.note(
        "directory",
        "the script runs in the folder it lies in, which all nodes must mount; else write workdir: . instead",
    )
    note_arguments(draft, script)
    draft.put("run", f"{GO_ON}\n{with_meeting_point(draft, script)}")
    return draft


def _is_torchrun(words: Sequence[str]) -> bool:
    launcher = find_launcher(words)
    return launcher is not None and ("torchrun" in launcher.name or "torch.distributed" in launcher.name)


def _option(words: Sequence[str], name: str, default: str) -> str:
    """The value of --name=VALUE or --name VALUE, with - or _ in it; `nproc` for --nproc-per-node."""
    for at, word in enumerate(words):
        key, equal, _ = word.replace("_", "-").partition("=") if word.startswith("--") else (word, "", "")
        if key == f"--{name}" or (name == "nproc" and key == "--nproc-per-node"):
            return word.partition("=")[2] if equal else (words[at + 1] if at + 1 < len(words) else "")
    return default
