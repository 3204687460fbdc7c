"""oidc-provider-mock on a port of this machine, with the device flow in front of it, which it has not (RFC 8628)."""

from __future__ import annotations

import contextlib
import io
import json
import secrets
import threading
import urllib.parse
from collections.abc import Iterator

import oidc_provider_mock
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_BACK = "http://127.0.0.1:1/callback"


class DeviceProvider:
    """A WSGI application. `confirms`: the sub as whom the next codes are entered; "": they are denied."""

    def __init__(self) -> None:
        self.mock = oidc_provider_mock.app()
        self.issuer, self.confirms, self.without_device = "", "", False
        self._polls: dict[str, int] = {}

    def __call__(self, environ, start_response):
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        request = Request({**environ, "wsgi.input": io.BytesIO(body)})
        answer = self._own(request)
        return (answer or self.mock.wsgi_app)(environ, start_response)

    def person(self, sub: str, **claims) -> None:
        """What the provider says of somebody from now on."""
        answer = self.mock.test_client().put(f"/users/{urllib.parse.quote(sub)}", json=claims)
        assert answer.status_code == 204

    def _own(self, request):
        if request.path == "/.well-known/openid-configuration" and not self.without_device:
            described = self._client().get(request.path, base_url=self.issuer).get_json()
            return _json({**described, "device_authorization_endpoint": f"{self.issuer}/device"})
        if request.path == "/device":
            code = secrets.token_urlsafe(16)
            self._polls[code] = 0
            return _json(
                {"device_code": code, "user_code": "WXYZ", "verification_uri": f"{self.issuer}/go", "interval": 0.02}
            )
        if request.path == "/oauth2/token" and request.form.get("grant_type") == _GRANT:
            return self._polled(request.form)
        return None

    def _polled(self, form):
        self._polls[form["device_code"]] += 1
        if self._polls[form["device_code"]] == 1:
            return _json({"error": "authorization_pending"}, 400)
        if not self.confirms:
            return _json({"error": "access_denied"}, 400)
        return _json(self._tokens(form["client_id"], form["client_secret"]))

    def _tokens(self, client_id, client_secret):
        """As the mock gives them for a code."""
        query = {
            "response_type": "code",
            "client_id": client_id,
            "redirect_uri": _BACK,
            "scope": "openid email profile",
        }
        client = self._client()
        entered = client.post(
            "/oauth2/authorize", query_string=query, data={"sub": self.confirms}, base_url=self.issuer
        )
        code = urllib.parse.parse_qs(urllib.parse.urlsplit(entered.location).query)["code"][0]
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": _BACK, "client_id": client_id}
        form["client_secret"] = client_secret
        return client.post("/oauth2/token", data=form, base_url=self.issuer).get_json()

    def _client(self):
        return self.mock.test_client()


def _json(content, status=200):
    return Response(json.dumps(content), status=status, content_type="application/json")


class _Silent(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def device_provider() -> Iterator[DeviceProvider]:
    """Serves while the block runs."""
    provider = DeviceProvider()
    server = make_server("localhost", 0, provider, threaded=True, request_handler=_Silent)
    provider.issuer = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()
