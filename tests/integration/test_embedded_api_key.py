"""The suite's own key of the inference API: kept, or made by a process that ends."""

import subprocess
import sys

import pytest

from whaleflux.context import Context
from whaleflux.embedded import api_key
from whaleflux.errors import Unavailable

pytestmark = pytest.mark.integration
SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from whaleflux.context import Context
from whaleflux.embedded import api_key, suite
from whaleflux.errors import Unavailable

try:
    asyncio.run(api_key.kept_or_new(Context("127.0.0.1:1", "ca", "cert", "key"), Path(sys.argv[1])))
except Unavailable:
    print(*sys.modules)
"""


@pytest.fixture
def nobody(tmp_path):
    """A fleet of which there is not even a certificate."""
    return Context("127.0.0.1:1", *(str(tmp_path / name) for name in ("ca.crt", "admin.crt", "admin.key")))


async def test_the_key_of_last_time_is_kept(nobody, tmp_path):
    (tmp_path / "api.key").write_text("wf-kept")
    assert await api_key.kept_or_new(nobody, tmp_path / "api.key") == "wf-kept"


async def test_a_key_that_cannot_be_made_says_why_and_leaves_no_file(nobody, tmp_path):
    with pytest.raises(Unavailable, match=r"admin\.key"):
        await api_key.kept_or_new(nobody, tmp_path / "api.key")
    assert not (tmp_path / "api.key").exists()


def test_whoever_asks_for_a_key_holds_no_grpc_afterwards(tmp_path):
    argv = [sys.executable, "-c", SUPERVISOR, str(tmp_path / "api.key")]
    loaded = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert "whaleflux.embedded.suite" in loaded
    assert not {"grpc", "google.protobuf", "opentelemetry", "pydantic", "yaml"} & set(loaded)
