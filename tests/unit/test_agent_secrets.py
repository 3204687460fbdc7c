"""Secrets on a node: where their values are, for how long, and who sees them."""

import os
import stat

import pytest

from tests.support.virtual_time import LoopClock
from whaleflux.errors import PermissionDenied, Unavailable
from whaleflux.manifests.job_fields import SecretUse, Spec
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import inventory_pb2, secrets_pb2
from whaleflux_agent.core.environment import LaunchContext, rank_environment
from whaleflux_agent.core.work import Work
from whaleflux_agent.runtime.api import LaunchFailed
from whaleflux_agent.runtime.shim import given
from whaleflux_agent.secret_access import SecretAccess, authorization
from whaleflux_agent.secret_files import SecretFiles, choose_root

USES = (
    SecretUse("secrets/a", 0, "A"),
    SecretUse("secrets/k", 0, "KEY_PATH", "key.json"),
    SecretUse("secrets/n", 0, "", ".netrc"),
)
VALUES = (b"canary-a\xc3\xa9", b"-----BEGIN\ncanary-line-1\ncanary-line-2\n", b"\xff\0canary")
WORK = Work("q.j.1.0", "queues/q/jobs/j", 1, (), cpu_ranks=1, spec=Spec(secrets=USES))


class Scheduler:
    """Gives what it has; an error in its place is raised, once."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    async def OpenTaskSecrets(self, request, timeout):
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def answer(names=("secrets/a", "secrets/k", "secrets/n"), values=VALUES):
    opened = [
        secrets_pb2.OpenedSecret(name=name, version=1, value=value) for name, value in zip(names, values, strict=True)
    ]
    return type("Answer", (), {"secrets": opened})


def access(folder, *answers):
    scheduler, files = Scheduler(*answers), SecretFiles(folder / "memory")
    return SecretAccess(files, scheduler, LoopClock()), files, scheduler


async def silent(_):
    pass


async def test_a_task_finds_its_values_until_nothing_is_left_of_it(tmp_path):
    secrets, files, scheduler = access(tmp_path, answer())
    await secrets.bring(WORK, silent)
    folder = files.folder(WORK.task)
    assert given(f"{folder}/env") == {"A": "canary-aé"}
    assert (folder / "files" / "key.json").read_bytes() == VALUES[1]
    assert (folder / "files" / ".netrc").read_bytes() == VALUES[2]
    modes = {stat.S_IMODE(os.lstat(path).st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o400}
    assert {stat.S_IMODE(os.lstat(path).st_mode) for path in (folder.parent, folder, folder / "env")} == {0o700}
    await secrets.bring(WORK, silent)  # the next agent, whose task is still setting up
    assert len(scheduler.asked) == 1 and (scheduler.asked[0].job, scheduler.asked[0].epoch) == (WORK.job, 1)
    await secrets.forget(WORK)
    assert not list((tmp_path / "memory").iterdir())
    await secrets.bring(WORK, silent)
    assert len(scheduler.asked) == 2


async def test_what_no_task_needs_is_swept(tmp_path):
    secrets, files, _ = access(tmp_path, answer())
    await secrets.bring(WORK, silent)
    await secrets.sweep(frozenset({WORK.task}))
    assert files.exists(WORK.task)
    await secrets.sweep(frozenset())
    assert not files.exists(WORK.task)
    await SecretAccess(SecretFiles(None), None, LoopClock()).sweep(frozenset())


async def test_a_folder_that_an_agent_did_not_finish_is_written_anew(tmp_path):
    """An agent was killed while it wrote the values: the next one must not start ranks with some of them."""
    secrets, files, scheduler = access(tmp_path, answer())
    twice = (*USES[:2], SecretUse("secrets/n", 0, "", "key.json"))  # ends in the middle, as a full disk would
    with pytest.raises(FileExistsError):
        files.write(WORK.task, twice, VALUES, for_anybody=False)
    assert not list((tmp_path / "memory").iterdir())
    (files.folder(WORK.task + ".making") / "env").mkdir(parents=True)
    await secrets.bring(WORK, silent)
    assert len(scheduler.asked) == 1 and given(f"{files.folder(WORK.task)}/env") == {"A": "canary-aé"}
    assert (files.folder(WORK.task) / "files" / ".netrc").exists()


async def test_outages_are_waited_out_and_refusals_fail_the_launch(tmp_path):
    said = []

    async def tell(text):
        said.append(text)

    away = Unavailable("no leader")
    secrets, files, scheduler = access(tmp_path, away, away, answer())
    await secrets.bring(WORK, tell)
    assert len(scheduler.asked) == 3 and len(said) == 1 and "no leader" in said[0]
    secrets, files, _ = access(tmp_path / "other", PermissionDenied("no secret 'a'"))
    with pytest.raises(LaunchFailed, match="no secret 'a'") as failed:
        await secrets.bring(WORK, tell)
    assert not failed.value.unfit
    secrets, files, _ = access(tmp_path / "gone", PermissionDenied("there is no 'a'", reason=ErrorReason.NOT_OWNER))
    with pytest.raises(LaunchFailed, match="there is no 'a'") as failed:
        await secrets.bring(WORK, tell)
    assert failed.value.unfit, "deleted while the job ran: it ends with why, and does not wait node after node for GPUs"
    secrets, files, _ = access(tmp_path / "third", answer(("secrets/a", "secrets/n", "secrets/k")))
    with pytest.raises(LaunchFailed, match="gave others"):
        await secrets.bring(WORK, tell)
    assert not files.exists(WORK.task)


async def test_a_node_without_memory_for_them_says_what_to_do(tmp_path):
    secrets = SecretAccess(SecretFiles(None), Scheduler(answer()), LoopClock())
    with pytest.raises(LaunchFailed, match="--secrets-dir") as failed:
        await secrets.bring(WORK, silent)
    assert failed.value.unfit and "canary" not in str(failed.value)
    (tmp_path / "memory").symlink_to(tmp_path)
    secrets, _, _ = access(tmp_path, answer())
    with pytest.raises(LaunchFailed, match="somebody else"):
        await secrets.bring(WORK, silent)


async def test_texts_about_a_task_do_not_tell_its_values(tmp_path):
    secrets, _, _ = access(tmp_path, answer())
    await secrets.bring(WORK, silent)
    text = "401 for https://x:canary-aé@host, canary-line-2 canary-line-1; -----BEGIN"
    assert secrets.masked(WORK.task, text) == "401 for https://x:***@host, *** ***; ***"
    assert secrets.masked(WORK.task, "ry-line-1 and more") == "*** and more", "the end of a longer text"
    assert secrets.masked("another", text) == text


def test_the_environment_has_paths_and_never_a_value():
    found = rank_environment(
        WORK, LaunchContext("n", "t", "s", (), "", secrets_dir="/run/x/files"), 0, inherited={}, error_file="/e"
    )
    assert found["WHALEFLUX_SECRETS_DIR"] == "/run/x/files" and found["KEY_PATH"] == "/run/x/files/key.json"
    assert "A" not in found
    plain = rank_environment(
        Work("t", "j", 1, (), cpu_ranks=1), LaunchContext("n", "t", "s", (), ""), 0, inherited={}, error_file="/e"
    )
    assert "WHALEFLUX_SECRETS_DIR" not in plain


def test_a_containers_user_may_be_any_and_sees_this_folder_alone(tmp_path):
    files = SecretFiles(tmp_path / "memory")
    files.write("t", USES, VALUES, for_anybody=True)
    folder = files.folder("t")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755 and stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "env" / "A").stat().st_mode) == 0o444


def test_the_place_for_them_is_memory(tmp_path):
    mounts, base = tmp_path / "mounts", tmp_path / "shm"
    base.mkdir()
    state = tmp_path / "state"
    mounts.write_text(f"overlay / overlay rw 0 0\ntmpfs {base} tmpfs rw 0 0\n")
    found = choose_root(None, state, mounts=str(mounts), bases=[str(tmp_path / "absent"), str(base)])
    assert found is not None and found.parent == base
    assert choose_root(None, tmp_path / "other", mounts=str(mounts), bases=[str(base)]) != found
    mounts.write_text("overlay / overlay rw 0 0\n")
    assert choose_root(None, state, mounts=str(mounts), bases=[str(base)]) is None
    assert choose_root(tmp_path / "chosen", state) == tmp_path / "chosen"


def test_credentials_are_shown_as_http_wants_them():
    assert authorization(inventory_pb2.CREDENTIAL_SCHEME_UNSPECIFIED, b"t0ken\n") == "Bearer t0ken"
    assert authorization(inventory_pb2.CREDENTIAL_SCHEME_BASIC, "ann:pässword".encode()) == "Basic YW5uOnDDpHNzd29yZA=="
    for value in (b"two lines\nX-Other: 1", b"a b", "ä".encode()):
        with pytest.raises(LaunchFailed) as failed:
            authorization(inventory_pb2.CREDENTIAL_SCHEME_BEARER, value)
        assert value.decode() not in str(failed.value)
