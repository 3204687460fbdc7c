"""`python -m tests.support.toy_service`: a service on the common main, for tests that send it signals."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pydantic import Field

from tests.support.toy_rpc import NAME, TABLE, Toy, add_toy, text
from whaleflux.config import ServiceSettings
from whaleflux.rpc import roles
from whaleflux.service import Parts, ServiceContext, main

roles.TABLE.update(TABLE)


class ToySettings(ServiceSettings):
    """A toy."""

    diary: Path = Field(Path("diary"), description="Where it writes down how it ends.")
    crash: bool = Field(False, description="Whether its loop raises as soon as it is asked to.")
    hang: bool = Field(False, description="Whether its loop does not let itself be cancelled.")


async def build(ctx: ServiceContext[ToySettings]) -> Parts:
    def note(line: str) -> None:
        with ctx.settings.diary.open("a") as diary:
            diary.write(line + "\n")

    crash = asyncio.Event()

    async def get_it(request, context):
        if ctx.settings.crash:
            crash.set()
        return text(f"{ctx.role} at {ctx.address}")

    async def slow(request, context):
        note("slow began")
        await asyncio.sleep(0.3)
        note("slow ended")
        return text("done")

    async def watch(request, context):
        try:
            yield text("open")
            await asyncio.sleep(60)
        finally:
            note("watch ended")

    async def loop():
        try:
            await crash.wait()
            raise RuntimeError("the loop is lost")
        except asyncio.CancelledError:
            note("loop handed back")
            while ctx.settings.hang:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    note("loop hangs on")
            raise

    async def stopped():
        await ctx.store.get("/whaleflux/v1/x")  # still open
        note("stopped")

    await ctx.bus.publish("wf.v1.hub.toy.t.started", b"", id="1")
    toy = Toy({"GetIt": get_it, "Slow": slow}, {"Watch": watch})
    return Parts([(add_toy, toy, NAME)], [loop], [stopped], ports={"extra": 7})


if __name__ == "__main__":
    main("scheduler", ToySettings, build)
