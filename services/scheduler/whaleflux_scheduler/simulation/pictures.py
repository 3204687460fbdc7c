"""A simulation as one SVG: how busy the fleet was over time, and below, on the same time axis, who was on which node."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from whaleflux import names
from whaleflux.fleet.model import Node
from whaleflux.quantities import shown_duration
from whaleflux_scheduler.simulation.records import Series, Span
from whaleflux_scheduler.simulation.state import Result

MOST_NODES = 48  # rows of the Gantt chart
MOST_SPANS = 40_000
_WIDTH, _LEFT, _RIGHT = 1200.0, 118.0, 24.0
_CHART_TOP, _CHART_HEIGHT = 74.0, 200.0
_GANTT_GAP, _ROW_GAP = 62.0, 3.0
_HUES = (212, 28, 140, 345, 268, 48, 178, 312, 88, 232, 8, 160)
_STEPS_S = (
    1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 432000, 864000, 2592000, 5184000, 31536000,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Scale:
    """From seconds to pixels."""

    end_s: float

    def x(self, at_s: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(1.0, at_s / self.end_s)

    def ticks(self) -> list[float]:
        step_s = next((step for step in _STEPS_S if self.end_s / step <= 12), _STEPS_S[-1])
        return [at * float(step_s) for at in range(int(self.end_s // step_s) + 1)]


def shown_nodes(nodes: Sequence[Node]) -> frozenset[str]:
    """Those that have a row in the picture: the first in their order."""
    return frozenset(node.name for node in nodes[:MOST_NODES])


def picture(result: Result, nodes: Sequence[Node], title: str, about: str) -> str:
    """The whole SVG."""
    scale = _Scale(max(result.end_s, 1.0))
    rows = nodes[:MOST_NODES]
    lane = _lane(rows)
    heights = [len(node.gpus) * lane + _ROW_GAP for node in rows]
    gantt_top = _CHART_TOP + _CHART_HEIGHT + _GANTT_GAP
    bottom = gantt_top + sum(heights)
    queues = _colours(result)
    parts = [
        *_heading(title, about),
        *_legend(queues, bottom),
        *_grid(scale, _CHART_TOP, _CHART_TOP + _CHART_HEIGHT, labels=True),
        *_levels(result, scale),
        *_grid(scale, gantt_top, bottom, labels=True),
        *_gantt(result, rows, scale, gantt_top, lane, queues, len(nodes)),
    ]
    height = bottom + 66
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" width="{_WIDTH:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, Helvetica, Arial, sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{chr(10).join(parts)}\n</svg>\n'
    )


def _lane(rows: Sequence[Node]) -> float:
    """Pixels of one GPU: readable for a few nodes, a page for many."""
    gpus = sum(len(node.gpus) for node in rows)
    return min(7.0, max(1.5, 900.0 / gpus)) if gpus else 7.0


def _heading(title: str, about: str) -> list[str]:
    return [
        f'<text x="{_LEFT}" y="28" font-size="17" font-weight="600" fill="#1d2733">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="47" fill="#5b6875">{escape(about)}</text>',
    ]


def _grid(scale: _Scale, top: float, bottom: float, *, labels: bool) -> list[str]:
    lines = []
    for at_s in scale.ticks():
        x = scale.x(at_s)
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="#e4e8ec"/>')
        if labels:
            shown = shown_duration(at_s) if at_s else "0"
            lines.append(f'<text x="{x:.1f}" y="{bottom + 14:.1f}" text-anchor="middle" fill="#7a8793">{shown}</text>')
    return lines


def _levels(result: Result, scale: _Scale) -> list[str]:
    """GPUs held, GPUs of closed nodes, and GPUs that waiting jobs ask for (a line; cut at twice the fleet)."""
    most = max(result.gpus * 1.05, min(result.gpus * 2.0, result.asked.peak))
    base = _CHART_TOP + _CHART_HEIGHT

    def y(level: float) -> float:
        return base - _CHART_HEIGHT * min(level, most) / most

    fleet = y(result.gpus)
    return [
        *_axis(most, y),
        f'<path d="{_area(result.held, scale, y, base)}" fill="hsl(212 62% 62%)"/>',
        f'<path d="{_hanging(result, scale, y)}" fill="#b9c0c7"/>',
        f'<path d="{_line(result.asked, scale, y)}" fill="none" stroke="#d2552d" stroke-width="1.4"/>',
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{fleet:.1f}" y2="{fleet:.1f}" stroke="#1d2733" stroke-dasharray="4 3"/>',
        f'<text x="{_WIDTH - _RIGHT}" y="{fleet - 5:.1f}" text-anchor="end" fill="#1d2733">{result.gpus:,} GPUs</text>',
        *_key(_LEFT, _CHART_TOP - 8),
    ]


def _key(x: float, y: float) -> list[str]:
    parts, at = [], x
    for colour, words in (
        ("hsl(212 62% 62%)", "GPUs held"),
        ("#d2552d", "GPUs asked for by jobs that wait"),
        ("#b9c0c7", "closed nodes"),
    ):
        parts.append(f'<rect x="{at:.0f}" y="{y - 9:.0f}" width="10" height="10" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{at + 15:.0f}" y="{y:.0f}" fill="#3c4854">{words}</text>')
        at += 32 + 6.1 * len(words)
    return parts


def _axis(most: float, y: object) -> list[str]:
    assert callable(y)
    step = 10 ** math.floor(math.log10(max(most, 1.0)))
    step = step / 2 if most / step < 3 else step
    ticks = [at * step for at in range(int(most / step) + 1)]
    lines = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}" stroke="#eef1f4"/>' for t in ticks
    ]
    words = [
        f'<text x="{_LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end" fill="#7a8793">{t:,.0f}</text>' for t in ticks
    ]
    return lines + words


def _steps(series: Series, scale: _Scale, y: object) -> list[str]:
    assert callable(y)
    means = series.means()
    ends = [at for at, _ in means[1:]] + [scale.end_s]
    return [
        f"{scale.x(at):.1f},{y(level):.1f}L{scale.x(end):.1f},{y(level):.1f}"
        for (at, level), end in zip(means, ends, strict=True)
    ]


def _area(series: Series, scale: _Scale, y: object, base: float) -> str:
    steps = _steps(series, scale, y)
    return f"M{_LEFT},{base:.1f}L{'L'.join(steps)}L{scale.x(scale.end_s):.1f},{base:.1f}Z" if steps else ""


def _line(series: Series, scale: _Scale, y: object) -> str:
    return f"M{'L'.join(steps)}" if (steps := _steps(series, scale, y)) else ""


def _hanging(result: Result, scale: _Scale, y: object) -> str:
    """What is closed hangs from the line of the whole fleet."""
    assert callable(y)
    if not result.closed.total:
        return ""
    steps = _steps(result.closed, scale, lambda level: y(result.gpus - level))
    top = y(result.gpus)
    return f"M{_LEFT},{top:.1f}L{'L'.join(steps)}L{scale.x(scale.end_s):.1f},{top:.1f}Z"


def _colours(result: Result) -> dict[str, int]:
    """A hue for each queue."""
    queues = sorted({span.queue for span in result.spans.kept} if result.spans else ())
    return {queue: _HUES[at % len(_HUES)] for at, queue in enumerate(queues)}


def _legend(queues: dict[str, int], bottom: float) -> list[str]:
    parts, x, y = [], _LEFT, bottom + 44
    for queue, hue in queues.items():
        width = 28 + 6.4 * len(queue)
        if x + width > _WIDTH - _RIGHT - 150:
            parts.append(f'<text x="{x:.0f}" y="{y:.0f}" fill="#3c4854">and more</text>')
            break
        parts.append(f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10" rx="2" fill="hsl({hue} 55% 62%)"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="{y:.0f}" fill="#3c4854">{escape(queue)}</text>')
        x += width
    end = _WIDTH - _RIGHT
    parts.append(f'<rect x="{end - 132:.0f}" y="{y - 9:.0f}" width="3" height="10" fill="#c0182b"/>')
    parts.append(f'<text x="{end:.0f}" y="{y:.0f}" text-anchor="end" fill="#3c4854">suspended or lost here</text>')
    return parts


def _gantt(
    result: Result, rows: Sequence[Node], scale: _Scale, top: float, lane: float, queues: dict[str, int], nodes: int
) -> list[str]:
    spans: dict[str, list[Span]] = {}
    for span in result.spans.kept if result.spans else ():
        spans.setdefault(span.node, []).append(span)
    which = (
        f"each row is a node, each line in it a GPU: {len(rows)} of {nodes:,} nodes"
        if nodes > len(rows)
        else "each row is a node, each line in it a GPU"
    )
    parts = [f'<text x="{_LEFT}" y="{top - 10:.0f}" fill="#3c4854">{which}</text>']
    for node in rows:
        height = len(node.gpus) * lane
        parts.append(
            f'<rect x="{_LEFT}" y="{top:.1f}" width="{_WIDTH - _LEFT - _RIGHT}" height="{height:.1f}" fill="#f3f5f7"/>'
        )
        if height + _ROW_GAP >= 9:
            label = escape(names.last(node.name)[-17:])
            parts.append(
                f'<text x="{_LEFT - 8}" y="{top + height / 2 + 3.5:.1f}" text-anchor="end" fill="#5b6875" font-size="10">{label}</text>'
            )
        lanes = {gpu.uuid: at for at, gpu in enumerate(node.gpus)}
        for span in spans.get(node.name, ()):
            parts += _bars(span, lanes, scale, top, lane, queues[span.queue])
        top += height + _ROW_GAP
    return parts


def _bars(span: Span, lanes: dict[str, int], scale: _Scale, top: float, lane: float, hue: int) -> Iterable[str]:
    """One bar for each run of neighbouring GPUs."""
    x, end = scale.x(span.from_s), scale.x(span.to_s)
    width = max(0.6, end - x - 0.4)
    shade = 50 + hashlib.blake2b(span.job.encode(), digest_size=1).digest()[0] % 26  # jobs of a queue are told apart
    job = names.last(span.job)
    told = escape(f"{span.job}: {len(span.gpus)} GPUs here, {shown_duration(span.to_s - span.from_s)}, {span.why}")
    for first, count in _runs(sorted(lanes[uuid] for uuid in span.gpus if uuid in lanes)):
        y, height = top + first * lane, count * lane - (0.4 if lane > 3 else 0.0)
        yield (
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="hsl({hue} 55% {shade}%)">'
            f"<title>{told}</title></rect>"
        )
        if span.why in ("suspended", "lost"):
            yield f'<rect x="{end - 1.6:.1f}" y="{y:.1f}" width="1.6" height="{height:.1f}" fill="#c0182b"/>'
        if height >= 10 and width > 5.6 * len(job) + 6:
            yield f'<text x="{x + 4:.1f}" y="{y + height / 2 + 3.5:.1f}" font-size="9.5" fill="#16202b">{escape(job)}</text>'


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """(first, how many) of neighbours."""
    runs = []
    for _, run in groupby(enumerate(positions), key=lambda pair: pair[1] - pair[0]):
        members = [position for _, position in run]
        runs.append((members[0], len(members)))
    return runs
