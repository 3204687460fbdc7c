"""Bounds of code that travels, the same where it is packed, stored and unpacked."""

from __future__ import annotations

import re

MAX_PACKED_BYTES = 100 * 10**6
MAX_FILES = 20_000
MAX_UNPACKED_BYTES = 10**9
CHUNK_BYTES = 512 * 1024  # of an archive, as it is stored and sent; an event server takes messages of 1 MiB
DIGEST = re.compile(r"[0-9a-f]{64}")  # sha256 of the archive
