"""Ten tasks of a first day, done with the command line as a person types it, beside what dstack's and SkyPilot's docs ask for.

Every command that is run and every file that is written for the tool is counted as it happens, so that the counts cannot drift from what
works. The outcome of each task is checked in what the person sees. The programs that users bring (train.py) are the same for all tools and are not
counted, nor is cleaning up. Their counts are in `benchmarks/first_day_peers.py`, each with its page; nothing of theirs is run.

GPUs are simulated: ranks compute on the CPU, and most of the time is the start of Python and PyTorch. "Yesterday" of the bill is minutes ago.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.first_day_peers import DSTACK, NOTES, PEERS, SKYPILOT, Way

COMMAND_S, READY_S, DAY_S = 120.0, 120.0, 90.0
FLEET = "h200x8,h200x8"

DDP = """\
import os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=float(os.environ.get("LR", "0.1")))
for step in range(5):
    optimizer.zero_grad()
    loss = model(torch.randn(16, 8)).square().mean()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print(f"step {step} loss {loss.item():.3f} lr {optimizer.param_groups[0]['lr']}")
dist.destroy_process_group()
"""
CRASH = "config = {'lr': 0.1}\nprint(config['learning_rate'])\n"
HANG = """\
import os, time

def next_batch():
    while os.environ["RANK"] == "1":
        time.sleep(0.1)

print("epoch 0", flush=True)
next_batch()
time.sleep(3600)
"""
SERVER = """\
import http.server, json, sys

