"""Files with offers: machines that can be rented. `offers:` and a list, or one offer alone; several documents too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whaleflux import names, quantities
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.reader import Reader
from whaleflux.manifests.text_values import items, text
from whaleflux.manifests.yaml_text import load_all

if TYPE_CHECKING:
    from whaleflux.v1 import inventory_pb2

MAX_OFFERS = 200  # in one file
MARKETS = ("on_demand", "reserved", "spot")


@dataclass(frozen=True, slots=True)
class OfferManifest:
    """One offer of a file."""

    offer_id: str
    offer: inventory_pb2.Offer


def offers_from_yaml(content: str) -> list[OfferManifest]:
    """The offers of a file. Raises InvalidArgument naming every mistake."""
    wrong: list[FieldViolation] = []
    found: list[OfferManifest] = []
    for document in load_all(content):
        whole = Reader(document, "", wrong)
        if whole.has("offers"):
            found += [_offer(one) for one in whole.items("offers", items)]
            whole.done()
            if whole.raw("offers") == []:
                whole.note("offers", "is empty; name what can be rented, see the guide: Rented machines")
        else:
            found.append(_offer(whole))
    if len(found) > MAX_OFFERS:
        wrong.append(FieldViolation("offers", f"are {len(found)}; at most {MAX_OFFERS} fit in a file"))
    twice = (name for name, count in Counter(one.offer_id for one in found).items() if name and count > 1)
    wrong += [FieldViolation("name", f"{name!r} is there twice") for name in sorted(twice)]
    if wrong:
        raise InvalidArgument(wrong)
    return found


def _offer(reader: Reader) -> OfferManifest:
    from whaleflux.v1 import inventory_pb2 as pb
    from whaleflux.v1 import types_pb2

    for field, hint in _NEEDED.items():
        reader.require(field, hint)
    kinds = {
        "on_demand": types_pb2.PRICE_KIND_ON_DEMAND,
        "reserved": types_pb2.PRICE_KIND_RESERVED,
        "spot": types_pb2.PRICE_KIND_SPOT,
    }
    offer_id = reader.take("name", _id, "")
    offer = pb.Offer(
        provider=reader.take("provider", text, ""),
        machine_type=reader.take("machine", text, ""),
        gpu_type=reader.take("gpu", text, ""),
        gpus=reader.take("gpus", _whole, 1),
        gpu_memory_bytes=reader.take("gpu_memory", quantities.size_bytes, 0),
        site=reader.take("site", _named(names.site, "sites/"), ""),
        region=reader.take("region", text, ""),
        zone=reader.take("zone", text, ""),
        market=kinds[reader.take("market", _market, "on_demand")],
        usd_per_hour=reader.take("price", quantities.dollars, 0.0),
        boot_s=reader.take("boot", quantities.seconds, 0.0),
        billing_unit_s=reader.take("billing_unit", quantities.seconds, 0.0),
        max_machines=reader.take("max", _whole, 1),
        secret=reader.take("secret", _named(names.secret, "secrets/"), ""),
    )
    options = reader.inner("options")
    offer.options.update({key: options.take(key, text, "") for key in options.keys()})  # noqa: SIM118 - not a dict
    reader.done()
    return OfferManifest(offer_id, offer)


_NEEDED = {
    "name": "an id such as cloud-h200",
    "provider": "aws, rest, command or simulated",
    "machine": "the provider's name of the machines, such as p5.48xlarge",
    "gpu": "the GPUs as job files name them, such as H200",
    "site": "the id of the site that they join",
    "price": "US dollars for a whole machine and hour",
}


def _id(value: Any) -> str:
    return names.check_id("name", text(value).removeprefix("offers/"))


def _named(name: Callable[[str], str], prefix: str) -> Callable[[Any], str]:
    return lambda value: name(text(value).removeprefix(prefix))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError("must be a whole number from 1 on")
    return value


def _market(value: Any) -> str:
    chosen = text(value).replace("-", "_").lower()
    if chosen not in MARKETS:
        raise ValueError(f"must be one of {', '.join(MARKETS)}")
    return chosen
