"""Data sets, augmentation and loading.

The index of data sets is ``DatasetConfig``, that of transforms ``Transform``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from datasets.annotations import Category, CleaningReport
from datasets.coco import CocoConfig, CocoDataset
from datasets.collate import Collate
from datasets.loaders import EvalLoader, TrainLoader, WorkerPool, WorkerStart
from datasets.samplers import EvalBatchSampler, TrainBatchSampler, mix_seed
from datasets.sampling import Sampling, Uniform
from datasets.transforms import Transform, final_size

__all__ = [
    "Category",
    "CleaningReport",
    "CocoConfig",
    "CocoDataset",
    "DataConfig",
    "DatasetConfig",
    "EvalLoader",
    "TrainLoader",
    "Transform",
    "mix_seed",
]

DatasetConfig = CocoConfig
"""A further kind of data set joins here, as `CocoConfig | OtherConfig`, told apart by ``name``."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and validation data, and how they are loaded."""

    train: DatasetConfig
    """The training split."""
    val: DatasetConfig
    """The split that is evaluated."""
    sampling: Sampling = field(default_factory=Uniform)
    """How often each training image is drawn in an epoch, picked by name."""
    batch_size: int = 16
    """Images in an optimizer step, over all processes and accumulation steps."""
    skip_empty: bool = False
    """Leave images without a usable box out of training (detectron2's filter_empty)."""
    one_orientation: int = 1
    """So many images in a row, of which batches are cut, are all wider than high or none is (detectron2's aspect-ratio
    grouping, whose groups are the images of one GPU); 1: any mixture."""
    eval_batch_size: int = 2
    """The most images in an evaluation batch of one process; only images of equal size share one."""
    num_workers: int = 4
    """Data-loading processes of each training process; 0 loads in the training process itself."""
    worker_start: WorkerStart = "fork"
    """How worker processes are started."""
    prefetch: int = 2
    """Micro-batches that each worker prepares ahead."""
    timeout: float = 600.0
    """Seconds after which a batch that does not come ends the run, naming the files that were being read."""
    pad_multiple: int = 1
    """Height and width of a batch are rounded up to a multiple of this."""
    mean: tuple[float, float, float] | None = None
    """Of the red, green and blue channel, for pixels in [0, 1]; null: the backbone's own."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the channels; null: the backbone's own."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.eval_batch_size, self.prefetch, self.pad_multiple) < 1:
            raise ValueError("data: batch_size, eval_batch_size, prefetch and pad_multiple must be at least 1")
        if self.one_orientation < 1 or self.batch_size % self.one_orientation:
            raise ValueError(
                f"data.one_orientation={self.one_orientation} must divide data.batch_size={self.batch_size}"
            )
        if self.one_orientation > 1 and not isinstance(self.sampling, Uniform):
            raise ValueError(f"data.one_orientation={self.one_orientation} needs data.sampling: uniform")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must not be negative, got {self.num_workers}")
        if self.timeout <= 0:
            raise ValueError(f"data.timeout must be positive, got {self.timeout:g}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std must be positive, got {list(self.std)}")
        final_size(self.val.transforms, (1, 1))

    @property
    def pixel_statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """(mean, std) of the images; a whole configuration (``config.Config``) fills in the backbone's own."""
        assert self.mean is not None
        assert self.std is not None
        return self.mean, self.std

    def build_datasets(self, *, unlabelled: bool = False) -> tuple[CocoDataset, CocoDataset]:
        """(training, validation) data set; both use the classes of the training annotations.

        Args:
            unlabelled: whether training samples tell what is not labelled from background.

        Raises:
            FileNotFoundError: a file or directory is missing.
            ValueError: annotations cannot be used, or the two splits contradict each other.
        """
        train = self.train.build(split="train", unlabelled=unlabelled, skip_empty=self.skip_empty)
        return train, self.val.build(split="val", categories=train.categories)

    def build_train_loader(
        self,
        dataset: CocoDataset,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation_steps: int = 1,
        total_steps: Callable[[int], int] | None = None,
    ) -> TrainLoader:
        """Batches of this rank; see ``TrainBatchSampler`` for the arguments.

        Raises:
            ValueError: ``batch_size`` cannot be divided over processes and accumulation steps, or exceeds the data set.
        """
        sampler = TrainBatchSampler(
            len(dataset),
            self.batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            accumulation_steps=accumulation_steps,
            total_steps=total_steps,
            weights=self.sampling.weights(dataset.annotations, len(dataset.categories)),
            wide=dataset.wider_than_high() if self.one_orientation > 1 else None,
            block=self.one_orientation,
        )
        return TrainLoader(self._pool(dataset, sampler, training=True), sampler)

    def build_val_loader(self, dataset: CocoDataset, *, rank: int = 0, world_size: int = 1) -> EvalLoader:
        """This rank's share of the validation images."""
        sizes = [self.size_in_model(dataset, index) for index in range(len(dataset))]
        sampler = EvalBatchSampler(sizes, self.eval_batch_size, rank=rank, world_size=world_size)
        return EvalLoader(self._pool(dataset, sampler, training=False), sampler)

    def size_in_model(self, dataset: CocoDataset, index: int) -> tuple[int, int]:
        """(height, width) in which a validation image is evaluated; (0, 0) if it is not known."""
        size = dataset.stated_size(index)
        return size if size == (0, 0) else final_size(self.val.transforms, size)

    def _pool(
        self, dataset: CocoDataset, sampler: TrainBatchSampler | EvalBatchSampler, *, training: bool
    ) -> WorkerPool:
        return WorkerPool(
            dataset,
            sampler,
            Collate(*self.pixel_statistics, self.pad_multiple, equal_sizes=not training),
            num_workers=self.num_workers,
            worker_start=self.worker_start,
            prefetch=self.prefetch,
            persistent=training,
            timeout=self.timeout,
        )
