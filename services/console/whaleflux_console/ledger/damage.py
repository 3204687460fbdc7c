"""What is proven to be wrong with the ledger's files; what cannot be reached is `Unavailable` instead, and proves nothing."""

from __future__ import annotations

from whaleflux.errors import FailedPrecondition
from whaleflux.reasons import ErrorReason


class Damaged(FailedPrecondition):
    """A file is gone, or its bytes are not those that were written."""

    default_reason = ErrorReason.LEDGER_DAMAGED

    def __init__(self, path: str, what: str) -> None:
        super().__init__(
            f"the ledger's file {path} {what}: put it back from a copy; what can be read or made again is, and the rest is left as it was",
            metadata={"path": path, "what": what},
        )
        self.path, self.what = path, what


class OtherFolder(FailedPrecondition):
    """The folder is not the one whose files the head names: a volume that is not mounted looks like this, too."""

    default_reason = ErrorReason.LEDGER_FOLDER

    def __init__(self, wanted: str, found: str) -> None:
        super().__init__(
            f"the ledger's head is of folder {wanted}, this one is {found or 'empty'}: mount the right one; if its files are lost for good, "
            "start the console once with --ledger-rebuild",
            metadata={"wanted": wanted, "found": found},
        )
