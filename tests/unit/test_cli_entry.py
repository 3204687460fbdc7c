"""The program's first moments: Ctrl-C while it is imported, and an output that takes nothing."""

from whaleflux.cli import next_step


def test_what_the_system_refuses_is_named():
    assert next_step.of_the_system(FileNotFoundError(2, "No such file or directory", "/x")) == (
        "/x: No such file or directory; name another file or folder"
    )
    assert next_step.of_the_system(OSError(28, "No space left on device")) == (
        "cannot write the output: No space left on device"
    )
