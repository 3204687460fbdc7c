"""Opening files that lie where jobs write, too: never another file behind a link, never a pipe that somebody else has to fill.

A container has the folder of its task mounted, so what is there under a name may be anything.
"""

from __future__ import annotations

import errno
import os
import stat


def opener(path: str, flags: int) -> int:
    """For `open`. Raises OSError for anything but a regular file."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "is no regular file", path)
