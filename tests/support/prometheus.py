"""A real Prometheus over a suite, with the alerts as they are shipped, evaluated each second."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.deploy_files import DEPLOY
from tools.grafana import filled

RULES_FILE = DEPLOY / "observability/rules.yaml"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHORTEST_WINDOW_S = 10  # ten samples
_SHORTER = 60


def free_port() -> int:
    """One of 127.0.0.1 that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Prometheus:
    """Asked over HTTP."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, **asked: object) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def found(self, query: str) -> list[Any]:
        """The samples that a query answers with."""
        result: list[Any] = self.get("query", query=filled(query, "1m"))["result"]
        return result

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {one["labels"]["alertname"] for one in self.get("alerts")["alerts"] if one["state"] == "firing"}

    def scraped(self, service: str) -> bool:
        """Whether figures of the service are there; False while Prometheus starts."""
        with contextlib.suppress(OSError):
            return bool(self.found(f'up{{service="{service}"}} == 1'))
        return False


def rules() -> dict[str, Any]:
    """As shipped, evaluated each second."""
    loaded: dict[str, Any] = yaml.safe_load(RULES_FILE.read_text())
    for group in loaded["groups"]:
        group["interval"] = "1s"
    return loaded


def hurried() -> dict[str, Any]:
    """The same with each `for` and each window a sixtieth as long, windows 10 s at least. What is compared stays as it is."""
    loaded = rules()
    for group in loaded["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(
                r"\[(\w+)\]", lambda found: f"[{_shorter_s(found[1], _SHORTEST_WINDOW_S)}s]", rule["expr"]
            )
            if "for" in rule:
                rule["for"] = f"{_shorter_s(rule['for'])}s"
    return loaded


def _shorter_s(duration: str, at_least: int = 0) -> int:
    return max(at_least, int(duration[:-1]) * _SECONDS[duration[-1]] // _SHORTER)


@contextlib.contextmanager
def prometheus(folder: Path, targets: Mapping[str, str], loaded: Mapping[str, Any]) -> Iterator[Prometheus]:
    """Scrapes `targets`, service -> host:port, each second. `folder` keeps what it needs and stores."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(dict(loaded)))
    scraped = [
        {"job_name": name, "static_configs": [{"targets": [address], "labels": {"service": name}}]}
        for name, address in targets.items()
    ]
    told = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": scraped,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(told))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as running:
        try:
            yield Prometheus(port)
        finally:
            running.terminate()
