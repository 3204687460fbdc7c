"""Join tokens for the simulated nodes of an embedded suite, made by a process of its own (see `helper`)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from whaleflux import names
from whaleflux.context import Context
from whaleflux.embedded import helper
from whaleflux.errors import StatusError

_MODULE = "whaleflux.embedded.join_tokens"
_LIFE_S = 600


async def made(context: Context, sites: Mapping[Path, str]) -> None:
    """Writes a token of its site into each file, readable by the owner alone. Raises Unavailable when it could not be."""
    if sites:
        asked = json.dumps({str(file): site for file, site in sites.items()})
        shown = replace(context, api_key="")  # command lines are seen by all users of the machine
        await helper.run(_MODULE, json.dumps(asdict(shown)), asked, what="join tokens")


async def _make(context: Context, sites: Mapping[str, str]) -> None:
    from whaleflux.rpc.channel import connect
    from whaleflux.rpc.tls_files import TlsFiles, write_private
    from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc

    files = TlsFiles(Path(context.key), Path(context.cert), Path(context.ca))
    async with connect(context.server, files, server=context.server_name) as channel:
        stub = inventory_pb2_grpc.InventoryServiceStub(channel)
        for file, site in sites.items():
            request = inventory_pb2.CreateJoinTokenRequest(site=names.site(site), ttl_s=_LIFE_S)
            token = await stub.CreateJoinToken(request, timeout=helper.CALL_WITHIN_S)
            write_private(Path(file), token.secret.encode())


def main() -> None:
    """`python -m whaleflux.embedded.join_tokens CONTEXT SITES`: both as JSON; tokens go into the files alone."""
    try:
        asyncio.run(_make(Context(**json.loads(sys.argv[1])), json.loads(sys.argv[2])))
    except StatusError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
