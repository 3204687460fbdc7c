"""CPU, memory, disks and network of the machine itself, from what Linux shows to everybody."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from whaleflux import names
from whaleflux.fleet.model import Disk, Node

_DEFAULT_NIC_BYTES_PER_S = 125e6  # 1 Gb/s, where no interface says
_FILE_SYSTEMS = frozenset({"ext4", "xfs", "btrfs", "zfs", "f2fs"})


_SYSTEMD_WITHIN_S = 1.0
_NVIDIA, _DISPLAY_CLASS = "0x10de", "0x03"  # PCI vendor, and the class of VGA and 3D controllers


def describe(name: str) -> Node:
    """The machine without its GPUs, as node `name` (sites/{site}/nodes/{node})."""
    return Node(
        name=name,
        site=names.top(name),
        cpu_millicores=cpu_millicores(),
        memory_bytes=memory_bytes(),
        disks=disks(),
        network_bytes_per_s=network_bytes_per_s(),
    )


def nvidia_devices(root: Path = Path("/sys/bus/pci/devices")) -> int:
    """GPUs of NVIDIA on the PCI bus, with or without a driver."""
    devices = root.iterdir() if root.is_dir() else ()
    return sum(
        " ".join(_lines(device / "vendor")) == _NVIDIA and " ".join(_lines(device / "class")).startswith(_DISPLAY_CLASS)
        for device in devices
    )


async def is_shutting_down() -> bool:
    """Whether the host itself goes down, as far as systemd says so; False where there is none, or it does not answer."""
    systemctl = shutil.which("systemctl")
    if systemctl is None or not Path("/run/systemd/system").is_dir():
        return False
    try:
        async with asyncio.timeout(_SYSTEMD_WITHIN_S):
            asked = await asyncio.create_subprocess_exec(
                systemctl, "is-system-running", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            answer, _ = await asked.communicate()
    except (OSError, TimeoutError):
        return False
    return answer.strip() == b"stopping"


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
