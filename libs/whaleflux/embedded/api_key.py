"""The suite's own key of the inference API, made once by a process of its own (see `helper`)."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

from whaleflux.context import Context
from whaleflux.embedded import helper
from whaleflux.errors import StatusError

_MODULE = "whaleflux.embedded.api_key"


async def kept_or_new(context: Context, kept: Path) -> str:
    """The key in the file `kept`, which is made first where there is none. Raises Unavailable when it could not be."""
    if not kept.exists():
        await helper.run(_MODULE, json.dumps(asdict(context)), str(kept), what="the key of the inference API")
    return kept.read_text()


async def _made(context: Context) -> str:
    from whaleflux.rpc.channel import connect
    from whaleflux.rpc.pki import TlsFiles
    from whaleflux.v1 import router_pb2, router_pb2_grpc

    files = TlsFiles(Path(context.key), Path(context.cert), Path(context.ca))
    async with connect(context.server, files, server=context.server_name) as channel:
        asked = router_pb2.CreateApiKeyRequest(display_name="whaleflux up")
        made = await router_pb2_grpc.RouterServiceStub(channel).CreateApiKey(asked, timeout=helper.CALL_WITHIN_S)
    return str(made.secret)


def main() -> None:
    """`python -m whaleflux.embedded.api_key CONTEXT FILE`: the context as JSON; the key goes into the file alone."""
    from whaleflux.rpc.pki import write_private

    context, kept = Context(**json.loads(sys.argv[1])), Path(sys.argv[2])
    try:
        secret = asyncio.run(_made(context))
    except StatusError as error:
        sys.exit(error.message)
    write_private(kept, secret.encode())


if __name__ == "__main__":
    main()
