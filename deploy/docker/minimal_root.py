"""Copies what a Python program needs to run into an empty root: the interpreter, its library, what both link to, names, CAs.

    python3 minimal_root.py FOLDER INTERPRETER [FOLDER_WITH_MODULES ...]

No shell, no package manager, nothing with the set-user-id bit: what is not there cannot be used by whoever breaks in. Only glibc's
`ldd` is asked, which every base image with a shell has.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

_LEFT_OUT = shutil.ignore_patterns(
    "__pycache__",
    "dist-packages",
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "config-*",
)
_ALSO = (
    "/etc/ssl",
    "/usr/lib/ssl/openssl.cnf",
    "/usr/lib/ssl/certs",
    "/usr/lib/ssl/cert.pem",
    "/usr/share/zoneinfo/UTC",
    "/etc/ld.so.cache",
    "/etc/os-release",
)
_LOADED_LATER = (
    "libgcc_s.so.1",
    "libnss_dns.so.2",
    "libnss_files.so.2",
)  # by glibc when first needed, so that ldd is silent
_USERS = "root:x:0:0::/:/nonexistent\nwhaleflux:x:10001:10001::/var/lib/whaleflux:/nonexistent\n"
_GROUPS = "root:x:0:\nwhaleflux:x:10001:\n"


def linked(file: Path) -> set[Path]:
    """The shared libraries that the loader finds for one program or library, the loader among them."""
    said = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=False).stdout
    words = [word for line in said.splitlines() for word in line.split() if word.startswith("/")]
    return {Path(word) for word in words}


def keep(path: Path, root: Path) -> None:
    """Copies one file to the same place below `root`, each link on the way as a link."""
    real = Path(os.path.realpath(path.parent)) / path.name
    for at in {path, real}:
        target = root / at.relative_to("/")
        _folder(at.parent, root)
        if at.is_symlink():
            if not target.is_symlink():
                target.symlink_to(os.readlink(at))
            keep(at.parent / os.readlink(at), root)
        elif at.is_file() and not target.exists():
            shutil.copy2(at, target)
            target.chmod(at.stat().st_mode & 0o755)


def _folder(path: Path, root: Path) -> None:
    """Makes a folder below `root` as it is outside: /lib is a link to usr/lib on most systems."""
    for at in [*reversed(path.parents), path]:
        target = root / at.relative_to("/")
        if at.is_symlink() and not target.is_symlink():
            target.symlink_to(os.readlink(at))
            _folder(at.parent / os.readlink(at), root)
        elif not at.is_symlink():
            target.mkdir(exist_ok=True, mode=0o755)


def main() -> None:
    """Fills the root; prints its size."""
    root, interpreter, *folders = (Path(argument) for argument in sys.argv[1:])
    root.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    _folder(library.parent, root)
    shutil.copytree(library, root / library.relative_to("/"), symlinks=True, ignore=_LEFT_OUT, dirs_exist_ok=True)
    modules = [file for folder in [library, *folders] for file in folder.rglob("*.so*") if file.is_file()]
    wanted = set().union(*(linked(file) for file in [Path(os.path.realpath(interpreter)), *modules]))
    libraries = {folder for file in wanted for folder in [file.parent]}
    wanted |= {folder / name for folder in libraries for name in _LOADED_LATER if (folder / name).exists()}
    for file in {interpreter, *wanted}:
        if not any(file.is_relative_to(folder) for folder in folders) or file == interpreter:
            keep(file, root)
    for name in _ALSO:
        for file in [Path(name), *Path(name).rglob("*")]:
            if file.is_file() or file.is_symlink():
                keep(file, root)
    (root / "etc").mkdir(exist_ok=True)
    (root / "etc/passwd").write_text(_USERS)
    (root / "etc/group").write_text(_GROUPS)
    (root / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
    for folder in ("tmp", "proc", "sys", "dev"):
        (root / folder).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    size = sum(file.lstat().st_size for file in root.rglob("*"))
    print(f"{root}: {size >> 20} MiB")


if __name__ == "__main__":
    main()
