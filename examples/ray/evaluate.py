"""An ordinary Ray program: so many evaluations, each of which wants a whole H200. It knows nothing of WhaleFlux.

RAY_ADDRESS=... python examples/ray/evaluate.py --tasks 4 --seconds 8
"""

from __future__ import annotations

import argparse
import time

import ray


@ray.remote(num_cpus=0, num_gpus=1, accelerator_type="H200")
def evaluate(number: int, seconds: float) -> tuple[int, str]:
    """What stands for an evaluation: it holds its GPU for a while, and says on which node."""
    time.sleep(seconds)
    return number, ray.get_runtime_context().get_node_id()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0)
    asked = parser.parse_args()
    ray.init(log_to_driver=False, logging_level="ERROR")
    print("queued", flush=True)
    done = ray.get([evaluate.remote(number, asked.seconds) for number in range(asked.tasks)])
    print(f"evaluated {len(done)} on {len({node for _, node in done})} node(s)", flush=True)


if __name__ == "__main__":
    main()
