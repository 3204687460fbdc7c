"""`python -m whaleflux_scheduler.simulation`: what `whaleflux simulate` runs. Exit codes: 0 done, 2 wrong input."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from whaleflux.errors import InvalidArgument
from whaleflux_scheduler.simulation.scenario import Scenario, run_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulates what the arguments say and prints what came of it."""
    options = _parser().parse_args(arguments)
    try:
        text = run_all(_scenario(options))
    except InvalidArgument as wrong:
        if options.json:
            print(
                json.dumps({"violations": [{"field": v.field, "description": v.description} for v in wrong.violations]})
            )
        for violation in wrong.violations:
            print(f"error: {violation.field}: {violation.description}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="whaleflux simulate", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--load", type=float)
    parser.add_argument("--first", type=int)
    parser.add_argument("--estimates", default="")
    parser.add_argument("--fleet", type=Path)
    parser.add_argument("--assume", default="4 h")
    parser.add_argument("--until", default="")
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--picture", "--gantt", type=Path)
    parser.add_argument("--moves", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser


def _scenario(options: argparse.Namespace) -> Scenario:
    return Scenario(**vars(options))


if __name__ == "__main__":
    sys.exit(main())
