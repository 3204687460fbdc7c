"""Random operations on a plan, as many as are asked for: `python -m tests.support.plan_soak.driver --operations 1000000 --seed 1`.

A history is a world and some hundred operations. One that fails is shortened to the operations that are needed, and printed as what
`replay` takes; the seed alone repeats it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from random import Random

from tests.support.plan_soak.rules import RULES, Operation, do
from tests.support.plan_soak.world import PlanWorld
from whaleflux.service import collect_rarely

LENGTH = 200  # operations of a history
AGAINST_ALL = 8  # each so-manieth history has the reference beside it
WITH_REASONS = 10  # and each so-manieth tells those who wait why
NAMES = tuple(RULES)
WEIGHTS = tuple(weight for weight, _ in RULES.values())
Worlds = Callable[[], PlanWorld]


def history(seed: int, number: int, length: int = LENGTH) -> list[Operation]:
    """The operations of one history."""
    drawn = Random(f"{seed}/{number}")
    return [(name, drawn.getrandbits(32)) for name in drawn.choices(NAMES, WEIGHTS, k=length)]


def worlds(*, against_all: bool = False, reasons: bool = False) -> Worlds:
    """Where a history takes place: with the reference beside it or not, and with a plan that says why, or not."""
    return lambda: PlanWorld(against_all=against_all, reasons=reasons)


def worlds_of(number: int) -> Worlds:
    """Where history `number` of a soak takes place."""
    return worlds(against_all=number % AGAINST_ALL == 0, reasons=number % WITH_REASONS == 1)


def replay(operations: Sequence[Operation], world: Worlds = PlanWorld) -> tuple[int, Exception] | None:
    """Does them one after the other; the first that fails and how, None: none does."""
    made = world()
    for at, operation in enumerate(operations):
        try:
            do(made, operation)
        except Exception as wrong:
            return at, wrong
    return None


def what_failed(wrong: Exception) -> str:
    """The function that found it: so that another failure is not taken for this one."""
    return traceback.extract_tb(wrong.__traceback__)[-1].name


def shortened(operations: Sequence[Operation], world: Worlds, most_s: float = 120.0) -> list[Operation]:
    """Those of them that are needed to fail alike: without halves, quarters, and so on, as far as that still does (ddmin)."""
    failed = replay(operations, world)
    assert failed is not None, "it does not fail"
    what, left, end_s = what_failed(failed[1]), list(operations[: failed[0] + 1]), time.thread_time() + most_s
    size = len(left) // 2
    while size and time.thread_time() < end_s:
        at, shorter = 0, False
        while at < len(left):
            less = left[:at] + left[at + size :]
            again = replay(less, world)
            if again is not None and what_failed(again[1]) == what:
                left, shorter = less[: again[0] + 1], True
            else:
                at += size
        size = size if shorter and size == 1 else size // 2
    return left


def told(seed: int, number: int, operations: Sequence[Operation], world: Worlds) -> str:
    """A failed history in words."""
    failed = replay(operations, world)
    assert failed is not None
    where = "".join(traceback.format_exception(failed[1]))
    listed = "".join(f"    {operation!r},\n" for operation in operations)
    return f"seed {seed}, history {number} fails; shortened, for replay([...], worlds_of({number})):\n[\n{listed}]\n{where}"


def soak(operations: int, seed: int, first: int = 0, say: Callable[[str], None] = print) -> int:
    """How many histories failed."""
    begun_s, done, number, failures = time.process_time(), 0, first, 0
    collect_rarely()
    while done < operations:
        listed = history(seed, number, min(LENGTH, operations - done))
        if replay(listed, worlds_of(number)) is not None:
            failures += 1
            say(told(seed, number, shortened(listed, worlds_of(number)), worlds_of(number)))
        done, number = done + len(listed), number + 1
        if number % 100 == 0:
            took_s = time.process_time() - begun_s
            say(
                f"{done:,} operations, {number} histories, {failures} failed, {1000 * took_s / done:.2f} ms of CPU each"
            )
    say(f"seed {seed}: {done:,} operations, {failures} of {number - first} histories failed")
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the history to begin with")
    asked = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    return 1 if soak(asked.operations, asked.seed, asked.first, lambda text: print(text, flush=True)) else 0


if __name__ == "__main__":
    sys.exit(main())
