"""`run` as a bash script, `setup` before the ranks, `launch: once`: by a real agent with real processes."""

import asyncio
import sys

import pytest

from tests.integration.test_agent_restart import agent_process, kill
from tests.support.fake_control_plane import agent, desired, until
from whaleflux.manifests.shell_text import as_command, passes_signals_on, under_init

pytestmark = pytest.mark.integration


def output(state, task="train-1-0", rank=0):
    return (state / "tasks" / task / f"rank-{rank}.log").read_text()


def ended(control, task):
    return lambda: control.tasks.phases(task)[-1:] in (["EXITED"], ["KILLED"], ["REFUSED"])


def named(number, script, **more):
    """A job of its own that runs a script on one GPU."""
    job = f"queues/q/jobs/j{number}"
    return desired(as_command(script), job=job, gpus=(number % 4,), **more)


SCRIPTS = {
    "echo a && echo b | tee out.txt": (0, "a\nb\n"),
    "A=7 B=\"x y\" python3 -c \"import os; print(os.environ['A'], os.environ['B'])\"": (0, "7 x y\n"),
    "mkdir -p d\ncd d\npwd | sed 's/.*\\///'\n": (0, "d\n"),
    "echo 'export X=1' > env.sh\nsource env.sh; echo $X $RANK/$WORLD_SIZE": (0, "1 0/1\n"),
    "false | true\necho not here": (1, ""),
    "echo $NO_SUCH_VARIABLE": (1, "NO_SUCH_VARIABLE: unbound variable"),
    "no-such-program": (127, "command not found"),
    "bash -c 'kill -9 $$'\ntrue": (137, ""),
}


async def test_scripts_mean_what_bash_means(control, state):
    async with agent(control, state):
        for number, script in enumerate(SCRIPTS):
            control.tasks.want(named(number, script))
        for number in range(len(SCRIPTS)):
            await until(ended(control, f"j{number}-1-0"))
    for number, (script, (code, said)) in enumerate(SCRIPTS.items()):
        assert control.tasks.last(f"j{number}-1-0").exit_code == code, script
        assert said in output(state, f"j{number}-1-0"), script
    assert "128 + 9" in control.tasks.last("j7-1-0").message
    assert "not found" in control.tasks.last("j6-1-0").message.partition("\n")[0]


SAVES = "trap 'echo saving; sleep 0.3; echo saved; exit 0' TERM\ntouch ready\nwhile true; do sleep 0.05; done\n"


@pytest.mark.parametrize("script", ["bash saves.sh", "true\nbash saves.sh\necho never", "bash saves.sh &\nwait"])
async def test_what_a_script_runs_gets_sigterm_and_the_grace(control, state, tmp_path, script):
    def here(task):
        task.spec.working_directory = str(tmp_path)

    (tmp_path / "saves.sh").write_text(SAVES)
    async with agent(control, state):
        control.tasks.want(desired(as_command(script), grace_s=5.0, edit=here))
        await until((tmp_path / "ready").exists)
        control.tasks.unwant("train-1-0")
        await until(lambda: "KILLED" in control.tasks.phases("train-1-0"))
    assert output(state).endswith("saving\nsaved\n")


async def test_a_trap_on_exit_runs_whatever_happens(control, state, tmp_path):
    (tmp_path / "saves.sh").write_text(SAVES)
    after = "trap 'echo $? before; sleep 0.1; echo copied' EXIT\n"

    def here(task):
        task.spec.working_directory = str(tmp_path)

    async with agent(control, state):
        for number, script in enumerate(("echo well", "false\necho never", "bash saves.sh")):
            control.tasks.want(named(number, after + script, grace_s=5.0, edit=here))
        for number in (0, 1):
            await until(ended(control, f"j{number}-1-0"))
        await until((tmp_path / "ready").exists)
        control.tasks.unwant("j2-1-0")
        await until(lambda: "KILLED" in control.tasks.phases("j2-1-0"))
    assert output(state, "j0-1-0") == "well\n0 before\ncopied\n"
    assert output(state, "j1-1-0") == "1 before\ncopied\n"
    assert output(state, "j2-1-0").endswith("saving\nsaved\n143 before\ncopied\n")
    assert [control.tasks.last(f"j{number}-1-0").exit_code for number in (0, 1)] == [0, 1]


