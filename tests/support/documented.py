"""The command and file blocks of a page of the docs, as Markdown has them.

A block fenced as `sh` is run by a test, in the page's order, all of one page in one shell; one fenced as `python` is run as a
program in the same folder. A comment right before a block says more of it (several comments may stand there, one a line):

    <!-- file: job.yaml -->        the block is no command but this file, written where the page's commands run
    <!-- exits: 1 -->              the block's last command ends with this code
    <!-- until: stop with -->      it runs on in the background; the page goes on when it has printed these words
    <!-- typed: exit -->           what the reader types when the program asks for a line (questions are answered with y)
    <!-- needs: docker, kubectl --> it is run where all of these work; $NAME: where this variable is set
    <!-- another system: dstack -->  the block is a file or a command of another program, shown for comparison
    <!-- not run: why -->          nobody can run it in a test; such blocks are counted and named

A comment `<!-- fleet: h200x8,edge/rtx4090x2 -->` anywhere says which simulated fleet the page's commands reach.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\s*$")
_COMMENT = re.compile(r"^<!-- ([a-z ]+?): (.*?) -->\s*$")
_OF_A_BLOCK = {"file", "exits", "until", "typed", "needs", "another system", "not run"}
_NOT_OURS_TO_RUN = {"file", "another system", "not run"}


@dataclass(frozen=True, slots=True)
class Block:
    """`line` is where its first line stands in the page, from 1."""

    line: int
    language: str
    text: str
    said: dict[str, str] = field(default_factory=dict)

    @property
    def is_command(self) -> bool:
        return self.language in {"sh", "python"} and not _NOT_OURS_TO_RUN & self.said.keys()


@dataclass(frozen=True, slots=True)
class Page:
    path: Path
    fleet: str
    blocks: tuple[Block, ...]

    @property
    def commands(self) -> list[Block]:
        return [block for block in self.blocks if block.is_command]


def read(path: Path) -> Page:
    """The page at `path`. Raises ValueError for a fence that is not closed and for a comment that nobody knows."""
    blocks, said, fleet = list[Block](), dict[str, str](), ""
    lines = iter(enumerate(path.read_text().splitlines(), 1))
    for number, line in lines:
        if fence := _FENCE.match(line):
            blocks.append(Block(number + 1, fence[1], _body(path, number, lines), said))
            said = {}
        elif comment := _COMMENT.match(line):
            if comment[1] == "fleet":
                fleet = comment[2]
            elif comment[1] in _OF_A_BLOCK:
                said = said | {comment[1]: comment[2]}
            else:
                raise ValueError(f"{path}:{number}: nobody knows what {comment[1]!r} says of a block")
        elif line.strip():
            said = {}
    return Page(path, fleet, tuple(blocks))


def _body(path: Path, opened: int, lines: object) -> str:
    found = list[str]()
    for _, line in lines:  # type: ignore[attr-defined]
        if line == "```":
            return "\n".join(found) + "\n"
        found.append(line)
    raise ValueError(f"{path}:{opened}: the block does not end")
