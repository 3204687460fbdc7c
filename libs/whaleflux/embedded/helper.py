"""Short processes that speak gRPC for the supervisor: it lives as long as the suite, and gRPC would stay in its memory (15 MB)."""

from __future__ import annotations

import asyncio
import sys

from whaleflux.embedded.supervisor import end_with_parent
from whaleflux.errors import Unavailable

CALL_WITHIN_S = 20.0
_DONE_WITHIN_S = 30.0  # with the start of the process


async def run(module: str, *arguments: str, what: str) -> None:
    """`python -m module ARGUMENTS` until its end. Raises Unavailable, naming `what` and its last words, when it fails."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=end_with_parent,
    )
    said = f"not done within {_DONE_WITHIN_S:g} s".encode()
    try:
        async with asyncio.timeout(_DONE_WITHIN_S):
            _, said = await child.communicate()
    except TimeoutError:
        pass  # killed below, which counts as a failure
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        raise Unavailable(f"{what} could not be made: {said.decode(errors='replace').strip()}")
