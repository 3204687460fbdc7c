"""Balance in one process: what it refuses, what it reads, and where it goes on."""

import copy
import itertools

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from whaleflux.sdk import Balance  # noqa: E402
from whaleflux.sdk.balance_settings import Told, first_speed, planned_shares, settled  # noqa: E402
from whaleflux.sdk.forward_timer import ForwardTimer  # noqa: E402
from whaleflux.sdk.micro_batches import piece, samples_of  # noqa: E402

DATA = TensorDataset(torch.arange(20.0).reshape(-1, 1), torch.arange(20.0))


def told(replicas=2, **changes):
    """Of as many ranks; a list given stands for one value each."""
    given = {
        "samples": 100, "global_batch": 12, "num_replicas": replicas, "drop_last": False, "micro_batch": None, "shuffle": True, "seed": 0,
        "every_steps": 20, "speed": None, "largest": None, "rank": list(range(replicas)),
    } | changes  # fmt: skip
    ranks = max([replicas, *(len(value) for value in given.values() if isinstance(value, list))])
    each = [
        {name: value[rank] if isinstance(value, list) else value for name, value in given.items()}
        for rank in range(ranks)
    ]
    return [Told(one.pop("rank"), one.pop("speed"), one.pop("largest"), tuple(one.values())) for one in each]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"global_batch": [12, 13]}, "global_batch differs between ranks"),
        ({"seed": [1, 2]}, "seed differs between ranks"),
        ({"global_batch": 0}, "global_batch=0 must be a whole number"),
        ({"global_batch": 12.0}, "global_batch=12.0 must be a whole number"),
        ({"global_batch": 1}, "give each of 2 ranks one part"),
        ({"micro_batch": 5}, "must be a multiple of micro_batch=5"),
        ({"micro_batch": 12}, "give each of 2 ranks one part"),
        ({"micro_batch": 0}, "micro_batch=0 must be"),
        ({"every_steps": 0}, "every_steps=0 must be"),
        ({"samples": 1}, "the data set has 1 samples"),
        ({"samples": 11, "drop_last": True}, "the data set has 11 samples"),
        ({"speed": [1.0, float("nan")]}, "speed=nan of replica 1"),
        ({"speed": [1.0, -1.0]}, "speed=-1.0 of replica 1"),
        ({"largest": [6, 5]}, "largest_batch of all ranks holds 11 samples, global_batch=12 needs 13"),
        ({"largest": [20, 0]}, "largest_batch=0 must be"),
        ({"micro_batch": 4, "largest": [20, 3]}, "each rank takes one part at least"),
        ({"rank": [0, 0]}, "no rank is replica 1"),
    ],
)
def test_what_cannot_be_is_refused_with_a_fix(changes, said):
    with pytest.raises(ValueError, match=said):
        settled(told(**changes))


def test_a_replica_is_as_fast_as_its_slowest_rank_and_holds_what_its_smallest_does():
    members = settled(told(rank=[0, 0, 1, 1], speed=[3.0, 2.0, 1.0, 4.0], largest=[None, 9, 8, 7]))
    assert [one.kind for one in members] == [[2.0, 9], [1.0, 7]]


def read(balance, steps, weighed=True):
    """Samples of the next steps."""
    found = []
    for indices in balance:
        found.append(indices)
        if weighed:
            balance.weigh(torch.ones(()))
        if len(found) == steps:
            break
    return found


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def test_epochs_follow_one_another_and_each_has_every_sample_once():
    balance = Balance(DATA, global_batch=6)
    first, second = read(balance, 9), read(balance, 9)
    assert len(first) == len(balance) == 4
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(20))
    assert first != second


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_restored_one_goes_on_behind_the_last_step_that_was_trained(ahead):
    whole = read(Balance(DATA, global_batch=6), 9)
    balance = Balance(DATA, global_batch=6)
    reading = iter(balance)
    drawn = [next(reading) for _ in range(1 + ahead)]
    balance.weigh(torch.ones(()))
    again = Balance(DATA, global_batch=6)
    again.load_state_dict(copy.deepcopy(balance.state_dict()))
    assert drawn[:1] + read(again, 9) == whole


def test_set_epoch_of_the_epoch_that_is_under_way_changes_nothing():
    balance = Balance(DATA, global_batch=6)
    first = read(balance, 2)
    balance.set_epoch(0)
    assert sorted(flat(first + read(balance, 9))) == list(range(20))
    balance.set_epoch(7)
    assert balance.state_dict()["epoch"] == 7
    assert flat(read(balance, 9)) == flat(read_of(7))


def read_of(epoch):
    balance = Balance(DATA, global_batch=6)
    balance.set_epoch(epoch)
    return read(balance, 9)


def test_the_same_epoch_is_read_again_where_no_loss_was_weighed():
    balance = Balance(DATA, global_batch=6)
    assert read(balance, 9, weighed=False) == read(balance, 9, weighed=False)


