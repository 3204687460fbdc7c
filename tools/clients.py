"""`make clients LANG=...`: clients of the contract for other languages, generated where the plugins are to be had."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / ".build" / "clients"

GO = """Go: the plugins come from Go's own module proxy, not from PyPI or npm. With Go 1.22 or later:

    go install google.golang.org/protobuf/cmd/protoc-gen-go@latest
    go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@latest
    .venv/bin/python tools/googleapis.py .build/googleapis
    .venv/bin/python -m grpc_tools.protoc -Iprotos -I.build/googleapis \\
        --go_out=.build/clients/go --go_opt=module=whaleflux.dev/client \\
        $(for f in protos/whaleflux/v1/*.proto; do echo --go_opt=M${f#protos/}=whaleflux.dev/client/v1; done) \\
        --go-grpc_out=.build/clients/go --go-grpc_opt=module=whaleflux.dev/client \\
        $(for f in protos/whaleflux/v1/*.proto; do echo --go-grpc_opt=M${f#protos/}=whaleflux.dev/client/v1; done) \\
        protos/whaleflux/v1/*.proto
"""


def typescript() -> None:
    """Messages and service definitions through ts-proto, an npm package."""
    npm = shutil.which("npm") or sys.exit("npm is not installed; install Node.js 20 or later and run this again")
    tools = ROOT / ".build" / "ts-plugin"
    tools.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [npm, "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(tools), "ts-proto@2"], check=True
    )
    subprocess.run([sys.executable, str(ROOT / "tools/googleapis.py"), str(ROOT / ".build/googleapis")], check=True)
    target = OUT / "typescript"
    target.mkdir(parents=True, exist_ok=True)
    sources = [str(path) for path in sorted((ROOT / "protos").rglob("*.proto"))]
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", f"-I{ROOT / '.build/googleapis'}",
            f"--plugin=protoc-gen-ts_proto={tools / 'node_modules/.bin/protoc-gen-ts_proto'}",
            f"--ts_proto_out={target}", "--ts_proto_opt=outputServices=grpc-js,esModuleInterop=true,forceLong=bigint",
            *sources,
        ],
        check=True,
    )  # fmt: skip
    print(f"TypeScript client in {target.relative_to(ROOT)}; it needs @grpc/grpc-js and @bufbuild/protobuf")


def main() -> None:
    language = sys.argv[1] if len(sys.argv) > 1 else ""
    if language == "typescript":
        typescript()
    elif language == "go":
        print(GO)
    else:
        sys.exit(f"LANG={language!r} is not known; use: make clients LANG=go or LANG=typescript")


if __name__ == "__main__":
    main()
