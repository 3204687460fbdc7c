"""What code says of each service where types must see it, from the one table of services."""

from __future__ import annotations

from whaleflux.services import SERVICES

_STUBS = '''"""One stub per service. Made from libs/whaleflux/services.py: change that, then `make generate`."""

from __future__ import annotations

from typing import Any

{imports}

class Stubs:
    """All on one channel."""

    def __init__(self, channel: Any) -> None:
{attributes}'''


def stubs() -> str:
    """libs/whaleflux/sdk/stubs.py; each service is known by the name of its file of the contract."""
    known = sorted((file, name) for s in SERVICES for file, name in ((s.proto, s.grpc[0]), *s.also.items()))
    imports = (f"from whaleflux.v1.{file}_pb2_grpc import {name}Stub\n" for file, name in known)
    attributes = (f"        self.{file} = {name}Stub(channel)\n" for file, name in known)
    return _STUBS.format(imports="".join(imports), attributes="".join(attributes))


def addresses() -> str:
    """Settings that name each service's address."""
    return "".join(f'    {s.role}: str = Field("", description="Where {s.role} is, host:port.")\n' for s in SERVICES)
