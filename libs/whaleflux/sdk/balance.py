"""Data-parallel training on GPUs of different speeds: each rank takes samples by its speed, gradients are those of the global batch.

    balance = Balance(dataset, global_batch=256, model=model)      # instead of DistributedSampler
    for inputs, targets in DataLoader(dataset, batch_sampler=balance):
        loss = balance.weigh(loss_of(model(inputs), targets))      # the loss: a mean over the samples of this rank
        loss.backward(); optimizer.step(); optimizer.zero_grad()

DDP and FSDP2 average gradients over ranks. With the loss of rank r weighed by ranks x n_r / n, that average is the gradient of the mean over all n
samples of the step, as it is with an even split. Which samples a step has depends on seed, epoch and step alone, never on shares: those say only
who computes them. So each sample is trained once in an epoch whatever speeds do, and another number of ranks goes on where the last one was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import nn

from whaleflux.planning.whole_shares import dealt, moved
from whaleflux.sdk.agreement import Agreement
from whaleflux.sdk.balance_settings import Told, even_ones, first_speed, planned_shares, settled
from whaleflux.sdk.forward_timer import ForwardTimer
from whaleflux.sdk.micro_batches import piece, samples_of, without_exchange
from whaleflux.sdk.uneven import Epoch, Position, Timeline, part_of, shares_of

log = logging.getLogger(__name__)


class Balance:
    """A batch sampler whose batches are as large as this rank is fast; every rank makes one, with the same arguments.

    `global_batch` is in samples of all ranks. It, `micro_batch` and speeds are the plan's (the variable BALANCE) where they are not given. `model` (as DDP or fully_shard made it) is timed, and shares follow what was measured each
    `every_steps` steps, by at most a quarter at once and not for less than 3 %; without it they stay. `speed`: this rank's, in any unit that is
    the same on all ranks, to begin with; else the catalogue's of its GPU, or the same for all where one is not known. `largest_batch`: the most
    samples that this rank's memory holds at once. `micro_batch`: batches are cut into parts of so many samples (`parts`), shares are whole parts.
    With tensor or pipeline parallelism `rank` and `num_replicas` are those of the data-parallel dimension, as DistributedSampler has them.

    Making one, and each `every_steps`-th step, is a collective of all ranks over gloo. Raises ValueError, on all ranks alike, for what cannot be.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        global_batch: int | None = None,
        model: nn.Module | None = None,
        micro_batch: int | None = None,
        largest_batch: int | None = None,
        speed: float | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        num_replicas: int | None = None,
        every_steps: int = 20,
        timeout_s: float = 1800.0,
    ) -> None:
        planned = planned_shares()
        global_batch, micro_batch = global_batch or planned.global_batch, micro_batch or planned.micro_batch
        if global_batch is None:
            raise ValueError(
                "global_batch is missing, and no plan says it in BALANCE: give Balance the samples of a step"
            )
        self._agreement = Agreement(timeout_s)
        self._rank = self._agreement.rank if rank is None else rank
        self._replicas = self._agreement.world_size if num_replicas is None else num_replicas
        self._plan = Epoch(len(dataset), global_batch, self._replicas, drop_last)
        self._unit, self._shuffle, self._seed, self._every = micro_batch or 1, shuffle, seed, every_steps
        common = (len(dataset), global_batch, self._replicas, drop_last, micro_batch, shuffle, seed, every_steps)
        told = Told(self._rank, first_speed(model, planned) if speed is None else speed, largest_batch, common)
        self._members = settled(self._agreement.gather(told))
        self._most = [min(one.largest or self._plan.largest, self._plan.largest) for one in self._members]
        self._timeline = Timeline(self._first_shares())
        self._micro, self._model = micro_batch, model
        self._timer = ForwardTimer(model) if model is not None else None
        self._position: Position = (0, 0)
        self._drawn: Position = (0, -1)
        self._passed: Position | None = None  # where the last reading began
        self._part: int | None = None

    def _first_shares(self) -> tuple[int, ...]:
        each_s = even_ones([one.speed for one in self._members])
        return self._dealt(each_s)

    def _dealt(self, each_s: list[float]) -> tuple[int, ...]:
        units, most = self._plan.batch // self._unit, [high // self._unit for high in self._most]
        return tuple(one * self._unit for one in dealt(units, each_s, [1] * len(most), most))

    # a batch sampler

    def __len__(self) -> int:
        """Steps of an epoch, the same on all ranks."""
        return self._plan.steps

    def set_epoch(self, epoch: int) -> None:
        """Begins that epoch; the one that is under way goes on."""
        if epoch != self._position[0]:
            self._go_to((epoch, 0))

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of this rank's samples, step by step, from the first step that was not trained; after the last, the next epoch's."""
        self._warn_unweighed()
        if self._position[1] >= len(self):
            self._go_to((self._position[0] + 1, 0))
        epoch, first = self._passed = self._position
        self._drawn = (epoch, first - 1)
        order = self._order(epoch)
        for step in range(first, len(self)):
            self._drawn = (epoch, step)
            part = part_of(self._plan.span(step), self._shares_at((epoch, step)), self._rank)
            yield order[part.start : part.stop].tolist()

    def _order(self, epoch: int) -> torch.Tensor:
        if not self._shuffle:
            return torch.arange(self._plan.samples)
        return torch.randperm(self._plan.samples, generator=torch.Generator().manual_seed(self._seed + epoch))

    def _go_to(self, position: Position) -> None:
        self._position, self._drawn = position, (position[0], position[1] - 1)
        self._timeline.restart()

    def _shares_at(self, position: Position) -> tuple[int, ...]:
        return shares_of(len(self._plan.span(position[1])), self._timeline.at(position), self._most)

    def _warn_unweighed(self) -> None:
        uneven = len(set(self._timeline.newest)) > 1
        if uneven and self._passed == self._position and self._drawn[1] >= len(self) - 1:
            log.warning(
                "an epoch was read and no loss was weighed: ranks have different numbers of samples, call Balance.weigh(loss)"
            )

    # the training loop

    @property
    def shares(self) -> tuple[int, ...]:
        """Samples of each rank in the step that is trained next."""
        return self._timeline.at(self._position)

    def weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """The mean loss of this rank's batch, or part, as it counts in the global batch; once for each. Its mean over ranks is the global mean."""
        if self._position > self._drawn:
            raise RuntimeError(
                "Balance.weigh was called more often than batches were read: once for each batch (or part), with the sum of its losses"
            )
        shares = self._shares_at(self._position)
        samples = shares[self._rank] if self._part is None else self._part
        weight = self._replicas * samples / sum(shares)
        if self._timer is not None:
            self._timer.trained(samples)
        if self._part is None:
            self._step_ends()
        return loss * weight

    def parts(self, batch: Any) -> Iterator[Any]:
        """A batch in parts of at most `micro_batch` samples; gradients are exchanged with the last one. Weigh the loss of each, step after all.

        Cut are tensors along their first dimension. Raises ValueError where the batch has not the samples that were drawn.
        """
        count, drawn = samples_of(batch), self._shares_at(self._position)[self._rank]
        if count != drawn:
            raise ValueError(
                f"the batch has {count} samples and {drawn} were drawn: give parts() what the loader gave, before anything else is done"
            )
        size = self._micro or count
        for begin in range(0, count, size):
            self._part = min(size, count - begin)
            with without_exchange(self._model, last=begin + size >= count):
                yield piece(batch, slice(begin, begin + self._part), count)
        self._part = None
        self._step_ends()

    def _step_ends(self) -> None:
        epoch, step = self._position
        self._position = (epoch, step + 1)
        if self._timer is not None and (epoch * len(self) + step + 1) % self._every == 0:
            self._rebalance(self._timer.sample_s())

    def _rebalance(self, sample_s: float | None) -> None:
        """All ranks hear what all measured, and decide the same; from a step on that nobody has read yet."""
        told = self._agreement.gather((self._rank, sample_s, self._drawn))
        each_s = [0.0] * self._replicas
        for replica, measured, _ in told:
            if not measured:
                return
            each_s[replica] = max(each_s[replica], measured)
        epoch, step = max(drawn for _, _, drawn in told)
        before, unit = self._timeline.newest, self._unit
        wanted = moved([one // unit for one in before], each_s, [high // unit for high in self._most])
        after = tuple(one * unit for one in wanted)
        if after != before:
            self._timeline.change((epoch, step + 1), after, self._position)
            if self._agreement.rank == 0:
                log.info(
                    "samples of a step by rank: %s, from step %d of epoch %d; before: %s",
                    after,
                    step + 1,
                    epoch,
                    before,
                )

    # checkpoints: Checkpointer(data=balance)

    def state_dict(self) -> dict[str, Any]:
        """Behind the last step whose loss was weighed."""
        epoch, step = self._position
        return {
            "version": 1, "epoch": epoch, "step": step, "shares": list(self._timeline.newest), "members": [one.kind for one in self._members],
            "samples": self._plan.samples, "global_batch": self._plan.batch, "seed": self._seed, "shuffle": self._shuffle,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on there. Shares are kept where the ranks are of the same kinds, else they begin anew. Raises ValueError for another data set or batch."""
        here = self.state_dict()
        for name in ("samples", "global_batch", "seed", "shuffle"):
            if state[name] != here[name]:
                raise ValueError(
                    f"{name} was {state[name]} when the state was saved and is {here[name]} now, so its steps are others: use the same, or begin anew"
                )
        self._go_to((int(state["epoch"]), int(state["step"])))
        same = state["members"] == here["members"] and all(one % self._unit == 0 for one in state["shares"])
        self._timeline.restart(state["shares"] if same else self._first_shares())

    def load_world_state(self, states: list[dict[str, Any]], rank: int, world_size: int) -> None:
        """Of another number of ranks: where the training stood is the same for all of them."""
        self.load_state_dict(states[0])
