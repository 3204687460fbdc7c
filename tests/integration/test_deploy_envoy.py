"""deploy/envoy under the real Envoy: it is accepted, and a renewed certificate is shown without a restart."""

import asyncio
import json
import socket
import ssl
import subprocess
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from whaleflux import bootstrap, frontdoor
from whaleflux.errors import Unavailable
from whaleflux.rpc.tls_files import TlsFiles

pytestmark = pytest.mark.integration
DEPLOY = Path(__file__).parents[2] / "deploy" / "envoy"


def program():
    try:
        return frontdoor.program()
    except Unavailable as missing:
        pytest.skip(missing.message)


def identities(folder):
    """As deployed, with the front door's certificate for the inference API too."""
    bootstrap.write_identities(folder, datetime.now(UTC), hosts=["localhost"], life=timedelta(days=1))
    TlsFiles.under(folder / "public", "service").save(bootstrap.files_of(folder, "frontdoor").load())


def placed(folder, ports):
    """The deployed files with paths and ports of this test."""
    for name in ("envoy.yaml", "secrets.yaml", "public.yaml"):
        text = (DEPLOY / name).read_text().replace("/etc/envoy", str(folder))
        text = text.replace('"/identity', f'"{folder / "frontdoor"}').replace('"0.0.0.0"', '"127.0.0.1"')
        text = text.replace('"/public', f'"{folder / "public"}')
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
    path.write_text(json.dumps(yaml.safe_load(path.read_text()) | {"listeners": []}))
    command = [program(), "--mode", "validate", "-c", str(path)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


async def shown(port):
    """The certificate that the front door shows, DER."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    async with asyncio.timeout(30):
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        return writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()


def health(port, scheme, roots):
    """The status of /health at the inference API."""
    context = ssl.create_default_context(cafile=str(roots)) if scheme == "https" else None
    with urllib.request.urlopen(f"{scheme}://localhost:{port}/health", context=context, timeout=30) as answer:
        return answer.status


async def test_both_ports_speak_tls_alone_and_show_renewed_certificates_without_a_restart(tmp_path):
    program()
    identities(tmp_path)
    ports = free_ports(7443, 8080, 9901)
    process = await asyncio.create_subprocess_exec(*frontdoor.command(placed(tmp_path, ports)))
    try:
        await frontdoor.wait_ready(f"127.0.0.1:{ports[9901]}", 60)
        roots = tmp_path / "frontdoor" / "ca.crt"
        assert await asyncio.to_thread(health, ports[8080], "https", roots) == 200
        with pytest.raises(OSError):
            await asyncio.to_thread(health, ports[8080], "http", roots)
        before = [await shown(ports[port]) for port in (7443, 8080)]
        identities(tmp_path)
        async with asyncio.timeout(60):
            while set(before) & {await shown(ports[port]) for port in (7443, 8080)}:
                await asyncio.sleep(0.1)
    finally:
        process.terminate()
        await process.wait()
