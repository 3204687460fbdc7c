"""What held time went into, signal by signal; what no signal tells is unknown and nothing else."""

from dataclasses import replace

import pytest

from whaleflux_console.core.attribution import Attribution
from whaleflux_console.core.facts import WHOLE_PPM, Attempt, Facts, Holding, Plan, Sample, Steps
from whaleflux_console.core.rows import CLASSES

KEY = ("u", 1)
END = 1_000_000
ATTEMPT = Attempt(
    "queues/q/jobs/j", "u", 1, "queues/q", "r/x", "", 0, 0, 0, None,
    communication_s=0.4, best_communication_s=0.1, best_free_communication_s=0.1, cross_node=True, plan=Plan(),
)  # fmt: skip
REPORT = Steps("u", 1, 0, "GPU-0", 0, END, 1, 1000, 100_000, 50_000, 30_000, 20_000, 200_000)
SAID = {"data": 100_000, "host": 50_000, "save": 30_000, "comm_in_node": 20_000}


def holdings(count):
    return tuple(Holding(f"GPU-{i}", "queues/q/jobs/j", "u", 1, WHOLE_PPM, 0, END) for i in range(count))


def split(*steps, attempt=ATTEMPT, samples=(), devices=2, start=0, end=END):
    facts = Facts(attempts=(attempt,), steps=steps, samples=tuple(samples), holdings=holdings(devices))
    return Attribution(facts).of("GPU-0", KEY, start, end)


def told(found):
    """Milliseconds by class, what is not 0."""
    return {kind.value: ms for kind, ms in zip(CLASSES, found.ms, strict=True) if ms}


def sample(start, end, tensor=0, active=0, idle=True):
    return Sample("GPU-0", start, end, tensor, active, idle, "gpm")


