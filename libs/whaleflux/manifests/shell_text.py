"""A bash script as one word of a command line, and the commands that stand in it. Pure; nothing is run or expanded.

`run: text` is `bash -euo pipefail -c TEXT` in the contract, as the shell form of a Dockerfile's CMD is `/bin/sh -c TEXT`.
Reading a script without running it is an approximation: it finds the words of its simple commands, inside of
substitutions too, and knows variables that the script itself sets to plain text. What it cannot see it does not guess.
"""

from __future__ import annotations

import posixpath
import re
import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile

BASH = ("bash", "-euo", "pipefail", "-c")
_MAX_DEPTH = 5  # substitutions in substitutions
_MAX_COMMANDS = 10_000
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\+?=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_KEYWORDS = frozenset({
    "if", "then", "elif", "else", "fi", "while", "until", "do", "done", "for", "case", "esac", "in", "select", "function", "!", "{",
    "}", "time", "coproc",
})  # fmt: skip
_IN_THIS_SHELL = frozenset({"source", ".", "eval", "wait", "trap", "exec"}) | _KEYWORDS
_SHELLS = frozenset({"bash", "sh", "dash", "zsh", "ksh"})
# What the scanner does not read as bash does: of a script with some of it, it does not say that a quote is open.
_HARD_TO_READ = re.compile(r"""\$'|\\`|=~|\$\{[^}\n]*['"]|\$\([^)]*(?:<<|\#|\bcase\b|[^\w]['"][()]+['"])""")
_FIRST_LINE = re.compile(r"#![ \t]*(?:\S*/env[ \t]+)?(?:\S*/)?([^/\s]+)[ \t]*([^\n]*)")


def as_command(script: str) -> list[str]:
    """The command line that runs `script`. Without the newlines at its end bash becomes the script's last program."""
    return [*BASH, script.rstrip()]


def script_of(command: Sequence[str]) -> str | None:
    """The script that `as_command` was given; None for any other command line."""
    return command[len(BASH)] if len(command) == len(BASH) + 1 and tuple(command[: len(BASH)]) == BASH else None


def passes_signals_on(command: Sequence[str]) -> tuple[str, ...]:
    """The same command line for a rank: a script of several commands does not end before what it has started.

    Signals reach all processes of a rank. Bash would end at once of SIGTERM, and what is left after a rank has little time; so
    it waits for its commands, which have the whole grace. A script of one command needs no care: bash becomes that program.
    """
    script = script_of(command)
    if script is None or is_one_program(script):
        return tuple(command)
    return (*BASH, "trap 'wait; exit 143' TERM; " + script)


_FORWARDING = """trap 'trap "" TERM; kill -TERM 0; wait $p; exit $?' TERM; "$0" "$@" & p=$!; wait $p"""


def under_init(command: Sequence[str]) -> list[str]:
    """A script's command line for a container, whose init passes signals to its one child alone: that child tells the others."""
    script = script_of(command)
    return list(command) if script is None or is_one_program(script) else ["bash", "-c", _FORWARDING, *command]


