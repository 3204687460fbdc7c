"""Whether every call answers what the tables of roles and owners say, over the wire, for each kind of caller and of thing.

Each rpc of the contract and each HTTP path, for each kind of principal, about a thing that is theirs, their team's, somebody else's
that they may know of, one that they may not, and one that does not exist. The answer that is right comes from `rpc.roles.TABLE` and
`rpc.owners.TABLE` alone (`authz/expected.py`); what was answered comes through the real front door. Then a fuzzer mutates identities,
names and headers of calls that must not be let in (`--fuzz-s`, 600; 10 with --quick).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from dataclasses import dataclass
from statistics import median

import grpc
from google.protobuf.message import Message

from benchmarks.authz import fleet, fuzz, http, revocation
from benchmarks.authz.contract import OPEN_S, Method, Said, call, methods
from benchmarks.authz.expected import Answer, Caller, Relation, answer_of, expected
from benchmarks.authz.probes import PROBES
from benchmarks.common import Options, Report, Row, Target, main

REFUSED_S = 8.0  # within which a refusal comes, on however busy a host
AT_ONCE = 16  # calls at a time


@dataclass(frozen=True, slots=True)
class Asked:
    """One cell of the matrix and what became of it."""

    method: str
    caller: str
    thing: str
    relation: Relation
    wanted: frozenset[Answer]
    said: Said

    @property
    def is_right(self) -> bool:
        nothing = self.relation in (Relation.HIDDEN, Relation.ABSENT) and PROBES[self.method].empty
        if nothing and self.said.response is not None and _tells_nothing(self.said.response):
            return True
        answer = answer_of(self.said.code, self.said.details)
        if answer is Answer.NOT_THERE and PROBES[self.method].spent and Answer.ADMITTED in self.wanted:
            return True
        return answer in self.wanted

    def __str__(self) -> str:
        wanted = " or ".join(sorted(answer.value for answer in self.wanted))
        return (
            f"{self.caller} called {self.method.rpartition('.')[2]} about {self.thing or 'nothing'} ({self.relation.value}): "
            f"wanted {wanted}, got {self.said.code.name}: {self.said.details[:200]}"
        )


def _tells_nothing(response: Message) -> bool:
    """But from which version on a watch goes on, which is one for all that is kept, and that nothing changed."""
    told = {field.name: value for field, value in response.ListFields() if field.name != "resource_version"}
    return not told or (list(told) == ["bookmark"] and not told["bookmark"].ByteSize())


Cell = tuple[Method, Caller, fleet.Thing | None, frozenset[Answer]]


async def matrix(world: fleet.World) -> tuple[list[Asked], bool]:
    """Every cell, and whether anything was changed by those who were to be kept out: they come first, what deletes comes last."""
    cells = [cell for caller in world.callers.values() for cell in _cells(world, caller)]
    out = [cell for cell in cells if Answer.ADMITTED not in cell[3]]
    let_in = [cell for cell in cells if Answer.ADMITTED in cell[3]]
    before = await world.fingerprint()
    asked = await _ask_all(world, out)
    changed = await world.fingerprint() != before
    asked += await _ask_all(world, [cell for cell in let_in if not PROBES[cell[0].path].spent])
    asked += await _ask_all(world, [cell for cell in let_in if PROBES[cell[0].path].spent])
    return asked, changed


async def _ask_all(world: fleet.World, cells: list[Cell]) -> list[Asked]:
    channels = {label: world.channel(caller) for label, caller in world.callers.items()}
    slots = asyncio.Semaphore(AT_ONCE)

    async def ask(method: Method, caller: Caller, thing: fleet.Thing | None, wanted: frozenset[Answer]) -> Asked:
        name = thing.name if thing else ""
        async with slots:
            open_s = OPEN_S if Answer.ADMITTED in wanted else REFUSED_S
            said = await call(channels[caller.label], method, PROBES[method.path].build(name), open_s=open_s)
        return Asked(method.path, caller.label, name, thing.to(caller) if thing else Relation.NONE, wanted, said)

    try:
        return list(await asyncio.gather(*(ask(*cell) for cell in cells)))
    finally:
        await asyncio.gather(*(channel.close() for channel in channels.values()))


def _cells(world: fleet.World, caller: Caller) -> list[tuple[Method, Caller, fleet.Thing | None, frozenset[Answer]]]:
    found = []
    for method in methods():
        kind = PROBES[method.path].kind
        for thing in world.things[kind] if kind else [None]:
            relation = thing.to(caller) if thing else Relation.NONE
            found.append((method, caller, thing, expected(method.path, caller, relation)))
    return found


def tell_apart(asked: list[Asked]) -> list[str]:
    """Hidden things that a person can tell from absent ones, by the answer's code or by its words but for the name.

    Agents are told apart jobs of other nodes and no jobs: a zombie has to hear that its attempt is over.
    """
    told: dict[tuple[str, str, Relation], set[tuple[str, str]]] = {}
    for one in (one for one in asked if not one.caller.startswith("agent")):
        words = one.said.details.replace(one.thing, "*").replace(one.thing.rpartition("/")[2], "*") if one.thing else ""
        told.setdefault((one.caller, one.method, one.relation), set()).add((one.said.code.name, words))
    found = []
    for (caller, method, relation), answers in told.items():
        absent = told.get((caller, method, Relation.ABSENT))
        if relation is Relation.HIDDEN and absent and not answers <= absent:
            found.append(
                f"{caller} can tell by {method} what is hidden {sorted(answers - absent)} from what is absent {sorted(absent)}"
            )
    return found


async def private_words(world: fleet.World) -> list[str]:
    """Who could read what stands in ann's private fields: each read of each caller, searched for the canary."""
    reads = ("Get", "List", "Watch", "Find", "Explain", "Stream")
    cells = [cell for caller in world.callers.values() for cell in _cells(world, caller)]
    asked = await _ask_all(world, [cell for cell in cells if cell[0].path.rpartition("/")[2].startswith(reads)])
    team = {caller.label for caller in world.callers.values() if caller.above or caller.name in ("ann", "bob")}
    return [
        f"{one.caller} read ann's private words by {one.method} about {one.thing}"
        for one in asked
        if one.caller not in team
        and one.said.response is not None
        and fleet.PRIVATE.encode() in one.said.response.SerializeToString()
    ]


