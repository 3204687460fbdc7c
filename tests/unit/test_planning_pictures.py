"""Timelines obey the pipeline's rules and agree with the cost model; pictures are sound SVG, and say in text what they show in colour."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.found import PART_WORDS, Split, candidate
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine, Tier
from whaleflux.planning.pictures import MOST_ROWS, Titles, as_text, rows_of, svg
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.schedule import MOST_WORKS, ChunkTimes, chunk_times, scheduled, timeline
from whaleflux.planning.step import step_time
from whaleflux.planning.training import Training
from whaleflux.planning.why import reasons

H200 = Machine.of(CATALOGUE.types["H200"])
DENSE = model_named("dense-700b")
SPLIT = Split(
    tp=8, pp=8, dp=2, cp=1, ep=1, vp=1, micro_batch=1, global_batch=64, sequence=8192, zero=1, replicas=1, recompute="full", recomputed=1.0,
    sequence_parallel=True,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 0.5))
def test_each_pass_is_done_once_when_its_stage_is_free_and_what_it_needs_is_there(
    stages, virtual, groups, forward, backward, send
):
    virtual = virtual if stages > 1 else 1
    count = stages * groups
    works = scheduled(ChunkTimes((forward,) * stages, (backward,) * stages, 0.2, send), stages, virtual, count)
    assert (
        len(works)
        == len({(w.stage, w.micro_batch, w.chunk, w.backward) for w in works})
        == 2 * stages * virtual * count
    )
    ended = {(w.stage, w.micro_batch, w.chunk, w.backward): w.end_s for w in works}
    for work in works:
        place = work.chunk * stages + work.stage  # along the model
        before = place + 1 if work.backward else place - 1
        needed = (before % stages, work.micro_batch, before // stages, work.backward)
        there_s = ended[needed] + (send if stages > 1 else 0) if 0 <= before < stages * virtual else 0.0
        forward_s = ended[work.stage, work.micro_batch, work.chunk, False] if work.backward else 0.0
        assert work.start_s >= max(there_s, forward_s) - 1e-9
    for stage in range(stages):
        mine = sorted((w.start_s, w.end_s) for w in works if w.stage == stage)
        assert all(later[0] >= earlier[1] - 1e-9 for earlier, later in pairwise(mine))


@pytest.mark.parametrize(("stages", "virtual", "count"), [(4, 1, 8), (8, 1, 32), (4, 2, 8), (8, 4, 16), (2, 3, 6)])
def test_the_bubble_is_the_textbooks(stages, virtual, count):
    """(p - 1) (f + b) / v: Narayanan et al. 2021."""
    works = scheduled(ChunkTimes((1 / virtual,) * stages, (2 / virtual,) * stages), stages, virtual, count)
    assert max(work.end_s for work in works) == pytest.approx(count * 3 + (stages - 1) * 3 / virtual)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"first_layers": 24, "last_layers": 16},
        {"first_layers": 19, "last_layers": 17},
        {"first_layers": 10, "last_layers": 28, "recompute": Recompute.FULL, "recomputed": 0.25, "recomputing": 2},
    ],
)
def test_a_timeline_is_as_long_as_the_step_that_the_cost_model_says(more):
    """Without what comes after it, and but for the head: it is one stage's alone. Where the first stage is the slowest it waits less than said."""
    plan = Plans.of(tp=8, pp=4, dp=4, micro_batch=1, global_batch=32, sequence=8192, sequence_parallel=True, **more)
    shape = model_named("llama-3.1-70b")
    drawn, took = timeline(shape, H200, plan, Training()), step_time(shape, H200, plan, Training())
    assert drawn.drawn == drawn.micro_batches == 8
    said = float(np.ravel(took.total_s - took.dp_s - took.optimizer_s)[0])
    assert drawn.span_s == pytest.approx(said, rel=0.1 if more else 0.05)


