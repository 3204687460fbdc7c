"""Copies google/api and google/rpc .proto files of the installed package to a folder that buf can read."""

import shutil
import sys
from pathlib import Path

import google.rpc


def main(target: Path) -> None:
    source = Path(next(iter(google.rpc.__path__))).parent
    for part in ("api", "rpc"):
        for proto in (source / part).rglob("*.proto"):
            copy = target / "google" / proto.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(proto, copy)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
