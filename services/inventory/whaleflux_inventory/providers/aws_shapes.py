"""How a machine is asked of EC2, and what its answers mean. Pure: nothing is called here.

Codes of errors: docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html. What a table does not name means that nobody
knows what came of the call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from whaleflux import names
from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.providers.api import (
    FLEET_TAG,
    LEASE_TAG,
    OFFER_TAG,
    TOKEN_TAG,
    AuthFailed,
    LaunchRequest,
    MachineNotFound,
    NoCapacity,
    ProviderError,
    Throttled,
    Unsupported,
)
from whaleflux_inventory.providers.user_data import MAX_BYTES, user_data

SPOT_NOTICE_S = 120.0
_ENDED = frozenset({"shutting-down", "terminated"})
_PLANNED = ("instance-reboot", "system-reboot", "system-maintenance", "instance-retirement", "instance-stop")
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d{1,2}")
_TYPE = re.compile(r"[a-z0-9-]{1,30}\.[a-z0-9-]{1,30}")
_RESERVATION = re.compile(r"cr-[0-9a-f]{8,17}")
_OPTIONS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "image": (re.compile(r"ami-[0-9a-f]{8,17}"), "must be an image with WhaleFlux installed, such as ami-0123456789abcdef0"),
    "subnet": (re.compile(r"subnet-[0-9a-f]{8,17}"), "must be a subnet, such as subnet-0123456789abcdef0"),
    "security_groups": (
        re.compile(r"sg-[0-9a-f]{8,17}(,sg-[0-9a-f]{8,17}){0,15}"),
        "must be security groups with commas between, such as sg-0123456789abcdef0",
    ),
    "profile": (
        re.compile(r"(arn:[a-z-]+:iam::\d{12}:instance-profile/)?[\w+=,.@/-]{1,128}"),
        "must be the name or ARN of an instance profile",
    ),
    "key": (re.compile(r"[ -~]{1,255}"), "must be the name of a key pair"),
    "capacity_reservation": (_RESERVATION, "must be a capacity reservation, such as cr-0123456789abcdef0"),
    "capacity_block": (_RESERVATION, "must be the reservation of a capacity block, such as cr-0123456789abcdef0"),
    "whaleflux": (re.compile(r"[\w./-]{1,255}"), "must be the path of the program in the image"),
}  # fmt: skip
_NO_CAPACITY = frozenset({
    "InsufficientInstanceCapacity", "InsufficientHostCapacity", "InsufficientReservedInstanceCapacity", "InsufficientCapacity",
    "ReservationCapacityExceeded", "InstanceLimitExceeded", "VcpuLimitExceeded", "MaxSpotInstanceCountExceeded",
    "SpotMaxPriceTooLow", "InsufficientFreeAddressesInSubnet", "InsufficientAddressCapacity", "VolumeLimitExceeded",
    "IdempotentInstanceTerminated",  # the machine of this token has ended, so that the token makes none any more
})  # fmt: skip
_THROTTLED = frozenset({
    "RequestLimitExceeded", "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "SlowDown",
    "RequestThrottledException", "TooManyRequestsException", "EC2ThrottledException", "BandwidthLimitExceeded",
})  # fmt: skip
_AUTH = frozenset({
    "AuthFailure", "UnauthorizedOperation", "InvalidClientTokenId", "SignatureDoesNotMatch", "IncompleteSignature", "OptInRequired",
    "Blocked", "PendingVerification", "ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidAccessKeyId", "AccessDenied",
    "MissingAuthenticationToken", "UnrecognizedClientException", "AccessDeniedException", "AccountDisabled",
})  # fmt: skip
_UNKNOWN = frozenset({"IdempotentParameterMismatch"})  # the token has made a machine, of other words than these
_WRONG = ("Invalid", "Unsupported", "Missing", "Unknown", "VPC", "Malformed", "InstanceTypeNot")


def problems(offer: Offer) -> dict[str, str]:
    """What is wrong with an offer of EC2: field -> what would be right."""
    found = dict[str, str]()
    if not _REGION.fullmatch(offer.region):
        found["region"] = "must be a region of AWS, such as us-east-1"
    elif offer.zone and not offer.zone.startswith(offer.region):
        found["zone"] = f"must be a zone of {offer.region}, such as {offer.region}a"
    if not _TYPE.fullmatch(offer.machine_type):
        found["machine_type"] = "must be a type of instances, such as p5.48xlarge"
    for key, value in offer.options.items():
        if key not in _OPTIONS:
            found[f"options.{key}"] = f"is no option of aws; use {', '.join(_OPTIONS)}"
        elif not _OPTIONS[key][0].fullmatch(value):
            found[f"options.{key}"] = _OPTIONS[key][1]
    if "image" not in offer.options:
        found["options.image"] = f"is missing; it {_OPTIONS['image'][1]}"
    return found | _market_problems(offer)


def _market_problems(offer: Offer) -> dict[str, str]:
    named = [key for key in ("capacity_reservation", "capacity_block") if key in offer.options]
    if offer.market == "reserved" and len(named) != 1:
        return {"options.capacity_reservation": "or capacity_block has to name what is reserved, one of both"}
    if offer.market != "reserved" and named:
        return {f"options.{named[0]}": "is for the market `reserved`"}
    return {}


def run_arguments(request: LaunchRequest) -> dict[str, Any]:
    """Arguments of RunInstances: the same, letter for letter, for the same request. Raises Unsupported."""
    listens = {"WHALEFLUX_MACHINE_NOTICES": "ec2"}
    offer, script = request.offer, user_data(replace(request, environment={**request.environment, **listens}))
    if (size := len(script.encode())) > MAX_BYTES:
        raise Unsupported(f"what the machine is told at its first boot has {size} bytes; EC2 takes {MAX_BYTES}")
    tags = [{"Key": key, "Value": value} for key, value in {"Name": names.last(request.lease), **request.tags}.items()]
    tagged = ["instance", "volume", *(["spot-instances-request"] if offer.market == "spot" else [])]
    arguments = {
        "ClientToken": request.token,
        "ImageId": offer.options["image"],
        "InstanceType": offer.machine_type,
        "MinCount": 1,
        "MaxCount": 1,
        "UserData": script,
        "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in tagged],
        "InstanceInitiatedShutdownBehavior": "terminate",  # so that its own end is the end of what is paid
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled", "HttpPutResponseHopLimit": 1},
    }
    return arguments | _place(offer) | _market(offer)


def _place(offer: Offer) -> dict[str, Any]:
    options, found = offer.options, dict[str, Any]()
    if offer.zone:
        found["Placement"] = {"AvailabilityZone": offer.zone}
    if "subnet" in options:
        found["SubnetId"] = options["subnet"]
    if "security_groups" in options:
        found["SecurityGroupIds"] = options["security_groups"].split(",")
    if "key" in options:
        found["KeyName"] = options["key"]
    if profile := options.get("profile"):
        found["IamInstanceProfile"] = {"Arn" if profile.startswith("arn:") else "Name": profile}
    return found


def _market(offer: Offer) -> dict[str, Any]:
    """The price of an offer is the most that is paid for a spot machine: what it costs is counted by it."""
    if offer.market == "spot":
        once = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        most = {"MaxPrice": f"{offer.terms.usd_per_hour:.4f}"}
        return {"InstanceMarketOptions": {"MarketType": "spot", "SpotOptions": once | most}}
    if offer.market != "reserved":
        return {}
    block = offer.options.get("capacity_block")
    target = {"CapacityReservationId": block or offer.options["capacity_reservation"]}
    found: dict[str, Any] = {"CapacityReservationSpecification": {"CapacityReservationTarget": target}}
    return found | ({"InstanceMarketOptions": {"MarketType": "capacity-block"}} if block else {})


def machine_of(instance: Mapping[str, Any]) -> Machine:
    """An entry of DescribeInstances. Raises KeyError where it is none."""
    tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", ())}
    return Machine(
        id=instance["InstanceId"],
        lease=tags.get(LEASE_TAG, ""),
        token=tags.get(TOKEN_TAG, ""),
        created_s=instance["LaunchTime"].timestamp(),
        offer=tags.get(OFFER_TAG, ""),
        ended=instance["State"]["Name"] in _ENDED,
    )


def of_fleet(fleet: str) -> dict[str, Any]:
    """The filter that finds a fleet's machines."""
    return {"Name": f"tag:{FLEET_TAG}", "Values": [fleet]}