def test_a_state_of_other_data_is_refused():
    state = Balance(DATA, global_batch=6).state_dict()
    with pytest.raises(ValueError, match="global_batch was 6 when the state was saved and is 5 now"):
        Balance(DATA, global_batch=5).load_state_dict(state)


def test_weighing_more_often_than_reading_is_told():
    balance = Balance(DATA, global_batch=6)
    read(balance, 1)
    with pytest.raises(RuntimeError, match="once for each batch"):
        balance.weigh(torch.ones(()))


def test_parts_have_the_samples_of_the_batch_and_weights_of_one_mean():
    balance = Balance(DATA, global_batch=6, micro_batch=2)
    values, weighed = [], 0.0
    for inputs, _ in DataLoader(DATA, batch_sampler=balance):
        for part, targets in balance.parts((inputs, inputs)):
            assert len(part) == len(targets) <= 2
            values += part.flatten().tolist()
            weighed += balance.weigh(part.mean()).item()
    assert sorted(values) == list(range(20))
    steps = [values[start : start + 6] for start in range(0, 20, 6)]
    assert weighed == pytest.approx(sum(sum(step) / len(step) for step in steps))


def test_parts_of_another_batch_are_refused():
    balance = Balance(DATA, global_batch=6, micro_batch=2)
    next(iter(balance))
    with pytest.raises(ValueError, match="the batch has 3 samples and 6 were drawn"):
        next(balance.parts(torch.ones(3)))


def test_batches_of_any_form_are_cut():
    batch = {
        "ids": torch.arange(8).reshape(4, 2),
        "names": ["a", "b", "c", "d"],
        "pair": (torch.arange(4), 7),
        "scale": torch.ones(()),
    }
    found = piece(batch, slice(1, 3), samples_of(batch))
    assert found["ids"].tolist() == [[2, 3], [4, 5]]
    assert found["names"] == ["b", "c"]
    assert (found["pair"][0].tolist(), found["pair"][1], found["scale"].item()) == ([1, 2], 7, 1.0)
    with pytest.raises(ValueError, match="let collate_fn stack samples into tensors"):
        samples_of(["text"])


class Ticks:
    """A clock that goes on by what the model says."""

    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_only_forward_passes_that_train_are_timed():
    clock = Ticks()

    class Slow(nn.Linear):
        def forward(self, inputs):
            clock.now_s += len(inputs) * 0.5
            return super().forward(inputs)

    model = Slow(1, 1)
    timer = ForwardTimer(model, clock)
    assert timer.sample_s() is None
    for size in (4, 8, 8):
        model(torch.ones(size, 1))
        timer.trained(size)
    with torch.no_grad():
        model(torch.ones(100, 1))
    timer.trained(1)
    model.eval()
    model(torch.ones(100, 1))
    timer.trained(1)
    assert timer.sample_s() == pytest.approx(0.5)
    assert timer.sample_s() is None


PLANNED = '{"global_batch": 8, "micro_batch": 2, "samples": {"H100-80GB": 18.0, "A100-80GB": 7.0}}'


def test_a_plan_says_the_batch_its_parts_and_the_first_speeds(monkeypatch):
    monkeypatch.setenv("BALANCE", PLANNED)
    planned = planned_shares()
    assert first_speed(None, planned, "H100-80GB") / first_speed(None, planned, "A100-80GB") == 18 / 7
    assert first_speed(None, planned, "RTX4090") is None  # of another unit than these
    balance = Balance(DATA, shuffle=False)
    batches = list(balance)
    assert [len(one) for one in batches] == [8, 8, 4]
    assert [len(part[0]) for part in balance.parts(next(iter(DataLoader(DATA, batch_size=8))))] == [2, 2, 2, 2]


def test_what_the_script_says_goes_before_the_plan(monkeypatch):
    monkeypatch.setenv("BALANCE", PLANNED)
    assert len(next(iter(Balance(DATA, global_batch=5, micro_batch=1)))) == 5


@pytest.mark.parametrize(
    "said",
    [
        "{",
        "[]",
        "3",
        '{"global_batch": 8}',
        '{"global_batch": 0, "samples": {}}',
        '{"global_batch": 8, "samples": {"H200": -1}}',
    ],
)
def test_what_no_plan_wrote_is_refused_with_the_command_that_does(monkeypatch, said):
    monkeypatch.setenv("BALANCE", said)
    with pytest.raises(ValueError, match=r"BALANCE .*make it with whaleflux plan"):
        Balance(DATA)


def test_a_batch_that_nobody_says_is_asked_for(monkeypatch):
    monkeypatch.delenv("BALANCE", raising=False)
    with pytest.raises(ValueError, match="global_batch is missing"):
        Balance(DATA)
