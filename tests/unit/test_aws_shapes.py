"""How EC2 is asked, and what its answers mean: no library of AWS is needed here."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from benchmarks.burst_lab import crashes
from whaleflux_inventory.core.lease_rules import Lease, Terms
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.providers import aws_shapes
from whaleflux_inventory.providers.api import (
    FLEET_TAG,
    LEASE_TAG,
    TOKEN_TAG,
    AuthFailed,
    MachineNotFound,
    NoCapacity,
    Throttled,
    Unsupported,
)

OPTIONS = {"image": "ami-0123456789abcdef0"}
BLOCK = "cr-0123456789abcdef0"
OFFER = Offer("offers/o", "aws", "p5.48xlarge", "sites/cloud", Terms(98.32), "H100", 8, "us-east-1", options=OPTIONS)


def request(offer=OFFER):
    lease = Lease("leases/l", offer.name, offer.terms, 1.0, 5000.0, 100.0, asked_s=1.0)
    return Launching(FrontDoor("fleet:7443"), crashes.authority(), 1800.0).request(lease, offer, "f")


def with_options(market="on_demand", **options):
    return replace(OFFER, market=market, options={**OPTIONS, **options})


def test_one_machine_is_asked_for_with_its_token_and_tags_and_ends_what_is_paid_by_itself():
    asked = aws_shapes.run_arguments(request())
    assert (asked["ClientToken"], asked["MinCount"], asked["MaxCount"]) == (request().token, 1, 1)
    assert asked["InstanceInitiatedShutdownBehavior"] == "terminate" and "shutdown -h now" in asked["UserData"]
    assert asked["MetadataOptions"]["HttpTokens"] == "required"
    kinds = {
        one["ResourceType"]: {tag["Key"]: tag["Value"] for tag in one["Tags"]} for one in asked["TagSpecifications"]
    }
    assert set(kinds) == {"instance", "volume"}
    assert kinds["instance"] == {"Name": "l", **request().tags}
    assert asked == aws_shapes.run_arguments(request()), "the same words for the same request, or the token is refused"


def test_what_the_options_say_is_asked_for():
    offer = replace(
        with_options(subnet="subnet-01234567", security_groups="sg-01234567,sg-89abcdef", key="k", profile="trainer"),
        zone="us-east-1b",
    )
    asked = aws_shapes.run_arguments(request(offer))
    assert aws_shapes.problems(offer) == {}
    assert (asked["Placement"], asked["SubnetId"]) == ({"AvailabilityZone": "us-east-1b"}, "subnet-01234567")
    assert asked["SecurityGroupIds"] == ["sg-01234567", "sg-89abcdef"]
    assert (asked["KeyName"], asked["IamInstanceProfile"]) == ("k", {"Name": "trainer"})
    arn = "arn:aws:iam::123456789012:instance-profile/trainer"
    assert aws_shapes.run_arguments(request(with_options(profile=arn)))["IamInstanceProfile"] == {"Arn": arn}


def test_each_market_is_asked_for_in_its_way():
    assert "InstanceMarketOptions" not in aws_shapes.run_arguments(request())
    spot = aws_shapes.run_arguments(request(with_options("spot")))
    assert spot["InstanceMarketOptions"]["SpotOptions"] == {
        "SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate", "MaxPrice": "98.3200",
    }  # fmt: skip
    assert "spot-instances-request" in [one["ResourceType"] for one in spot["TagSpecifications"]]
    held = aws_shapes.run_arguments(request(with_options("reserved", capacity_reservation=BLOCK)))
    target = {"CapacityReservationTarget": {"CapacityReservationId": BLOCK}}
    assert held["CapacityReservationSpecification"] == target and "InstanceMarketOptions" not in held
    block = aws_shapes.run_arguments(request(with_options("reserved", capacity_block=BLOCK)))
    assert block["CapacityReservationSpecification"] == target
    assert block["InstanceMarketOptions"] == {"MarketType": "capacity-block"}


@pytest.mark.parametrize(
    ("offer", "field"),
    [
        (replace(OFFER, region=""), "region"),
        (replace(OFFER, region="us-east-1a"), "region"),
        (replace(OFFER, zone="us-east-2a"), "zone"),
        (replace(OFFER, machine_type="p5"), "machine_type"),
        (replace(OFFER, options={}), "options.image"),
        (with_options(image="ubuntu"), "options.image"),
        (with_options(security_groups="sg-01234567, sg-01234567"), "options.security_groups"),
        (with_options(profile="a b"), "options.profile"),
        (with_options(user_data="x"), "options.user_data"),
        (with_options("reserved"), "options.capacity_reservation"),
        (with_options("reserved", capacity_reservation=BLOCK, capacity_block=BLOCK), "options.capacity_reservation"),
        (with_options("spot", capacity_reservation=BLOCK), "options.capacity_reservation"),
    ],
)
def test_an_offer_that_could_never_be_rented_is_refused_by_the_name_of_its_field(offer, field):
    assert set(aws_shapes.problems(offer)) == {field}


def test_regions_of_all_partitions_are_regions():
    for region in ("eu-central-2", "us-gov-west-1", "cn-north-1", "ap-southeast-10"):
        assert aws_shapes.problems(replace(OFFER, region=region, zone=f"{region}b")) == {}


def test_more_than_ec2_takes_at_a_first_boot_is_refused_before_it_is_asked():
    with pytest.raises(Unsupported, match="16384"):
        aws_shapes.run_arguments(replace(request(), authority_pem="x" * 16384))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("InsufficientInstanceCapacity", NoCapacity),
        ("MaxSpotInstanceCountExceeded", NoCapacity),
        ("VcpuLimitExceeded", NoCapacity),
        ("IdempotentInstanceTerminated", NoCapacity),
        ("RequestLimitExceeded", Throttled),
        ("UnauthorizedOperation", AuthFailed),
        ("InvalidClientTokenId", AuthFailed),
        ("InvalidAMIID.NotFound", Unsupported),
        ("UnsupportedOperation", Unsupported),
        ("InvalidInstanceID.NotFound", MachineNotFound),
        ("IdempotentParameterMismatch", None),
        ("InternalError", None),
        ("Unavailable", None),
        ("", None),
    ],
)
def test_errors_say_what_came_of_a_call_or_that_nobody_knows(code, kind):
    assert type(aws_shapes.refusal(code, "words")) is (kind or type(None))


@pytest.mark.parametrize("state", ["pending", "running", "stopping", "stopped", "shutting-down", "terminated"])
def test_a_machine_has_ended_when_nothing_is_paid_for_it_any_more(state):
    tags = [{"Key": FLEET_TAG, "Value": "f"}, {"Key": LEASE_TAG, "Value": "leases/l"}, {"Key": TOKEN_TAG, "Value": "t"}]
    born = datetime(2026, 1, 1, tzinfo=UTC)
    seen = aws_shapes.machine_of({"InstanceId": "i-1", "State": {"Name": state}, "LaunchTime": born, "Tags": tags})
    assert (seen.lease, seen.token, seen.created_s) == ("leases/l", "t", born.timestamp())
    assert seen.ended == (state in ("shutting-down", "terminated"))


def test_of_several_announcements_the_first_counts_and_what_is_over_does_not():
    def event(code, hour, said="The host is degraded"):
        return {"Code": code, "Description": said, "NotBefore": datetime(2026, 1, 1, hour, tzinfo=UTC)}

    events = [event("system-reboot", 9), event("instance-stop", 7), event("instance-stop", 3, "[Completed] over")]
    found = aws_shapes.planned([{"InstanceId": "i-1", "Events": events}, {"InstanceId": "i-2", "Events": events[2:]}])
    assert set(found) == {"i-1"} and found["i-1"][0] == events[1]["NotBefore"].timestamp()
    assert "instance-stop" in found["i-1"][1]


def test_a_spot_request_that_is_marked_says_when_its_machine_goes():
    at = datetime(2026, 1, 1, tzinfo=UTC)
    marked = {"InstanceId": "i-1", "Status": {"Code": "marked-for-termination", "UpdateTime": at}}
    fine = {"InstanceId": "i-2", "Status": {"Code": "fulfilled", "UpdateTime": at}}
    assert {key: at_s for key, (at_s, _) in aws_shapes.interrupted([marked, fine]).items()} == {
        "i-1": at.timestamp() + 120
    }
