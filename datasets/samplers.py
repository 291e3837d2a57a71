"""Which image goes into which batch, on which rank.

The order of training images depends on the seed and the epoch only, and with blocks of one orientation on the images'
sizes. Global batch g is a fixed window of that order; ranks and accumulation steps merely divide it among themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from datasets.coco import SampleKey

_MASK = 2**64 - 1


def mix_seed(*values: int) -> int:
    """A well-mixed 63-bit seed from some integers (SplitMix64, Steele et al. 2014, folded over them)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class TrainBatchSampler(Sampler[list[SampleKey]]):
    """Yields this rank's micro-batches: those of one optimizer step after the other, ``accumulation_steps`` each.

    Every epoch is a permutation of the data set (or, with weights, as many draws), of which an incomplete last global
    batch is left out (another permutation leaves out others). The sample at place p of the order gets the same seed
    wherever it is processed.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
        total_steps: Callable[[int], int] | None = None,
        weights: Tensor | None = None,
        wide: Tensor | None = None,
        block: int = 1,
    ) -> None:
        """
        Args:
            length: images in the data set.
            batch_size: images in a global batch, over all ranks and accumulation steps.
            seed: of the run.
            rank: of this process.
            world_size: number of processes.
            accumulation_steps: micro-batches of each process in an optimizer step.
            total_steps: length of the training, given the steps of an epoch; None: samples do not know their progress.
            weights: [length] how often each image is drawn, relative to others; None: each once in an epoch.
            wide: [length] bool, which images are wider than high; None: orientation does not matter.
            block: so many images in a row have one orientation; what fills no block is left out of the epoch.

        Raises:
            ValueError: the batch cannot be divided, or is larger than the data set.
        """
        parts = world_size * accumulation_steps
        if batch_size % parts:
            raise ValueError(
                f"data.batch_size={batch_size} must be a multiple of {parts} "
                f"({world_size} processes x {accumulation_steps} accumulation steps)"
            )
        usable = length
        if wide is not None:
            usable = sum(int(count) // block * block for count in (wide.sum(), (~wide).sum()))
        if usable < batch_size:
            raise ValueError(
                f"data.batch_size={batch_size} is more than the {usable} training images"
                f"{f' in whole blocks of {block} of one orientation' if usable < length else ''}: "
                f"lower it to at most {usable}"
            )
        self.length, self.batch_size, self.seed, self.wide, self.block = length, batch_size, seed, wide, block
        self.rank, self.world_size, self.accumulation_steps = rank, world_size, accumulation_steps
        self.micro_batch_size = batch_size // parts
        self.weights = None if weights is None else weights.double() * (length / weights.double().sum())
        self.steps_per_epoch = usable // batch_size
        self.total_steps = None if total_steps is None else total_steps(self.steps_per_epoch)
        self._position = (0, 0)

    def set_position(self, epoch: int, step: int, micro_step: int = 0) -> None:
        """Where the next iteration starts: before this micro-batch of this optimizer step of this epoch."""
        assert 0 <= step <= self.steps_per_epoch, f"step {step} of {self.steps_per_epoch}"
        self._position = (epoch, step * self.accumulation_steps + micro_step)

    def __len__(self) -> int:
        """Micro-batches left in the epoch."""
        return self.steps_per_epoch * self.accumulation_steps - self._position[1]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, first = self._position
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(self.length, generator=generator)
        if self.weights is not None:
            order = _drawn(order, self.weights, generator)
        if self.wide is not None:
            order = _in_blocks(order, self.wide[order], self.block)
        for micro_batch in range(first, self.steps_per_epoch * self.accumulation_steps):
            step, micro_step = divmod(micro_batch, self.accumulation_steps)
            part = micro_step * self.world_size + self.rank
            start = step * self.batch_size + part * self.micro_batch_size
            places = range(start, start + self.micro_batch_size)
            progress = (epoch * self.steps_per_epoch + step) / self.total_steps if self.total_steps else 0.0
            yield [SampleKey(int(order[place]), mix_seed(self.seed, epoch, place), progress) for place in places]


def _drawn(order: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """As many images, each ⌊w⌋ or ⌈w⌉ times and w times in the mean (systematic sampling of an order, then mixed)."""
    ends = weights[order].cumsum(0)
    ends[-1] = len(order)
    places = (ends + torch.rand(1, generator=generator, dtype=torch.float64)).floor().long()
    drawn = order.repeat_interleave(places.diff(prepend=places.new_zeros(1)))
    return drawn[torch.randperm(len(drawn), generator=generator)]


def _in_blocks(order: Tensor, wide: Tensor, block: int) -> Tensor:
    """What of an order fills blocks of equal values of ``wide``, each block standing where its last member stood."""
    of_kind = ((wide == kind).nonzero()[:, 0] for kind in (True, False))
    places = torch.cat([places[: len(places) // block * block].view(-1, block) for places in of_kind])
    return order[places[places[:, -1].argsort()]].flatten()


class EvalBatchSampler(Sampler[list[SampleKey]]):
    """Batches of images of equal size, so that padding cannot reach the metrics; each image is on exactly one rank."""

    def __init__(
        self, sizes: Sequence[tuple[int, int]], batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """
        Args:
            sizes: (height, width) of each image as the model will see it.
            batch_size: the most images in a batch of one process.
            rank: of this process.
            world_size: number of processes.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        batches = [
            members[start : start + batch_size]
            for members in groups.values()
            for start in range(0, len(members), batch_size)
        ]
        # Large batches first and dealt in turn: ranks get alike amounts of work, and memory peaks at the start.
        batches.sort(key=lambda batch: (-sizes[batch[0]][0] * sizes[batch[0]][1] * len(batch), batch[0]))
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in self.batches:
            yield [SampleKey(index, mix_seed(index)) for index in batch]
