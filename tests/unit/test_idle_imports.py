"""What a process holds for as long as it lives: libraries that only some of its runs use are imported by those."""

import subprocess
import sys

import pytest

UNUSED = {
    "whaleflux_agent.__main__": {"opentelemetry.sdk", "pydantic_settings", "yaml", "psutil", "docker", "pynvml", "nats", "aetcd", "numpy"},
    "whaleflux_inventory.__main__": {"opentelemetry.sdk", "pydantic_settings", "yaml", "psutil", "numpy"},
    "whaleflux.embedded.suite": {"grpc", "google.protobuf", "opentelemetry", "pydantic", "yaml"},
}  # fmt: skip


@pytest.mark.parametrize("module", UNUSED)
def test_a_process_starts_without_what_it_may_never_use(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert not UNUSED[module] & set(loaded.split())
