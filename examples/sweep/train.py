"""One point of a sweep: stochastic gradient descent on a made-up regression, in plain Python. Prints its last loss as JSON."""

import argparse
import json
import os
import random

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, required=True)
parser.add_argument("--seed", type=int, required=True)
point = parser.parse_args()
random.seed(point.seed)
truth = [random.uniform(-1, 1) for _ in range(8)]
weights, loss = [0.0] * len(truth), 0.0
for _ in range(2_000):
    x = [random.gauss(0, 1) for _ in truth]
    error = sum((w - t) * v for w, t, v in zip(weights, truth, x, strict=True))
    weights = [w - point.lr * error * v for w, v in zip(weights, x, strict=True)]
    loss = 0.99 * loss + 0.01 * error * error
print(json.dumps({"index": int(os.environ["WHALEFLUX_ARRAY_INDEX"]), **vars(point), "loss": loss}))
