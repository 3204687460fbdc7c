"""The example engine's part of the OpenAI API: every parameter is honoured, or refused by name."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "gpt"))
from completions import MAX_TOKENS, Refused, asked, until_stop, usage

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def ask(chat=False, **body):
    return asked({**(CHAT if chat else {"prompt": "hi"}), **body}, chat=chat)


def test_null_means_not_given():
    names = ["temperature", "max_tokens", "seed", "stop", "n", "stream", "stream_options", "top_p", "tools", "logprobs"]
    assert ask(**dict.fromkeys(names)) == ask()


def test_lists_of_prompts_and_n_make_choices_in_order():
    request = ask(prompt=["a", "b"], n=2, seed=5)
    assert list(request.choices()) == [(0, "a", 5), (1, "a", 6), (2, "b", 5), (3, "b", 6)]
    assert usage(request, 7) == {"prompt_tokens": 2, "completion_tokens": 7, "total_tokens": 9}


def test_text_parts_are_their_text():
    parts = [{"type": "text", "text": "def "}, {"type": "text", "text": "f"}]
    request = ask(chat=True, messages=[{"role": "system", "content": None}, {"role": "user", "content": parts}])
    assert request.prompts == ("\ndef f",)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("temperature", {"temperature": "hot"}),
        ("max_tokens", {"max_tokens": float("inf")}),
        ("seed", {"seed": float("nan")}),
        ("temperature", {"temperature": 10**400}),
        ("temperature", {"temperature": 3}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": MAX_TOKENS + 1}),
        ("max_completion_tokens", {"max_completion_tokens": 1.5}),
        ("n", {"n": True}),
        ("n", {"n": 9, "prompt": ["a", "b"]}),
        ("stop", {"stop": [""]}),
        ("stop", {"stop": list("abcde")}),
        ("prompt", {"prompt": [1, 2]}),
        ("prompt", {"prompt": {}}),
        ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": 1}),
        ("include_usage", {"stream_options": {"include_usage": 1}}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("logprobs", {"logprobs": 3}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("best_of", {"best_of": 2}),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(param, body):
    with pytest.raises(Refused) as refused:
        ask(**body)
    assert refused.value.body()["error"]["param"] == param
    assert refused.value.body()["error"]["type"] == "invalid_request_error"


def test_parts_that_are_no_text_are_refused_with_their_place():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(Refused) as refused:
        ask(chat=True, messages=[{"role": "user", "content": parts}])
    assert refused.value.param == "messages[0].content[1]"


def test_a_body_that_is_no_object_is_refused():
    with pytest.raises(Refused, match="JSON object"):
        asked([], chat=False)


@given(st.text("ab\n", max_size=20), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_answer_and_is_never_shown(text, stops):
    pieces = list(until_stop(iter(text), tuple(stops)))
    shown, reason = "".join(piece for piece, _ in pieces), pieces[-1][1]
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert reason == ("stop" if ends else "length")
    assert all(stop not in shown for stop in stops)
    assert text.startswith(shown)
    assert [why for _, why in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert shown == text or ends
