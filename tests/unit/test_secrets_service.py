"""SecretService over the memory store: who may do what to a secret, what the store keeps of it, and what tasks are given."""

import contextlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from whaleflux.rpc import auth
from whaleflux.store import Put, keys
from whaleflux.store.memory import MemoryStore
from whaleflux.trust import key_file
from whaleflux.v1 import secrets_pb2 as pb
from whaleflux_inventory import secret_records, secret_rules
from whaleflux_inventory.key_wrapping import FileKeys
from whaleflux_inventory.secret_servicer import SecretServicer

NOW = datetime(2026, 11, 30, tzinfo=UTC)
HF, ANN = "secrets/hf-token", "user/ann"


@dataclass
class Known:
    """The fleet's people, as its records say."""

    groups: dict[str, set[str]] = field(default_factory=dict)
    disabled: set[str] = field(default_factory=set)

    def groups_of(self, name):
        return frozenset(group for group, members in self.groups.items() if name in members)

    def is_group(self, group):
        return group in self.groups

    def is_disabled(self, name):
        return name in self.disabled


class World:
    def __init__(self, folder):
        self.key_path = folder / "secrets.keys"
        key_file.add_key(self.key_path, NOW)
        self.store, self.known = MemoryStore(), Known({"nlp": {"ann", "bob"}})
        self.rpc = SecretServicer(self.store, VirtualClock(), FileKeys(self.key_path), self.known)

    async def call(self, method, request, name="ann", role="user", queues=None):
        groups = self.known.groups_of(name)
        with auth.acting_as(auth.Principal(auth.Identity(role, name), groups, queues)):
            return await getattr(self.rpc, method)(request, None)

    async def add(self, secret_id="hf-token", value=b"canary-1", name="ann", **more):
        fields = {one: more.pop(one) for one in ("team", "queues") if one in more}
        who = {one: more.pop(one) for one in ("role", "scope") if one in more}
        request = pb.CreateSecretRequest(secret_id=secret_id, secret=pb.Secret(**fields), value=value, **more)
        return await self.call("CreateSecret", request, name, who.get("role", "user"), who.get("scope"))

    async def rotate(self, value, name="ann", etag="", **more):
        return await self.call(
            "UpdateSecret", pb.UpdateSecretRequest(secret=pb.Secret(name=HF, etag=etag), value=value, **more), name
        )

    async def share(self, name="ann", **fields):
        request = pb.UpdateSecretRequest(secret=pb.Secret(name=HF, **fields))
        request.update_mask.paths.extend(fields)
        return await self.call("UpdateSecret", request, name)

    async def open(self, *names, subject=ANN, queue="queues/default", version=0, groups=(), text=False, dry=False):
        choices = [pb.SecretChoice(name=name, version=version, as_text=text) for name in names or (HF,)]
        request = pb.OpenSecretsRequest(subject=subject, queue=queue, groups=groups, choices=choices, validate_only=dry)
        return await self.call("OpenSecrets", request, "embedded", "scheduler")

    async def value(self, **asked):
        answer = await self.open(**asked)
        assert not answer.problems, answer.problems
        return answer.opened[0].value

    async def problem(self, *names, **asked):
        answer = await self.open(*names, **asked)
        assert not answer.opened
        return answer.problems[0].message

    async def rewrap(self):
        with auth.acting_as(auth.Identity("admin", "root")):
            said = pb.RewrapSecretsResponse()
            async with contextlib.aclosing(self.rpc.RewrapSecrets(pb.RewrapSecretsRequest(), None)) as answers:
                async for answer in answers:
                    said.CopyFrom(answer)
            return said

    async def stored(self):
        return {entry.key: entry.value for entry in (await self.store.list("/")).entries}


@pytest.fixture
async def world(tmp_path):
    return World(tmp_path)


