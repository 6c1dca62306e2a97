"""What a recipe may set of a training stage, and what a worker is told besides.

Legend: a *task* is a head with its loss; the *mix* says which datasets of the shards fill a batch.
"""

from typing import Literal

from pydantic import Field, model_validator

from lookalike.config import Config, runtime
from lookalike.errors import UsageError
from lookalike.stages import StageConfig
from lookalike.train.draws import BalanceConfig
from lookalike.train.streams import split_batch
from lookalike.train.tasks import TaskConfig
from lookalike.vision.encoder import EncoderConfig, check_dims
from lookalike.vision.transforms import AugmentConfig


class TrainConfig(StageConfig):
    """Settings shared by pretraining and fine-tuning."""

    tasks: dict[str, TaskConfig] = Field(min_length=1)
    """Name -> task; losses are weighted and summed."""
    mix: dict[str, float] = Field(min_length=1)
    """Dataset of the shards -> its share of every batch."""
    embedding_dim: int | None = Field(None, ge=1)
    """Size of the embedding, through a bias-free projection; None takes the backbone's features as they are."""
    dims: tuple[int, ...] | None = None
    """Nested dims, smallest first, the last one the embedding's size; None trains that one alone."""
    nested_weights: tuple[float, ...] | None = None
    """Weight c_m of each nested dim; None means all ones."""
    initialise: Literal["data", "random"] = "data"
    """``data``: a PCA projection and class-mean proxies from a sample of training images (see ``initialise``)."""
    initialise_images: int = Field(4096, ge=1)
    """Size of that sample; it must span the embedding, so take a few times ``embedding_dim``."""
    projection_whitening: float = Field(0.5, ge=0.0, le=1.0)
    """Power by which PCA directions are divided by their singular values: 0 keeps PCA, 1 whitens."""
    epochs: float = Field(1.0, gt=0.0)
    """Passes over the dataset named first in ``mix``, resampled."""
    batch_size: int = Field(64, ge=2)
    """Images of a global batch, shared out among workers; with ``views`` of each picture, it has batch_size / views."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(3e-4, gt=0.0)
    """Peak learning rate of the backbone, at the global batch size given."""
    head_lr: float = Field(1e-2, gt=0.0)
    """Peak learning rate of classifiers and proxies."""
    projection_lr: float = Field(1e-3, gt=0.0)
    """Peak learning rate of the projection."""
    weight_decay: float = Field(1e-4, ge=0.0)
    """Weight decay of matrices; vectors (biases, norms) and heads have none."""
    warmup_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises linearly; a cosine to zero follows."""
    clip_norm: float = Field(5.0, gt=0.0)
    """Largest norm of the whole gradient."""
    freeze_batch_norm: bool = True
    """Keep batch-norm statistics of the starting backbone (small batches)."""
    frozen_stages: int = Field(0, ge=0)
    """Leading blocks of the backbone (the stem with the first) that stay as they are."""
    resample: bool = True
    """Repeat rare labels' images by their repeat factor."""
    augment: AugmentConfig = AugmentConfig()
    views: int = Field(1, ge=1, le=2)
    """Augmented views of each picture in a batch: two for losses that compare them."""
    balance: dict[str, BalanceConfig] = {}
    """Dataset of the mix -> how many pictures of a class stand together in its share of a batch. Row groups should hold
    classes whole then: ``shards.together``. Classes with fewer pictures repeat them, beyond what ``epochs`` counts."""
    num_workers: int = Field(2, ge=1)
    """Ray Train workers (DDP processes); it shapes batches, so it belongs to the result."""
    use_gpu: bool = runtime(False)
    cpus_per_worker: int = runtime(1, ge=1)
    """CPUs and torch threads of a worker."""
    loader_processes: int = runtime(0, ge=0)
    """Processes a worker decodes images in besides its own, on its node."""
    decode_actors: int = runtime(0, ge=0)
    """Ray actors a worker decodes images in, on any node of the cluster; they take the place of loader_processes."""
    decode_cpus: float = runtime(1.0, gt=0.0)
    """CPUs of each of these actors."""
    decode_resource: str | None = runtime(None)
    """Custom Ray resource that a node must offer to hold these actors; None: any node."""
    checkpoint_every: int = runtime(50, ge=1)
    """Steps between checkpoints."""
    max_failures: int = runtime(3, ge=0)
    """Restarts of the worker group after a worker dies."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.embedding_dim is not None:
            self.resolve_dims(self.embedding_dim)  # dims that cannot be are refused before anything runs
        if self.nested_weights is not None and len(self.nested_weights) != len(self.dims or (1,)):
            raise ValueError(f"nested_weights has {len(self.nested_weights)} values for {len(self.dims or (1,))} dims; "
                             "give one each")  # fmt: skip
        if self.batch_size % self.num_workers:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of num_workers {self.num_workers}")
        if self.batch_size % (self.num_workers * self.views):
            raise ValueError(f"batch_size {self.batch_size} is no multiple of num_workers {self.num_workers} times "
                             f"views {self.views}")  # fmt: skip
        if self.loader_processes and self.decode_actors:
            raise ValueError(f"loader_processes {self.loader_processes} and decode_actors {self.decode_actors} exclude "
                             "each other; set one of them to 0")  # fmt: skip
        if unknown := [name for name in self.balance if name not in self.mix]:
            raise ValueError(f"balance names {unknown[0]!r}, which mix does not have; it has {', '.join(self.mix)}")
        if self.balance:
            self.pictures(self.num_workers)
        return self

    def pictures(self, world: int) -> dict[str, int]:
        """Pictures of each dataset in a worker's batch when there are ``world`` workers.

        Raises ``UsageError`` when a balanced dataset's share is no multiple of its ``samples``.
        """
        counts = split_batch(self.batch_size // self.views // world, self.mix)
        for name, balance in self.balance.items():
            if counts[name] % balance.samples:
                raise UsageError(f"a worker's batch holds {counts[name]} pictures of dataset {name!r}, no multiple of "
                                 f"balance.{name}.samples {balance.samples}; change batch_size, mix or samples")
        return counts

    def resolve_dims(self, num_features: int) -> tuple[int, ...]:
        """The nested dims for a backbone of that width; raises ``UsageError`` for dims above the embedding."""
        dim = self.embedding_dim or num_features
        dims = self.dims or (dim,)
        check_dims(dims, dim)
        return dims


class LoopConfig(Config):
    """What a worker is told besides the training settings."""

    train: TrainConfig
    encoder: EncoderConfig
    source_encoder: str
    """URI of the encoder whose backbone training starts from."""
    files: dict[str, list[str]]
    """Dataset -> URIs of its shard files."""
    num_classes: dict[str, int]
    rows_per_epoch: int
    """Expected rows of one pass over the first dataset of the mix."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        first = next(iter(self.train.mix))
        share = split_batch(self.train.batch_size // self.train.views, self.train.mix)[first]
        return max(1, round(self.train.epochs * self.rows_per_epoch / share))
