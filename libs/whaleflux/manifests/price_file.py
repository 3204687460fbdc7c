"""Prices of GPUs as people write them: files with `prices:` and a list, or one price alone; several documents too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from whaleflux import names, quantities
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.reader import Reader
from whaleflux.manifests.text_values import items, text
from whaleflux.manifests.yaml_text import load_all

if TYPE_CHECKING:
    from whaleflux.v1 import console_pb2

MAX_PRICES = 500  # in one file
KINDS = ("owned", "on_demand", "reserved", "spot")
_MOST_USD = Decimal(10**9)


@dataclass(frozen=True, slots=True)
class PriceManifest:
    """One price of a file."""

    price_id: str
    price: console_pb2.GpuPrice


def prices_from_yaml(content: str) -> list[PriceManifest]:
    """The prices of a file. Raises InvalidArgument naming every mistake."""
    wrong: list[FieldViolation] = []
    found: list[PriceManifest] = []
    for document in load_all(content):
        whole = Reader(document, "", wrong)
        if whole.has("prices"):
            found += [_price(one) for one in whole.items("prices", items)]
            whole.done()
            if whole.raw("prices") == []:
                whole.note("prices", "is empty; name what GPUs cost, see the guide: Cost")
        else:
            found.append(_price(whole))
    if len(found) > MAX_PRICES:
        wrong.append(FieldViolation("prices", f"are {len(found)}; at most {MAX_PRICES} fit in a file"))
    twice = (name for name, count in Counter(one.price_id for one in found).items() if name and count > 1)
    wrong += [FieldViolation("name", f"{name!r} is there twice") for name in sorted(twice)]
    if wrong:
        raise InvalidArgument(wrong)
    return found


def price_from_fields(said: Mapping[str, str]) -> PriceManifest:
    """One price, of a file's fields. Raises InvalidArgument naming every mistake."""
    wrong: list[FieldViolation] = []
    found = _price(Reader(dict(said), "", wrong))
    if wrong:
        raise InvalidArgument(wrong)
    return found


def field_in_file(field: str, price: console_pb2.GpuPrice) -> str:
    """What the file of this price calls a field of the contract: owned.residual_percent for price.ownership.residual_ppm."""
    *_, inner, name = ["", *field.split(".")]
    said = _cost_word(price.ownership.gpus > 0) if name == "capex_micros" else _WORDS.get(name, name)
    return f"owned.{said}" if inner == "ownership" else said


def micros(value: object) -> int:
    """$2.95, -120.50 USD or a number of US dollars as whole micro-dollars, exactly. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("must be an amount such as 2.95 USD")
    said = str(value).strip().removesuffix("USD").removesuffix("usd").strip()
    if said.lstrip("+-").startswith("$"):
        said = said.replace("$", "", 1)
    try:
        amount = Decimal(said)
    except InvalidOperation:
        raise ValueError("must be an amount such as 2.95 USD; other currencies are not converted") from None
    if not amount.is_finite():
        raise ValueError("must be an amount such as 2.95 USD")
    if abs(amount) > _MOST_USD:
        raise ValueError(f"is more than {_MOST_USD:,} USD, the most that any amount may be")
    if amount * 1_000_000 != int(amount * 1_000_000):
        raise ValueError("has more than six decimals of a dollar")
    return int(amount * 1_000_000)


def kind(value: object) -> int:
    """owned, on-demand, reserved or spot as the contract says it. Raises ValueError."""
    from whaleflux.v1 import types_pb2

    said = text(value).strip().lower().replace("-", "_")
    if said not in KINDS:
        raise ValueError(f"must be one of {', '.join(KINDS)}")
    return int(types_pb2.PriceKind.Value(f"PRICE_KIND_{said.upper()}"))


def _price(reader: Reader) -> PriceManifest:
    from whaleflux.v1 import console_pb2 as pb

    for field, hint in _NEEDED.items():
        reader.require(field, hint)
    price_id = reader.take("name", text, "").removeprefix("prices/")
    price = pb.GpuPrice(
        node=reader.take("node", _node, ""),
        site=reader.take("site", lambda value: names.site(text(value).removeprefix("sites/")), ""),
        gpu_class=reader.take("gpu", text, ""),
        kind=reader.take("kind", kind, 0),
        micros_per_gpu_hour=reader.take("usd_per_gpu_hour", micros, 0),
        source=reader.take("source", text, ""),
        source_date=reader.take("source_date", str, ""),
    )
    if (start := reader.take("from", quantities.instant, None)) is not None:
        price.start_time.FromDatetime(start)
    if (end := reader.take("until", quantities.instant, None)) is not None:
        price.end_time.FromDatetime(end)
    owned = reader.inner("owned")
    if reader.has("owned"):
        price.ownership.CopyFrom(_ownership(owned))
    elif not reader.has("usd_per_gpu_hour"):
        reader.note("usd_per_gpu_hour", "is missing; give it, or what owning costs under `owned:`")
    reader.done()
    return PriceManifest(price_id, price)


def _ownership(reader: Reader) -> console_pb2.Ownership:
    from whaleflux.v1 import console_pb2 as pb

    of_node = reader.has("usd_per_node") or reader.has("gpus")
    if of_node:
        reader.require("usd_per_node", "what a node cost with its share of the network, such as 320000 USD")
        reader.require("gpus", "how many GPUs such a node has, such as 8")
    else:
        reader.require("usd_per_gpu", "what one GPU cost with its share of the node and the network, such as 40000 USD")
    reader.require("months", "over how many months that is written off, such as 36")
    made = pb.Ownership(
        capex_micros=reader.take(_cost_word(of_node), micros, 0),
        gpus=reader.take("gpus", _count, 0),
        months=reader.take("months", _whole, 0),
        residual_ppm=reader.take("residual_percent", _ppm_of_percent, 0),
        power_w=reader.take("power_w", _whole, 0),
        pue_ppm=reader.take("pue", _ppm, 0),
        electricity_micros_per_kwh=reader.take("usd_per_kwh", micros, 0),
        colocation_micros_per_kw_month=reader.take("usd_per_kw_month", micros, 0),
        support_ppm_per_year=reader.take("support_percent_per_year", _ppm_of_percent, 0),
    )
    reader.done()
    return made


def _cost_word(of_node: bool) -> str:
    return "usd_per_node" if of_node else "usd_per_gpu"


def _node(value: object) -> str:
    said = text(value)
    site, _, node = said.removeprefix("sites/").replace("/nodes/", "/").partition("/")
    return names.node(site, node)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError("must be a whole number")
    return value


def _count(value: object) -> int:
    if not (found := _whole(value)):
        raise ValueError("must be 1 or more")
    return found


def _ppm(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1000:
        raise ValueError("must be a number such as 1.3")
    return round(value * 1_000_000)


def _ppm_of_percent(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1000:
        raise ValueError("must be a number of per cent, such as 30")
    return round(value * 10_000)


_WORDS = {  # by the contract's field
    "colocation_micros_per_kw_month": "usd_per_kw_month",
    "electricity_micros_per_kwh": "usd_per_kwh",
    "end_time": "until",
    "gpu_class": "gpu",
    "micros_per_gpu_hour": "usd_per_gpu_hour",
    "ownership": "owned",
    "price_id": "name",
    "pue_ppm": "pue",
    "residual_ppm": "residual_percent",
    "start_time": "from",
    "support_ppm_per_year": "support_percent_per_year",
}
_NEEDED = {
    "name": "an id such as h100-2026",
    "kind": "owned, on-demand, reserved or spot",
    "from": "from when on it holds, such as 2026-12-01",
    "source": "whose figure it is: a contract, a price list",
}
