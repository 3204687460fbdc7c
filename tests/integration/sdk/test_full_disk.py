"""The checkpointer on a file system that is really full."""

import contextlib
import subprocess

import pytest
import torch
from torch import nn

from whaleflux.sdk import Checkpointer, SaveFailed

pytestmark = pytest.mark.integration


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for a few checkpoints; skipped where nothing may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


def fill(folder):
    file = folder / "filler"
    with file.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while True:
            opened.write(b"\0" * 4096)
    return file


def checkpointer(folder, **more):
    torch.manual_seed(1)
    model = nn.Linear(300, 300)  # 0.4 MB of weights, 1.1 MB with Adam's state
    optimizer = torch.optim.Adam(model.parameters())
    return model, optimizer, Checkpointer(model=model, optimizer=optimizer, location=folder, **more)


def test_training_goes_on_through_a_full_disk_and_saves_again_when_there_is_room(small_disk):
    model, optimizer, made = checkpointer(small_disk / "checkpoints", every=1)
    errors, filler, wrote = [], None, 0
    with made as saved:
        for step, _ in saved.steps(lambda step: step, total=12):
            optimizer.zero_grad()
            model(torch.ones(1, 300)).sum().backward()
            optimizer.step()
            if step == 3:  # three are kept: there is nothing older to make room
                saved.wait()
                filler = fill(small_disk)
            if step == 6:
                filler.unlink()
            wrote = step + 1
            errors.append(str(saved.last_error or ""))
        digest = saved.digest()
    assert wrote == 12
    assert any("No space left" in error or "file write failed" in error for error in errors), errors
    again = checkpointer(small_disk / "checkpoints")[2]
    assert again.restore() == 12
    assert again.digest() == digest


def test_a_disk_that_stays_full_keeps_the_last_checkpoint_whole(small_disk):
    model, optimizer, made = checkpointer(small_disk / "checkpoints", every=1)
    with pytest.raises(SaveFailed), made as saved:
        for step, _ in saved.steps(lambda step: step, total=6):
            if step == 3:
                saved.wait()
                digest = saved.digest()
                fill(small_disk)
            optimizer.zero_grad()
            model(torch.ones(1, 300)).sum().backward()
            optimizer.step()
    again = checkpointer(small_disk / "checkpoints")[2]
    assert again.restore() == 3
    assert again.digest() == digest