def one_after_the_other(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One command line of two; the second is not begun when the first fails, and then the first's exit code is that of both."""
    failed = '{ code=$?; echo "whaleflux: setup ended with exit code $code" >&2; exit $code; }'
    return as_command(f"{shlex.join(first)} || {failed}\n{shlex.join(second)}")


def meaning_of(code: int) -> str:
    """What shells mean by an exit code, in brackets; "" for nothing of their own."""
    if code == 126:
        return " (a command was found and could not be executed)"
    if code == 127:
        return " (a command was not found)"
    if code - 128 in set(signal.Signals):
        return f" (128 + {code - 128}: what it ran was ended by {signal.Signals(code - 128).name})"
    return ""


def signal_name(number: int) -> str:
    """SIGKILL; "signal 99" for what has no name here."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_one_program(script: str) -> bool:
    """Whether a script is one program with its words, and nothing that a shell has to stay for."""
    read = _Scanner(script)
    first = next((word for words in read.commands for word in words if not _ASSIGNMENT.fullmatch(word)), "")
    return len(read.commands) == 1 and not read.operators and bool(first) and first not in _IN_THIS_SHELL


def mistake(script: str) -> str:
    """Why a text can be no bash script, "" when it may be one."""
    if script.startswith("#!"):
        found = _FIRST_LINE.match(script)
        if found is None or found[1] not in ("bash", "sh"):
            return "begins as a script of another language: keep it in a file and run that, for example: run: python train.py"
        if found[2].strip():
            return f"begins with options of {found[1]} that would be passed over ({found[2].strip()[:40]!r}): write them as `set` in a line of its own"
    read = _Scanner(script)
    if read.unclosed and not _HARD_TO_READ.search(script):
        return f"has a {read.unclosed} that is not closed; check its quotes"
    return "" if read.commands else "has no command; give what starts one rank, for example: python train.py"


def own_commands(script: str) -> list[list[str]]:
    """The words of each simple command of a script, without those inside of substitutions."""
    return _Scanner(script).commands


def simple_commands(command: Sequence[str]) -> list[list[str]]:
    """The words of each simple command that a command line runs, in scripts that it gives to shells too."""
    return list(_unfolded(list(command), {}, 0))


def _unfolded(words: list[str], known: dict[str, str], depth: int) -> Iterator[list[str]]:
    """`words`, or the commands of the script that they give to a shell."""
    if (inner := _script_for_shell(words)) is None or depth >= _MAX_DEPTH:
        yield words
        return
    yield from _commands_in(inner, known, depth + 1)


def _commands_in(script: str, known: dict[str, str], depth: int) -> Iterator[list[str]]:
    read = _Scanner(script)
    for words in read.commands:
        words = _expanded(words, known)
        for word in words:
            if (found := _ASSIGNMENT.fullmatch(word)) and "$(" not in word:
                known[found[1]] = found[2]
        yield from _unfolded(_without_keywords(words), known, depth)
    for inner in read.nested if depth < _MAX_DEPTH else ():
        yield from _commands_in(inner, known, depth + 1)


def _expanded(words: list[str], known: dict[str, str]) -> list[str]:
    """With the variables that stand where a command begins: `LAUNCHER="torchrun ..."` and later `$LAUNCHER train.py`."""
    found: list[str] = []
    for word in words:
        name = _VARIABLE.fullmatch(word)
        value = known.get(name[1] or name[2]) if name else None
        found += value.split() if value is not None else [word]
    return found


def _without_keywords(words: list[str]) -> list[str]:
    while words and words[0] in _KEYWORDS:
        words = words[1:]
    return words


def _script_for_shell(words: list[str]) -> str | None:
    """SCRIPT of `bash -lc SCRIPT`, and of `eval WORDS`."""
    program = list(dropwhile(_ASSIGNMENT.fullmatch, words))
    if program[:1] == ["eval"]:
        return " ".join(program[1:])
    if not program or posixpath.basename(program[0]) not in _SHELLS:
        return None
    for at, word in enumerate(program[1:], 1):
        if word.startswith("-") and not word.startswith("--") and word.endswith("c"):
            return program[at + 1] if at + 1 < len(program) else None
        if not word.startswith(("-", "+")) and program[at - 1] not in ("-o", "+o", "-euo", "-eo", "-uo", "-O"):
            return None  # a file
    return None


@dataclass
class _Scanner:
    """One pass over a script."""

    text: str
    commands: list[list[str]] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)  # scripts inside of $( ), ` ` and <( )
    operators: bool = False  # anything between commands but the end of the text
    unclosed: str = ""  # what began and never ended
    _words: list[str] = field(default_factory=list)
    _word: str | None = None
    _open: int = 0  # parentheses
    _redirected: str = ""  # the operator whose word comes next
    _heredocs: list[tuple[str, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text = self.text.replace("\\\n", " ").rstrip()
        at = 0
        while at < len(self.text) and len(self.commands) < _MAX_COMMANDS:
            at = self._step(at)
        self._end_command()

    def _step(self, at: int) -> int:
        """Takes what stands at `at`; where to go on."""
        char = self.text[at]
        if char in " \t\r":
            self._end_word()
        elif char == "#" and self._word is None:
            return self._find("\n", at)
        elif char == "\n":
            self._end_command()
            self.operators = True
            return self._after_heredocs(at + 1)
        elif char in "<>" or self.text.startswith("&>", at):
            return self._redirection(at)
        elif char in ";&|()":
            if char == ")" and not self._open:  # what stands before it is a pattern of `case`
                self._words, self._word = [], None
            self._open = max(0, self._open + (char == "(") - (char == ")"))
            self._end_command()
            self.operators = True
        else:
            return self._part(at)
        return at + 1

    def _part(self, at: int) -> int:
        """A piece of a word."""
        char = self.text[at]
        if char == "\\":
            return self._take(self.text[at + 1 : at + 2], at + 2)
        if char == "'":
            end = self._close("'", at + 1, "single quote")
            return self._take(self.text[at + 1 : end], end + 1)
        if char == '"':
            return self._double_quoted(at + 1)
        if char in "$`":
            return self._substitution(at)
        return self._take(char, at + 1)

    def _double_quoted(self, at: int) -> int:
        self._take("", at)
        while at < len(self.text):
            char = self.text[at]
            if char == '"':
                return at + 1
            if char == "\\":
                at = self._take(self.text[at + 1 : at + 2], at + 2)
            elif char in "$`":
                at = self._substitution(at)
            else:
                at = self._take(char, at + 1)
        self.unclosed = self.unclosed or "double quote"
        return at

    def _substitution(self, at: int) -> int:
        if self.text[at] == "`":
            end = self._close("`", at + 1, "backquote")
        elif self.text.startswith("$(", at):
            end = self._matching(at + 1, "()")
        elif self.text.startswith("${", at):
            end = self._matching(at + 1, "{}")
            return self._take(self.text[at : end + 1], end + 1)
        else:
            return self._take("$", at + 1)
        inner = self.text[at + 1 : end].removeprefix("(")
        if not inner.startswith("("):  # no arithmetic
            self.nested.append(inner)
        asked = re.fullmatch(r"\s*(?:which|command -v|type -p)\s+(\S+)\s*", inner)
        return self._take(asked[1] if asked else f"$({inner})", end + 1)

    def _redirection(self, at: int) -> int:
        operator = re.compile(r"&?>>?[|&]?|<<-|<<<|<<|<>|<&|<").match(self.text, at)
        assert operator is not None
        end = operator.end()
        if operator[0] in ("<", ">") and self.text.startswith("(", end):
            close = self._matching(end, "()")
            self.nested.append(self.text[end + 1 : close])
            return self._take("", close + 1)
        if self._word is not None and not self._word.isdigit():
            self._end_word()
        self._word, self._redirected = None, operator[0]
        return end

    def _matching(self, at: int, pair: str) -> int:
        """Where what opens at `at` closes; quotes inside count as text."""
        depth = 0
        quote = ""
        for end in range(at, len(self.text)):
            char = self.text[end]
            if quote:
                quote = "" if char == quote else quote
            elif char in "'\"" and self.text[end - 1] != "\\":
                quote = char
            elif char in pair:
                depth += 1 if char == pair[0] else -1
                if depth == 0:
                    return end
        self.unclosed = self.unclosed or f"`{pair[0]}`"
        return len(self.text)

    def _close(self, mark: str, at: int, what: str) -> int:
        end = self.text.find(mark, at)
        if end < 0:
            self.unclosed = self.unclosed or what
        return end if end >= 0 else len(self.text)

    def _find(self, mark: str, at: int) -> int:
        end = self.text.find(mark, at)
        return end if end >= 0 else len(self.text)

    def _take(self, piece: str, after: int) -> int:
        self._word = (self._word or "") + piece
        return after

    def _end_word(self) -> None:
        if self._word is not None and self._redirected:
            if self._redirected in ("<<", "<<-"):
                self._heredocs.append((self._word, self._redirected == "<<-"))
            self._redirected = ""
        elif self._word is not None:
            self._words.append(self._word)
        self._word = None

    def _end_command(self) -> None:
        self._end_word()
        if self._words:
            self.commands.append(self._words)
        self._words = []

    def _after_heredocs(self, at: int) -> int:
        """Behind the bodies of the here-documents that the line before began."""
        for mark, indented in self._heredocs:
            while at < len(self.text):
                line, at = self.text[at : self._find("\n", at)], self._find("\n", at) + 1
                if (line.lstrip("\t") if indented else line) == mark:
                    break
        self._heredocs = []
        return min(at, len(self.text))