async def test_a_secret_goes_in_and_comes_out_for_its_owners_jobs_alone(world):
    made = await world.add(queues=["queues/b", "queues/a"])
    assert (made.name, made.owner, list(made.queues)) == (HF, ANN, ["queues/a", "queues/b"])
    assert [(one.version, one.size_bytes, one.text) for one in made.versions] == [(1, 8, True)]
    assert await world.value(queue="queues/a") == b"canary-1"
    absent = (await world.problem("secrets/nothing", subject="user/eve")).replace("nothing", "hf-token")
    assert await world.problem(subject="user/eve", queue="queues/a") == absent
    assert await world.problem(subject="admin/root", queue="queues/a") == absent.replace("user/eve", "admin/root")
    assert await world.problem(subject="agent/a/n1", queue="queues/a") == absent.replace("user/eve", "agent/a/n1")
    assert "queue a, b, not in 'c'" in await world.problem(queue="queues/c")
    assert await world.value(queue="queues/a", subject="operator/ann") == b"canary-1"  # her role changed, not she
    world.known.disabled.add("ann")
    assert "disabled" in await world.problem(queue="queues/a")


async def test_all_that_is_wrong_is_named_and_nothing_is_given_then(world):
    await world.add()
    await world.add("blob", b"\xff\0")
    answer = await world.open(HF, "secrets/x", "secrets/blob", "secrets/y", text=True)
    assert [one.index for one in answer.problems] == [1, 2, 3] and not answer.opened
    assert "{name: blob, file: NAME}" in answer.problems[1].message
    assert not (await world.open(HF, dry=True)).opened
    for role in ("inference_router", "admin", "agent"):
        request = pb.OpenSecretsRequest(subject=ANN, choices=[pb.SecretChoice(name=HF)])
        with pytest.raises(PermissionDenied, match="scheduler alone"):
            await world.call("OpenSecrets", request, "x/y" if role == "agent" else "x", role)
    with pytest.raises(InvalidArgument, match="choices"):
        await world.open(*["secrets/x"] * 65)


async def test_the_store_never_has_a_value_in_clear(world):
    await world.add(request_id="r1")
    await world.rotate(b"canary-2", request_id="r2")
    kept = await world.stored()
    assert len(kept) == 3
    text = repr(kept)
    assert "canary" not in text
    shown = await world.call("GetSecret", pb.GetSecretRequest(name=HF))
    assert "canary" not in repr(shown) and [one.version for one in shown.versions] == [1, 2]


async def test_rotation_adds_versions_and_keeps_the_newest_ten(world):
    await world.add()
    for number in range(2, 13):
        await world.rotate(b"canary-%d" % number)
    shown = await world.call("GetSecret", pb.GetSecretRequest(name=HF))
    assert [one.version for one in shown.versions] == list(range(3, 13))
    assert await world.value() == b"canary-12" and await world.value(version=3) == b"canary-3"
    assert "no version 2; kept are 3 to 12" in await world.problem(version=2)
    assert len(await world.stored()) == 1 + secret_rules.VERSIONS_KEPT


async def test_requests_may_be_repeated_and_etags_count(world):
    made = await world.add(request_id="r1")
    assert await world.add(request_id="r1") == made
    for again in ({"request_id": "r1", "value": b"other"}, {"request_id": "r2"}, {"name": "bob", "request_id": "r1"}):
        with pytest.raises(AlreadyExists):
            await world.add(**again)
    second = await world.rotate(b"canary-2", request_id="r3", etag=made.etag)
    assert (await world.rotate(b"canary-2", request_id="r3")) == second
    with pytest.raises(Aborted):
        await world.rotate(b"canary-3", etag=made.etag)
    assert len(second.versions) == 2
    before = await world.stored()
    dry = await world.rotate(b"canary-3", validate_only=True)
    assert len(dry.versions) == 3
    await world.add("new", validate_only=True)
    with pytest.raises(AlreadyExists):
        await world.add(validate_only=True)
    assert await world.stored() == before


