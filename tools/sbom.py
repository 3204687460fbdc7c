"""A bill of materials of each image, from its lock: `make sbom` writes deploy/docker/sbom, and each image carries its own.

CycloneDX 1.6 as JSON; the same lock makes the same bytes. It lists what WhaleFlux installs, with licences and with what asked for
what. The operating system's packages and Python itself come with the base image, whose maker has a list of them.
"""

from __future__ import annotations

import json
import tomllib
import uuid
from hashlib import sha256
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from tools import locks

SBOMS = locks.ROOT / "deploy" / "docker" / "sbom"
_LICENCES = LicenseFactory()


def sbom_file(image: str) -> Path:
    return SBOMS / f"{image}.cdx.json"


def sbom(image: str) -> str:
    """The bill of materials of one image, as text of its file."""
    lock = locks.lock_file(image).read_text()
    known = json.loads(locks.LICENCES.read_text())
    pins = list(locks.read(lock))
    parts = {pin.name: _component(pin, known.get(pin.name, "")) for pin in pins}
    own = _whaleflux(image, lock)
    bom = Bom(components=parts.values(), serial_number=uuid.uuid5(uuid.NAMESPACE_OID, f"{own.name} {lock}"))
    bom.metadata.component = own
    for pin in pins:
        for asking in pin.asked_by:
            bom.register_dependency(parts.get(asking, own), [parts[pin.name]])
    made = json.loads(JsonV1Dot6(bom).output_as_string())
    made["metadata"].pop("timestamp")  # else no two would be alike
    return json.dumps(made, indent=1, sort_keys=True) + "\n"


def _component(pin: locks.Pin, licence: str) -> Component:
    url = PackageURL("pypi", name=pin.name, version=pin.version)
    licences = [_LICENCES.make_from_string(licence)] if licence else []
    kind = ComponentType.LIBRARY
    return Component(name=pin.name, version=pin.version, type=kind, purl=url, bom_ref=str(url), licenses=licences)


def _whaleflux(image: str, lock: str) -> Component:
    """The image itself."""
    project = tomllib.loads((locks.ROOT / "pyproject.toml").read_text())["project"]
    return Component(
        name=f"whaleflux/{locks.extra_of(image)}",
        version=project["version"],
        type=ComponentType.CONTAINER,
        bom_ref="image",
        properties=[Property(name="whaleflux:lock:sha256", value=sha256(lock.encode()).hexdigest())],
    )


def main() -> None:
    """Writes the bill of materials of every image."""
    SBOMS.mkdir(parents=True, exist_ok=True)
    for image in locks.IMAGES:
        sbom_file(image).write_text(sbom(image))
        print(f"{sbom_file(image).relative_to(locks.ROOT)}: {len(locks.pins(image))} packages")


if __name__ == "__main__":
    main()
