"""What a recipe may set of a training stage, and what a worker is told besides.

Legend: a *task* is a head with its loss; the *mix* says which datasets of the shards fill a batch.
"""

from typing import Annotated

from pydantic import Field, model_validator
from torch.nn import ModuleDict

from lookalike.config import Config, runtime
from lookalike.errors import UsageError
from lookalike.stages import StageConfig
from lookalike.train.feed.mixture import Mixture
from lookalike.train.run.sections import (
    BackboneConfig,
    ComputeConfig,
    InitialiseConfig,
    LoaderConfig,
    OptimizerConfig,
    ScheduleConfig,
    WorkersConfig,
)
from lookalike.train.run.trackers import TRACKERS
from lookalike.train.tasks import CLASS_FIELDS, TASKS, PrefixTask, TaskConfig, form_of
from lookalike.vision.encoder import EncoderConfig, check_dims
from lookalike.vision.transforms import AugmentConfig


class TrainConfig(StageConfig):
    """Settings shared by pretraining and fine-tuning."""

    tasks: dict[str, TaskConfig] = Field(min_length=1)
    """Name -> task; losses are weighted and summed."""
    mix: dict[str, Annotated[float, Field(gt=0.0)]] = Field(min_length=1)
    """Dataset of the shards -> its weight: its share of all pictures, and, to within a row or two, of every batch."""
    embedding_dim: int | None = Field(None, ge=1)
    """Size of the embedding, through a bias-free projection; None takes the backbone's features as they are."""
    dims: tuple[int, ...] | None = None
    """Nested dims, smallest first, the last one the embedding's size; None trains that one alone."""
    nested_weights: tuple[Annotated[float, Field(ge=0.0)], ...] | None = None
    """Weight c_m of each nested dim; None means all ones."""
    dims_per_step: int | None = Field(None, ge=1)
    """Nested dims trained in a step, the largest among them and the others at random; None trains all of them. The
    weights c_m of those drawn stay as they are."""
    epochs: float = Field(1.0, gt=0.0)
    """Passes over the dataset named first in ``mix``, resampled."""
    batch_size: int = Field(64, ge=2)
    """Images of a global batch, shared out among workers; ``loader.views`` of one picture count as so many images."""
    augment: AugmentConfig = AugmentConfig()
    backbone: BackboneConfig = BackboneConfig()
    initialise: InitialiseConfig = InitialiseConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loader: LoaderConfig = LoaderConfig()
    compute: ComputeConfig = ComputeConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoint_every: int = runtime(50, ge=1)
    """Steps between checkpoints."""
    log_every: int = runtime(10, ge=1)
    """Steps between log lines, metrics and points of the trackers' curves."""
    trackers: tuple[str, ...] = runtime(())
    """Where curves go: ``mlflow``, ``wandb``, ``tensorboard`` or one added to the registry ``tracker``. TensorBoard
    files are written without being named where the extra ``tracking`` is installed and the root is a local disk."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.dims is not None:
            check_dims(self.dims, max(self.dims, default=1))
        if self.embedding_dim is not None:
            self.resolve_dims(self.embedding_dim)  # impossible dims are refused before anything runs
        num_dims = len(self.dims or (1,))
        if self.nested_weights is not None and len(self.nested_weights) != num_dims:
            raise ValueError(f"nested_weights has {len(self.nested_weights)} values for {num_dims} dims; give one each")
        if self.nested_weights is not None and not any(self.nested_weights):
            raise ValueError(f"nested_weights {list(self.nested_weights)} are all zero: nothing would train; raise one")
        if (self.dims_per_step or 1) > num_dims:
            raise ValueError(f"dims_per_step {self.dims_per_step} exceeds the {num_dims} dims; lower or drop it")
        if strange := [
            name for name in self.tasks if not name or "." in name or hasattr(ModuleDict, name) or name == "training"
        ]:
            raise ValueError(f"task {strange[0]!r} is not a name that a module can have; give another, without dots")
        if unknown := [name for name in self.loader.balance if name not in self.mix]:
            raise ValueError(
                f"loader.balance names {unknown[0]!r}, which mix does not have; it has {', '.join(self.mix)}"
            )
        if pairs := [name for name, task in self.tasks.items() if task.field == "row" and self.loader.views == 1]:
            raise ValueError(f"task {pairs[0]!r} compares the views of a picture; set loader.views=2")
        self._check_batch()
        self.schedule.require_within(self.epochs)
        _ = self.mixture  # a balanced dataset that has no place is refused before anything runs
        for name in self.trackers:
            TRACKERS.get(name)  # an unknown name lists the valid ones
        return self

    def _check_batch(self) -> None:
        num, accumulation = self.workers.num, self.compute.accumulation
        if self.batch_size % num:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of workers.num {num}")
        share = self.batch_size // num
        if share % accumulation:
            raise ValueError(
                f"compute.accumulation {accumulation} does not divide a worker's {share} rows (batch_size "
                f"{self.batch_size} over workers.num {num})"
            )
        lone = [name for name, task in self.tasks.items() if issubclass(TASKS.get(task.kind), PrefixTask)]
        if self.micro_batch == 1 and lone:
            raise ValueError(
                f"task {lone[0]!r} compares rows, and a forward pass holds one (batch_size {self.batch_size} in "
                f"{self.parts} parts); raise batch_size, or lower compute.accumulation or workers.num"
            )
        if self.micro_batch % self.loader.views:
            raise ValueError(
                f"a worker's part of a batch, {self.micro_batch} images, is not a multiple of loader.views "
                f"{self.loader.views}"
            )
        if self.compute.precision == "float16" and not self.workers.use_gpu:
            raise ValueError(
                "compute.precision float16 needs a GPU; set workers.use_gpu=true, or compute.precision=bfloat16"
            )

    @property
    def parts(self) -> int:
        """Forward passes of all workers in one step."""
        return self.workers.num * self.compute.accumulation

    @property
    def micro_batch(self) -> int:
        """Rows of one forward pass."""
        return self.batch_size // self.parts

    @property
    def mixture(self) -> Mixture:
        """How the datasets share the pictures of a forward pass.

        Raises ``UsageError`` when a balanced dataset gets none, or a number that is not a multiple of its ``samples``.
        """
        mixture = Mixture(self.micro_batch // self.loader.views, self.mix, self.loader.balance)
        for name, balance in self.loader.balance.items():
            if mixture.fixed[name] % balance.samples:
                raise UsageError(
                    f"a worker's batch holds {mixture.fixed[name]} pictures of dataset {name!r}, not a multiple of "
                    f"loader.balance.{name}.samples {balance.samples}; change batch_size, mix or samples"
                )
        return mixture

    def resolve_dims(self, num_features: int) -> tuple[int, ...]:
        """The nested dims for a backbone of that width; raises ``UsageError`` for dims above the embedding."""
        dim = self.embedding_dim or num_features
        dims = self.dims or (dim,)
        check_dims(dims, dim)
        for name, task in self.tasks.items():
            task.pick_dims(name, dims)
        return dims


class LoopConfig(Config):
    """What a worker is told besides the training settings."""

    name: str
    """The artifact's name."""
    fingerprint: str
    root: str
    """The root under which it will be published."""
    train: TrainConfig
    encoder: EncoderConfig
    source_encoder: str
    """URI of the encoder whose backbone training starts from."""
    teacher: str | None = None
    """URI of the encoder that tasks of kind ``distill`` learn from."""
    files: dict[str, list[str]]
    """Dataset -> URIs of its shard files."""
    num_classes: dict[str, int]
    """Field of classes -> how many; ``teacher`` -> the size of its embedding. Attributes: those that tasks read."""
    attributes: tuple[str, ...] = ()
    """What the shards' column ``attributes`` holds, in its order; none when no task reads one."""
    rows_per_epoch: int
    """Expected rows of one pass over the first dataset of the mix."""

    @property
    def class_fields(self) -> dict[str, int]:
        """Fields of a batch that hold class ids -> how many classes there are."""
        return {name: count for name, count in self.num_classes.items() if form_of(name) in CLASS_FIELDS}

    @property
    def total_steps(self) -> int:
        train, mixture = self.train, self.train.mixture
        share = mixture.share(next(iter(train.mix))) * mixture.rows * train.parts
        return max(1, round(train.epochs * self.rows_per_epoch / float(share)))