async def test_a_team_shares_and_operators_only_look_after_it(world):
    await world.add(team="groups/nlp")
    assert await world.value(subject="user/bob") == b"canary-1"
    await world.rotate(b"canary-2", name="bob")
    for name, role in (("bob", "user"), ("olga", "operator"), ("root", "admin")):
        listed = await world.call("ListSecrets", pb.ListSecretsRequest(), name, role)
        assert [one.name for one in listed.secrets] == [HF]
    assert not (await world.call("ListSecrets", pb.ListSecretsRequest(), "eve")).secrets
    for method in ("GetSecret", "DeleteSecret"):
        with pytest.raises(NotFound):
            await world.call(method, getattr(pb, f"{method}Request")(name=HF), "eve")
    with pytest.raises(NotFound):
        await world.rotate(b"x", name="eve")
    with pytest.raises(PermissionDenied, match="only its owner"):
        await world.share("bob", team="")
    with pytest.raises(PermissionDenied, match="operators may see and delete"):
        await world.call(
            "UpdateSecret", pb.UpdateSecretRequest(secret=pb.Secret(name=HF), value=b"x"), "olga", "operator"
        )
    world.known.groups["nlp"].discard("bob")  # left the team
    assert "no secret" in await world.problem(subject="user/bob", groups=["groups/nlp"])
    await world.call("DeleteSecret", pb.DeleteSecretRequest(name=HF), "olga", "operator")
    assert not await world.stored()


async def test_groups_of_an_identity_provider_count_as_they_were_at_login(world):
    await world.add(team="groups/nlp")
    del world.known.groups["nlp"]  # not the fleet's any more, but its provider's
    assert await world.value(subject="user/bob", groups=["groups/nlp"]) == b"canary-1"


async def test_whom_it_is_shared_with_can_change_and_cannot_be_forged(world):
    await world.add()
    await world.share(queues=["queues/a"], team="groups/nlp")
    assert await world.value(subject="user/bob", queue="queues/a") == b"canary-1"
    entry = await world.store.get(keys.SECRETS + "hf-token")
    for team, queues in (("groups/eve", ["queues/a"]), ("groups/nlp", [])):
        forged = secret_records.record_of(entry)
        forged.secret.team, forged.secret.queues[:] = team, queues
        await world.store.commit(Put(entry.key, forged.SerializeToString()))
        with pytest.raises(FailedPrecondition, match="not as it was stored"):
            await world.open(queue="queues/a")
    forged = secret_records.record_of(entry)
    forged.secret.owner = "user/eve"
    await world.store.commit(Put(entry.key, forged.SerializeToString()))
    with pytest.raises(FailedPrecondition, match="not as it was stored"):
        await world.open(subject="user/eve", queue="queues/a")


async def test_records_swapped_in_the_store_do_not_open(world):
    await world.add()
    await world.rotate(b"canary-2")
    await world.add("mine", b"canary-eve", name="eve")
    kept = await world.stored()
    hf, mine = keys.SECRETS + "hf-token", keys.SECRETS + "mine"
    values = keys.SECRET_VALUES + "hf-token/"
    for swapped in (
        {mine: kept[hf]},
        {keys.SECRET_VALUES + "mine/1": kept[values + "2"]},
        {keys.SECRET_VALUES + "mine/1": b""},
    ):
        await world.store.commit(*(Put(key, value) for key, value in (kept | swapped).items()))
        with pytest.raises(FailedPrecondition):
            await world.open("secrets/mine", subject="user/eve")
    renamed = pb.SecretRecord.FromString(kept[hf])
    renamed.secret.name, renamed.secret.owner = "secrets/mine", "user/eve"
    await world.store.commit(
        Put(mine, renamed.SerializeToString()), Put(keys.SECRET_VALUES + "mine/2", kept[values + "2"])
    )
    with pytest.raises(FailedPrecondition):
        await world.open("secrets/mine", subject="user/eve")
    await world.store.commit(*(Put(values + v, kept[values + w]) for v, w in (("1", "2"), ("2", "1"))))
    with pytest.raises(FailedPrecondition):
        await world.open()


async def test_what_cannot_be_read_is_unknown_and_not_absent(world):
    await world.add()
    await world.store.commit(Put(keys.SECRETS + "hf-token", b"\xff"))
    with pytest.raises(FailedPrecondition, match="not gone"):
        await world.open()
    with pytest.raises(AlreadyExists):
        await world.add()
    with pytest.raises(NotFound):
        await world.call("GetSecret", pb.GetSecretRequest(name=HF))
    listed = await world.call("ListSecrets", pb.ListSecretsRequest(), "olga", "operator")
    assert list(listed.unreadable) == [HF]
    assert not (await world.call("ListSecrets", pb.ListSecretsRequest())).unreadable
    await world.call("DeleteSecret", pb.DeleteSecretRequest(name=HF), "olga", "operator")
    assert not await world.stored()


