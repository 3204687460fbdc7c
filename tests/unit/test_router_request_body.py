"""What routing reads of a request's body: the same from whole and scanned bodies, in bounded work, refusing only what has no model."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument
from whaleflux_inference_router.core import request_body
from whaleflux_inference_router.core.fatal_requests import MAX_REMEMBERED, FatalRequests, fingerprint
from whaleflux_inference_router.core.request_body import WHOLE_BYTES, read

LONG = "x" * WHOLE_BYTES


def body(**content):
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("sent", "text_bytes", "output"),
    [
        (b'{"model":"m","prompt":"12345678"}', 8, 0),
        (b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"1234"}]}],"max_tokens":9}', 8, 9),
        (b'{"model":"m","input":["1234","5678"],"max_completion_tokens":3}', 8, 3),
        (b'{"model":"m","prompt":[1,2,3]}', 12, 0),
        (b'{"model":"m"}', 0, 0),
        (b'\xef\xbb\xbf{"model":"m"}', 0, 0),
    ],
)
def test_what_is_read_of_a_request(sent, text_bytes, output):
    facts = read(sent)
    assert (facts.model, facts.prompt_bytes, facts.max_output_tokens) == ("m", text_bytes, output)


@pytest.mark.parametrize("limit", [0, -1, None, True, "64", 1e300])
def test_a_limit_that_says_nothing_is_the_engines_to_judge(limit):
    assert read(body(model="m", max_tokens=limit)).max_output_tokens == 0


def test_a_limit_as_a_float_is_a_number():
    assert read(body(model="m", max_tokens=64.0)).max_output_tokens == 64


def test_text_that_is_no_unicode_goes_on_to_the_engine():
    assert read(b'{"model":"m","prompt":"\\ud800"}').model == "m"


@pytest.mark.parametrize(
    "sent", [b"", b"[]", b"{", b"nonsense", b'{"model":1}', b'{"model":""}', b"[" * 100_000, b"{}"]
)
def test_a_body_without_a_model_names_the_field(sent):
    with pytest.raises(InvalidArgument) as refused:
        read(sent)
    assert refused.value.violations[0].field in {"body", "model"}


@pytest.mark.parametrize(
    "packed",
    [gzip.compress(body(model="m", prompt="hello")), gzip.compress(body(model="m", prompt=LONG * 40))],
    ids=["short", "long"],
)
def test_a_compressed_body_is_read_as_far_as_needed(packed):
    assert read(packed, content_encoding="gzip").model == "m"


def test_what_is_not_compressed_as_it_says_is_refused():
    with pytest.raises(InvalidArgument, match="content-encoding"):
        read(b"{}", content_encoding="gzip")


@pytest.mark.parametrize("at_end", [False, True])
def test_a_form_names_its_model(at_end):
    field = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
    audio = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"\x00" * 200_000 + b"\r\n"
    parts = (audio + field) if at_end else (field + audio)
    facts = read(parts + b"--b--", content_type="multipart/form-data; boundary=b")
    assert (facts.model, facts.prompt_bytes) == ("whisper", 0)


class TestLarge:
    def test_a_model_is_found_before_and_behind_a_long_prompt(self):
        for sent in (body(model="m", prompt=LONG, max_tokens=7), body(prompt=LONG, max_tokens=7, model="m")):
            facts = read(sent)
            assert (facts.model, facts.max_output_tokens) == ("m", 7)
            assert abs(facts.prompt_bytes - len(LONG)) < 16

    def test_only_the_top_level_counts(self):
        inner = '{"model":"evil"}'
        sent = body(messages=[{"model": "evil", "role": "user", "content": LONG + inner}], model="m")
        assert read(sent).model == "m"

    def test_pictures_are_no_text(self):
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + LONG}}
        assert read(body(model="m", messages=[{"role": "user", "content": [picture]}])).prompt_bytes < 200

    @pytest.mark.parametrize(
        "filler",
        [b"[],", b"{},", b'"",', b'"\\"\\"\\"",', b"\\", b"1,", b'"a":', b"[" * 1000 + b"]" * 1000 + b","],
        ids=["lists", "objects", "strings", "escapes", "slashes", "numbers", "keys", "depth"],
    )
    def test_work_is_bounded_whatever_the_body_is(self, filler, monkeypatch):
        """Counted, not timed: no more steps than the budget, however large the body."""
        looked = []
        real = request_body.STRUCTURE

        class Counted:
            def search(self, *where):
                looked.append(where)
                return real.search(*where)

        monkeypatch.setattr(request_body, "STRUCTURE", Counted())
        sent = b'{"x":[' + filler * (4_000_000 // len(filler)) + b'0],"model":"m"}'
        assert read(sent).model == "m", "the end of the body is looked at when the budget is used up"
        assert len(looked) <= request_body.MAX_STEPS


@given(
    st.fixed_dictionaries(
        {
            "model": st.text(min_size=1, max_size=20),
            "messages": st.recursive(st.text(max_size=5), lambda c: st.lists(c, max_size=3)),
        },
        optional={"max_tokens": st.integers(1, 1000), "store": st.booleans(), "user": st.text(max_size=10)},
    ),
    st.booleans(),
)
def test_a_scan_reads_what_a_parse_reads(content, ascii_only):
    small = json.dumps(content, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    large = small[:-1] + b" " * WHOLE_BYTES + b"}"
    parsed, scanned = read(small), read(large)
    assert (scanned.model, scanned.max_output_tokens, scanned.keeps) == (
        parsed.model,
        parsed.max_output_tokens,
        parsed.keeps,
    )


def test_what_is_remembered_of_fatal_requests_is_bounded():
    fatal = FatalRequests()
    for number in range(MAX_REMEMBERED + 10):
        fatal.engine_ended(fingerprint(b"%d" % number), "a", 1.0)
    assert fatal.engines_ended(fingerprint(b"0"), 1.0) == 0
    assert fatal.engines_ended(fingerprint(b"%d" % (MAX_REMEMBERED + 9)), 1.0) == 1
