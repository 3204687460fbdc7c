"""Options of sbatch and srun (https://slurm.schedmd.com/sbatch.html): how they are written, and which have no equivalent. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from whaleflux.manifests.importing.draft import Draft, positive

DIRECTIVE = re.compile(r"^#SBATCH\s+(.*?)\s*(?:#.*)?$")
LONG = {
    "a": "array", "A": "account", "b": "begin", "C": "constraint", "c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error",
    "F": "nodefile", "G": "gpus", "J": "job-name", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition", "q": "qos", "t": "time",
    "w": "nodelist", "x": "exclude", "L": "licenses", "M": "clusters", "v": "verbose", "H": "hold", "i": "input", "l": "label", "K": "kill-on-bad-exit",
}  # fmt: skip
FLAGS = {"exclusive", "requeue", "no-requeue", "hold", "overcommit", "verbose", "quiet", "parsable", "contiguous", "spread-job", "label",
          "overlap", "unbuffered", "oversubscribe", "kill-on-bad-exit", "wait-all-nodes", "mem-bind", "propagate"}  # fmt: skip
NOTES = {
    "account": "has no equivalent; queues share a fleet", "partition": "has no equivalent; `gpu`, `sites` and `queue` choose where it runs",
    "qos": "has no equivalent; see `priority`", "output": "what ranks print is read by `whaleflux logs`", "error": "what ranks print is read by `whaleflux logs`",
    "open-mode": "what ranks print is read by `whaleflux logs`", "mail-type": "nobody is mailed; `whaleflux events --for JOB` follows a job",
    "mail-user": "nobody is mailed; `whaleflux events --for JOB` follows a job", "exclusive": "GPUs are held by one job alone, the rest of a node is shared",
    "nodelist": "names nodes of the Slurm cluster", "exclude": "names nodes of the Slurm cluster; cordon bad ones",
    "constraint": "names features of the Slurm cluster; `nodes.labels`, `gpu` and `sites` say where it may run", "requeue": "a lost node moves the job to others by itself",
    "no-requeue": "a lost node moves the job to others all the same", "signal": "is not sent; SIGTERM comes `stop_grace` before the end",
    "comment": "jobs have no comments", "wckey": "has no equivalent", "reservation": "names a reservation of the Slurm cluster", "hint": "has no equivalent",
    "export": "variables of the submitting shell are not passed on; name those it needs under environment", "mem-bind": "has no equivalent",
    "cpu-bind": "ranks are not bound to cores", "gpu-bind": "each rank has the GPU of its number", "distribution": "ranks are numbered along the nodes",
    "switches": "see `place`", "nice": "see `priority`", "licenses": "has no equivalent", "verbose": "", "quiet": "", "parsable": "", "label": "lines bear the rank in `logs --rank -1`",
    "threads-per-core": "has no equivalent", "ntasks-per-core": "has no equivalent", "cores-per-socket": "has no equivalent", "get-user-env": "has no equivalent",
    "oversubscribe": "GPUs are held by one job alone", "overcommit": "has no equivalent", "kill-on-bad-exit": "a job's ranks end with the first that fails",
    "unbuffered": "", "overlap": "", "exact": "", "tmp": "nodes are chosen by their GPUs", "gpu-freq": "has no equivalent", "network": "has no equivalent",
    "propagate": "has no equivalent", "wait-all-nodes": "ranks begin together", "acctg-freq": "has no equivalent", "job": "", "wait": "a job's ranks end with the first that fails",
    "input": "ranks read nothing from standard input", "jobid": "", "ntasks-per-socket": "has no equivalent", "sockets-per-node": "has no equivalent", "contiguous": "see `place`",
}  # fmt: skip
REFUSED = {
    "dependency": "names jobs by numbers of Slurm: write depends_on: JOB, with the name of a job here",
    "begin": "jobs start as soon as they can", "hold": "submit it, then: whaleflux hold JOB", "clusters": "names clusters of Slurm",
    "cluster-constraint": "names clusters of Slurm", "wrap": "give the script itself", "burst-buffer": "has no equivalent", "bb": "has no equivalent",
}  # fmt: skip


@dataclass
class Asked:
    """Options of sbatch, or of srun, by their long names."""

    options: dict[str, str] = field(default_factory=dict)

    def number(self, draft: Draft, *names: str, default: int = 0) -> int:
        for name in names:
            if name in self.options:
                return positive(draft, f"--{name}", self.options[name].partition("-")[0])
        return default


def take_options(draft: Draft, asked: Asked, words: list[str]) -> None:
    at = 0
    while at < len(words):
        word, at = words[at], at + 1
        if word.startswith("--"):
            name, equal, value = word[2:].partition("=")
        elif word.startswith("-") and len(word) > 1:
            name, value = LONG.get(word[1], word[1:]), word[2:].removeprefix("=")
            equal = "=" if value else ""
        else:
            draft.refuse("#SBATCH", f"{word!r} is no option")
            continue
        if not equal and name not in FLAGS and at < len(words) and not words[at].startswith("--"):
            value, at = words[at], at + 1
        asked.options[name] = value


READ = {"array", "job-name", "nodes", "ntasks", "ntasks-per-node", "gres", "gpus", "gpus-per-node", "gpus-per-task", "time", "cpus-per-task", "mem",
         "mem-per-cpu", "mem-per-gpu", "chdir", "cpus-per-gpu", "time-min"}  # fmt: skip


def time_limit(draft: Draft, text: str) -> str | None:
    """Slurm's minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    if text.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        draft.refuse("--time", f"{text!r} is no time of Slurm, such as 2-12:00:00")
        return None
    days, *parts = found.groups()
    given = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = (*given, 0, 0)[:3]
    elif len(given) == 3:
        hours, minutes, seconds = given
    else:
        hours, (minutes, seconds) = 0, (*given, 0)[:2]
    return f"{((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds} s"
