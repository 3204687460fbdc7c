"""A plan as the configuration of what runs it. Pure: text out; `whaleflux plan --emit` is the door.

Each format refuses the parts of a plan that it cannot express, and says which and what to use; what it can express only nearly is a note.
What is emitted is checked by rules that know nothing of these modules (`planning/validity.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.arrays import Flags
from whaleflux.planning.emit.deepspeed import RULES as DEEPSPEED
from whaleflux.planning.emit.deepspeed import deepspeed
from whaleflux.planning.emit.megatron import RULES as MEGATRON
from whaleflux.planning.emit.megatron import megatron
from whaleflux.planning.emit.mesh import RULES as FSDP2
from whaleflux.planning.emit.mesh import fsdp2
from whaleflux.planning.emit.planned import Emitted, Facts, Planned, Rule, cannot, expressible
from whaleflux.planning.emit.torchrun import torchrun
from whaleflux.planning.emit.torchtitan import RULES as TORCHTITAN
from whaleflux.planning.emit.torchtitan import torchtitan
from whaleflux.planning.plans import Plans

FORMATS: Final[dict[str, Callable[[Planned], Emitted]]] = {
    "torchrun": torchrun,
    "megatron": megatron,
    "torchtitan": torchtitan,
    "fsdp2": fsdp2,
    "deepspeed": deepspeed,
}
_RULES: Final[dict[str, tuple[Rule, ...]]] = {
    "torchrun": (),
    "megatron": MEGATRON,
    "torchtitan": TORCHTITAN,
    "fsdp2": FSDP2,
    "deepspeed": DEEPSPEED,
}


def can_express(form: str, facts: Facts) -> Callable[[Plans], Flags] | None:
    """Which of plans the format can say, for the search; None: all of them."""
    rules = _RULES[form]
    return (lambda plans: expressible(facts, plans, rules)) if rules else None


def refused(form: str, planned: Planned) -> list[str]:
    """What the format cannot express of this plan, each with what to use."""
    return cannot(planned, _RULES[form])


def emit(form: str, planned: Planned) -> Emitted:
    """Raises InvalidArgument for an unknown format, and for a plan that the format cannot express."""
    if form not in FORMATS:
        raise InvalidArgument(FieldViolation("--emit", f"{form[:40]!r} is not known; take one of {', '.join(FORMATS)}"))
    return FORMATS[form](planned)
