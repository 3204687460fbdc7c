"""What goes into images: locked by hash, listed with licences, and checked for known vulnerabilities, offline too."""

import dataclasses
import importlib.util
import json
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import advisories, audit_deps, locks

DOCKER = locks.ROOT / "deploy" / "docker"
PROJECT = tomllib.loads((locks.ROOT / "pyproject.toml").read_text())["project"]


def asked_for(extra):
    """What pyproject.toml names for an image: its extra, the extras in it, and what all need."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for line in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(line)
        inner = requirement.extras if requirement.name == "whaleflux" else ()
        found += [each for name in inner for each in asked_for(name)] if inner else [requirement]
    return found


@pytest.mark.parametrize("image", [*locks.IMAGES, locks.BUILD])
class TestLock:
    def test_every_file_has_a_hash_and_every_package_one_version(self, image):
        pins = locks.pins(image)
        assert len(pins) > 10
        assert len({pin.name for pin in pins}) == len(pins)
        assert all(pin.hashes for pin in pins)
        text = locks.lock_file(image).read_text()
        assert "//" not in text  # an index of somebody's own
        assert "@ file" not in text

    def test_it_fits_what_is_asked_for(self, image):
        build = tomllib.loads((locks.ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
        of_image = [one for extra in locks.extras_of(image) if image != locks.BUILD for one in asked_for(extra)]
        asked = [Requirement(line) for line in build] if image == locks.BUILD else of_image
        versions = {pin.name: pin.version for pin in locks.pins(image)}
        for requirement in asked:
            found = versions.get(canonicalize_name(requirement.name))
            assert found, f"{requirement} is not in the lock of {image}; run: make locks"
            assert requirement.specifier.contains(found), f"{requirement}: locked {found}; run: make locks"

    def test_every_package_is_there_for_a_reason(self, image):
        names = {"whaleflux", *(pin.name for pin in locks.pins(image))}
        assert all(pin.asked_by for pin in locks.pins(image))
        assert all(by in names or image == locks.BUILD for pin in locks.pins(image) for by in pin.asked_by)


def test_images_that_share_a_package_share_its_version():
    assert len({pin.name for pin in audit_deps.all_pins()}) == len(audit_deps.all_pins())


def test_every_licence_is_known():
    known = json.loads(locks.LICENCES.read_text())
    assert {pin.name for pin in audit_deps.all_pins()} == set(known)
    assert [name for name, licence in known.items() if not licence] == []


@pytest.fixture(scope="module")
def tool():
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed: run make setup")
    from tools import sbom

    return sbom


class TestSbom:
    @pytest.mark.parametrize("image", locks.IMAGES)
    def test_it_is_what_the_lock_makes(self, tool, image):
        assert tool.sbom_file(image).read_text() == tool.sbom(image), "run: make sbom"

    def test_it_is_valid_and_lists_versions_licences_and_reasons(self, tool):
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        text = tool.sbom_file("scheduler").read_text()
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        bill = json.loads(text)
        parts = {part["name"]: part for part in bill["components"]}
        assert {name: part["version"] for name, part in parts.items()} == {
            pin.name: pin.version for pin in locks.pins("scheduler")
        }
        assert all(part["licenses"] for part in parts.values())
        needs = {entry["ref"]: entry.get("dependsOn", []) for entry in bill["dependencies"]}
        assert parts["pydantic-core"]["purl"] in needs[parts["pydantic"]["purl"]]
        assert parts["numpy"]["purl"] in needs["image"]

    def test_what_an_environment_holds_beside_it_is_told(self):
        spec = importlib.util.spec_from_file_location("verify_sbom", DOCKER / "verify_sbom.py")
        verify = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(verify)
        bill = {"components": [{"name": "a", "version": "1"}, {"name": "b", "version": "1"}]}
        assert verify.differences(bill, {"a": "1", "b": "1"}) == []
        told = verify.differences(bill, {"a": "2", "c": "1"})
        assert [line.partition(":")[0] for line in told] == ["a", "b", "c"]


def record(package, *, versions=(), events=()):
    ranges = [{"type": "ECOSYSTEM", "events": list(events)}] if events else []
    affected = [{"package": {"name": package, "ecosystem": "PyPI"}, "versions": list(versions), "ranges": ranges}]
    return {"id": f"TEST-{package}", "schema_version": "1.4.0", "summary": "bad", "affected": affected}


class TestAdvisories:
    @pytest.mark.parametrize(
        ("events", "version", "affected"),
        [
            ([{"introduced": "0"}, {"fixed": "2.0"}], "1.9", True),
            ([{"introduced": "0"}, {"fixed": "2.0"}], "2.0", False),
            ([{"introduced": "0"}, {"fixed": "2.0"}], "2.0rc1", True),
            ([{"introduced": "1"}, {"last_affected": "1.5"}], "1.5", True),
            ([{"introduced": "1"}, {"last_affected": "1.5"}], "1.6", False),
            ([{"introduced": "1"}, {"last_affected": "1.5"}], "0.9", False),
            ([{"introduced": "3"}, {"fixed": "3.1"}, {"introduced": "0"}, {"fixed": "1"}], "3.0.5", True),
            ([{"introduced": "3"}, {"fixed": "3.1"}, {"introduced": "0"}, {"fixed": "1"}], "2", False),
        ],
    )
    def test_ranges_are_read_as_osv_says(self, events, version, affected):
        known = advisories.Advisories(iter([record("Py_YAML", events=events)]))
        assert bool(known.of("py-yaml", version)) is affected

    def test_a_list_of_versions_counts_too(self):
        known = advisories.Advisories(iter([record("a", versions=["1.0"])]))
        assert (bool(known.of("a", "1.0.0")), bool(known.of("a", "1.1")), bool(known.of("b", "1.0"))) == (
            True,
            False,
            False,
        )

    def test_what_holds_no_advisories_is_refused(self, tmp_path):
        for wrong in (tmp_path / "nowhere", tmp_path):
            with pytest.raises(ValueError, match="OSV records"):
                advisories.load(wrong)


class TestAudit:
    """The real pip-audit, against a folder of advisories."""

    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("pip_audit", reason="pip-audit is not installed: run make setup")

    def test_a_pin_that_is_known_to_be_bad_fails_and_good_ones_pass(self, tmp_path):
        good = next(pin for pin in audit_deps.all_pins() if pin.name == "pyyaml")
        bad = dataclasses.replace(good, version="5.3")
        made = record("PyYAML", events=[{"introduced": "0"}, {"fixed": "5.4"}])
        (tmp_path / "record.json").write_text(json.dumps(made))
        code, words = audit_deps.audit([bad], tmp_path)
        assert code == 1
        assert "pyyaml 5.3: TEST-PyYAML" in words
        assert "fixed in 5.4" in words
        assert audit_deps.audit([good], tmp_path)[0] == 0
        assert audit_deps.audit([bad], tmp_path, "--ignore-vuln=TEST-PyYAML")[0] == 0

    def test_what_nobody_checked_is_said_and_fails_nothing(self, monkeypatch):
        for scheme in (
            "http",
            "https",
        ):  # a proxy that is not there: no advisory database, whatever network this machine has
            monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
        code, words = audit_deps.audit(audit_deps.all_pins(), None)
        assert code == 0
        assert words.startswith("not checked: no advisory database")
