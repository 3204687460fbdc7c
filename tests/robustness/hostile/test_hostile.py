"""Five who attack at once, each with everything that they are given: nothing is gained, and the audit trail tells of each attempt.

What no program of ours sees (a kernel's refusal, a handshake's) is marked as such on the attempt itself. `-rP` shows the tables.
"""

import asyncio
from collections import Counter

import pytest
import pytest_asyncio

from tests.robustness.hostile import agent, app_key, outsider, rank, user
from tests.robustness.hostile.attempts import Attacker
from tests.robustness.hostile.place import CAN_ISOLATE, hostile_place

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]
PROGRAMS = {"agent": agent, "app key": app_key, "outsider": outsider, "rank": rank, "user": user}
AT_LEAST = 25


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attacked():
    """All of them have tried all that they know; then the trail was read."""
    async with hostile_place() as place:
        programs = {name: program for name, program in PROGRAMS.items() if name != "rank" or CAN_ISOLATE}
        known = await asyncio.gather(*(program.attempts(place) for program in programs.values()))
        tried = dict(zip(programs, known, strict=True))
        before = await place.world.fingerprint()
        attackers = {name: Attacker(name) for name in programs}
        await asyncio.gather(*(attackers[name].run(tried[name], place.canaries) for name in programs))
        wanted = sum((attacker.kinds() for attacker in attackers.values()), Counter())
        told = await place.trail(wanted)
        for attacker in attackers.values():
            for one in attacker.outcomes:
                one.recorded = told[one.kind]
        after = await place.world.fingerprint()
        if CAN_ISOLATE:
            attackers["rank"].outcomes.append(await rank.outlive(place))
        yield attackers, before, after, wanted - told


@pytest.mark.parametrize("name", PROGRAMS)
async def test_nothing_is_gained_and_each_attempt_is_on_record(attacked, name):
    if name == "rank" and not CAN_ISOLATE:
        pytest.skip("only root can run work as somebody else")
    attackers, before, after, untold = attacked
    attacker = attackers[name]
    print(attacker.table())
    assert len(attacker.outcomes) >= AT_LEAST
    assert [(one.attempt.name, one.gained) for one in attacker.outcomes if one.gained] == []
    missing = {kind: number for kind, number in untold.items() if kind in attacker.kinds()}
    assert missing == {}, "not in the audit trail, or fewer times than it was tried"
    assert after == before
