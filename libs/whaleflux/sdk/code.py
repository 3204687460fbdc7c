"""Sending a folder, so that a job can start in it.

with Client.from_context() as fleet:
    spec = scheduler_pb2.JobSpec(command=["python", "train.py"], gpus=8, code=send_folder(fleet, "."))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whaleflux.code.pack import Packed, contents, pack
from whaleflux.errors import NotFound, StatusError
from whaleflux.retry import Backoff, worth_repeating

if TYPE_CHECKING:
    from whaleflux.v1 import scheduler_pb2

_UPLOAD_S = 600.0
_TRIES, _PAUSE = 4, Backoff(first_s=0.5, longest_s=5.0)


def send_folder(client: Any, folder: str | Path) -> str:
    """Packs and sends a folder; the digest belongs into `JobSpec.code`. Raises InvalidArgument where it cannot travel."""
    packed = pack(contents(Path(folder).resolve()))
    with packed.file:
        send(client, packed)
    return packed.digest


def send(client: Any, packed: Packed, progress: Callable[[int], None] = lambda _: None) -> bool:
    """Sends what the fleet does not have; False: it had it. `progress` hears how many bytes are on their way."""
    from whaleflux.v1 import scheduler_pb2

    for failures in range(1, _TRIES + 1):
        try:
            client.scheduler.GetCode(scheduler_pb2.GetCodeRequest(digest=packed.digest), timeout=20)
            return failures > 1
        except NotFound:
            pass
        try:
            client.scheduler.UploadCode(_messages(packed, progress), timeout=_UPLOAD_S)
            return True
        except StatusError as error:
            if failures == _TRIES or not worth_repeating(error):
                raise
        time.sleep(_PAUSE.pause_s(failures))
    raise AssertionError("the last try returns or raises")


def _messages(packed: Packed, progress: Callable[[int], None]) -> Iterator[scheduler_pb2.UploadCodeRequest]:
    from whaleflux.v1 import scheduler_pb2

    yield scheduler_pb2.UploadCodeRequest(digest=packed.digest, size_bytes=packed.size_bytes)
    sent = 0
    for chunk in packed.chunks():
        yield scheduler_pb2.UploadCodeRequest(data=chunk)
        sent += len(chunk)
        progress(sent)
