"""What an offer may say: bounds on every number and text."""

from __future__ import annotations

import re
from collections.abc import Mapping

from whaleflux.manifests import offer_file as limits
from whaleflux_inventory.core.facts import MAX_TEXT, Findings
from whaleflux_inventory.core.offers import Offer

MAX_OPTIONS = 32
MAX_OPTION = 2_048
MIN_LEASE_S, MAX_LEASE_S = 60, 30 * 86_400
MAX_OFFERS_OF_LEASE = 16
_KEPT_SECRET = "looks like a key, and options are shown to whoever lists offers: keep it with `whaleflux secrets add`, and name that as `secret`"
_SECRET_NAME = re.compile(
    r"(^|_)(secrets?|tokens?|passwords?|passwd|credentials?|(api|access|private|secret)_?keys?)($|_)"
)
_SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN|\beyJ[\w-]{10,}\.eyJ|\b(sk|ghp|hf|xox[bp])[-_][\w-]{16,}"
)
_OPTION = re.compile(r"[a-z][a-z0-9_]{0,39}")


def check(offer: Offer, gpu_memory_bytes: int) -> Findings:
    """What is wrong with an offer by itself, whoever its provider is."""
    found = Findings()
    for field, text in (("machine_type", offer.machine_type), ("region", offer.region), ("zone", offer.zone)):
        found.text(f"offer.{field}", text, MAX_TEXT)
    if not offer.machine_type:
        found.add("offer.machine_type", "is empty; say what the provider calls the machines")
    found.text("offer.gpu_type", offer.gpu_type, 64)
    if not offer.gpu_type:
        found.add("offer.gpu_type", "is empty; name the GPUs as job files do, such as H200")
    for field, value, least, most in (
        ("gpus", offer.gpus, 1, limits.MOST_GPUS),
        ("gpu_memory_bytes", gpu_memory_bytes, 0, limits.MOST_GPU_BYTES),
        ("usd_per_hour", offer.terms.usd_per_hour, limits.LEAST_USD_PER_HOUR, limits.MOST_USD_PER_HOUR),
        ("boot_s", offer.terms.boot_s, 0, limits.MOST_BOOT_S),
        ("billing_unit_s", offer.terms.billing_unit_s, limits.LEAST_BILLING_UNIT_S, limits.MOST_BILLING_UNIT_S),
        ("max_machines", offer.max_machines, 1, limits.MOST_MACHINES),
    ):
        found.number(f"offer.{field}", value, least, most)
    _check_options(found, offer.options)
    return found


def _check_options(found: Findings, options: Mapping[str, str]) -> None:
    if len(options) > MAX_OPTIONS:
        found.add("offer.options", f"are {len(options)}; give at most {MAX_OPTIONS}")
        return
    for key, value in options.items():
        if not _OPTION.fullmatch(key):
            found.add("offer.options", f"{key[:40]!r} is no name of an option: use a-z, 0-9 and _")
        elif len(value) > MAX_OPTION or any(ord(letter) < 32 for letter in value):
            found.add(f"offer.options.{key}", f"must be one line of at most {MAX_OPTION} characters")
        elif _SECRET_NAME.search(key) or _SECRET_VALUE.search(value):
            found.add(f"offer.options.{key}", _KEPT_SECRET)
