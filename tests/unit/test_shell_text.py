"""Scripts in `run`: what command line they become, what a rank's shell owes its children, which launchers stand in them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.manifests.launchers import find_launcher
from whaleflux.manifests.shell_text import (
    as_command,
    is_one_program,
    mistake,
    one_after_the_other,
    passes_signals_on,
    script_of,
    simple_commands,
)


def test_a_script_is_bash_and_its_text_comes_back():
    command = as_command("cd x\npython train.py\n\n")
    assert command == ["bash", "-euo", "pipefail", "-c", "cd x\npython train.py"]
    assert script_of(command) == "cd x\npython train.py"
    assert script_of(["bash", "-c", "x"]) is None


@pytest.mark.parametrize(
    "script", ["python train.py --x 'a b'", "A=1 python x > out 2>&1", "python x \\\n  --y", "torchrun x # why"]
)
def test_bash_becomes_the_one_program_of_a_script(script):
    assert is_one_program(script)
    assert passes_signals_on(as_command(script)) == tuple(as_command(script))


@pytest.mark.parametrize(
    "script", ["a && b", "a; b", "a\nb", "a | b", "(a)", "source x", "if a; then b; fi", "a &", "exec a", "A=1"]
)
def test_other_scripts_wait_for_what_they_have_started(script):
    assert passes_signals_on(as_command(script))[-1] == f"trap 'wait; exit 143' TERM; {script}"


def test_words_are_left_as_they_are():
    assert passes_signals_on(["python", "x.py"]) == ("python", "x.py")


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("", "no command"),
        ("# nothing\n", "no command"),
        ("echo 'a", "single quote"),
        ('python "', "double quote"),
        ("x=$(date", "is not closed"),
        ("#!/usr/bin/env python3\nprint(1)", "another language"),
        ("#!/bin/bash -l\nx", "'-l'"),
    ],
)
def test_what_cannot_be_a_bash_script_is_named(script, word):
    assert word in mistake(script)


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/bash\nx", "#!/usr/bin/env bash\nx", "#!/bin/sh\nx", 'echo "it\'s"', "cat <<E\n'\nE\nx", "echo $'it\\'s'; x",
        "echo `echo \\`date\\``; x", "echo \"${a:-it's}\"; x", "[[ $a =~ ^[\"']$ ]]; x", "echo $(cat <<E\nit's\nE\n); x",
        "grep='${G-'\\''grep'\\''}'; x",
    ],
)  # fmt: skip
def test_what_may_be_one_passes(script):
    assert mistake(script) == ""


TORCHRUN = [
    "torchrun train.py", "cd x && exec torchrun x", "A=1 B='2 3' torchrun x", "/opt/venv/bin/torchrun x", "$(which torchrun) x",
    "uv run --with torch torchrun x", "poetry run torchrun x", "conda run -n e --no-capture-output torchrun x", "time torchrun x",
    "env -u X A=1 torchrun x", "timeout -k 5 10 torchrun x", "nohup torchrun x &", "if true; then torchrun x; fi",
    "for i in 1 2; do\n  torchrun x\ndone", "f() { torchrun x; }\nf", "case $A in\n a) torchrun x;;\nesac", "bash -lc 'torchrun x'",
    "L='torchrun --nnodes 2'\n$L x.py", "export L=torchrun\n${L} x.py", 'eval "torchrun x"', "out=$(torchrun x)", 'echo "`torchrun x`"',
    "diff <(torchrun x) y", "torchrun \\\n  --nnodes 2 x", "source a; torchrun x | tee log", "nsys profile -o f torchrun x",
    "numactl -N 0 torchrun x",
]  # fmt: skip


@pytest.mark.parametrize("script", TORCHRUN)
def test_a_launcher_is_found_where_it_is_started(script):
    found = find_launcher(as_command(script))
    assert found is not None
    assert (found.name, found.meets) == ("torchrun", True)


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("python -u -X dev -m torch.distributed.run x", "python -m torch.distributed.run"),
        ("python3.11 -m torch.distributed.launch x", "python -m torch.distributed.launch"),
        ("accelerate launch x", "accelerate launch"),
        ("deepspeed x", "deepspeed"),
        ("mpirun.openmpi -np 4 x", "mpirun"),
        ("srun -n 4 x", "srun"),
        ("horovodrun -np 4 x", "horovodrun"),
    ],
)
def test_all_of_them_are_known(script, name):
    assert find_launcher(as_command(script)).name == name
    assert find_launcher(script.split()).name == name


@pytest.mark.parametrize(
    "script",
    ["python train.py --launcher torchrun", "echo torchrun x", "pip install torchrun # torchrun x", "cat > run.sh <<'E'\ntorchrun x\nE",
     "which torchrun", "accelerate config", "python -m torch.utils.collect_env", "grep torchrun x | tee torchrun", "python mpirun",
     "bash torchrun.sh", "A='torchrun x' python y", "command -v torchrun && python x", "torchrun --version; python x",
     "deepspeed --help", "case $A in\n deepspeed) python y;;\n *) python x;;\nesac"],
)  # fmt: skip
def test_a_launcher_that_is_only_named_is_none(script):
    assert find_launcher(as_command(script)) is None


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_can_be_read(text):
    mistake(text)
    is_one_program(text)
    for words in simple_commands(as_command(text)):
        assert all(isinstance(word, str) for word in words)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab$`(){}'\"\\<>|&;#\n =", max_size=60))
def test_any_shell_like_text_can_be_read(text):
    mistake(text)
    simple_commands(as_command(text))


def test_setup_and_run_in_one_container():
    script = script_of(one_after_the_other(as_command("pip install x"), ["python", "a b.py"]))
    assert script.endswith("\npython 'a b.py'")
    assert ["pip", "install", "x"] in simple_commands(as_command(script))