async def test_rewrap_moves_all_to_the_newest_key_and_names_what_it_cannot_open(world):
    await world.add()
    await world.rotate(b"canary-2")
    await world.add("other", b"canary-3", name="bob")
    old = key_file.load(world.key_path).newest
    assert (await world.rewrap()).rewrapped == 0
    new = key_file.add_key(world.key_path, NOW)
    assert await world.value(version=1) == b"canary-1"
    said = await world.rewrap()
    assert (said.done, said.total, said.rewrapped, said.key_id) == (2, 2, 2, new)
    shown = await world.call("GetSecret", pb.GetSecretRequest(name=HF))
    assert {one.key_id for one in shown.versions} == {new}
    world.key_path.write_text("".join(line for line in world.key_path.read_text().splitlines(True) if old not in line))
    assert await world.value() == b"canary-2" and await world.value(version=1) == b"canary-1"
    world.key_path.unlink()
    key_file.add_key(world.key_path, NOW)  # of another fleet: the old keys are lost
    said = await world.rewrap()
    assert list(said.failed) == [HF, "secrets/other"] and said.done == 2


async def test_bounds(world, monkeypatch):
    wrong = [{"value": b""}, {"value": b"x" * 65_537}, {"queues": ["queues/a"] * 65}, {"queues": ["a"]}, {"team": "groups/eve"},
             {"team": "eve"}, {"secret_id": "Not-An-Id"}]  # fmt: skip
    for fields in wrong:
        with pytest.raises(InvalidArgument):
            await world.add(**fields)
    await world.add(value=b"x" * 65_536)
    with pytest.raises(InvalidArgument, match="nothing to change"):
        await world.rotate(b"")
    request = pb.UpdateSecretRequest(secret=pb.Secret(name=HF))
    request.update_mask.paths.append("owner")
    with pytest.raises(InvalidArgument, match="owner"):
        await world.call("UpdateSecret", request)
    monkeypatch.setattr(secret_records, "MAX_PER_OWNER", 2)
    await world.add("second")
    with pytest.raises(ResourceExhausted, match="user/ann has 2"):
        await world.add("third")
    await world.add("third", name="bob")


def test_a_credential_of_several_parts_is_taken_apart():
    whole = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "a=b/c"}
    written = (
        "AWS_ACCESS_KEY_ID=AKIA\nAWS_SECRET_ACCESS_KEY=a=b/c\n",
        "# x\n[default]\nexport AWS_ACCESS_KEY_ID = AKIA\nAWS_SECRET_ACCESS_KEY= a=b/c",
        json.dumps(whole),
    )
    for text in written:
        assert secret_rules.credentials_of(text.encode()) == whole
    for bad in (b"", b"canary", b'{"a": 1}', b"[1]", b"\xff", b"{"):
        with pytest.raises(ValueError, match="neither") as refused:
            secret_rules.credentials_of(bad)
        assert "canary" not in str(refused.value)


async def test_a_token_for_some_queues_touches_only_secrets_that_are_for_these(world):
    scope = frozenset({"ci"})
    await world.add("theirs", queues=["queues/ci"], scope=scope)
    for more in ({}, {"queues": ["queues/ci", "queues/prod"]}):
        with pytest.raises(PermissionDenied, match="for ci alone"):
            await world.add("mine", scope=scope, **more)
    await world.add()
    with pytest.raises(PermissionDenied):
        await world.call("UpdateSecret", pb.UpdateSecretRequest(secret=pb.Secret(name=HF), value=b"x"), queues=scope)
    with pytest.raises(PermissionDenied):
        await world.call("DeleteSecret", pb.DeleteSecretRequest(name=HF), queues=scope)
    for queues in ([], ["queues/ci", "queues/prod"]):
        widened = pb.UpdateSecretRequest(secret=pb.Secret(name="secrets/theirs", queues=queues))
        widened.update_mask.paths.append("queues")
        with pytest.raises(PermissionDenied, match="for ci alone"):
            await world.call("UpdateSecret", widened, queues=scope)
