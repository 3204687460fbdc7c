"""Work beside the training, in a thread that has ended before the interpreter does.

Python ends a thread that asks for the interpreter while that is being taken down (pthread_exit). When the thread is in torch's
C++ then, if only to free a tensor, the whole process aborts: "terminate called without an active exception", exit code 134.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

EXIT_PATIENCE_S = 10.0  # a program that ends in the midst of a save, by an error for instance
_STOPPED_WITHIN_S = 2.0


class Background(threading.Thread):
    """Runs `work` at once. Storage may hang for ever: the process ends all the same, EXIT_PATIENCE_S and a little later."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work, self._hangs = work, False
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            del self._work  # a state is freed before the thread counts as gone

    def result(self, timeout_s: float) -> None:
        """Returns when the work is done and its thread is gone. Raises what the work raised; TimeoutError when it goes on."""
        self.join(max(0.0, timeout_s))
        if self.is_alive():
            self._hangs = True
            raise TimeoutError(f"{self.name} goes on after {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    def wait_at_exit(self) -> None:
        """A program that ends waits for the work, but not again for what it has waited for in vain."""
        if self.is_alive() and not self._hangs:
            log.warning("the program ends while %s is at work, which gets %g s", self.name, EXIT_PATIENCE_S)
            self.join(EXIT_PATIENCE_S)

    def stop(self) -> None:
        """Raises SystemExit in the thread, between two steps of its Python code; what hangs in the system does not notice."""
        if self.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(SystemExit))


@atexit.register
def _leave_none() -> None:
    """Before the interpreter is taken down."""
    running = [thread for thread in threading.enumerate() if isinstance(thread, Background)]
    for thread in running:
        thread.wait_at_exit()
    for thread in running:
        thread.stop()
    end_s = time.monotonic() + _STOPPED_WITHIN_S
    for thread in running:
        thread.join(max(0.0, end_s - time.monotonic()))
