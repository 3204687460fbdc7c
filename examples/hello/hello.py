"""Says where it runs and counts for some seconds: what a job sees of WhaleFlux, without any library."""

import os
import time

STEPS = 5


def main() -> None:
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or "none that a program could see: it is simulated"
    print(f"hello from rank {rank} of {world} on {os.environ['WHALEFLUX_NODE']}")
    print(f"my GPU: {gpus}")
    for step in range(1, STEPS + 1):
        print(f"step {step} of {STEPS}")
        time.sleep(0.5)
    print("done")


if __name__ == "__main__":
    main()
