"""Somebody who types what a page of the docs says, at a terminal, with a home and a folder of their own."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.support.documented import Block

ROOT = Path(__file__).parents[2]
BLOCK_S = 240.0
_QUESTION = re.compile(rb"\[[yY]/[nN]\]: ?$")
_PROMPT = re.compile(rb"[$#>] (\x1b\[[0-9;?]*[a-zA-Z])*$")


class PageReader:
    """Blocks are run one after another; the shell's folder and exported variables go on from one to the next."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.folder = folder
        for part in ("examples", "deploy"):
            shutil.copytree(ROOT / part, folder / part)
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("WHALEFLUX_", "XDG_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = clean | {"HOME": str(home), "PATH": path, "PAGER": "cat", "TERM": "dumb"}
        self._background = list[subprocess.Popen[bytes]]()

    def write(self, block: Block) -> None:
        path = self.folder / block.said["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)

    def run(self, block: Block) -> None:
        """Fails with what was printed unless the block ends with the code that it says, or prints what it says."""
        script = self._script(block)
        if "until" in block.said:
            return self._run_on(block, script)
        code, printed = self._at_a_terminal(script, block.said.get("typed", "exit"))
        print(printed)  # pytest shows it with -rP
        wanted = int(block.said.get("exits", "0"))
        assert code == wanted, f"ended with {code}, not {wanted}:\n{block.text}\n{printed}"

    def _script(self, block: Block) -> str:
        state = self.folder / ".shell"
        state.mkdir(exist_ok=True)
        begin = f'[ -e {state}/variables ] && . {state}/variables; cd "$(cat {state}/folder 2>/dev/null || pwd)"\n'
        # A shell of its own goes on in the background: what it says when it ends is nothing for the reader's.
        keep = (
            ""
            if "until" in block.said
            else f"trap 'code=$?; export -p > {state}/variables; pwd > {state}/folder; exit $code' EXIT\n"
        )
        text = block.text
        if block.language == "python":
            program = state / f"block-{block.line}.py"
            program.write_text(block.text)
            text = f"python {program}\n"
        return f"{begin}{keep}set -euo pipefail\n{text}"

    def _at_a_terminal(self, script: str, typed: str) -> tuple[int, str]:
        process, terminal = self._start(script)
        try:
            printed = _conversation(process, terminal, f"{typed}\n".encode())
            return process.wait(timeout=60), printed
        finally:
            os.close(terminal)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _start(self, script: str) -> tuple[subprocess.Popen[bytes], int]:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=self.folder, env=self._environment, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        return process, ours

    def _run_on(self, block: Block, script: str) -> None:
        process, terminal = self._start(script)
        self._background.append(process)
        printed = _conversation(process, terminal, b"", block.said["until"])
        print(printed)
        assert block.said["until"] in printed, f"never said {block.said['until']!r}:\n{block.text}\n{printed}"
        threading.Thread(target=_read_on, args=(terminal,), daemon=True).start()

    def leave(self) -> None:
        """Ctrl-C for what runs in the background, and the end of what does not end."""
        for process in reversed(self._background):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _read_on(terminal: int) -> None:
    """Or whoever writes there would stop when the terminal is full."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def _conversation(process: subprocess.Popen[bytes], terminal: int, typed: bytes, until: str = "") -> str:
    """What was printed to the end, or to `until`; questions are answered with y, and a prompt gets `typed`."""
    printed, deadline = b"", time.monotonic() + BLOCK_S
    while True:
        ended = process.poll() is not None
        more = b""
        if select.select([terminal], [], [], 0 if ended else 0.1)[0]:
            with contextlib.suppress(OSError):  # nobody holds the other side any more
                more = os.read(terminal, 1 << 16)
        printed += more
        if (ended and not more) or (until and until.encode() in printed):
            return printed.decode(errors="replace").replace("\r\n", "\n")
        assert time.monotonic() < deadline, f"does not end:\n{printed.decode(errors='replace')}"
        if more and _QUESTION.search(printed):
            os.write(terminal, b"y\n")
        elif more and typed and _PROMPT.search(printed):
            os.write(terminal, typed)
        elif not more and not ended:
            time.sleep(0.01)
