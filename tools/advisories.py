"""A folder of advisories, answering as OSV's query does: what pip-audit asks where there is no network."""

from __future__ import annotations

import contextlib
import json
import threading
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

Advisory = dict[str, Any]  # https://ossf.github.io/osv-schema


class Advisories:
    """Advisories by package."""

    def __init__(self, records: Iterator[Advisory]) -> None:
        self._by_package: dict[str, list[tuple[Advisory, Advisory]]] = defaultdict(list)
        self.count = 0
        for record in records:
            self.count += 1
            for affected in record.get("affected", ()):
                package = affected.get("package", {})
                if package.get("ecosystem") == "PyPI":
                    package["name"] = canonicalize_name(package["name"])
                    self._by_package[package["name"]].append((record, affected))

    def of(self, package: str, version: str) -> list[Advisory]:
        """Those that say that this version is affected."""
        found = self._by_package.get(canonicalize_name(package), [])
        hit = {record["id"]: record for record, affected in found if _is_affected(affected, version)}
        return list(hit.values())


def load(path: Path) -> Advisories:
    """From a folder of OSV records (*.json, below it too), a zip file of them, or one record; ValueError says what is wrong."""
    try:
        advisories = Advisories(_records(path))
    except (OSError, zipfile.BadZipFile, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no readable advisories (OSV records as JSON): {error!r}") from None
    if not advisories.count:
        raise ValueError(f"{path} holds no advisory: give a folder of OSV records (*.json) or a zip file of them")
    return advisories


def _records(path: Path) -> Iterator[Advisory]:
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            yield json.loads(file.read_text())
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    yield json.loads(archive.read(name))
    else:
        yield json.loads(path.read_text())


def _is_affected(affected: Advisory, version: str) -> bool:
    """By the list of versions, or by a range of ecosystem versions: its events in order, as OSV's specification evaluates them."""
    try:
        ours = Version(version)
        if any(ours == Version(listed) for listed in affected.get("versions", ()) if _is_version(listed)):
            return True
        ranges = (r for r in affected.get("ranges", ()) if r.get("type") == "ECOSYSTEM")
        return any(_in_range(ours, r.get("events", ())) for r in ranges)
    except InvalidVersion:
        return version in affected.get("versions", ())


def _in_range(ours: Version, events: list[dict[str, str]]) -> bool:
    order = {"introduced": 0, "fixed": 1, "last_affected": 2}
    known = [(Version(text), order[kind], kind) for event in events for kind, text in event.items() if kind in order]
    inside = False
    for at, _, kind in sorted(known):
        if kind == "introduced" and ours >= at:
            inside = True
        elif (kind == "fixed" and ours >= at) or (kind == "last_affected" and ours > at):
            inside = False
    return inside


def _is_version(text: str) -> bool:
    with contextlib.suppress(InvalidVersion):
        return bool(Version(text))
    return False


@contextlib.contextmanager
def served(advisories: Advisories) -> Iterator[str]:
    """The address, on loopback, at which OSV's query is answered while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # named by http.server
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = advisories.of(asked["package"]["name"], asked["version"])
            answer = json.dumps({"vulns": found} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Not of interest."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
