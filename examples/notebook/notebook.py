"""JupyterLab where it is installed (pip install jupyterlab), else a page that lists the job's folder; both on 127.0.0.1 alone.

Whoever may `whaleflux port-forward` to the job reaches it, and nobody else beside the users of its node: there is no password.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8888)
    port = parser.parse_args().port
    if importlib.util.find_spec("jupyterlab"):
        options = ["--ip=127.0.0.1", f"--port={port}", "--no-browser", "--IdentityProvider.token="]
        root = ["--allow-root"] if os.geteuid() == 0 else []
        os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options, *root])  # noqa: S606  # becomes it
    print(f"jupyterlab is not installed here; the job's folder is listed on 127.0.0.1:{port}", flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), SimpleHTTPRequestHandler).serve_forever()


if __name__ == "__main__":
    main()
