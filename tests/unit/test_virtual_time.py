"""The tests' own loop: its time does not jump past what a thread is about to bring."""

import threading
from concurrent.futures import ThreadPoolExecutor

from tests.support.virtual_time import VirtualTimeLoop


def test_time_does_not_jump_past_a_thread_that_ends_while_the_loop_looks():
    loop, may_end = VirtualTimeLoop(), threading.Event()
    with ThreadPoolExecutor(1) as thread:
        work = loop.run_in_executor(thread, may_end.wait)

        def looked_too_early(timeout_s):
            may_end.set()
            thread.submit(int).result()  # the one thread is past `work` and what follows it
            return []

        began_s = loop.time()
        assert loop.wait(10.0, looked_too_early) == []
        assert loop.time() - began_s < 5.0
        assert loop.run_until_complete(work)
    loop.close()
