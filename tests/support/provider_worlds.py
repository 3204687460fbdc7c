"""Providers of rented machines with what stands behind them here: each makes machines, lists them, and fails when it is told to."""

from __future__ import annotations

import contextlib
import itertools
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.support import ec2_shim, lambda_service
from whaleflux import names
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux_inventory.core.lease_rules import Lease, Terms
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.providers.api import LaunchRequest, Provider
from whaleflux_inventory.providers.aws import AwsKind
from whaleflux_inventory.providers.command import CommandKind
from whaleflux_inventory.providers.rest import RestKind
from whaleflux_inventory.providers.simulated import SimulatedKind

FLEET, OTHER_FLEET = names.ulid(), names.ulid()
LAUNCHING = Launching(FrontDoor("fleet.example:7443"), CertificateAuthority.create(datetime.now(UTC)), 60.0)
AWS_OFFER = Offer(
    "offers/aws", "aws", "p4d.24xlarge", "sites/cloud", Terms(30.0), "A100", 8, ec2_shim.REGION,
    secret="secrets/cloud", options={"image": ec2_shim.image()},
)  # fmt: skip
REST_OFFER = Offer(
    "offers/rest", "rest", "gpu_8x_a100", "sites/cloud", Terms(14.0), "A100", 8, "us-east-1", secret="secrets/lambda",
    options={"service": "lambda", "key": "fleet"},
)  # fmt: skip
_SHOP = """#!{python}
import json, sys, time
from pathlib import Path
here, asked = Path(__file__).parent, json.load(sys.stdin)
plan, machines = here / "plan", here / "machines"
machines.mkdir(exist_ok=True)
fault = plan.read_text() if plan.exists() else ""
if sys.argv[1] == "launch":
    made = machines / asked["token"]
    plan.unlink(missing_ok=True)
    if fault in ("no_capacity", "throttled", "auth"):
        sys.exit(print(json.dumps({{"error": fault, "message": "as planned"}})))
    if not made.exists():
        made.write_text(json.dumps({{"id": made.name, "tags": asked["tags"], "created_s": time.time()}}))
    sys.exit(1) if fault == "lost_reply" else print(json.dumps({{"id": made.name}}))
elif sys.argv[1] == "list":
    print(json.dumps({{"machines": [json.loads(one.read_text()) for one in machines.iterdir()]}}))
else:
    (machines / asked["id"]).unlink(missing_ok=True)
    print("{{}}")
"""


@dataclass
class ProviderWorld:
    """A provider, an offer of it, and `plan`: what the next launch meets, where the offer's options do not say it."""

    provider: Provider
    offer: Offer
    wrong: dict[str, Offer]  # field -> an offer whose field is wrong
    kind: Any
    plan: Any = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def request(self, fault: str = "", fleet: str = FLEET) -> LaunchRequest:
        """For one machine of a new lease, whose first launch meets the fault."""
        offer = replace(self.offer, name=f"{self.offer.name}-{next(self._numbers)}")
        if self.plan:
            self.plan(fault)
        elif fault:
            offer = replace(offer, options={**offer.options, "faults": fault})
        now_s = time.time()
        lease = Lease(f"leases/{names.ulid()}", offer.name, offer.terms, now_s, float(int(now_s) + 3600), 100.0)
        return LAUNCHING.request(replace(lease, asked_s=now_s), offer, fleet)


@contextlib.contextmanager
def simulated(folder: Path) -> Iterator[ProviderWorld]:
    """Machines boot longer than any test runs: no agent starts."""
    kind = SimulatedKind(folder, {})
    offer = Offer("offers/sim", "simulated", "h200x8", "sites/cloud", Terms(1.0), options={"boot_s": "3000"})
    wrong = {"machine_type": replace(offer, machine_type="h2000"), "options.boots": _with(offer, boots="1")}
    world = ProviderWorld(kind.open(offer, {}), offer, wrong, kind)
    try:
        yield world
    finally:
        for machine in folder.glob("sim-*"):
            (machine / "stop").touch()


@contextlib.contextmanager
def command(folder: Path) -> Iterator[ProviderWorld]:
    """A shop of one file for each machine."""
    shop, plan = folder / "shop", folder / "plan"
    shop.write_text(_SHOP.format(python=sys.executable))
    shop.chmod(shop.stat().st_mode | stat.S_IXUSR)
    kind = CommandKind(folder)
    offer = Offer("offers/shop", "command", "m", "sites/cloud", Terms(1.0), options={"command": "shop"})
    wrong = {"options.command": _with(offer, command="none"), "options.lag_s": _with(offer, lag_s="soon")}
    yield ProviderWorld(kind.open(offer, {}), offer, wrong, kind, plan.write_text)


@contextlib.contextmanager
def aws(folder: Path) -> Iterator[ProviderWorld]:
    """moto behind our shim."""
    shim, plan = ec2_shim.Shim(), [""]

    def planned(action: str) -> str:
        return plan.pop() if action == "RunInstances" and plan else ""

    shim.fault = planned
    wrong = {
        "region": replace(AWS_OFFER, region="mars"),
        "zone": replace(AWS_OFFER, zone="us-west-2a"),
        "machine_type": replace(AWS_OFFER, machine_type="h200x8"),
        "options.image": replace(AWS_OFFER, options={}),
        "options.subnet": _with(AWS_OFFER, subnet="my-subnet"),
        "options.imgae": _with(AWS_OFFER, imgae="ami-1"),
        "options.capacity_reservation": replace(AWS_OFFER, market="reserved"),
        "options.capacity_block": _with(AWS_OFFER, capacity_block="cr-0123456789abcdef0"),
    }
    with ec2_shim.running(shim), _endpoint(shim.url):
        kind = AwsKind()
        yield ProviderWorld(
            kind.open(AWS_OFFER, ec2_shim.KEYS),
            AWS_OFFER,
            wrong,
            kind,
            lambda fault: plan.__setitem__(slice(None), [fault]),
        )


@contextlib.contextmanager
def rest(folder: Path) -> Iterator[ProviderWorld]:
    """A service that speaks as Lambda does."""
    service, plan = lambda_service.Service(), [""]

    def planned(path: str) -> str:
        return plan.pop() if path.endswith("launch") and plan else ""

    service.fault = planned
    wrong = {
        "region": replace(REST_OFFER, region=""),
        "market": replace(REST_OFFER, market="spot"),
        "secret": replace(REST_OFFER, secret=""),
        "options.service": _with(REST_OFFER, service="lambada"),
        "options.key": replace(REST_OFFER, options={"service": "lambda"}),
        "options.url": _with(REST_OFFER, url="http://elsewhere.example"),
        "options.image": _with(REST_OFFER, image="ubuntu"),
        "options.user_data": _with(REST_OFFER, user_data="x"),
    }
    with lambda_service.running(service):
        kind, offer = RestKind(), _with(REST_OFFER, url=service.url)
        account = kind.open(offer, {"LAMBDA_API_KEY": lambda_service.KEY})
        yield ProviderWorld(account, offer, wrong, kind, lambda fault: plan.__setitem__(slice(None), [fault]))


@contextlib.contextmanager
def _endpoint(url: str) -> Iterator[None]:
    """As an operator would name another endpoint of EC2."""
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_EC2", url)
        yield


def _with(offer: Offer, **options: str) -> Offer:
    return replace(offer, options={**offer.options, **options})


WORLDS = {"simulated": simulated, "command": command, "rest": rest, "aws": aws}
