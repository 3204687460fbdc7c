"""Reasons, conditions and the words of events stand in one list each (test_architecture looks for stray ones)."""

import pytest

from tests.support.stray_words import python_files
from whaleflux import errors
from whaleflux.reasons import LISTS, ErrorReason
from whaleflux.store import api

FILES = python_files()


def test_what_errors_say_by_default_is_in_the_list():
    kinds = [
        k for m in (errors, api) for k in vars(m).values() if isinstance(k, type) and issubclass(k, errors.StatusError)
    ]
    given = [k.default_reason for k in kinds if "default_reason" in vars(k)]
    assert len(given) > 10
    assert all(isinstance(reason, ErrorReason) for reason in given)


@pytest.mark.parametrize("words", LISTS)
def test_each_word_is_used_and_means_something(words):
    code = "\n".join(file.read_text() for file in FILES)
    for word in words:
        assert f"{words.__name__}.{word.name}" in code, f"{word.name} is used nowhere"
        assert len(word.meaning) > 10
    assert len({word.meaning for word in words}) == len(words)
