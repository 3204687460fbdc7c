"""One image, built and run as deployments run it: confined, without a shell, with exactly what its bill of materials says.

Needs a container engine and, there, the base image: python:3.11-slim, or the one that WHALEFLUX_TEST_BASE names.
"""

import json
import os
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from whaleflux import bootstrap

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
BASE = os.environ.get("WHALEFLUX_TEST_BASE", "python:3.11-slim")
IMAGE = "whaleflux-test/inventory"
CONFINED = ["--read-only", "--user=10001:10001", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
CONFINED += ["--network=none", "--tmpfs=/tmp:size=64m,mode=1777", "--memory=384m", "--pids-limit=512"]
LOOK = """
import json, os, stat
found = {"shells": [], "special": [], "uid": os.getuid()}
for folder, inner, files in os.walk("/"):
    inner[:] = [] if folder in ("/proc", "/sys", "/dev") else inner
    for path in (os.path.join(folder, name) for name in files):
        mode = os.lstat(path).st_mode
        if os.path.basename(path) in ("sh", "bash", "dash", "busybox", "apt", "dpkg", "pip"): found["shells"].append(path)
        if stat.S_ISREG(mode) and mode & 0o6000: found["special"].append(path)
print(json.dumps(found))
"""


def docker(*arguments, check=True, timeout=120):
    made = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=timeout)
    assert not check or made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return made


@pytest.fixture(scope="module")
def image():
    try:
        here = docker("image", "inspect", BASE, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        pytest.skip("no docker command here: images are checked as files only, by tests/unit/test_deploy_images.py")
    if here.returncode != 0:
        pytest.skip(f"no container engine here, or it has no image {BASE}: images are checked as files only")
    told = ["--network=host", f"--build-arg=BASE={BASE}", "--build-arg=ROLE=inventory", f"--tag={IMAGE}"]
    docker("build", "-q", "-f", str(ROOT / "deploy" / "docker" / "Dockerfile"), *told, str(ROOT), timeout=800)
    yield IMAGE
    docker("image", "rm", IMAGE, check=False)


def test_it_holds_what_its_bill_says_and_nothing_to_work_with(image):
    run = ["run", "--rm", *CONFINED, "--entrypoint=python", image]
    assert "exactly what is installed" in docker(*run, "/opt/whaleflux/share/verify_sbom.py").stdout
    assert json.loads(docker(*run, "-c", LOOK).stdout) == {"shells": [], "special": [], "uid": 10001}


def test_a_service_becomes_healthy_confined_and_stops_when_asked(image, tmp_path):
    bootstrap.write_identities(tmp_path, datetime.now(UTC), hosts=["localhost"], life=timedelta(days=1))
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.chown(path, 10001, 10001)
    settings = {
        "STORE": "memory://",
        "NATS": "memory://",
        "LISTEN": "127.0.0.1:7000",
        "METRICS_LISTEN": "127.0.0.1:9000",
    }
    settings |= {"TLS_CERT": "/identity/service.crt", "TLS_KEY": "/identity/service.key", "TLS_CA": "/identity/ca.crt"}
    told = [part for name, value in settings.items() for part in ("-e", f"WHALEFLUX_{name}={value}")]
    mount = f"--volume={tmp_path / 'inventory'}:/identity:ro"
    name = docker("run", "-d", "--health-interval=1s", *CONFINED, mount, *told, image).stdout.strip()
    try:
        deadline, state = time.monotonic() + 60, {}
        while time.monotonic() < deadline and state.get("Health", {}).get("Status") != "healthy":
            state = json.loads(docker("inspect", "--format={{json .State}}", name).stdout)
            assert state["Running"], docker("logs", name, check=False).stderr
            time.sleep(0.2)
        assert state["Health"]["Status"] == "healthy", state
        docker("stop", "--time=20", name)
        assert json.loads(docker("inspect", "--format={{json .State}}", name).stdout)["ExitCode"] == 0
    finally:
        docker("rm", "-f", name, check=False)