class Engine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer({"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": "hello"}}]})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Engine).serve_forever()
"""


@dataclass
class Person:
    """Somebody at a terminal, in a folder; what they type and write for the tool is counted."""

    folder: Path
    environment: dict[str, str]
    api: str  # of inference
    commands: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def has(self, name: str, text: str) -> None:
        """A program of theirs."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def writes(self, name: str, text: str) -> None:
        """A file for the tool."""
        self.files.append(name)
        self.has(name, text)

    def types(self, command: str, *, code: int = 0) -> str:
        """Runs it to its end; what it printed. Raises RuntimeError when it ends otherwise than with `code`."""
        self.commands.append(command)
        return self.quietly(command, code=code)

    def quietly(self, command: str, *, code: int = 0) -> str:
        """What is not part of the task: preparing, waiting, cleaning up."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_S, check=False,
        )  # fmt: skip
        if done.returncode != code:
            raise RuntimeError(f"{command}: ended with {done.returncode}\n{done.stdout[-2000:]}")
        return done.stdout

    @contextmanager
    def watches(self, command: str, words: str) -> Iterator[str]:
        """Types it and reads on until a line matches `words`; gives that line; Ctrl-C at the end of the block."""
        self.commands.append(command)
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            found = next((line for line in process.stdout if re.search(words, line)), "")
            sees(found, words)
            yield found
        finally:
            process.send_signal(signal.SIGINT)
            process.stdout.close()
            process.wait(timeout=30)


def sees(output: str, words: str) -> None:
    """Raises RuntimeError when what the person needs is not in what they see."""
    if not re.search(words, output):
        raise RuntimeError(f"nothing says {words!r}:\n{output[-2000:]}")


def until(question: Callable[[], bool]) -> None:
    """What a person waits for. Raises RuntimeError after COMMAND_S."""
    deadline = time.monotonic() + COMMAND_S
    while not question():
        if time.monotonic() > deadline:
            raise RuntimeError("it did not happen in time")
        time.sleep(0.2)


def ddp(person: Person) -> None:
    person.has("train/train.py", DDP)
    person.writes("train/job.yaml", "name: train\nrun: python train.py\nworkdir: .\ngpus: 2\n")
    sees(person.types("whaleflux submit train/job.yaml -y"), r"step 4 loss .* lr 0\.1\b(.|\n)*SUCCEEDED")


def crash(person: Person) -> None:
    person.has("crash/train.py", CRASH)
    person.writes("crash/job.yaml", "name: crash\nrun: python train.py\nworkdir: .\ngpus: 2\n")
    with person.watches("whaleflux submit crash/job.yaml -y", "KeyError: 'learning_rate'"):
        pass
    person.quietly("whaleflux cancel -y crash")


def hang(person: Person) -> None:
    """The job hangs already; its file was written as any other."""
    person.types("whaleflux logs --rank -1 --timestamps hang")
    person.types("whaleflux exec hang --rank 1 -- sh -c 'kill -ABRT $WHALEFLUX_RANK_PID'")
    until(lambda: "ended" in person.quietly("whaleflux job hang") or "SIGABRT" in person.quietly("whaleflux job hang"))
    sees(person.types("whaleflux logs --attempt 1 --rank 1 hang"), r'train\.py", line \d+ in next_batch')
    person.quietly("whaleflux cancel -y hang")


def sweep(person: Person) -> None:
    matrix = "matrix:\n  lr: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n"
    person.writes("sweep.yaml", f"name: sweep\nrun: echo lr $lr\nworkdir: null\ngpus: 1\n{matrix}")
    person.types("whaleflux submit sweep.yaml -y")
    until(lambda: "10 SUCCEEDED" in person.quietly("whaleflux jobs"))
    sees(person.types("whaleflux history sweep"), "total: 10 jobs")


def notebook(person: Person) -> None:
    """JupyterLab is not installed everywhere: another server stands in its place, which changes neither commands nor files."""
    person.writes(
        "notebook.yaml", "name: notebook\nrun: python -m http.server 18888 -b 127.0.0.1\ngpus: 1\nworkdir: null\n"
    )
    person.types("whaleflux submit notebook.yaml -y -d")
    until(lambda: "Serving" in person.quietly("whaleflux logs notebook || true"))
    with person.watches("whaleflux port-forward notebook :18888", r"127\.0\.0\.1:\d+") as line:
        port = re.search(r"127\.0\.0\.1:(\d+)", line)
        assert port is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/", timeout=30) as answer:
            sees(answer.read().decode(), "Directory listing")
    person.quietly("whaleflux cancel -y notebook")


def inside(person: Person) -> None:
    said = person.types(
        "whaleflux exec hang --rank 1 -- sh -c 'echo rank $RANK; ls; head -2 /proc/$WHALEFLUX_RANK_PID/status'"
    )
    sees(said, r"rank 1(.|\n)*train\.py(.|\n)*python")


def again(person: Person) -> None:
    sees(person.types("whaleflux submit train/job.yaml -y --name train-2 --env LR=0.01"), r"step 4 .* lr 0\.01\b")


def queue(person: Person) -> None:
    person.types("whaleflux queue create research --weight 2 --max-gpus 12")
    person.types("whaleflux queue create product --weight 1")
    person.writes("work.yaml", "name: work\nrun: sleep 1\ngpus: 1\nworkdir: null\n")
    person.types("whaleflux submit work.yaml -y -d --set queue=research")
    person.types("whaleflux submit work.yaml -y -d --set queue=product")
    sees(person.quietly("whaleflux jobs -a"), r"(?s)(?=.*research/jobs/work)(?=.*product/jobs/work)")


def serve(person: Person) -> None:
    person.has("serve.py", SERVER)
    person.writes("model.yaml", "model: tiny\nengine: {run: 'python serve.py {port}', directory: .}\n")
    person.types("whaleflux deploy model.yaml -y")
    until(lambda: "READY" in person.quietly("whaleflux replicas tiny"))
    key = re.search(r"^[^\s:]{20,}$", person.types("whaleflux keys create me"), re.M)
    assert key is not None
    body = '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}'
    headers = f"-H 'authorization: Bearer {key[0]}' -H 'content-type: application/json'"
    call = f"curl -sS {person.api}/chat/completions {headers} -d '{body}'"
    sees(person.types(call), '"content": "hello"')


def bill(person: Person) -> None:
    sees(
        person.types("whaleflux history train --since yesterday"),
        r"train .*SUCCEEDED.*\$\d(.|\n)*total: .*GPU-hours, \$\d",
    )


# In their order; `hang` is last of those that need the hanging job.
TASKS: dict[str, Callable[[Person], None]] = {
    "a DDP script from a folder": ddp,
    "a crash at start: why": crash,
    "debugging inside of a rank": inside,
    "a hang: that, and where": hang,
    "a sweep of ten": sweep,
    "a notebook": notebook,
    "again with another value": again,
    "a queue for two teams": queue,
    "serve and call": serve,
    "yesterday's bill of a job": bill,
}


@contextmanager
def fleet(home: Path) -> Iterator[Person]:
    """`whaleflux up` with two simulated nodes, and a job that hangs."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("WHALEFLUX_", "XDG_"))}
    environment = plain | {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log, folder = home / "up.log", home / "work"
    folder.mkdir()
    with log.open("w") as stream:
        process = subprocess.Popen(
            ["whaleflux", "up", "--state", str(home / "state"), "--simulate", FLEET], env=environment,
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: "stop with" in log.read_text() or process.poll() is not None)
        api = re.search(r"http://\S+/v1", said := log.read_text())
        if api is None:
            raise RuntimeError(f"the fleet did not start:\n{said[-2000:]}")
        yield Person(folder, environment, api[0])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def prepare(person: Person) -> None:
    person.has("hang/train.py", HANG)
    person.has("hang/job.yaml", "name: hang\nrun: python train.py\nworkdir: .\ngpus: 2\n")
    person.quietly("whaleflux submit hang/job.yaml -y -d")
    until(lambda: person.quietly("whaleflux logs --rank -1 hang || true").count("epoch 0") == 2)


def measure(options: Options) -> Report:
    """Commands, files and wall time of ten tasks of a first day on a simulated fleet, beside the steps in other tools' docs."""
    if not shutil.which("curl"):
        sys.exit("curl is needed: it calls the model")
    with tempfile.TemporaryDirectory(prefix="wf-") as home, fleet(Path(home)) as person:
        prepare(person)
        rows = [timed(name, task, person) for name, task in TASKS.items()]
    return report([row for name in PEERS for row in rows if row["task"] == name])


def timed(name: str, task: Callable[[Person], None], person: Person) -> Row:
    """Does it; raises RuntimeError when its outcome is not what it should be."""
    person.commands, person.files = [], []
    began = time.perf_counter()
    task(person)
    taken_s = time.perf_counter() - began
    ours = Way(tuple(person.commands), tuple(person.files), "")
    row: Row = {"task": name, "whaleflux": shown(ours), "s": round(taken_s, 1)}
    peers = {peer: shown(PEERS[name][peer]) for peer in (DSTACK, SKYPILOT)}
    return row | peers | {"typed": person.commands, "written": person.files}


def shown(way: Way | None) -> str:
    return f"{len(way.commands)} + {len(way.files)}" if way else "none documented"


def without_key(command: str) -> str:
    return re.sub(r"Bearer \S+'", "Bearer ...'", command)


def steps(text: str) -> int:
    return sum(map(int, text.split(" + ")))


def report(rows: list[Row]) -> Report:
    compared = [(row, [steps(row[p]) for p in (DSTACK, SKYPILOT) if row[p] != shown(None)]) for row in rows]
    longer = [row["task"] for row, theirs in compared if theirs and steps(row["whaleflux"]) > min(theirs)]
    return Report(
        rows=[{key: row[key] for key in ("task", "whaleflux", DSTACK, SKYPILOT, "s")} for row in rows],
        targets=[
            Target("tasks_done", float(len(rows)), float(len(PEERS)), "of ten", "higher"),
            Target("longer_than_a_peer", float(len(longer)), 0.0, "tasks"),
            Target("day_s", sum(row["s"] for row in rows), DAY_S, "s", per="python"),
        ],
        simulated="GPUs; the notebook is another web server; peers' steps are counted in their docs, not run",
        notes=[
            "n + m: commands typed + files written for the tool; the user's own program, installation and cleaning up are not counted",
            *(f"{row['task']}: {' ; '.join(map(without_key, row['typed']))}" for row in rows),
            f"more steps than the shortest peer: {', '.join(longer) or 'none'}",
            *(f"{task}, {peer}: {note}" for (task, peer), note in NOTES.items()),
        ],
    )


if __name__ == "__main__":
    sys.exit(main("first_day", measure))
