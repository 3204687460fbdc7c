"""The example engine over HTTP: connections that are used again, refusals, streams."""

import http.client
import json
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "gpt"))
import serve

pytestmark = pytest.mark.integration


class Echo:
    """A model that says its prompt again and again."""

    def generate(self, prompt, length, temperature, seed, top_p):
        return iter((prompt * length)[:length])


@pytest.fixture
def connection():
    server = serve.server(Echo(), "echo", "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    yield made
    made.close()
    server.shutdown()
    thread.join()
    server.server_close()


def post(connection, path, body, headers=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read()


GOOD = {"prompt": "abc", "max_tokens": 5}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/nothing", {"prompt": "of another client"}, 404),
        ("/v1/completions", {"prompt": "x", "n": 99}, 400),
        ("/v1/completions", b"{", 400),
        ("/health", {"prompt": "x"}, 404),
        ("/v1/completions", b"x" * (serve.MAX_BODY_BYTES + 1), 413),
    ],
)
def test_the_next_request_of_a_connection_is_read_from_its_beginning(connection, path, body, status):
    try:
        got, answer = post(connection, path, body)
        assert got == status
        assert json.loads(answer)["error"]["type"] == "invalid_request_error"
    except (BrokenPipeError, ConnectionResetError):  # too large: the engine had answered and closed before all was sent
        assert status == 413
        connection.close()
    assert post(connection, "/v1/completions", GOOD)[0] == 200


def test_other_methods_and_bodies_without_length_are_refused_as_json(connection):
    connection.request("PUT", "/v1/completions", b"{}")
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["param"]) == (501, None)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders(b"2\r\n{}\r\n0\r\n\r\n")  # with the head, in one packet: the engine closes without reading it
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("connection")) == (411, "close")
    answer.read()
    assert post(connection, "/v1/completions", GOOD)[0] == 200


def test_choices_stops_and_usage(connection):
    status, answer = post(connection, "/v1/completions", {"prompt": ["abc", "xy"], "max_tokens": 5, "stop": "ca"})
    answer = json.loads(answer)
    assert status == 200
    assert [(c["index"], c["text"], c["finish_reason"]) for c in answer["choices"]] == [
        (0, "ab", "stop"),
        (1, "xyxyx", "length"),
    ]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def test_a_stream_ends_with_its_usage_when_that_was_asked_for(connection):
    chat = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 3, "stream": True, "temperature": None}
    status, answer = post(connection, "/v1/chat/completions", {**chat, "stream_options": {"include_usage": True}})
    assert status == 200
    events = [line[6:] for line in answer.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    *pieces, last = map(json.loads, events[:-1])
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == "aba"
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    assert len({p["id"] for p in (*pieces, last)}) == 1
    assert post(connection, "/v1/completions", GOOD)[0] == 200
