"""A command that asks a key management service, as a process."""

import sys
from datetime import UTC, datetime

import pytest

from whaleflux.errors import Unavailable
from whaleflux.trust import key_file
from whaleflux_inventory.key_wrapping import FileBehindKms, FileKeys, KmsCommand, Wrapped

NOW = datetime(2026, 11, 30, tzinfo=UTC)
KEY = b"k" * 32
KMS = """
import base64, json, os, sys
asked = json.load(sys.stdin)
assert not [name for name in os.environ if name.startswith("WHALEFLUX_")]
turned = lambda name: base64.b64encode(base64.b64decode(asked[name])[::-1]).decode()
if asked["operation"] == "wrap":
    print(json.dumps({"key_id": "arn:1", "ciphertext": turned("plaintext")}))
else:
    print(json.dumps({"plaintext": turned("ciphertext")}))
"""


async def test_a_command_wraps_in_the_place_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WHALEFLUX_NATS_PASSWORD", "canary")
    path = tmp_path / "secrets.keys"
    key_file.make_key_file(path, NOW)
    old = await FileKeys(path).wrap(KEY, b"c")
    both = FileBehindKms(FileKeys(path), KmsCommand([sys.executable, "-c", KMS]))
    wrapped = await both.wrap(bytes(range(32)), b"c")
    assert wrapped == Wrapped("arn:1", bytes(range(32))[::-1])
    assert await both.unwrap(wrapped, b"c") == bytes(range(32))
    assert await both.unwrap(old, b"c") == KEY


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit(3)", "exit code 3"),
        ("print('x' * 100_000)", "more than"),
        ("print('[]')", "JSON object"),
        ("print('{}')", "key_id"),
        ("import time; time.sleep(60)", "within"),
    ],
)
async def test_a_command_that_fails_is_unavailable_and_ends(program, said):
    within_s = 0.3 if "sleep" in program else 20
    with pytest.raises(Unavailable, match=said):
        await KmsCommand([sys.executable, "-c", program], within_s=within_s).wrap(KEY, b"c")
    with pytest.raises(Unavailable, match="cannot be started"):
        await KmsCommand(["/nowhere/kms"]).wrap(KEY, b"c")
