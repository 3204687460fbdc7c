"""What goes wrong with the GPUs of a machine that is played: "lost=3", "xid=79/0@60s", "ecc=1@5 min". Pure.

A machine that is played breaks as a real one does: the driver reports an event, and from then on the GPU says why it cannot be used.
"""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux import quantities
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.xids import action_before_use
from whaleflux.reasons import NodeReason

KINDS = ("lost", "xid", "ecc")
_ECC_XID = 48  # an uncorrectable ECC error
_MOST_XID = 999
_LONGEST_S = 30 * 86_400.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`gpu` (its index) breaks `after_s` seconds after the agent's start; `xid` 0: it falls off the bus without one."""

    gpu: int
    after_s: float
    xid: int = 0

    @property
    def unhealthy_reason(self) -> str:
        """Why it may not be used from then on; "" where an Xid leaves it in use."""
        if not self.xid:
            return f"{NodeReason.GPU_LOST}: the driver does not list it any more (simulated)"
        action = action_before_use(self.xid)
        return f"XID_{self.xid}: {action.value} (simulated)" if action else ""


def parse(kind: str, text: str, gpus: int) -> Fault:
    """Of `lost=GPU[@TIME]`, `ecc=GPU[@TIME]` or `xid=CODE[/GPU][@TIME]`. Raises InvalidArgument with what would be right."""
    where, _, when = text.partition("@")
    code, slash, index = where.partition("/") if kind == "xid" else ("0", "/", where)
    try:
        gpu, xid = int(index) if slash else 0, _ECC_XID if kind == "ecc" else int(code)
        after_s = quantities.seconds(when) if when else 0.0
    except ValueError:
        gpu = xid = -1
        after_s = 0.0
    if not (0 <= gpu < gpus and (kind != "xid" or 0 < xid <= _MOST_XID) and xid >= 0 and after_s <= _LONGEST_S):
        form = "xid=CODE[/GPU][@TIME]" if kind == "xid" else f"{kind}=GPU[@TIME]"
        raise InvalidArgument(
            FieldViolation("profile", f"{kind}={text!r} is not {form}, with a GPU from 0 to {gpus - 1}: {kind}=" + (
                "79/0@60s" if kind == "xid" else "0@60s"))
        )  # fmt: skip
    return Fault(gpu, after_s, xid)
