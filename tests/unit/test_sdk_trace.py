"""What a step was made of, from made-up traces: milliseconds, a step from 100 to 200 on the CPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.sdk.trace import Event, Places, TracedStep, common, length_ns, merged, of_cpu, of_gpu, without

MS = 1_000_000
HERE, MIXED = Places(True), Places(None, {"tp": True, "dp": False})


def kernel(name, start, end, launched, operator=0):
    """And the call that launched it."""
    kernel.calls += 1
    call = Event("cudaLaunchKernel", launched * MS, launched * MS + 1000, call=kernel.calls)
    return [call, Event(name, start * MS, end * MS, on_gpu=True, call=kernel.calls, operator=operator)]


kernel.calls = 1000


def operator(number, group, collective):
    return [Event("record_param_comms", 0, 1, call=number, group=group, collective=collective)]


def on_gpu(*events, waits=(), places=HERE):
    waits = [(start * MS, end * MS) for start, end in waits]
    return of_gpu([one for pair in events for one in pair], 100 * MS, 200 * MS, waits, places)


BEFORE = kernel("gemm", 60, 110, 90)


def told(step):
    return [
        None if part is None else round(part * 1000)
        for part in (step.whole_s, step.host_s, step.in_node_s, step.cross_s)
    ]


def test_a_gpu_that_always_has_something_to_do_waits_for_nobody():
    seen = on_gpu(BEFORE, kernel("gemm", 110, 160, 101), kernel("gemm", 160, 210, 110), kernel("gemm", 210, 300, 201))
    assert told(seen) == [100, 0, 0, 0], "what was launched after the step is the next one's"


def test_gaps_are_the_host_s_but_for_those_while_it_waits_for_data():
    seen = on_gpu(BEFORE, kernel("gemm", 150, 160, 149), kernel("gemm", 180, 210, 180), waits=[(101, 140)])
    assert told(seen) == [70, 30, 0, 0], "30 of 100 were a wait for data: from 110, when the GPU was done, to 140"


def test_what_a_gpu_needs_from_one_kernel_to_the_next_is_its_own():
    seen = on_gpu(BEFORE, kernel("gemm", 112, 150, 105), kernel("gemm", 153, 160, 152))
    assert told(seen) == [50, 3, 0, 0]


def test_copies_keep_a_gpu_busy_and_hide_no_communication():
    seen = on_gpu(
        BEFORE,
        kernel("Memcpy HtoD (Pinned -> Device)", 110, 130, 105),
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 120, 150, 106),
        kernel("gemm", 140, 180, 107),
    )
    assert told(seen) == [70, 0, 20, 0]


def test_a_graph_is_launched_by_one_call_and_waits_for_no_other():
    call = Event("cudaGraphLaunch", 105 * MS, 106 * MS, call=7)
    ran = [Event("gemm", at * MS, (at + 10) * MS, on_gpu=True, call=7) for at in (110, 130)]
    assert told(on_gpu(BEFORE, [call, *ran])) == [30, 0, 0, 0]


def test_groups_say_where_a_collective_was():
    seen = on_gpu(
        BEFORE,
        operator(1, "tp", "allreduce"),
        operator(2, "dp", "_reduce_scatter_base"),
        kernel("ncclDevKernel_AllReduce", 110, 120, 101, operator=1),
        kernel("gemm", 120, 130, 102),
        kernel("ncclDevKernel_ReduceScatter", 125, 160, 103, operator=2),
        kernel("ncclDevKernel_AllReduce", 150, 170, 104, operator=1),
        places=MIXED,
    )
    assert told(seen) == [60, 0, 20, 30], "both at once count as across nodes"


def test_a_collective_of_which_nobody_says_where_it_was_leaves_both_unknown():
    seen = on_gpu(BEFORE, kernel("ncclDevKernel_AllReduce", 110, 120, 101), kernel("gemm", 120, 130, 102), places=MIXED)
    assert told(seen) == [20, 0, None, None]


def test_unless_it_was_hidden():
    seen = on_gpu(BEFORE, kernel("ncclDevKernel_AllReduce", 110, 120, 101), kernel("gemm", 110, 130, 102), places=MIXED)
    assert told(seen) == [20, 0, 0, 0]


@pytest.mark.parametrize(
    ("collective", "in_node"), [("all_to_allv", 10), ("all_to_all", 10), ("recv", 0), ("send", 0), (None, None)]
)
def test_stages_that_wait_for_each_other_do_not_communicate_and_experts_do(collective, in_node):
    names = operator(1, "ep", collective) if collective else []
    seen = on_gpu(BEFORE, names, kernel("ncclDevKernel_SendRecv", 110, 120, 101, operator=1 if collective else 0))
    assert told(seen)[:3] == [10, 0, in_node]


def test_a_trace_without_kernels_says_nothing():
    assert on_gpu([Event("cudaDeviceSynchronize", 110 * MS, 120 * MS, call=1)]) is None


def on_cpu(*events, places=HERE):
    return of_cpu(events, 100 * MS, 200 * MS, [(100 * MS, 110 * MS)], places)


def ran(name, start, end, thread=1, **more):
    return Event(name, start * MS, end * MS, thread=thread, **more)


def test_on_a_cpu_operators_hide_what_gloo_does():
    seen = on_cpu(
        ran("aten::mm", 110, 140),
        ran("gloo:all_reduce", 120, 180, thread=2, is_async=True),
        ran("aten::copy_", 170, 180, thread=2),
        ran("aten::add", 150, 160),
    )
    assert told(seen) == [90, None, 30, 0]


def test_an_operator_that_waits_within_computes_nothing():
    seen = on_cpu(
        ran("aten::sum", 110, 170),
        ran("_c10d_functional::wait_tensor", 115, 165),
        ran("gloo:all_reduce", 112, 165, thread=2, is_async=True),
    )
    assert told(seen) == [90, None, 50, 0]


def test_on_a_cpu_over_nodes_no_group_is_named():
    exposed = ran("gloo:all_reduce", 120, 180, thread=2, is_async=True)
    assert told(on_cpu(ran("aten::mm", 110, 120), exposed, places=MIXED)) == [90, None, None, None]
    assert told(on_cpu(ran("aten::mm", 110, 120), exposed, places=Places(False))) == [90, None, 0, 60]


def test_a_cpu_that_ran_no_operator_says_nothing():
    assert on_cpu(ran("gloo:all_reduce", 120, 180, is_async=True)) is None


INTERVALS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: tuple(sorted(pair))), max_size=12
)


def points(intervals):
    return {at for start, end in intervals for at in range(start, end)}


@given(INTERVALS, INTERVALS)
def test_intervals_are_sets_of_points(one, other):
    a, b = merged(one), merged(other)
    assert points(a) == points(one)
    assert points(without(a, b)) == points(one) - points(other)
    assert points(common(a, b)) == points(one) & points(other)
    assert length_ns(a) == len(points(one))


KERNELS = st.lists(
    st.tuples(
        st.sampled_from(["gemm", "ncclDevKernel_AllReduce", "Memcpy DtoH"]), st.integers(90, 220), st.integers(0, 40),
        st.integers(80, 199), st.sampled_from([0, 1, 2]),
    ),
    max_size=20,
)  # fmt: skip


@given(KERNELS, st.tuples(st.integers(90, 150), st.integers(0, 60)))
def test_parts_are_no_more_than_the_step(kernels, wait):
    events = [
        kernel(name, start, start + took, min(launched, start), op) for name, start, took, launched, op in kernels
    ]
    seen = on_gpu(operator(1, "tp", "x"), operator(2, "dp", "x"), *events, waits=[(wait[0], sum(wait))], places=MIXED)
    seen = seen or TracedStep(0.0, 0.0, 0.0, 0.0)
    assert seen.host_s + (seen.in_node_s or 0.0) + (seen.cross_s or 0.0) <= seen.whole_s + 1e-12
