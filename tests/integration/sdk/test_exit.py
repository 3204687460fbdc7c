"""A training program ends as it meant to, whatever its checkpointer is in the midst of: by its own exit code, not by SIGABRT."""

import os
import subprocess
import sys

import pytest

from tests.support.fake_agent import FakeAgent

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
pytest.importorskip("torch")

HEAD = """
import logging, os, threading, time
import torch
from whaleflux.sdk import Checkpointer, background
logging.basicConfig()
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
saved = Checkpointer(model=model, optimizer=optimizer, location="checkpoints", save_timeout_s=60)
"""
FAILS = """
real, entered = os.fsync, threading.Event()
def slow(descriptor):
    entered.set()
    time.sleep(0.1)
    real(descriptor)
os.fsync = slow
with saved:
    saved.step = 7
    saved.save_async()
    entered.wait()
    raise ValueError("of the training")
"""
# As a save that takes long: at work in torch when the program has to end.
GOES_ON = """
background.EXIT_PATIENCE_S, entered = 0.1, threading.Event()
def busy(descriptor):
    while True:
        kept = [torch.ones(1) for _ in range(1000)]
        entered.set()
os.fsync = busy
with saved:
    saved.save_async()
    entered.wait()
    raise ValueError("of the training")
"""


def ended(folder, script):
    """Exit code and standard error of a program."""
    program = [sys.executable, "-c", HEAD + script]
    found = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False, timeout=200)
    return found.returncode, found.stderr


def finished(folder):
    return sorted(path.parent.name for path in folder.glob("checkpoints/*/pieces-0.json"))


def test_a_program_that_fails_in_the_midst_of_a_save_finishes_it_and_ends_by_its_own_error(tmp_path):
    code, said = ended(tmp_path, FAILS)
    assert code == 1, said
    assert "ValueError: of the training" in said
    assert "the program ends while whaleflux-save is at work" in said
    assert [name.partition("-")[0] for name in finished(tmp_path)] == ["s000000000007"]


def test_a_save_that_goes_on_for_ever_is_stopped_and_leaves_no_checkpoint(tmp_path):
    code, said = ended(tmp_path, GOES_ON)
    assert code == 1, said
    assert "ValueError: of the training" in said
    assert finished(tmp_path) == []


def test_the_last_step_is_told_of_by_a_program_that_closes_nothing(tmp_path):
    script = """
import os
from whaleflux.sdk.agent_keeper import AgentKeeper
keeper = AgentKeeper(os.environ["WHALEFLUX_AGENT_SOCKET"], "token")
keeper.progress(0, 7, lambda: float(sum(range(10**7))))  # one that takes a while, as from a GPU that is at work
"""
    with FakeAgent(tmp_path) as agent:
        subprocess.run([sys.executable, "-c", script], env={**os.environ, **agent.environment}, check=True, timeout=100)
    assert [report.step for report in agent.named("report_progress")] == [7]
