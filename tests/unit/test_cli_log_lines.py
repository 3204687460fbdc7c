"""Output of ranks: each line with its rank, harmless on a terminal, untouched in a pipe."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.cli.log_lines import LogView, shown


def test_each_line_has_its_rank_once():
    assert shown(b"a\n\nb\n", "3", terminal=False) == b"[3] a\n[3] \n[3] b\n"
    assert shown(b"", "3", terminal=False) == b""


def test_lines_never_run_into_the_next_ranks():
    assert shown(b"a\nb", "0", terminal=True) + shown(b"c\n", "1", terminal=True) == b"[0] a\n[0] b\n[1] c\n"


@given(st.binary())
def test_pipes_get_the_bytes_as_they_are(data):
    assert shown(data, "", terminal=False) == data


@pytest.mark.parametrize("rank", ["", "0"])
def test_nothing_commands_the_terminal(rank):
    text = shown(b"\x1b]0;owned\x07 \x1b[2J \xc2\x9b1A \x1b[31mred\x1b[0m\r\n", rank, terminal=True)
    assert text.removeprefix(b"[0] ") == b"\\x1b]0;owned\\x07 \\x1b[2J \\x9b1A red\\x0d\n"


@given(st.binary(), st.sampled_from(["", "0", "sweep-3 0"]))
def test_nothing_does_whatever_the_bytes(data, rank):
    text = shown(data, rank, terminal=True).decode()
    assert not [c for c in text if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0]


def test_letters_of_all_kinds_are_left():
    line = "é漢🐳 42 %\ttab\n".encode()
    assert shown(line, "", terminal=True) == line


def test_times_and_ranks_stand_before_each_line():
    assert shown(b"a\nb\n", "1", terminal=False, time="08:00") == b"08:00 [1] a\n08:00 [1] b\n"


def test_a_progress_bar_stays_on_its_line_on_a_terminal_and_is_lines_in_a_pipe():
    pieces = [(b"start\n", False), (b"10%\n", True), (b"20%\n", True), (b"100%\ndone\n", False)]
    screen = LogView(terminal=True)
    assert b"".join(screen.written(data, "", progress=bar) for data, bar in pieces) == (
        b"start\n10%\r\x1b[K20%\r\x1b[K100%\ndone\n"
    )
    pipe = LogView(terminal=False)
    assert b"".join(pipe.written(data, "", progress=bar) for data, bar in pieces) == b"start\n10%\n20%\n100%\ndone\n"


def test_a_progress_bar_never_takes_two_lines_and_makes_room_for_what_is_said_beside_it():
    view = LogView(terminal=True, columns=10)
    assert view.written(b"#" * 50 + b"\n", "0", progress=True) == b"[0] #####"
    assert (view.cleared(), view.cleared()) == (b"\r\x1b[K", b"")
