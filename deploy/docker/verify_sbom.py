"""Whether a Python environment holds exactly what its bill of materials says.

Every image carries this file:

    docker run --rm --entrypoint python whaleflux/scheduler:dev /opt/whaleflux/share/verify_sbom.py

Exit code 0 when it does; 1 with a line for each difference. Needs nothing but Python.
"""

import json
import re
import sys
from importlib import metadata
from pathlib import Path

OURS = "whaleflux"  # the image itself, in the bill's metadata


def differences(bill: dict, installed: dict[str, str]) -> list[str]:
    """What differs, in words."""
    said = {part["name"]: part["version"] for part in bill["components"]}
    names = sorted(said.keys() | installed.keys())
    lines = [(name, said.get(name), installed.get(name)) for name in names if said.get(name) != installed.get(name)]
    return [f"{name}: the bill says {bill or 'nothing'}, here is {here or 'nothing'}" for name, bill, here in lines]


def installed_here() -> dict[str, str]:
    """Name -> version of everything that this environment holds, WhaleFlux itself left out."""
    found = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in metadata.distributions()}
    return {name: version for name, version in found.items() if name != OURS}


def main() -> None:
    """Compares with the file given, or with the one beside this."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("sbom.cdx.json")
    found = differences(json.loads(file.read_text()), installed_here())
    print("\n".join(found) or f"{file}: exactly what is installed, {len(installed_here())} packages")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
