"""Generates libs/whaleflux/v1 from protos/ when the package is built or installed in place."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def generate(root: Path) -> None:
    """Runs protoc over protos/whaleflux and writes messages, stubs and .pyi into libs/whaleflux/v1."""
    import google.rpc  # ships google/api and google/rpc .proto files beside its modules
    import grpc_tools
    from grpc_tools import protoc

    well_known = Path(grpc_tools.__file__).parent / "_proto"
    googleapis = Path(next(iter(google.rpc.__path__))).parent.parent
    sources = sorted(str(path) for path in (root / "protos" / "whaleflux").rglob("*.proto"))
    includes = [f"-I{path}" for path in (well_known, googleapis, root / "protos")]
    outputs = [f"--{kind}={root / 'libs'}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    if protoc.main(["protoc", *includes, *outputs, *sources]) != 0:
        raise SystemExit("protoc failed; its messages above name the file and line")
    (root / "libs/whaleflux/v1/__init__.py").touch()


def note_commit(root: Path) -> None:
    """For `whaleflux --version` of a wheel; a checkout asks git itself (libs/whaleflux/version.py).

    WHALEFLUX_REVISION says it where there is no checkout, as in the build of an image.
    """
    said = os.environ.get("WHALEFLUX_REVISION", "")
    if not said and shutil.which("git"):
        asked = ["git", "-C", str(root), "describe", "--tags", "--always", "--dirty=, changed"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    if said:
        (root / "libs/whaleflux/built-from.txt").write_text(said)


class ProtoHook(BuildHookInterface):  # type: ignore[misc, type-arg]  # hatchling is untyped here
    """Called by hatchling before wheel and editable builds."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates in place; the artifacts setting puts the result into the wheel, with the commit it was built from."""
        root = Path(self.root)
        generate(root)
        if version != "editable":
            note_commit(root)


if __name__ == "__main__":
    generate(Path(__file__).parent)
