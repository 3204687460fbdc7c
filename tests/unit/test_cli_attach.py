"""What the commands inside of a job understand, and the way out of a terminal that hangs."""

import os

import pytest

from whaleflux.cli import copying, forwarding
from whaleflux.cli.forwarding import Forward
from whaleflux.cli.terminal import Escape
from whaleflux.errors import InvalidArgument


@pytest.mark.parametrize(("text", "local", "remote"), [
    ("8888", 8888, 8888), ("9000:8888", 9000, 8888), (":8888", 0, 8888), ("0:8888", 0, 8888), ("65535", 65535, 65535),
])  # fmt: skip
def test_ports_are_written_as_kubectl_takes_them(text, local, remote):
    assert forwarding.parse(text) == Forward(local, remote)


@pytest.mark.parametrize("text", ["", "x", "1:x", "0", "1:0", "70000", "1:2:3", "-1", "80:", "١"])
def test_what_is_no_port_is_refused(text):
    with pytest.raises(InvalidArgument):
        forwarding.parse(text)


@pytest.mark.parametrize(("text", "there"), [
    ("train:out/a", ("train", "out/a")), ("research/train:", ("research/train", "")),
    ("queues/q/jobs/j:/work/x", ("queues/q/jobs/j", "/work/x")), ("out", None), ("./a:b", None), ("/a:b", None), ("~/a:b", None), (":x", None),
])  # fmt: skip
def test_what_is_there_has_a_colon_behind_a_job(text, there):
    assert copying.parse(text) == (there and copying.Remote(*there))


@pytest.mark.parametrize(("typed", "sent", "leaves"), [
    ([b"~."], b"", True),
    ([b"ls\r", b"~", b"."], b"ls\r", True),
    ([b"ls\r~.more"], b"ls\r", True),
    ([b"a~.b"], b"a~.b", False),
    ([b"~~."], b"~.", False),
    ([b"~", b"x"], b"~x", False),
    ([b"\r~\r~."], b"\r~\r", True),
])  # fmt: skip
def test_enter_tilde_dot_leaves(typed, sent, leaves):
    escape, out, left = Escape(), b"", False
    for data in typed:
        more, left = escape.typed(data)
        out += more
    assert (out, left) == (sent, leaves)


@pytest.mark.parametrize("make", [os.mkfifo, lambda _path: None])
async def test_only_files_and_folders_are_copied(tmp_path, make):
    make(tmp_path / "p")
    with pytest.raises(InvalidArgument, match=r"LOCAL: .* cannot be read"):
        await copying.send(None, str(tmp_path / "p"), None)
    with pytest.raises(InvalidArgument, match="neither a file nor a folder"):
        await copying.send(None, "/dev/zero", None)