@pytest.mark.parametrize(("stages", "waits"), [(2, 1), (4, 2)])
def test_a_stage_waits_once_for_each_neighbour(stages, waits):
    """A state forth and a gradient back cross at once: of two stages each has one neighbour."""
    slow = replace(H200, fabric=replace(H200.fabric, island=1, tiers=(Tier(1, 1e8),)))
    plan = Plans.of(pp=stages, micro_batch=1, global_batch=64, sequence=8192)
    took, each_s = step_time(DENSE, slow, plan, Training()), 2 * 8192 * DENSE.hidden / 1e8
    assert float(np.ravel(took.pp_s)[0]) == pytest.approx(64 * waits * each_s, rel=0.1)
    assert chunk_times(DENSE, slow, plan, Training()).send_s == pytest.approx(each_s, rel=0.1)


def test_a_timeline_of_two_stages_on_a_slow_line_is_as_long_as_the_step():
    slow = replace(H200, fabric=replace(H200.fabric, island=1, tiers=(Tier(1, 5e7),)))
    plan = Plans.of(pp=2, micro_batch=1, global_batch=8, sequence=8192)
    took = step_time(DENSE, slow, plan, Training())
    said = float(np.ravel(took.total_s - took.dp_s - took.optimizer_s)[0])
    assert float(np.ravel(took.pp_s)[0]) > 0.1 * said
    assert timeline(DENSE, slow, plan, Training()).span_s == pytest.approx(said, rel=0.05)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 24, 96, 480]), st.sampled_from([1, 2, 5, 20]), st.sampled_from([1, 4, 64]))
def test_a_picture_is_bounded_however_many_stages_there_are_and_says_what_it_leaves_out(stages, virtual, groups):
    shape = replace(DENSE, layers=9600)
    virtual = virtual if stages > 1 else 1
    split = replace(SPLIT, pp=stages, vp=virtual, dp=1, global_batch=stages * groups)
    drawn = timeline(shape, H200, split.plans(), Training())
    plan = candidate(shape, H200, split, Training())
    picture, text = svg(Titles("a", "b"), plan, drawn), "\n".join(as_text(plan, drawn))
    assert len(drawn.works) <= MOST_WORKS
    assert len(picture) < 6_000_000
    cut = stages > 1 and drawn.drawn < drawn.micro_batches
    assert not cut or f"{drawn.drawn} of {drawn.micro_batches} micro-batches drawn" in picture
    empty = stages > 1 and not drawn.works
    assert not empty or all("more than a timeline shows" in shown for shown in (picture, text))


def test_long_steps_are_drawn_in_part_and_say_so():
    split = replace(SPLIT, global_batch=2 * 256)
    drawn = timeline(DENSE, H200, split.plans(), Training())
    assert (drawn.drawn, drawn.micro_batches) == (16, 256)
    picture = svg(Titles("a", "b"), candidate(DENSE, H200, split, Training()), drawn)
    assert "16 of 256 micro-batches drawn" in picture


class TestSvg:
    def picture(self, split=SPLIT, title="dense-700b on 128 x H200"):
        drawn = timeline(DENSE, H200, split.plans(), Training())
        return svg(Titles(title, split.words()), candidate(DENSE, H200, split, Training()), drawn)

    def test_it_is_one_document_that_loads_nothing(self):
        picture = self.picture(title='<script>alert("&")</script>')
        root = ET.fromstring(picture)
        assert root.tag.endswith("svg")
        assert "script" not in {one.tag.rpartition("}")[2] for one in root.iter()}
        assert not re.search(r"href|url\((?!#)|@import|https?://(?!www\.w3\.org)", picture)
        assert "prefers-color-scheme: dark" in picture

    def test_numbers_stand_beside_colours(self):
        words = " ".join(ET.fromstring(self.picture()).itertext())
        for part in PART_WORDS.values():
            assert re.search(rf"{part} \d+\.\d GB", words)
        assert re.search(r"pipeline bubble .* \(\d+\.\d%\)", words)
        assert "to spare" in words
        assert "idle: " in words

    def test_what_does_not_fit_says_how_much_is_missing(self):
        assert "GB too much" in self.picture(replace(SPLIT, recompute="none"))

    def test_everything_lies_inside(self):
        root = ET.fromstring(self.picture(replace(SPLIT, recompute="none", pp=34, tp=4, dp=1, global_batch=68)))
        width = float(root.get("width"))
        for box in root.iter("{http://www.w3.org/2000/svg}rect"):
            assert 0 <= float(box.get("x", "0")) <= float(box.get("x", "0")) + float(box.get("width")) <= width + 0.1

    def test_a_plan_of_one_stage_has_no_pipeline(self):
        one = Split(1, 1, 8, 1, 1, 1, 1, 64, 8192, 3, 1, "none", 1.0, sequence_parallel=False)
        shape = model_named("llama-3.1-8b")
        drawn = timeline(shape, H200, one.plans(), Training())
        assert "Pipeline" not in svg(Titles("a", "b"), candidate(shape, H200, one, Training()), drawn)


