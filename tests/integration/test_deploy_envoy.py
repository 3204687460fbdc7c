"""deploy/envoy under the real Envoy: it is accepted, and a renewed certificate is shown without a restart."""

import asyncio
import json
import socket
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from whaleflux import bootstrap
from whaleflux.embedded import envoy
from whaleflux.errors import Unavailable

pytestmark = pytest.mark.integration
DEPLOY = Path(__file__).parents[2] / "deploy" / "envoy"


def program():
    try:
        return envoy.program()
    except Unavailable as missing:
        pytest.skip(missing.message)


def identities(folder):
    bootstrap.write_identities(folder, datetime.now(UTC), hosts=["localhost"], life=timedelta(days=1))


def placed(folder, ports):
    """The deployed files with paths and ports of this test."""
    for name in ("envoy.yaml", "secrets.yaml"):
        text = (DEPLOY / name).read_text().replace("/etc/envoy", str(folder))
        text = text.replace('"/identity', f'"{folder / "frontdoor"}').replace('"0.0.0.0"', '"127.0.0.1"')
        for port, own in ports.items():
            text = text.replace(f'"port_value": {port}\n', f'"port_value": {own}\n')
        (folder / name).write_text(text)
    return folder / "envoy.yaml"


def free_ports(*wanted):
    probes = [socket.socket() for _ in wanted]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = {port: probe.getsockname()[1] for port, probe in zip(wanted, probes, strict=True)}
    for probe in probes:
        probe.close()
    return ports


def test_the_real_envoy_accepts_it(tmp_path):
    identities(tmp_path)
    command = [program(), "--mode", "validate", "-c", str(placed(tmp_path, {}))]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stderr


def test_an_unknown_field_would_be_noticed(tmp_path):
    identities(tmp_path)
    path = placed(tmp_path, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"listeners": []}))
    command = [program(), "--mode", "validate", "-c", str(path)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


async def shown(port):
    """The certificate that the front door shows, DER."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    async with asyncio.timeout(5):
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        return writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()


async def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path):
    program()
    identities(tmp_path)
    ports = free_ports(7443, 8080, 9901)
    process = await asyncio.create_subprocess_exec(*envoy.command(placed(tmp_path, ports)))
    try:
        await envoy.wait_ready(f"127.0.0.1:{ports[9901]}", 30)
        before = await shown(ports[7443])
        identities(tmp_path)
        async with asyncio.timeout(15):
            while await shown(ports[7443]) == before:
                await asyncio.sleep(0.1)
    finally:
        process.terminate()
        await process.wait()
