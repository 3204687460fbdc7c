"""What all tests keep to: units have no real time, nobody looks behind the public seams, and no assert can be passed by."""

import ast
import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.virtual_time import LoopClock, VirtualTimeLoop

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
REAL_TIME = {
    "time.sleep", "time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.perf_counter",
    "datetime.now", "datetime.utcnow", "datetime.today", "date.today", "SystemClock", "asyncio.run",
}  # fmt: skip
THEIR_PRIVATES = {"_exit", "_replace", "_fields", "_asdict", "_make"}  # public in spite of their names


def shown(file: Path, node: ast.AST, what: str) -> str:
    return f"{file.relative_to(TESTS)}:{getattr(node, 'lineno', 0)}: {what}"


def real_time(file: Path, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in REAL_TIME:
            yield shown(file, node, ast.unparse(node))


def privates(file: Path, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and ast.unparse(node.value) not in {"self", "cls", "super()"}
        ):
            yield shown(file, node, ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("whaleflux"):
            yield from (shown(file, node, name.name) for name in node.names if is_private(name.name))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            yield from (shown(file, node, text) for text in texts if is_private(text.rpartition(".")[2]))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in THEIR_PRIVATES


def passed_by(file: Path, tree: ast.AST) -> Iterator[str]:
    """Asserts of a test under an `if` that has no other branch: the test says nothing when the condition does not hold."""
    tests = (
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name.startswith("test")
    )
    for node in (node for test in tests for node in ast.walk(test)):
        if isinstance(node, ast.If) and not node.orelse and asserts(node.body):
            yield shown(file, node, f"if {ast.unparse(node.test)}")


def asserts(body: list[ast.stmt]) -> bool:
    """A body that leaves the test has what follows it as its other branch."""
    return not isinstance(body[-1], ast.Return) and any(isinstance(inner, ast.Assert) for inner in body)


def found(check, files=FILES):
    return [line for file in files for line in check(file, ast.parse(file.read_text(encoding="utf-8")))]


def test_units_and_simulations_ask_no_real_clock():
    units = [file for file in FILES if file.parts[len(TESTS.parts)] in {"unit", "simulation"}]
    assert found(real_time, units) == []


def test_no_test_looks_behind_the_public_seams():
    assert found(privates) == []


def test_no_assert_is_passed_by():
    assert found(passed_by) == []


@pytest.mark.parametrize(("check", "code", "count"), [
    (real_time, "import time\ntime.sleep(1)", 1),
    (real_time, "clock = SystemClock()", 1),
    (real_time, "clock.monotonic(), asyncio.sleep(1)", 0),
    (privates, "world._loop.cancel()", 1),
    (privates, "from whaleflux.names import _split", 1),
    (privates, "monkeypatch.setattr('whaleflux.store.cache._PAUSE_S', 0)", 1),
    (privates, "monkeypatch.setattr(cache, '_PAUSE_S', 0)", 1),
    (privates, "self._loop, super()._run(), os._exit(1), node.__class__", 0),
    (passed_by, "def test_x():\n if y:\n  assert z", 1),
    (passed_by, "def test_x():\n if y:\n  assert z\n else:\n  assert not z", 0),
    (passed_by, "def helper():\n if y:\n  assert z", 0),
])  # fmt: skip
def test_the_checks_see_what_they_are_for(check, code, count):
    assert len(list(check(TESTS / "x.py", ast.parse(code)))) == count


async def test_a_day_passes_at_once():
    clock = LoopClock()
    begun = clock.now(), clock.monotonic()
    assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(86_400):
            await asyncio.Event().wait()
    assert clock.monotonic() - begun[1] == pytest.approx(86_400)
    assert (clock.now() - begun[0]).total_seconds() == pytest.approx(86_400)


async def test_what_a_thread_does_is_waited_for():
    """Time runs as outside while it works: the timeout, far away, does not come first."""
    async with asyncio.timeout(60):
        assert await asyncio.to_thread(sum, range(1_000_000)) == 499_999_500_000


async def test_timers_ring_in_their_order():
    heard = []
    await asyncio.gather(*(ring(heard, seconds) for seconds in (3, 1, 2)))
    assert heard == [1, 2, 3]


async def ring(heard, seconds):
    await asyncio.sleep(seconds)
    heard.append(seconds)
