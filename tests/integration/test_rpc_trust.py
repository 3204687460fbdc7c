"""The boundary's part of trust: who is admitted, that owners were asked for, and what the audit trail hears."""

import asyncio
import contextlib

import pytest

from tests.support.toy_rpc import NAME, Stub, Toy, dial, serving, text
from whaleflux import errors
from whaleflux.rpc import auth, owners
from whaleflux.rpc.limits import CallLimits
from whaleflux.rpc.status import ServerFailure
from whaleflux.trust import audit, ownership

METHOD = f"/{NAME}/Echo"


class Door:
    """Admits everybody but `closed` names."""

    def __init__(self):
        self.closed, self.groups, self._changed = set(), {"research"}, asyncio.Event()
        self.refusal = None

    def close(self, name, refusal=None):
        self.closed.add(name)
        self.refusal = refusal or errors.Unauthenticated(f"{name} was revoked")
        self._changed.set()

    def regroup(self, *groups):
        self.groups = set(groups)
        self._changed.set()

    def admit(self, identity):
        if identity.name in self.closed:
            raise self.refusal
        return auth.Principal(identity, frozenset(self.groups))

    async def changed(self):
        await self._changed.wait()
        self._changed.clear()


class Trail(list, audit.NoAudit):
    def record(self, record):
        self.append(record)


@contextlib.asynccontextmanager
async def guarded(toy, door=None):
    trail = Trail()
    async with serving(toy) as server:
        server.guard(door or Door(), trail)
        watching = asyncio.create_task(server.end_streams_of_the_revoked())
        async with dial(server) as channel:
            yield Stub(channel), trail
        watching.cancel()


async def echo(request, context):
    audit.note(before="1", after="2")
    return text(f"{auth.principal().subject} {sorted(auth.principal().groups)}")


async def test_the_servicer_gets_the_principal_with_its_groups():
    async with guarded(Toy(unary={"Echo": echo})) as (stub, _):
        assert (await stub.unary("Echo")(text())).value == "user/ann ['research']"


async def test_who_is_revoked_is_refused_and_loses_its_open_streams_at_once():
    door = Door()

    async def watch(request, context):
        yield text("open")
        await asyncio.Event().wait()

    async with guarded(Toy(unary={"Echo": echo}, stream={"Watch": watch}), door) as (stub, trail):
        stream = stub.stream("Watch")(text()).__aiter__()
        assert (await anext(stream)).value == "open"
        door.close("ann")
        async with asyncio.timeout(45):
            with pytest.raises(errors.Unauthenticated, match="ann was revoked"):
                await anext(stream)
        with pytest.raises(errors.Unauthenticated, match="revoked"):
            await stub.unary("Echo")(text())
        assert [(r.subject, r.result) for r in trail] == [("user/ann", "UNAUTHENTICATED")] * 2


async def test_who_cannot_be_judged_now_loses_its_streams_and_nobody_else_suffers():
    """A login that was ended within seconds of its beginning is unknown, not refused: that ended whole services."""
    door = Door()

    async def watch(request, context):
        yield text("open")
        await asyncio.Event().wait()

    async with guarded(Toy(stream={"Watch": watch}), door) as (stub, _):
        for refusal in (errors.Unavailable("so young"), errors.Unauthenticated("ann was revoked")):
            door.closed.clear()
            stream = stub.stream("Watch")(text()).__aiter__()
            assert (await anext(stream)).value == "open"
            door.close("ann", refusal)
            async with asyncio.timeout(45):
                with pytest.raises(type(refusal), match=refusal.message):
                    await anext(stream)


async def test_who_is_in_other_groups_opens_streams_again():
    door = Door()

    async def stay(request, context):
        yield text("open")
        await asyncio.Event().wait()

    async with guarded(Toy(stream={"Watch": stay, "Stay": stay}), door) as (stub, _):
        streams = {name: stub.stream(name)(text()).__aiter__() for name in ("Watch", "Stay")}
        for stream in streams.values():
            await anext(stream)
        door.regroup("research")
        door.regroup("research", "other")
        for name, error in (("Watch", errors.OutOfRange), ("Stay", errors.Unavailable)):
            async with asyncio.timeout(45):
                with pytest.raises(error, match="your groups have changed"):
                    await anext(streams[name])