async def run(fuzz_s: float, seed: int, rounds: int) -> Report:
    """The matrix, the search for private words, the HTTP paths, the fuzzer; each with its surprises. Then people leave, in rounds."""
    async with fleet.running() as world:
        leaks = await private_words(world)
        paths = await http.matrix(world)
        fuzzed = await fuzz.run(world, fuzz_s, seed)
        asked, changed = await matrix(world)
        left = await revocation.measure(world, rounds)
    wrong = [*map(str, (one for one in asked if not one.is_right)), *tell_apart(asked), *leaks]
    wrong += [*paths.surprises, *fuzzed.surprises]
    if changed:
        wrong.append("somebody's things are not as before")
    return _report(asked, paths, fuzzed, wrong, left)


def _report(
    asked: list[Asked], paths: http.Walked, fuzzed: fuzz.Fuzzed, wrong: list[str], left: dict[str, list[float]]
) -> Report:
    tried = Counter(
        (one.caller, "let in" if answer_of(one.said.code, one.said.details) is Answer.ADMITTED else "kept out")
        for one in asked
    )
    rows: list[Row] = [
        {"caller": label, "calls": tried[label, "let in"] + tried[label, "kept out"], "let in": tried[label, "let in"]}
        for label in dict.fromkeys(one.caller for one in asked)
    ]
    rows.append({"caller": "HTTP paths", "calls": paths.calls, "let in": paths.let_in})
    rows.append({"caller": "fuzzer", "calls": fuzzed.calls, "let in": fuzzed.let_in})
    rows += [
        {"caller": f"disabled: {what} refuses", "median_s": median(took), "longest_s": max(took)}
        for what, took in left.items()
    ]
    longest_s = max(max(took) for took in left.values())
    return Report(
        rows,
        [
            Target("revocation_longest", longest_s, 1.0, "s"),
            Target("surprises", len(wrong), 0, "calls"),
            Target("calls", len(asked) + paths.calls, 2000, "calls", "higher"),
        ],
        simulated="the GPUs of the two nodes; everything else is real",
        notes=wrong[:100],
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fuzz-s", type=float, default=None, help="seconds of fuzzing; 600, or 10 with --quick")


def measure(options: Options) -> Report:
    """Every rpc and HTTP path x every kind of caller x own, foreign and absent things, against the tables; then a fuzzer."""
    if options.extra.fuzz_s is None:
        options.extra.fuzz_s = 10.0 if options.quick else 600.0
    grpc.aio.init_grpc_aio()
    return asyncio.run(run(options.extra.fuzz_s, options.seed, 3 if options.quick else 20))


if __name__ == "__main__":
    sys.exit(main("authz_matrix", measure, add_arguments=_arguments))
