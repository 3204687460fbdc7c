"""Where the five attack: a suite with Ann's things in it, and (as root) a node whose agent isolates what it runs.

Whatever gains is seen here: the versions of all things before and after, words that nobody may be told, and what the audit trail tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc

from benchmarks.authz import fleet
from tests.support.suite import ready_nodes, until
from whaleflux.context import Context
from whaleflux.demo.fleet import DemoFleet, Machine
from whaleflux.rpc.pki import CertificateAuthority, Tls
from whaleflux.sdk.stubs import Stubs
from whaleflux.v1 import audit_pb2, scheduler_pb2

ANNS_CODE = b"print('what Ann wrote')"
ISOLATED = Machine("c", "n1", "h100x8")
PYTHON = "/usr/bin/python3"  # users of tasks can run it
CAN_ISOLATE = os.geteuid() == 0 and os.access(PYTHON, os.X_OK)
_TOLD_WITHIN_S = 60.0  # refusals that repeat are counted for ten seconds before they are written down


@dataclass
class Place:
    """The fleet and what attackers need to know of it."""

    world: fleet.World
    isolated: DemoFleet | None = None
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    before: tuple[str, ...] = ()

    @property
    def now(self) -> datetime:
        return datetime.now(UTC)

    @property
    def canaries(self) -> tuple[str, ...]:
        return (fleet.PRIVATE, ANNS_CODE.decode(), "PRIVATE KEY")

    def authority(self) -> CertificateAuthority:
        """The fleet's own, for certificates that it would not issue."""
        pki = self.world.suite.layout.pki
        return CertificateAuthority.load((pki / "ca.crt").read_bytes(), (pki / "authority.key").read_bytes())

    def channel_with(self, tls: Tls) -> grpc.aio.Channel:
        return self.channel(self.authority().certificate_pem, tls.key, tls.chain)

    def channel(self, roots: bytes, key: bytes, chain: bytes) -> grpc.aio.Channel:
        """Through the front door, with a certificate of one's own."""
        options = (("grpc.ssl_target_name_override", "frontdoor.whaleflux"), ("grpc.use_local_subchannel_pool", 1))
        credentials = grpc.ssl_channel_credentials(roots, key, chain)
        return grpc.aio.secure_channel(self.world.target, credentials, options)

    def as_caller(self, label: str) -> grpc.aio.Channel:
        return self.world.channel(self.world.callers[label])

    def stubs(self, channel: grpc.aio.Channel) -> Stubs:
        return Stubs(channel)

    def thing(self, kind: str) -> str:
        return self.world.things[kind][0].name

    async def submit(self, who: str, queue: str, job: str, spec: scheduler_pb2.JobSpec) -> str:
        """A job on the isolated node, once there is room for it."""
        spec.sites.append(ISOLATED.site)
        request = scheduler_pb2.CreateJobRequest(
            parent=queue, job_id=job, job=scheduler_pb2.Job(spec=spec), wait_for_capacity=True
        )
        return str((await self.stubs(self.as_caller(who)).scheduler.CreateJob(request)).name)

    async def runs(self, job: str) -> None:
        async def running() -> bool:
            found = await self.world.admin.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job))
            return found.state == scheduler_pb2.JOB_STATE_RUNNING

        await until(running, f"{job} runs", 90)

    async def trail(self, enough: Counter[tuple[str, str, str]]) -> Counter[tuple[str, str, str]]:
        """How often the trail tells of each (who, what, result); waits until it is `enough`, or no more can come."""
        end_s = asyncio.get_running_loop().time() + _TOLD_WITHIN_S
        while True:
            found = Counter[tuple[str, str, str]]()
            async for record in self._records():
                found[record.subject, record.method, record.result] += record.count or 1
            if not enough - found or asyncio.get_running_loop().time() > end_s:
                return found
            await asyncio.sleep(0.2)

    async def _records(self) -> AsyncIterator[audit_pb2.AuditRecord]:
        request = audit_pb2.ListAuditRequest(page_size=1000, oldest_first=True)
        request.filter.since.FromDatetime(self.began)
        while True:
            page = await self.world.admin.audit.ListAudit(request)
            for record in page.records:
                yield record
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


@contextlib.asynccontextmanager
async def hostile_place() -> AsyncIterator[Place]:
    """All of it, while the block runs."""
    async with contextlib.AsyncExitStack() as stack:
        place = Place(await stack.enter_async_context(fleet.running()))
        await _upload(place)
        if CAN_ISOLATE:
            place.isolated = await stack.enter_async_context(_isolated(place))
        yield place


async def _upload(place: Place) -> None:
    """Ann's code, as `whaleflux submit` sends it, and a job of hers that uses it."""
    ann, digest = place.stubs(place.as_caller("owner")), hashlib.sha256(ANNS_CODE).hexdigest()

    async def parts() -> AsyncIterator[scheduler_pb2.UploadCodeRequest]:
        yield scheduler_pb2.UploadCodeRequest(digest=digest, size_bytes=len(ANNS_CODE), data=ANNS_CODE)

    await ann.scheduler.UploadCode(parts())


@contextlib.asynccontextmanager
async def _isolated(place: Place) -> AsyncIterator[DemoFleet]:
    """A node below a folder that users of tasks can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="wf-hostile-", dir="/var/tmp"))
    folder.chmod(0o711)
    context = Context.load(place.world.suite.layout.context_file)
    agents = DemoFleet(folder, context)
    kept = {name: os.environ.get(name) for name in _AGENT}
    os.environ.update(_AGENT)
    try:
        await agents.join(place.world.admin, [ISOLATED])
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    try:
        await until(lambda: ready_nodes(place.world.admin, {ISOLATED.name}), "the isolated node is READY", 90)
        yield agents
    finally:
        agents.stop()
        shutil.rmtree(folder, ignore_errors=True)


_AGENT = {"WHALEFLUX_TASK_ISOLATION": "required", "WHALEFLUX_TASK_PROCESSES": "64", "WHALEFLUX_LISTEN": "127.0.0.1:0"}