async def test_an_answer_without_asking_for_the_owner_is_our_bug(monkeypatch):
    monkeypatch.setitem(owners.TABLE, METHOD, owners.RECORD)

    async def asks(request, context):
        if request.value == "asked":
            ownership.may_see(auth.principal(), ownership.OPEN)
        return text("done")

    async with guarded(Toy(unary={"Echo": asks})) as (stub, _):
        assert (await stub.unary("Echo")(text("asked"))).value == "done"
        with pytest.raises(ServerFailure, match="internal error"):
            await stub.unary("Echo")(text("forgot"))


async def test_a_stream_gives_nothing_before_the_owner_was_asked_for(monkeypatch):
    monkeypatch.setitem(owners.TABLE, f"/{NAME}/Watch", owners.LEAVES_OUT)

    async def watch(request, context):
        yield text("secret")

    async with guarded(Toy(stream={"Watch": watch})) as (stub, _):
        with pytest.raises(ServerFailure):
            await anext(stub.stream("Watch")(text()).__aiter__())


async def test_changes_and_denials_are_written_down(monkeypatch):
    async def denied(request, context):
        raise errors.PermissionDenied("no")

    toy = Toy(unary={"Echo": echo, "Deny": denied})
    async with guarded(toy) as (stub, trail):
        await stub.unary("Echo")(text())  # a method of nobody's table is no change
        assert trail == []
        monkeypatch.setitem(owners.TABLE, METHOD, owners.FLEET)
        await stub.unary("Echo")(text())
        with pytest.raises(errors.PermissionDenied):
            await stub.unary("Deny")(text())
    changed, refused = trail
    assert (changed.subject, changed.method, changed.result, changed.before, changed.after) == (
        "user/ann",
        METHOD,
        "OK",
        "1",
        "2",
    )
    assert changed.peer == "127.0.0.1"
    assert (refused.method, refused.result, refused.before) == (f"/{NAME}/Deny", "PERMISSION_DENIED", "")


async def test_a_change_whose_caller_did_not_wait_for_the_answer_is_written_down(monkeypatch):
    """It may be done all the same: giving up is no way around the trail."""
    monkeypatch.setitem(owners.TABLE, METHOD, owners.FLEET)
    begun = asyncio.Event()

    async def slow(request, context):
        audit.note(before="1", after="2")
        begun.set()
        await asyncio.Event().wait()

    async def broken(request, context):
        raise KeyError("a bug after the commit")

    async def taken(requests, context):
        async for _ in requests:
            return await slow(None, context)

    async def texts():
        yield text()

    for method in ("Break", "Send"):
        monkeypatch.setitem(owners.TABLE, f"/{NAME}/{method}", owners.FLEET)
    toy = Toy(unary={"Echo": slow, "Break": broken})
    toy.collect["Send"] = taken
    async with guarded(toy) as (stub, trail):
        call = asyncio.ensure_future(stub.unary("Echo")(text()))
        await begun.wait()
        call.cancel()
        async with asyncio.timeout(30):
            while not trail:
                await asyncio.sleep(0.01)
        with pytest.raises(ServerFailure):
            await stub.unary("Break")(text())
        begun.clear()
        sending = asyncio.ensure_future(stub.collect("Send")(texts()))
        await begun.wait()
        sending.cancel()
        async with asyncio.timeout(30):
            while len(trail) < 3:
                await asyncio.sleep(0.01)
    assert [(r.result, r.after) for r in trail] == [("CANCELLED", "2"), ("INTERNAL", ""), ("CANCELLED", "2")]


async def test_a_stream_whose_caller_says_nothing_is_not_held(monkeypatch):
    monkeypatch.setitem(owners.TABLE, f"/{NAME}/Shout", owners.FLEET)
    toy, ended = Toy(), asyncio.Event()

    async def shout(requests, context):
        try:
            async for request in requests:
                yield request
        finally:
            ended.set()

    async def silence():
        await asyncio.Event().wait()
        yield text()

    toy.talk["Shout"] = shout
    async with serving(toy, CallLimits(first_request_s=0.05)) as server, dial(server) as channel:
        with pytest.raises(errors.InvalidArgument, match="first message"):
            async for _ in Stub(channel).talk("Shout")(silence()):
                pass
        assert ended.is_set()