def planned_events() -> dict[str, Any]:
    """The filter of DescribeInstanceStatus that finds machines which AWS is going to stop or to restart."""
    return {"Name": "event.code", "Values": list(_PLANNED)}


def planned(statuses: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """By machine: when AWS stops or restarts it, Unix seconds, and why in words. Events that are over say so in their description."""
    found = dict[str, tuple[float, str]]()
    for status in statuses:
        for event in status.get("Events", ()):
            said, at = str(event.get("Description", "")), event.get("NotBefore")
            if (
                event.get("Code") in _PLANNED
                and isinstance(at, datetime)
                and not said.startswith(("[Completed]", "[Canceled]"))
            ):
                first = found.get(status["InstanceId"], (float("inf"), ""))
                found[status["InstanceId"]] = min(
                    first, (at.timestamp(), f"AWS has scheduled {event['Code']}: {said[:200]}")
                )
    return found


def interrupted(requests: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """By machine: when AWS takes it away, of spot requests that are marked for it."""
    found = dict[str, tuple[float, str]]()
    for request in requests:
        status = request.get("Status", {})
        if str(status.get("Code", "")).startswith("marked-for-") and isinstance(status.get("UpdateTime"), datetime):
            at_s = status["UpdateTime"].timestamp() + SPOT_NOTICE_S
            found[str(request.get("InstanceId", ""))] = at_s, "AWS takes the spot machine away"
    return found


def refusal(code: str, message: str) -> ProviderError | None:
    """What an error of EC2 means; None: nobody knows what came of the call."""
    words = f"{code}: {message}"[:300]
    if code in _UNKNOWN:
        return None
    if code == "InvalidInstanceID.NotFound":
        return MachineNotFound(words)
    kinds: Sequence[tuple[frozenset[str], type[ProviderError]]] = (
        (_NO_CAPACITY, NoCapacity), (_THROTTLED, Throttled), (_AUTH, AuthFailed),
    )  # fmt: skip
    for codes, kind in kinds:
        if code in codes:
            return kind(words)
    return Unsupported(words) if code.startswith(_WRONG) else None
