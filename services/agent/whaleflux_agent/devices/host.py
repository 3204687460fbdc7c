"""CPU, memory, disks and network of the machine itself, from what Linux shows to everybody."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from whaleflux.fleet.model import Disk

_DEFAULT_NIC_BYTES_PER_S = 125e6  # 1 Gb/s, where no interface says
_FILE_SYSTEMS = frozenset({"ext4", "xfs", "btrfs", "zfs", "f2fs"})


def cpu_millicores() -> int:
    """Cores that this process may use, thousandths."""
    return len(os.sched_getaffinity(0)) * 1000


def memory_bytes() -> int:
    """Main memory of the host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def disks(mounts: Path = Path("/proc/self/mounts"), blocks: Path = Path("/sys/block")) -> tuple[Disk, ...]:
    """Local file systems by mount point, each device once."""
    found: dict[str, Disk] = {}
    for line in _lines(mounts):
        device, mount, kind = [*line.split(), "", "", ""][:3]
        if kind in _FILE_SYSTEMS and device.startswith("/dev/") and device not in found:
            path = mount.replace("\\040", " ")
            found[device] = Disk(path, shutil.disk_usage(path).total, _is_nvme(device, blocks))
    return tuple(found.values())


def _is_nvme(device: str, blocks: Path) -> bool:
    """By the device's name, or by the devices that a mapper or an array is made of."""
    name = Path(os.path.realpath(device)).name
    below = blocks / name / "slaves"
    parts = [part.name for part in below.iterdir()] if below.is_dir() else []
    return all(part.startswith("nvme") for part in parts or [name])


def network_bytes_per_s(root: Path = Path("/sys/class/net")) -> float:
    """Line rate of the physical interfaces that are up, together, one direction; 1 Gb/s where none says."""
    total = 0.0
    for interface in root.iterdir() if root.is_dir() else ():
        speed = " ".join(_lines(interface / "speed"))  # Mb/s; -1 or an error where there is no such thing
        if (interface / "device").exists() and " ".join(_lines(interface / "operstate")) == "up" and speed.isdigit():
            total += int(speed) * 125_000
    return total or _DEFAULT_NIC_BYTES_PER_S


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
