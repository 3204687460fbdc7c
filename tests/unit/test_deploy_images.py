"""deploy/docker: images hold what their lock says, run as nobody in particular, and start without a shell."""

import http.server
import importlib.util
import json
import re
import threading

import pytest

from tests.support.deploy_files import DEPLOY
from whaleflux import healthcheck

TEXT = (DEPLOY / "docker" / "Dockerfile").read_text()
# Instructions, with their lines put together.
INSTRUCTIONS = [
    (found[1], found[2].replace("\\\n", " "))
    for found in re.finditer(r"^([A-Z]+) ((?:.*\\\n(?:#.*\n)*)*.*)$", TEXT, re.MULTILINE)
]
LAST = INSTRUCTIONS[max(i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]


def one(name):
    (value,) = [value for found, value in LAST if found == name]
    return value


def test_it_runs_as_a_user_with_a_number():
    assert one("USER") == "10001:10001"


def test_neither_start_nor_health_check_needs_a_shell():
    assert json.loads(one("ENTRYPOINT")) == ["service"]
    assert json.loads(one("HEALTHCHECK").partition("CMD ")[2]) == ["python", "-m", "whaleflux.healthcheck"]


def test_nothing_is_run_where_there_may_be_no_shell_and_nothing_comes_from_elsewhere():
    assert {name for name, _ in LAST} == {
        "FROM",
        "COPY",
        "ENV",
        "USER",
        "WORKDIR",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
    }
    assert not [value for name, value in INSTRUCTIONS if name == "ADD"]
    assert not re.search(r"curl|wget|apt-get|https?://", TEXT)


def test_services_get_a_root_without_a_shell_unless_asked_otherwise():
    assert ("ARG", "ROOT=minimal") in INSTRUCTIONS
    assert LAST[0] == ("FROM", "${ROOT}")
    assert ("FROM", "scratch AS minimal") in INSTRUCTIONS


def test_every_installation_is_locked_by_hash():
    installs = re.findall(r"(?:pip|\$pip|python) install[^\n&]*|\$pip [^\n&]*", TEXT)
    assert len(installs) >= 4
    for line in installs:
        assert line.startswith("$pip") or "--require-hashes --only-binary :all:" in line or "--no-index" in line, line


@pytest.fixture(scope="module")
def minimal_root():
    spec = importlib.util.spec_from_file_location("minimal_root", DEPLOY / "docker" / "minimal_root.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_kept_with_their_links_and_without_special_rights(minimal_root, tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "real").mkdir(parents=True)
    program = outside / "real" / "program-1.2"
    program.write_text("x")
    program.chmod(0o4755)
    (outside / "real" / "program").symlink_to("program-1.2")
    (outside / "linked").symlink_to("real")
    root.mkdir()
    minimal_root.keep(outside / "linked" / "program", root)
    inside = root / outside.relative_to("/")
    assert (inside / "linked").readlink().name == "real"
    assert (inside / "linked" / "program").readlink().name == "program-1.2"
    assert (inside / "real" / "program-1.2").stat().st_mode & 0o7777 == 0o755


@pytest.fixture
def answering():
    """host:port of a server whose answer to /readyz is the last of `codes`."""
    codes = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(codes[-1] if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"0.0.0.0:{server.server_address[1]}", codes
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_health_is_what_readyz_says(answering, capsys):
    listen, codes = answering
    with pytest.raises(SystemExit) as ended:
        healthcheck.main({"WHALEFLUX_METRICS_LISTEN": listen})
    assert ended.value.code == 0
    codes.append(503)
    with pytest.raises(SystemExit) as ended:
        healthcheck.main({"WHALEFLUX_METRICS_LISTEN": listen})
    assert ended.value.code == 1
    assert "503" in capsys.readouterr().err
    assert "not-an-address" in healthcheck.ready("not-an-address")
