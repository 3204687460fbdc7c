"""A certificate that is not valid now: the front door hangs up without a word, so it is said from here."""

import json
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest

from whaleflux.cli import reach, state
from whaleflux.context import Context
from whaleflux.errors import Unauthenticated, Unavailable
from whaleflux.rpc.pki import CertificateAuthority


@pytest.mark.parametrize(
    ("year", "days", "said"),
    [(2000, 1, "ended at 2000-01-02"), (2200, 1, "begins at 21"), (2000, 365 * 200, "does not answer")],
    ids=["ended", "not yet", "now"],
)
def test_a_fleet_that_hangs_up_on_a_certificate_out_of_its_time(tmp_path, monkeypatch, year, days, said):
    begins = datetime(year, 1, 1, tzinfo=UTC)
    tls = CertificateAuthority.create(begins).issue("admin", "a", begins, lifetime=timedelta(days=days))
    for name, content in (("cert", tls.chain), ("key", tls.key), ("ca", tls.roots)):
        (tmp_path / name).write_bytes(content)
    files = {name: str(tmp_path / name) for name in ("ca", "cert", "key")}
    monkeypatch.setattr(reach, "check_known", lambda *_: None)
    (tmp_path / "context.json").write_text(json.dumps(asdict(Context(server="127.0.0.1:1", **files))))
    monkeypatch.setattr(state.GLOBAL, "context", str(tmp_path / "context.json"))
    with pytest.raises(Unavailable if "answer" in said else Unauthenticated, match=said), state.fleet():
        raise Unavailable("the server does not answer")