@pytest.mark.parametrize("script", ["true\nbash saves.sh\necho never", "bash saves.sh &\nwait"])
async def test_a_script_whose_init_signals_it_alone_tells_what_it_runs(tmp_path, script):
    (tmp_path / "saves.sh").write_text(SAVES)
    child = await asyncio.create_subprocess_exec(
        *under_init(passes_signals_on(as_command(script))),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    await until((tmp_path / "ready").exists)
    child.terminate()
    said, _ = await child.communicate()
    assert (child.returncode, said) == (143, b"saving\nsaved\n")


def with_setup(script, *, once=False, folder=None):
    def edit(task):
        task.spec.setup.extend(as_command(script))
        task.spec.launch_once = once
        if folder is not None:
            task.spec.working_directory = str(folder)

    return edit


async def test_setup_runs_once_before_the_ranks_and_is_seen(control, state):
    async with agent(control, state):
        task = desired(
            as_command("cat made; echo rank $RANK"),
            gpus=(0, 1),
            edit=with_setup("echo made > made; echo making $MASTER_ADDR"),
        )
        control.tasks.want(task)
        await until(ended(control, "train-1-0"))
    assert control.tasks.last("train-1-0").exit_code == 0, control.tasks.last("train-1-0").message
    phases = control.tasks.phases("train-1-0")
    assert phases.index("SETTING_UP") < phases.index("STARTING") < phases.index("RUNNING")
    lines = output(state).splitlines()
    assert lines[0] == "whaleflux: setup on sites/lab/nodes/n1"
    assert lines[1].startswith("making 127.")
    assert lines[2].startswith("whaleflux: setup ended well after ")
    assert lines[3:] == ["made", "rank 0"]
    assert output(state, rank=1) == "made\nrank 1\n"


async def test_a_setup_that_fails_is_a_failure_of_the_work(control, state):
    async with agent(control, state):
        control.tasks.want(desired(as_command("echo never"), edit=with_setup("echo no wheel found >&2; exit 3")))
        await until(ended(control, "train-1-0"))
        last = control.tasks.last("train-1-0")
        assert (last.exit_code, control.tasks.phases("train-1-0")[-1]) == (3, "EXITED")
        assert "setup on sites/lab/nodes/n1 ended with exit code 3" in last.message
        assert "no wheel found" in last.message
    assert "never" not in output(state)


async def test_a_setup_is_ended_with_the_task_and_gets_its_grace(control, state, tmp_path):
    (tmp_path / "saves.sh").write_text(SAVES)
    async with agent(control, state):
        edit = with_setup("bash saves.sh", folder=tmp_path)
        control.tasks.want(desired(as_command("echo never"), grace_s=5.0, edit=edit))
        await until((tmp_path / "ready").exists)
        control.tasks.unwant("train-1-0")
        await until(lambda: "KILLED" in control.tasks.phases("train-1-0"))
    assert "saved\n" in output(state)
    assert "never" not in output(state)


async def test_a_setup_outlives_its_agent_and_runs_once(control, state, tmp_path):
    script = "echo one >> runs; touch ready; while [ ! -e go ]; do sleep 0.02; done"
    wanted = desired(as_command("cat runs"), edit=with_setup(script, folder=tmp_path))
    async with agent_process(control, state) as child:
        control.tasks.want(wanted)
        await until((tmp_path / "ready").exists)
        await kill(child)
    (tmp_path / "go").touch()
    await asyncio.sleep(0)
    async with agent_process(control, state):
        await until(ended(control, "train-1-0"))
    assert control.tasks.last("train-1-0").exit_code == 0, control.tasks.last("train-1-0").message
    assert output(state).endswith("\none\n")


SHOW = "import os; print(sorted(k for k in os.environ if k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')), os.environ['PET_NPROC_PER_NODE'], os.environ['WHALEFLUX_GPUS_PER_NODE'])"


async def test_launched_once_a_command_has_the_node_to_itself(control, state):
    def once(task):
        task.spec.launch_once = True

    async with agent(control, state):
        control.tasks.want(desired([sys.executable, "-c", SHOW], gpus=(0, 1, 2), edit=once))
        await until(ended(control, "train-1-0"))
    assert control.tasks.last("train-1-0").exit_code == 0
    assert output(state) == "[] 3 3\n"
    assert not (state / "tasks" / "train-1-0" / "rank-1.log").exists()


async def test_a_script_on_a_node_without_bash_is_refused_for_good(control, state, monkeypatch, tmp_path):
    def poor(task):
        task.spec.environment["PATH"] = str(tmp_path)

    async with agent(control, state):
        control.tasks.want(desired(as_command("echo a"), edit=poor))
        await until(ended(control, "train-1-0"))
    last = control.tasks.last("train-1-0")
    assert control.tasks.phases("train-1-0")[-1] == "REFUSED"
    assert last.unfit
    assert "no bash" in last.message
