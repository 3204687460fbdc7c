"""How many tokens an engine has served, out of the metrics that it exports in Prometheus' text format. Pure.

Names are those of vLLM and SGLang (`vllm:prompt_tokens_total`, with any prefix before the colon, or none), TGI and llama.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

_INPUT = {"prompt_tokens_total", "tgi_request_input_length_sum"}
_OUTPUT = {"generation_tokens_total", "tokens_predicted_total", "tgi_request_generated_tokens_sum"}
_LINE = re.compile(rf"^(?:[A-Za-z_]\w*:)?({'|'.join(sorted(_INPUT | _OUTPUT))})(?:\{{[^\n]*\}})?[ \t]+(\S+)", re.M)
MOST_TOKENS = 1 << 60


class TokenCounters(NamedTuple):
    """Since the engine began. None: it does not say."""

    input_tokens: int | None = None
    output_tokens: int | None = None


def token_counters(text: str) -> TokenCounters:
    """Sums over all labels. A value that is no count makes its counter unknown."""
    found = [(line[1], _count(line[2])) for line in _LINE.finditer(text)]
    return TokenCounters(_total(found, _INPUT), _total(found, _OUTPUT))


def _total(found: Iterable[tuple[str, int | None]], wanted: set[str]) -> int | None:
    counts = [count for name, count in found if name in wanted]
    known = [count for count in counts if count is not None]
    return sum(known) if counts and len(known) == len(counts) else None


def _count(value: str) -> int | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return round(number) if math.isfinite(number) and 0 <= number <= MOST_TOKENS else None
