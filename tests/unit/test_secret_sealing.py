"""What seals secrets: the core, and the file of keys."""

import os
from datetime import UTC, datetime

import pytest

from whaleflux.errors import FailedPrecondition, InvalidArgument
from whaleflux.trust import key_file
from whaleflux_inventory.core import sealing
from whaleflux_inventory.core.sealing import Place, Unsealable
from whaleflux_inventory.key_wrapping import FileKeys, NoKeys, Wrapped, wrapper_of
from whaleflux_inventory.settings import Settings

NOW = datetime(2026, 11, 30, tzinfo=UTC)
PLACE = Place("secrets/a", "01u", 3, "user/ann")
KEY, NONCE = b"k" * 32, b"n" * 12


def test_a_value_opens_where_it_was_sealed_and_nowhere_else():
    sealed = sealing.seal(b"canary", KEY, NONCE, PLACE)
    assert b"canary" not in sealed
    assert sealing.unseal(sealed, KEY, PLACE) == b"canary"
    others = (
        Place("secrets/b", "01u", 3, "user/ann"), Place("secrets/a", "02u", 3, "user/ann"), Place("secrets/a", "01u", 4, "user/ann"),
        Place("secrets/a", "01u", 3, "user/eve"), Place("secrets/a01u", "", 3, "user/ann"),
    )  # fmt: skip
    for place in others:
        with pytest.raises(Unsealable):
            sealing.unseal(sealed, KEY, place)
    for damaged in (b"", sealed[:20], sealed[:-1] + bytes([sealed[-1] ^ 1])):
        with pytest.raises(Unsealable):
            sealing.unseal(damaged, KEY, PLACE)
    with pytest.raises(Unsealable):
        sealing.unseal(sealed, b"x" * 32, PLACE)


def test_who_may_use_it_is_sealed_too():
    proof = sealing.policy_seal(KEY, PLACE, "groups/g", ["queues/b", "queues/a"])
    sealing.check_policy(proof, KEY, PLACE, "groups/g", ["queues/a", "queues/b"])
    for team, queues in (
        ("groups/eve", ["queues/a", "queues/b"]),
        ("groups/g", ["queues/a"]),
        ("groups/g", []),
        ("", []),
    ):
        with pytest.raises(Unsealable):
            sealing.check_policy(proof, KEY, PLACE, team, queues)


async def test_keys_of_a_file_wrap_with_the_newest_and_open_with_any(tmp_path):
    path = tmp_path / "secrets.keys"
    first = key_file.add_key(path, NOW)
    keys = FileKeys(path)
    wrapped = await keys.wrap(KEY, b"here")
    assert wrapped.key_id == first and await keys.is_newest(first)
    second = key_file.add_key(path, NOW)
    assert await keys.is_newest(second) and not await keys.is_newest(first)
    assert await keys.unwrap(wrapped, b"here") == KEY
    assert (await keys.wrap(KEY, b"here")).key_id == second
    with pytest.raises(Unsealable):
        await keys.unwrap(wrapped, b"there")
    path.write_text(path.read_text().splitlines()[1] + "\n")  # the old one is taken away
    with pytest.raises(FailedPrecondition, match=first):
        await keys.unwrap(wrapped, b"here")
    path.write_text("nonsense")  # while somebody edits it, what was read last holds
    assert await keys.is_newest(second)


async def test_a_file_that_comes_later_is_taken_then_and_until_then_only_secrets_wait(tmp_path):
    path = tmp_path / "secrets.keys"
    keys = FileKeys(path)
    assert not await keys.is_newest("k1")
    with pytest.raises(FailedPrecondition, match="no file"):
        await keys.wrap(KEY, b"c")
    with pytest.raises(FailedPrecondition, match="k1"):
        await keys.unwrap(Wrapped("k1", b""), b"c")
    made = key_file.add_key(path, NOW)
    assert (await keys.wrap(KEY, b"c")).key_id == made


def test_a_file_of_keys_that_others_may_read_is_refused_and_no_message_quotes_a_key(tmp_path):
    path = tmp_path / "secrets.keys"
    key_file.make_key_file(path, NOW)
    made = path.read_text()
    key_file.make_key_file(path, NOW)
    assert path.read_text() == made and path.stat().st_mode & 0o777 == 0o600
    for mode in (0o640, 0o604, 0o620):
        os.chmod(path, mode)
        with pytest.raises(InvalidArgument, match="chmod 600"):
            key_file.load(path)
    os.chmod(path, 0o600)
    for text in ("", "k1 c2hvcnQ=\n", made + made, "K!\n", "k1\n", made.replace("k-", "K_")):
        path.write_text(text)
        with pytest.raises(InvalidArgument) as refused:
            key_file.load(path)
        assert not any(word in refused.value.message for line in text.splitlines() for word in line.split()[1:])


def test_keys_of_root_may_be_given_to_a_process_by_its_group():
    def stat(mode, uid):
        return os.stat_result((mode, 0, 0, 0, uid, 0, 0, 0, 0, 0))

    assert not key_file.too_open(stat(0o100440, 0), me=10001)
    assert key_file.too_open(stat(0o100440, 10001), me=10001)
    assert key_file.too_open(stat(0o100600, 1234), me=10001)
    assert key_file.too_open(stat(0o100444, 0), me=10001)


def test_a_folder_of_keys_is_read_in_the_order_of_names(tmp_path):
    for name in ("2-new", "1-old"):
        key_file.add_key(tmp_path / name, NOW)
    (tmp_path / "..data").mkdir()
    assert key_file.load(tmp_path).newest == (tmp_path / "2-new").read_text().split()[0]
    with pytest.raises(InvalidArgument, match="cannot read"):
        key_file.load(tmp_path / "absent")


async def test_without_keys_nothing_is_kept():
    assert isinstance(wrapper_of(Settings()), NoKeys)
    with pytest.raises(FailedPrecondition, match="keeps no secrets"):
        await NoKeys().wrap(KEY, b"c")
    with pytest.raises(InvalidArgument, match="command line"):
        wrapper_of(Settings(secrets_kms_command="'"))