class TestSteps:
    def test_their_parts_and_the_rest_is_useful(self):
        found = split(REPORT)
        assert told(found) == SAID | {"comm_structural": 50_000, "comm_avoidable": 150_000, "useful": 600_000}
        assert found.measured
        assert found.modelled  # the two kinds of communication across nodes are told apart by a model
        assert not found.blind

    def test_within_a_node_all_is_measured(self):
        found = split(replace(REPORT, comm_cross_ms=None), attempt=replace(ATTEMPT, cross_node=False))
        assert told(found) == SAID | {"useful": 800_000}
        assert (found.measured, found.modelled) == (True, False)

    def test_one_gpu_talks_to_nobody_and_needs_no_plan(self):
        alone = replace(REPORT, comm_in_node_ms=None, comm_cross_ms=None)
        found = split(alone, attempt=replace(ATTEMPT, cross_node=False, plan=None), devices=1)
        assert told(found) == {"data": 100_000, "host": 50_000, "save": 30_000, "useful": 820_000}

    def test_part_of_a_report_is_that_part_of_each(self):
        assert told(split(REPORT, start=250_000, end=500_000)) == {
            kind: ms // 4 for kind, ms in told(split(REPORT)).items()
        }

    def test_what_is_told_twice_counts_once_and_what_overlaps_is_the_first_ones(self):
        again = replace(REPORT, first_step=1001, last_step=2000, data_ms=END)
        assert told(split(REPORT, REPORT, again)) == told(split(REPORT))
        late = replace(
            again,
            start_ms=900_000,
            end_ms=1_100_000,
            data_ms=200_000,
            host_ms=0,
            save_ms=0,
            comm_in_node_ms=0,
            comm_cross_ms=0,
        )
        assert told(split(late, replace(REPORT, end_ms=900_000), end=1_000_000))["data"] == 200_000

    def test_a_claim_beyond_its_time_is_scaled_to_it(self):
        found = told(
            split(replace(REPORT, data_ms=4 * END, host_ms=4 * END, save_ms=0, comm_in_node_ms=0, comm_cross_ms=0))
        )
        assert found == {"data": END // 2, "host": END // 2}

    def test_another_ranks_report_says_nothing_of_this_device(self):
        assert told(split(replace(REPORT, device="GPU-1", rank=1))) == {"unknown": END}


class TestPlan:
    PLAN = Plan(pipeline=4, virtual_stages=2, micro_batches=6, recompute_share_ppm=250_000)

    def test_stages_wait_and_forward_work_is_done_again(self):
        quiet = replace(REPORT, data_ms=200_000, host_ms=0, save_ms=0, comm_in_node_ms=0, comm_cross_ms=0)
        found = split(quiet, attempt=replace(ATTEMPT, plan=self.PLAN))
        assert told(found) == {"data": 200_000, "bubble": 160_000, "recompute": 160_000, "useful": 480_000}
        assert found.modelled

    def test_without_one_the_rest_of_several_gpus_is_unknown(self):
        found = split(REPORT, attempt=replace(ATTEMPT, plan=None))
        assert told(found)["unknown"] == 600_000
        assert "useful" not in told(found)


class TestWhatIsNotSaid:
    def test_of_the_host_alone_is_within_the_rest_and_flagged(self):
        found = split(replace(REPORT, host_ms=None))
        assert told(found)["useful"] == 650_000
        assert found.modelled

    def test_of_the_host_is_unknown_as_far_as_counters_saw_nothing_run(self):
        ran = [Sample("GPU-0", 0, END, None, None, None, "nvml", busy_ppm=700_000)]
        found = told(split(replace(REPORT, host_ms=None), samples=ran))
        assert found["unknown"] == 300_000 - 130_000  # data and saves are waits that are known
        assert found["useful"] == 650_000 - 170_000

    def test_of_communication_is_unknown_where_the_score_is_of_another_model(self):
        found = told(split(replace(REPORT, comm_cross_ms=None), attempt=replace(ATTEMPT, of_its_model=False)))
        assert found == SAID | {"unknown": 800_000}

    @pytest.mark.parametrize("field", ["data_ms", "save_ms"])
    def test_of_a_part_makes_the_rest_unknown_and_no_other_part_more(self, field):
        full, found = told(split(REPORT)), told(split(replace(REPORT, **{field: None})))
        assert found.pop("unknown") == 600_000 + getattr(REPORT, field)
        assert found.items() <= full.items()
        assert "useful" not in found

    def test_of_communication_is_modelled_and_flagged(self):
        found = split(replace(REPORT, comm_cross_ms=None))
        assert found.modelled
        cross = 1000 * 400 - 20_000
        assert told(found) == SAID | {
            "comm_structural": cross // 4,
            "comm_avoidable": cross * 3 // 4,
            "useful": 800_000 - cross,
        }
        both = split(
            replace(REPORT, comm_in_node_ms=None, comm_cross_ms=None), attempt=replace(ATTEMPT, cross_node=False)
        )
        assert told(both)["comm_in_node"] == 400_000

    @pytest.mark.parametrize("no_score", [None, float("nan"), float("inf"), -1.0])
    def test_of_communication_without_a_model_is_unknown(self, no_score):
        blind = replace(ATTEMPT, communication_s=no_score)
        found = told(split(replace(REPORT, comm_cross_ms=None), attempt=blind))
        assert found == SAID | {"unknown": 800_000}

    def test_of_the_best_placement_leaves_communication_across_nodes_unknown(self):
        found = told(split(REPORT, attempt=replace(ATTEMPT, best_free_communication_s=None)))
        assert found == SAID | {"useful": 600_000, "unknown": 200_000}

    def test_tensor_pipes_prove_that_it_computed(self):
        counters = [sample(0, END, tensor=300_000, active=900_000, idle=False)]
        found = split(replace(REPORT, data_ms=None), samples=counters)
        assert (told(found)["useful"], told(found)["unknown"]) == (300_000, 400_000)
        assert found.modelled

    def test_of_the_attempt_makes_all_unknown(self):
        found = Attribution(Facts(holdings=holdings(1), steps=(REPORT,))).of("GPU-0", KEY, 0, END)
        assert told(found) == {"unknown": END}


class TestIdle:
    def test_counters_at_rest_for_five_minutes(self):
        at_rest = [sample(at, at + 10_000) for at in range(100_000, 400_000, 10_000)]
        assert told(split(samples=at_rest)) == {"allocated_idle": 300_000, "unknown": 700_000}
        assert told(split(samples=at_rest[:-1])) == {"unknown": END}
        assert told(split(samples=at_rest[:10] + at_rest[11:])) == {"unknown": END}

    @pytest.mark.parametrize(
        "unlike", [{"active": None}, {"idle": None}, {"idle": False}, {"tensor": 1}, {"active": 10_000}]
    )
    def test_what_they_do_not_say_is_no_rest(self, unlike):
        found = told(split(samples=[sample(0, END, **unlike)]))
        assert "allocated_idle" not in found

    def test_tensor_pipes_need_not_be_known(self):
        assert told(split(samples=[sample(0, END, tensor=None)])) == {"allocated_idle": END}

    def test_no_step_for_long_and_none_missing(self):
        before = replace(
            REPORT,
            end_ms=300_000,
            first_step=1,
            last_step=300,
            data_ms=0,
            host_ms=0,
            save_ms=0,
            comm_in_node_ms=0,
            comm_cross_ms=0,
        )
        after = replace(before, start_ms=700_000, end_ms=END, first_step=301, last_step=600)
        assert told(split(before, after)) == {"useful": 600_000, "allocated_idle": 400_000}
        busy = [sample(500_000, 600_000, tensor=500_000, active=900_000, idle=False)]
        assert told(split(before, after, samples=busy))["allocated_idle"] == 300_000
        lost = replace(after, first_step=302, last_step=601)
        assert told(split(before, lost)) == {"useful": 600_000, "unknown": 400_000}
        soon = replace(after, start_ms=350_000)
        assert told(split(before, soon))["unknown"] == 50_000

    def test_a_step_that_takes_far_longer_than_others(self):
        calm = [
            replace(REPORT, start_ms=at, end_ms=at + 100_000, first_step=at // 1000, last_step=at // 1000 + 99,
                    data_ms=0, host_ms=0, save_ms=0, comm_in_node_ms=0, comm_cross_ms=0)
            for at in range(0, 500_000, 100_000)
        ]  # fmt: skip
        hung = replace(calm[-1], start_ms=500_000, end_ms=END, first_step=500, last_step=599)
        assert told(split(*calm, hung)) == {"useful": 600_000, "allocated_idle": 400_000}
        waited = replace(hung, data_ms=400_000)
        assert told(split(*calm, waited)) == {"useful": 600_000, "data": 400_000}


class TestPhases:
    FAILED = replace(
        ATTEMPT,
        first_step_ms=100_000,
        end_ms=900_000,
        failed=True,
        last_step=800,
        last_saved_step=600,
        last_saved_ms=650_000,
    )

    def test_startup_then_work_then_in_vain(self):
        steps = replace(REPORT, start_ms=100_000, end_ms=900_000, first_step=1, last_step=800)
        found = told(split(steps, attempt=self.FAILED))
        assert (found["startup"], found["lost"]) == (100_000, 300_000)
        assert sum(found.values()) == END

    def test_modelled_when_no_step_times_are_there(self):
        found = split(attempt=self.FAILED)
        assert told(found) == {"startup": 100_000, "unknown": 550_000, "lost": 350_000}
        assert found.modelled
        assert not split(attempt=self.FAILED, end=500_000).modelled
