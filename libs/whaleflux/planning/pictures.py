"""A plan as a picture: its step by component, the pipeline's timeline, memory against what there is. One SVG, self-contained, light and dark.

Colour is never the only sign: parts of a bar carry the letter of their line in the legend, passes their number, backward ones are hatched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from whaleflux.planning.found import PART_WORDS, STEP_WORDS, Candidate
from whaleflux.planning.schedule import MOST_WORKS, Timeline, Work

MOST_ROWS = 16  # stages that are drawn: more are left out in the middle
_WIDTH, _LEFT, _RIGHT = 960, 96, 24
_INNER = _WIDTH - _LEFT - _RIGHT
_MEMORY = _INNER - 130  # of bars that have their sum beside them
_LETTER_WIDTH, _DIGIT_WIDTH = 12, 7
_ROW, _BAR = 20, 24
_COLOURS = 8  # of the style's

# Okabe and Ito's colours, which people who see few colours tell apart; of each a darker one where the background is dark.
_STYLE = """
text{font:12px system-ui,sans-serif;fill:#1c1f24}.h{font-weight:600;font-size:15px}.s{fill:#5b626c}.n{font-size:10px;fill:#101214}
.bg{fill:#ffffff}.idle{fill:#f1f3f5;stroke:#c3c8ce;stroke-dasharray:3 2}.line{stroke:#1c1f24;stroke-width:1.5}.edge{stroke:#ffffff;stroke-width:1}
.over{fill:none;stroke:#b3261e;stroke-width:2}.warn{fill:#b3261e}
.c0{fill:#56b4e9}.c1{fill:#e69f00}.c2{fill:#4fc3a1}.c3{fill:#f0e442}.c4{fill:#cc9ac0}.c5{fill:#e88d67}.c6{fill:#b7bdc6}.c7{fill:#8fb8de}
.f{fill:#56b4e9}.f.odd{fill:#9bd3f3}.b{fill:#e69f00}.b.odd{fill:#f3cd7c}.hatch{stroke:#6b4a00;stroke-width:1;opacity:.35}
@media (prefers-color-scheme: dark){text{fill:#e8eaed}.s{fill:#a5adb8}.n{fill:#101214}.bg{fill:#14171b}.idle{fill:#1f2429;stroke:#4a525c}
.line{stroke:#e8eaed}.edge{stroke:#14171b}.over{stroke:#ff8a80}.warn{fill:#ff8a80}}
""".strip()


@dataclass(frozen=True, slots=True)
class Titles:
    """What stands above: a line about the model and the machine, and one about the split."""

    title: str
    subtitle: str


def svg(titles: Titles, plan: Candidate, drawn: Timeline | None = None) -> str:
    """`drawn`: the pipeline's timeline, where there is one."""
    parts, top = [_text(_LEFT, 30, titles.title, "h"), _text(_LEFT, 50, titles.subtitle, "s")], 76.0
    sections = [
        _step(plan),
        *([_pipeline(plan, drawn)] if drawn is not None and drawn.stages > 1 else []),
        _memory(plan),
    ]
    for lines, height in sections:
        parts.append(f'<g transform="translate(0 {top:g})">{"".join(lines)}</g>')
        top += height + 26
    words = escape(f"{titles.title}. {titles.subtitle}.")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top:g}" width="{_WIDTH}" height="{top:g}" role="img" '
        f'aria-label="{words}"><title>{words}</title><style>{_STYLE}</style><defs>'
        '<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<line class="hatch" x1="0" y1="0" x2="0" y2="6"/></pattern></defs>'
        f'<rect class="bg" width="{_WIDTH}" height="{top:g}"/>'
    )
    return head + "".join(parts) + "</svg>\n"


def rows_of(stages: int) -> list[int | None]:
    """Stages that are drawn, in order; None: where some are left out."""
    if stages <= MOST_ROWS:
        return list(range(stages))
    half = MOST_ROWS // 2
    return [*range(half), None, *range(stages - half, stages)]


def _step(plan: Candidate) -> tuple[list[str], float]:
    shown = {part: took for part, took in plan.seconds.items() if took >= 0.0005 * plan.step_s}
    words = {part: f"{STEP_WORDS[part]} {_seconds(took)} ({took / plan.step_s:.1%})" for part, took in shown.items()}
    lines = [_text(_LEFT, 12, f"One step: {_seconds(plan.step_s)}", "h"), *_stacked(shown, plan.step_s, 24, _INNER)]
    legend, height = _legend(words, 24 + _BAR + 20)
    return [*lines, *legend], height


def _memory(plan: Candidate) -> tuple[list[str], float]:
    whole = max(plan.usable_bytes, *(sum(parts.values()) for parts in plan.stages_bytes))
    shown = [part for part in PART_WORDS if any(parts[part] > 0 for parts in plan.stages_bytes)]
    lines = [_text(_LEFT, 12, f"Memory of a GPU: {_gigabytes(plan.usable_bytes)} there are for training", "h")]
    top = 24.0
    for stage in rows_of(len(plan.stages_bytes)):
        if stage is None:
            lines.append(_text(_LEFT, top + 14, "...", "s"))
            top += _ROW
            continue
        parts = plan.stages_bytes[stage]
        total = sum(parts.values())
        name = f"stage {stage}" if len(plan.stages_bytes) > 1 else "each GPU"
        lines.append(_text(_LEFT - 8, top + 16, name, "s", "end"))
        lines.append(
            f'<rect class="idle" x="{_LEFT}" y="{top:g}" width="{plan.usable_bytes / whole * _MEMORY:.1f}" height="{_BAR}"/>'
        )
        lines += _stacked({part: parts[part] for part in shown}, whole, top, _MEMORY)
        over = total > plan.usable_bytes
        lines.append(_total(total, top, over=over))
        top += _BAR + 6
    edge = _LEFT + plan.usable_bytes / whole * _MEMORY
    lines.append(f'<line class="line" x1="{edge:.1f}" x2="{edge:.1f}" y1="20" y2="{top:g}"/>')
    fullest = plan.parts_bytes
    legend, height = _legend({part: f"{PART_WORDS[part]} {_gigabytes(fullest[part])}" for part in shown}, top + 16)
    where = f"Of stage {plan.fullest}, the fullest:" if len(plan.stages_bytes) > 1 else "Of each GPU:"
    lines.append(_text(_LEFT, height + 14, f"{where} {_gigabytes(plan.total_bytes)}, {_spare(plan)}", "s"))
    return [*lines, *legend], height + 18


def _total(total: float, top: float, *, over: bool) -> str:
    """A row's sum, right of all bars."""
    words = _gigabytes(total) + (", too much" if over else "")
    return _text(_LEFT + _INNER, top + 16, words, "warn" if over else "", "end")


def _spare(plan: Candidate) -> str:
    left = plan.usable_bytes - plan.total_bytes
    return f"{_gigabytes(left)} to spare" if left >= 0 else f"{_gigabytes(-left)} too much"


def _pipeline(plan: Candidate, drawn: Timeline) -> tuple[list[str], float]:
    some = "" if drawn.drawn == drawn.micro_batches else f", {drawn.drawn} of {drawn.micro_batches} micro-batches drawn"
    lines = [_text(_LEFT, 12, f"Pipeline: {drawn.stages} stages{some}", "h")]
    if not drawn.works:
        return [*lines, _text(_LEFT, 32, _too_many(drawn), "s")], 36
    top, places, span_s = 24.0, {}, drawn.span_s
    for stage in rows_of(drawn.stages):
        if stage is None:
            lines.append(_text(_LEFT, top + 14, "...", "s"))
        else:
            places[stage] = top
            lines.append(_text(_LEFT - 8, top + 14, f"stage {stage}", "s", "end"))
            lines.append(f'<rect class="idle" x="{_LEFT}" y="{top:g}" width="{_INNER}" height="{_ROW - 2}"/>')
        top += _ROW
    for work in drawn.works:
        if work.stage in places:
            lines += _work(work, span_s, places[work.stage])
    return [*lines, *_pipeline_legend(top + 6, plan, drawn)], top + 26


def _too_many(drawn: Timeline) -> str:
    return f"{drawn.stages} stages of {drawn.virtual} virtual ones are more than a timeline shows ({MOST_WORKS:,} passes): left out"


def _work(work: Work, span_s: float, top: float) -> list[str]:
    start, width = _LEFT + _at(work.start_s / span_s), _at((work.end_s - work.start_s) / span_s)
    place = f'x="{start:.2f}" y="{top:g}" width="{width:.2f}" height="{_ROW - 2}"'
    odd = " odd" if work.chunk % 2 else ""
    lines = [f'<rect class="{"b" if work.backward else "f"}{odd} edge" {place}/>']
    if work.backward:
        lines.append(f'<rect fill="url(#hatch)" {place}/>')
    number = str(work.micro_batch + 1)
    if width >= _DIGIT_WIDTH * len(number) + 2:
        lines.append(_text(start + width / 2, top + 13, number, "n", "middle"))
    return lines


def _idle(plan: Candidate, drawn: Timeline) -> str:
    """A step's bubble is as long as the drawn one, and the step longer."""
    whole = f", {plan.seconds['bubble_s'] / plan.step_s:.1%} of the step" if drawn.drawn < drawn.micro_batches else ""
    return f"idle: {drawn.idle_share:.0%} of what is drawn{whole}"


def _pipeline_legend(top: float, plan: Candidate, drawn: Timeline) -> list[str]:
    words = ["forward", "backward (with recomputation)", _idle(plan, drawn)]
    if drawn.virtual > 1:
        words[0] += f"; {drawn.virtual} virtual stages, every second one lighter"
    lines, left = [], float(_LEFT)
    for kind, text in zip(("f", "b", "idle"), words, strict=True):
        lines.append(f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="14" height="12"/>')
        if kind == "b":
            lines.append(f'<rect fill="url(#hatch)" x="{left:g}" y="{top:g}" width="14" height="12"/>')
        lines.append(_text(left + 20, top + 11, text))
        left += 44 + 6.4 * len(text)
    return lines


def _stacked(parts: Mapping[str, float], whole: float, top: float, room: float) -> list[str]:
    """One bar, `room` wide where it is `whole`; each part with the letter of its place, where it is wide enough."""
    lines, start = [], float(_LEFT)
    for number, size in enumerate(parts.values()):
        width = size / whole * room
        lines.append(
            f'<rect class="c{number % _COLOURS} edge" x="{start:.2f}" y="{top:g}" width="{width:.2f}" height="{_BAR}"/>'
        )
        if width >= _LETTER_WIDTH:
            lines.append(_text(start + width / 2, top + 16, _letter(number), "n", "middle"))
        start += width
    return lines


def _legend(words: Mapping[str, str], top: float) -> tuple[list[str], float]:
    """Three to a line; and how high it is with what stands above."""
    lines = []
    for number, text in enumerate(words.values()):
        left, line = _LEFT + number % 3 * (_INNER / 3), top + number // 3 * 18
        lines.append(f'<rect class="c{number % _COLOURS}" x="{left:.0f}" y="{line - 10:g}" width="14" height="12"/>')
        lines.append(_text(left + 7, line, _letter(number), "n", "middle"))
        lines.append(_text(left + 20, line, text))
    return lines, top + (len(words) - 1) // 3 * 18 + 6


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def _at(share: float) -> float:
    return share * _INNER


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    more = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.1f}" y="{y:g}"{more}>{escape(text)}</text>'


def _seconds(span_s: float) -> str:
    return f"{span_s:.3g} s" if span_s >= 1 else f"{1000 * span_s:.3g} ms"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def as_text(plan: Candidate, drawn: Timeline | None = None, width: int = 72) -> list[str]:
    """The same for a terminal: a row of characters for each stage, `width` of them."""
    lines = []
    if drawn is not None and drawn.stages > 1:
        lines += _pipeline_text(plan, drawn, width)
    return [*lines, *_memory_text(plan, width)]


def _pipeline_text(plan: Candidate, drawn: Timeline, width: int) -> list[str]:
    some = "" if drawn.drawn == drawn.micro_batches else f" ({drawn.drawn} of {drawn.micro_batches} micro-batches)"
    if not drawn.works:
        return ["", f"pipeline: {_too_many(drawn)}"]
    span_s = drawn.span_s
    lines = ["", f"pipeline{some}: > forward, < backward, . {_idle(plan, drawn)}"]
    for stage in rows_of(drawn.stages):
        if stage is None:
            lines.append(f"{'...':>7}")
            continue
        lines.append(f"  {stage:>5}  {_row([work for work in drawn.works if work.stage == stage], span_s, width)}")
    return lines


def _row(works: Sequence[Work], span_s: float, width: int) -> str:
    """Each character is what the stage does in the middle of that part of the time. `works` are in their order."""
    row, rest = "", list(reversed(works))
    for place in range(width):
        now_s = (place + 0.5) / width * span_s
        while rest and rest[-1].end_s <= now_s:
            rest.pop()
        busy = bool(rest) and rest[-1].start_s <= now_s
        row += ("<" if rest[-1].backward else ">") if busy else "."
    return row


def _memory_text(plan: Candidate, width: int) -> list[str]:
    shown = [part for part in PART_WORDS if any(parts[part] > 0 for parts in plan.stages_bytes)]
    whole = max(plan.usable_bytes, *(sum(parts.values()) for parts in plan.stages_bytes))
    names = ", ".join(f"{_letter(number)} {PART_WORDS[part]}" for number, part in enumerate(shown))
    lines = ["", f"memory of a GPU: {names}; | what there is, {_gigabytes(plan.usable_bytes)}"]
    for stage in rows_of(len(plan.stages_bytes)):
        if stage is None:
            lines.append(f"{'...':>7}")
            continue
        parts, at, row = plan.stages_bytes[stage], 0.0, ""
        for number, part in enumerate(shown):
            at += parts[part]
            row += _letter(number) * (round(at / whole * (width - 1)) - len(row))
        edge = round(plan.usable_bytes / whole * (width - 1))
        row = row.ljust(width)
        lines.append(f"  {stage:>5}  {row[:edge]}|{row[edge:]}".rstrip() + f"  {_gigabytes(sum(parts.values()))}")
    return lines