def test_many_stages_leave_the_middle_out():
    assert rows_of(3) == [0, 1, 2]
    rows = rows_of(64)
    assert len(rows) == MOST_ROWS + 1
    assert rows.count(None) == 1
    assert (rows[0], rows[-1]) == (0, 63)


def test_the_terminal_shows_the_same():
    drawn = timeline(DENSE, H200, SPLIT.plans(), Training())
    lines = as_text(candidate(DENSE, H200, SPLIT, Training()), drawn, 40)
    rows = [line.split()[1] for line in lines if re.match(r" +\d+  [<>.]+$", line)]
    assert len(rows) == 8
    assert {len(row) for row in rows} == {40}
    assert rows[0].startswith(">")
    assert rows[-1].startswith(".")
    bars = [line for line in lines if re.match(r" +\d+  A+B+C+", line)]
    assert len(bars) == 8
    assert all("|" in bar and "GB" in bar for bar in bars)


class TestWhy:
    def said(self, split=SPLIT):
        return "\n".join(reasons(DENSE, H200, split, Training()))

    def test_each_part_of_a_split_has_its_reason(self):
        said = self.said()
        assert "tensor parallelism 8: within the 8 GPUs of a node" in said
        assert re.search(r"pipeline stages 8: .* with 4 it does not fit \(\d+ GB of \d+", said)
        assert re.search(r"full recomputation: without it does not fit \(\d+ GB of \d+, most of it activations\)", said)
        assert re.search(r"memory: stage 0 holds most, \d+ GB of \d+", said)

    def test_what_cannot_be_run_instead_names_the_rule(self):
        shape = model_named("llama-3.2-3b")  # 24 heads
        split = replace(SPLIT, pp=1, dp=2, global_batch=64, recompute="none")
        assert "with 16 it cannot be run (heads must be a multiple of tp)" in reasons(shape, H200, split, Training())[0]

    def test_half_the_stages_are_those_that_can_be_run(self):
        shape = model_named("llama-3.1-405b")
        ends = replace(SPLIT, pp=16, dp=1, first_layers=7, last_layers=7)
        (said,) = [one for one in reasons(shape, H200, ends, Training()) if one.startswith("pipeline")]
        assert "layers last" in said
        assert "cannot be run" not in said

    def test_fewer_ranks_of_a_tensor_take_the_virtual_stages_that_can_be_run(self):
        """A batch of 16 over dp 4 is 4 micro-batches, no multiple of 8 stages."""
        split = replace(SPLIT, tp=4, vp=2, global_batch=16, recompute="none")
        (said,) = [
            one for one in reasons(model_named("llama-3.1-70b"), H200, split, Training()) if one.startswith("tensor")
        ]
        assert "no virtual stages) a step is" in said
        assert "cannot be run" not in said

    def test_stages_with_layers_of_their_own_and_recomputation_of_the_first_have_their_reasons(self):
        shape = replace(DENSE, layers=126)
        split = replace(SPLIT, first_layers=15, last_layers=15, recomputing=6)
        said = "\n".join(reasons(shape, H200, split, Training()))
        assert (
            "15 layers in the first stage and 15 in the last: with as many in each it cannot be run (layers must be"
            in said
        )
        assert "recomputation in the first 6 of 8 stages: in all a step is" in said
        assert "pipeline stages 8: hold some layers each; with 4 (" in said

    def test_a_plan_without_parts_says_what_its_memory_holds(self):
        one = Split(1, 1, 1, 1, 1, 1, 1, 8, 2048, 0, 1, "none", 1.0, sequence_parallel=False)
        assert reasons(model_named("llama-3.2-1b"), H200, one, Training())[0].startswith("memory: each GPU holds")
