"""Files with offers: machines that can be rented. `offers:` and a list, or one offer alone; several documents too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whaleflux import names, quantities
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.reader import Reader, quoted
from whaleflux.manifests.text_values import items, text
from whaleflux.manifests.values import LEAST_BYTES

if TYPE_CHECKING:
    from whaleflux.v1 import inventory_pb2

MAX_OFFERS = 200  # in one file
MARKETS = ("on_demand", "reserved", "spot")
MOST_GPUS, MOST_GPU_BYTES = 64, 4 << 40  # of a machine, of a GPU
LEAST_USD_PER_HOUR, MOST_USD_PER_HOUR = 0.0001, 100_000.0
MOST_BOOT_S = 7_200.0
LEAST_BILLING_UNIT_S, MOST_BILLING_UNIT_S = 1.0, 31 * 86_400.0
MOST_MACHINES = 1_000
_FIELDS = {
    "offer_id": "name", "machine_type": "machine", "gpu_type": "gpu", "gpu_memory_bytes": "gpu_memory", "usd_per_hour": "price",
    "boot_s": "boot", "billing_unit_s": "billing_unit", "max_machines": "max",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OfferManifest:
    """One offer of a file, and what the file calls it: `offers[0]`, "" where it is alone."""

    offer_id: str
    offer: inventory_pb2.Offer
    at: str = ""

    def as_in_file(self, error: InvalidArgument) -> InvalidArgument:
        """A refusal of inventory with its fields as this file calls them."""
        return InvalidArgument([FieldViolation(self._in_file(one.field), one.description) for one in error.violations])

    def _in_file(self, path: str) -> str:
        name, dot, rest = path.removeprefix("offer.").partition(".")
        return f"{self.at}.{_FIELDS.get(name, name)}{dot}{rest}".lstrip(".")


def offers_from_yaml(content: str) -> list[OfferManifest]:
    """The offers of a file. Raises InvalidArgument naming every mistake."""
    from whaleflux.manifests.yaml_text import load_all  # a service that knows how offers are written reads no file

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
        gpus=reader.take("gpus", _whole(MOST_GPUS), 1),
        gpu_memory_bytes=reader.take("gpu_memory", _memory, 0),
        site=reader.take("site", _named(names.site, "sites/"), ""),
        region=reader.take("region", text, ""),
        zone=reader.take("zone", text, ""),
        market=kinds[reader.take("market", _market, "on_demand")],
        usd_per_hour=reader.take("price", _price, 0.0),
        boot_s=reader.take("boot", _boot, 0.0),
        billing_unit_s=reader.take("billing_unit", _billing_unit, 0.0),
        max_machines=reader.take("max", _whole(MOST_MACHINES), 1),
        secret=reader.take("secret", _named(names.secret, "secrets/"), ""),
    )
    options = reader.inner("options")
    offer.options.update({key: options.take(key, text, "") for key in options.keys()})  # noqa: SIM118 - not a dict
    reader.done()
    return OfferManifest(offer_id, offer, reader.path)


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


def _whole(most: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"must be a whole number, 1 to {most}")
        return value

    return read


def _memory(value: Any) -> int:
    return int(_between(value, quantities.size_bytes, LEAST_BYTES, MOST_GPU_BYTES, "1 MiB to 4 TiB, such as 141 GB"))


def _price(value: Any) -> float:
    wanted = "0.0001 USD to 100000 USD, for a whole machine and hour, such as 40 USD"
    return _between(value, quantities.dollars, LEAST_USD_PER_HOUR, MOST_USD_PER_HOUR, wanted)


def _boot(value: Any) -> float:
    return _between(value, quantities.seconds, 1.0, MOST_BOOT_S, "1 s to 2 h, such as 4 min, or leave it out for 3 min")


def _billing_unit(value: Any) -> float:
    wanted = "1 s to 31 d, such as 1 min"
    return _between(value, quantities.seconds, LEAST_BILLING_UNIT_S, MOST_BILLING_UNIT_S, wanted)


def _between(value: Any, read: Callable[[object], float], least: float, most: float, wanted: str) -> float:
    """Raises ValueError that quotes what the file says, in the file's units."""
    if not least <= (found := read(value)) <= most:
        raise ValueError(f"is {quoted(value)}; give {wanted}")
    return found


def _market(value: Any) -> str:
    chosen = text(value).replace("-", "_").lower()
    if chosen not in MARKETS:
        raise ValueError(f"must be one of {', '.join(MARKETS)}")
    return chosen
