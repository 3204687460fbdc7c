"""A Ray program whose tasks come one after another, none of which is tried again: run by an interpreter that has Ray, told to stop by the end of its input.

    python ray_drain_program.py HOST:PORT SEED

Prints `{"done": tasks that ended well, "failed": {what was raised: how often}}`. Gaps between tasks are drawn so that nodes fall idle and get work again at all times.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from typing import Any

RUN_S, GAP_S, MOST_WAITING = (0.05, 2.0), (0.0, 2.0), 12


def main() -> int:
    import ray

    address, seed = sys.argv[1], int(sys.argv[2])
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")

    work, over = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(slept), threading.Event()
    threading.Thread(target=heard_the_end, args=(over,), daemon=True).start()
    draw, waiting, said = random.Random(seed), list[Any](), Counter[str]()
    print("ready", flush=True)
    while not over.is_set() or waiting:
        if not over.is_set() and len(waiting) < MOST_WAITING:
            waiting.append(work.remote(draw.uniform(*RUN_S)))
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.05) if waiting else ([], [])
        said.update(ended(ray, one) for one in done)
        time.sleep(draw.uniform(*GAP_S) if not over.is_set() else 0.2)
    print(json.dumps({"done": said.pop("", 0), "failed": said}), flush=True)
    return 0


def slept(seconds: float) -> int:
    time.sleep(seconds)
    return 1


def heard_the_end(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()


def ended(ray: Any, one: Any) -> str:
    """Empty: well."""
    try:
        ray.get(one, timeout=60)
    except Exception as error:
        return type(error).__name__
    return ""


if __name__ == "__main__":
    sys.exit(main())
