"""Files of checkpoints, read so that only proof counts as damage."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import xxhash

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class SavedPiece:
    """One durable file of a checkpoint: path below its folder, size in bytes, "xxh3-128:<hex>"."""

    path: str
    size_bytes: int
    checksum: str


class FaultKind(Enum):
    """Why a checkpoint cannot be used from here."""

    UNREACHABLE = "unreachable"  # its bytes could not be read by this node: says nothing about the bytes
    CORRUPT = "corrupt"  # its bytes were read, and they are not what was saved


@dataclass(frozen=True, slots=True)
class Fault:
    """What one rank found. `read` is what a corrupt piece really holds: the proof."""

    kind: FaultKind
    message: str
    read: SavedPiece | None = None


def find_fault(folder: Path, piece: SavedPiece) -> Fault | None:
    """Reads a piece; None when it is what was saved. A file that cannot be read is unreachable, never corrupt."""
    try:
        read = describe(folder, folder / piece.path)
    except OSError as error:
        return Fault(FaultKind.UNREACHABLE, f"{folder / piece.path}: {error.strerror or error}")
    if read == piece:
        return None
    if read.size_bytes != piece.size_bytes:
        said = f"{piece.path} has {read.size_bytes} bytes, saved were {piece.size_bytes}"
    else:
        said = f"{piece.path} has another checksum than when it was saved"
    return Fault(FaultKind.CORRUPT, said, read)


def describe(folder: Path, file: Path) -> SavedPiece:
    """Size and checksum of a file, from its bytes. Raises OSError."""
    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return SavedPiece(str(file.relative_to(folder)), size, f"xxh3-128:{digest.hexdigest()}")
