"""One session with a command beside a rank."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent.attach_link import Link, Refused, side_by_side
from whaleflux_agent.runtime.beside import Command, place_of_rank, shell
from whaleflux_agent.task_runner import Task


async def run_command(link: Link, task: Task, opened: pb.AttachOpen, begun: pb.AttachOpened) -> pb.AttachResult:
    """From its start to its end. Raises Refused, CallerGone, OSError; nothing of the command is left then."""
    if task.work.spec.image:
        raise Refused(f"{task.work.job} runs in a container; commands beside its ranks are not possible there yet")
    try:
        position = task.work.process_of(opened.rank)
        place = await asyncio.to_thread(place_of_rank, task.folder, task.meta.token, position)
    except (OSError, ValueError, LookupError):
        raise Refused(f"how rank {opened.rank} of {task.work.job} was started is not known here any more") from None
    asked = opened.command
    size = (asked.terminal.rows, asked.terminal.columns) if asked.HasField("terminal") else None
    extra = {"TERM": asked.term} if asked.term else {}
    command = Command(place, asked.argv or [shell(place.environment)], size, extra)
    try:
        await command.start()
        link.on_control = lambda request: _control(command, request)
        await link.send(pb.AttachJobResponse(opened=begun))
        return await _carry(link, command)
    finally:
        await command.end()


def _control(command: Command, request: pb.AttachJobRequest) -> None:
    if request.HasField("resize"):
        command.resize(request.resize.rows, request.resize.columns)
    else:
        command.signal(request.signal)


async def _carry(link: Link, command: Command) -> pb.AttachResult:
    """Input and output, until it has ended and all of its output is handed over."""
    feeding = asyncio.create_task(_feed(link, command))
    outputs = [_pass_on(link, command, command.stdout, lambda data: pb.AttachJobResponse(data=data))]
    if command.stderr >= 0:
        outputs.append(_pass_on(link, command, command.stderr, lambda data: pb.AttachJobResponse(error_data=data)))
    try:
        await side_by_side(*outputs)
        return pb.AttachResult(exit_code=await command.exit_code())
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _feed(link: Link, command: Command) -> None:
    """What it does not take is dropped: it has closed its input."""
    taking = True
    async for data in link.input():
        taking = taking and await command.write(data)
    await command.end_input()


async def _pass_on(
    link: Link, command: Command, descriptor: int, response: Callable[[bytes], pb.AttachJobResponse]
) -> None:
    async with contextlib.aclosing(command.output(descriptor)) as output:
        async for data in output:
            await link.send(response(data))
