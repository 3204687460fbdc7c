"""Tables of costs: rows by group and by class sum to what the console answered."""

from hypothesis import given
from hypothesis import strategies as st

from whaleflux.cli import cost_words
from whaleflux.cli.cost_filters import groupings
from whaleflux.v1 import console_pb2 as pb

CLASSES = [value for name, value in pb.CostClass.items() if value]


def group(keys, parts):
    classes = [pb.ClassCost(cost_class=name, micros=micros) for name, micros in parts.items()]
    return pb.CostGroup(keys=keys, bill_micros=sum(parts.values()), classes=classes)


def answer_of(groups, others):
    total = {name: sum(g.get(name, 0) for g in [*groups, others]) for name in CLASSES}
    return pb.GetCostResponse(
        groups=[group([f"queues/q{at}"], parts) for at, parts in enumerate(groups)],
        others=group([], others),
        total=group([], {name: micros for name, micros in total.items() if micros}),
    )


def cents(rows, column):
    return [round(100 * float(row[column].replace(",", ""))) for row in rows]


PARTS = st.dictionaries(st.sampled_from(CLASSES), st.integers(1, 10**7).map(lambda cents: 10_000 * cents))


@given(st.lists(PARTS, max_size=3), PARTS)
def test_rows_of_classes_sum_to_the_bill_with_and_without_groups(groups, others):
    answer = answer_of(groups, others)
    for by in ("class", "queue,class", "class,queue"):
        headers, rows = cost_words.by_class(answer, groupings(by))
        assert all(len(row) == len(headers) for row in rows)
        *parts, total = cents(rows, headers.index("USD"))
        assert sum(parts) == total == answer.total.bill_micros // 10_000


@given(st.lists(PARTS, max_size=3), PARTS)
def test_waste_by_class_leaves_out_what_is_none(groups, others):
    answer = answer_of(groups, others)
    headers, rows = cost_words.by_class(answer, groupings("class"), cost_words.NO_WASTE)
    *parts, total = cents(rows, headers.index("USD"))
    assert sum(parts) == total == cost_words.wasted(answer.total) // 10_000


def test_a_table_of_classes_reads_as_people_do():
    answer = answer_of([{pb.COST_CLASS_USEFUL: 3_000_000, pb.COST_CLASS_IDLE: 1_000_000}], {})
    assert cost_words.by_class(answer, ("class",)) == (
        ["CLASS", "USD", "SHARE"],
        [("useful", "3.00", "75.0 %"), ("free", "1.00", "25.0 %"), ("TOTAL", "4.00", "100.0 %")],
    )
