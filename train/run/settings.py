"""What a recipe may set of a training stage, and what a worker is told besides.

Legend: a *task* is a head with its loss; the *mix* says which datasets of the shards fill a batch.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch.nn import ModuleDict

from lookalike.config import Config, runtime
from lookalike.errors import UsageError
from lookalike.stages import StageConfig
from lookalike.train.feed.draws import BalanceConfig
from lookalike.train.feed.streams import split_batch
from lookalike.train.run.trackers import TRACKERS
from lookalike.train.tasks import CLASS_FIELDS, TaskConfig, form_of
from lookalike.vision.encoder import EncoderConfig, check_dims
from lookalike.vision.transforms import AugmentConfig

_DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainConfig(StageConfig):
    """Settings shared by pretraining and fine-tuning."""

    tasks: dict[str, TaskConfig] = Field(min_length=1)
    """Name -> task; losses are weighted and summed."""
    mix: dict[str, Annotated[float, Field(gt=0.0)]] = Field(min_length=1)
    """Dataset of the shards -> its share of every batch."""
    embedding_dim: int | None = Field(None, ge=1)
    """Size of the embedding, through a bias-free projection; None takes the backbone's features as they are."""
    dims: tuple[int, ...] | None = None
    """Nested dims, smallest first, the last one the embedding's size; None trains that one alone."""
    nested_weights: tuple[Annotated[float, Field(ge=0.0)], ...] | None = None
    """Weight c_m of each nested dim; None means all ones."""
    dims_per_step: int | None = Field(None, ge=1)
    """Nested dims trained in a step, the largest among them and the others at random; None trains all of them. The
    weights c_m of those drawn stay as they are."""
    image_size: int | None = Field(None, ge=32, le=1024)
    """Side of the images in pixels, where it differs from the starting encoder's: position embeddings are resized."""
    drop_path: float = Field(0.0, ge=0.0, lt=1.0)
    """Stochastic depth: share of residual branches left out at the backbone's end, fewer before it."""
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

    # optimizer: a group each for the backbone's matrices, its vectors, the projection, heads, and proxies
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(3e-4, gt=0.0)
    """Peak learning rate of the backbone, at the global batch size given."""
    head_lr: float = Field(1e-2, gt=0.0)
    """Peak learning rate of classifiers, and of proxies unless they have their own."""
    projection_lr: float = Field(1e-3, gt=0.0)
    """Peak learning rate of the projection."""
    proxy_lr: float | None = Field(None, gt=0.0)
    """Peak learning rate of class proxies; None takes ``head_lr``."""
    weight_decay: float = Field(1e-4, ge=0.0)
    """Weight decay of matrices; vectors (biases, norms) have none, nor have position embeddings and class tokens."""
    head_weight_decay: float = Field(0.0, ge=0.0)
    """Weight decay of classifiers' matrices."""
    proxy_weight_decay: float = Field(0.0, ge=0.0)
    """Weight decay of proxies."""
    layer_decay: float | None = Field(None, gt=0.0, le=1.0)
    """Factor of the learning rate from each layer of the backbone to the one below it, the top one at ``lr``; None
    gives all the same."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Momentum of SGD and LARS."""
    proxy_momentum: float | None = Field(None, ge=0.0, lt=1.0)
    """Momentum of proxies under SGD and LARS; None takes ``momentum``."""
    nesterov: bool = False
    """Nesterov's momentum for SGD and LARS."""
    betas: tuple[_DecayRate, _DecayRate] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    trust_coefficient: float = Field(0.001, gt=0.0)
    """LARS: share of a matrix's norm that one step at learning rate 1 may change."""
    clip_norm: float | None = Field(5.0, gt=0.0)
    """Largest norm of the whole gradient; None leaves it as it is."""

    # schedule of the learning rate, step by step
    schedule: Literal["cosine", "linear", "polynomial", "step", "constant", "cyclic"] = "cosine"
    """What follows the warm-up: down to zero as a cosine, a line or a power; in steps; not at all. ``cyclic`` is a line
    up to ``peak_epoch`` and one down to zero (Kusupati et al. 2022, appendix C), its own warm-up."""
    warmup_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises linearly."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same as a number of steps; it goes before ``warmup_fraction``."""
    schedule_power: float = Field(2.0, gt=0.0)
    """Exponent of ``polynomial``."""
    schedule_epochs: tuple[float, ...] = ()
    """Epochs at whose end ``step`` multiplies the learning rate by ``schedule_factor``."""
    schedule_factor: float = Field(0.1, gt=0.0, lt=1.0)
    """See ``schedule_epochs``."""
    peak_epoch: float = Field(2.0, gt=0.0)
    """Epoch at whose end ``cyclic`` stands at its peak."""

    # what trains
    trainable: Literal["full", "partial", "probe"] | None = None
    """``full``: everything; ``partial``: all but ``frozen_stages``; ``probe``: projection and heads, on a frozen
    backbone. None: partial when ``frozen_stages`` is set, else full."""
    frozen_stages: int = Field(0, ge=0)
    """Leading blocks of the backbone (the stem with the first) that stay as they are."""
    freeze_batch_norm: bool = True
    """Keep batch-norm statistics of the starting backbone (small batches); those of frozen layers are kept anyway.
    False: they follow the batches, within a tenth of the run."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Decay of a moving average of the weights, warmed up; the average is then what the encoder holds. None: none."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the forward pass (autocast); ``float16`` needs a GPU and scales the loss."""
    accumulation: int = Field(1, ge=1)
    """Parts that a worker's share of a batch is cut into, one in memory at a time. Losses that compare rows with each
    other, and batch-norm, see one part."""
    resample: bool = True
    """Repeat rare labels' images by their repeat factor."""
    augment: AugmentConfig = AugmentConfig()
    views: int = Field(1, ge=1, le=2)
    """Augmented views of each picture in a batch: two for losses that compare them."""
    balance: dict[str, BalanceConfig] = {}
    """Dataset of the mix -> how many pictures of a class stand together in its share of a batch. Row groups should hold
    classes whole then: ``shards.together``. Classes with fewer pictures repeat them, beyond what ``epochs`` counts."""
    num_workers: int = Field(2, ge=1)
    """Ray Train workers (DDP processes), each with a data stream of its own; it shapes batches, so it belongs to the
    result. A pair ``[min, max]`` sets ``min_workers`` too."""
    min_workers: int | None = runtime(None, ge=1)
    """Carry on with as few workers when nodes are lost, the streams shared out among those left: the same batches,
    summed in another order. None waits for all ``num_workers``."""
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
    activation_checkpointing: bool = runtime(False)
    """Compute the backbone's activations a second time in the backward pass instead of keeping them."""
    compile: bool = runtime(False)
    """Compile the encoder with torch.compile; its kernels round differently."""
    task_memory_gib: float | None = runtime(None, gt=0.0)
    """Memory of a worker tasks may take (weights, gradients, optimizer, scores); a run that needs more is refused."""
    checkpoint_every: int = runtime(50, ge=1)
    """Steps between checkpoints."""
    log_every: int = runtime(10, ge=1)
    """Steps between log lines, metrics and points of the trackers' curves."""
    trackers: tuple[str, ...] = runtime(())
    """Where curves go: ``mlflow``, ``wandb``, ``tensorboard`` or one added to the registry ``tracker``. TensorBoard
    files are written without being named where the extra ``tracking`` is installed and the root is a local disk."""
    max_failures: int = runtime(3, ge=0)
    """Restarts of the worker group after a worker dies."""

    @model_validator(mode="before")
    @classmethod
    def _split_pair(cls, values: Any) -> Any:
        pair = values.get("num_workers") if isinstance(values, Mapping) else None
        if not isinstance(pair, (list, tuple)):
            return values
        if len(pair) != 2 or not all(isinstance(n, int) for n in pair) or not 1 <= pair[0] <= pair[1]:
            raise ValueError(f"num_workers {list(pair)} is no range; give a number, or [min, max] with 1 <= min <= max")
        if (own := values.get("min_workers")) not in (None, pair[0]):
            raise ValueError(f"num_workers {list(pair)} sets min_workers, which is {own} besides; drop one of the two")
        return {**values, "min_workers": pair[0], "num_workers": pair[1]}

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.dims is not None:
            check_dims(self.dims, max(self.dims, default=1))
        if self.embedding_dim is not None:
            self.resolve_dims(self.embedding_dim)  # dims that cannot be are refused before anything runs
        if self.nested_weights is not None and len(self.nested_weights) != len(self.dims or (1,)):
            raise ValueError(
                f"nested_weights has {len(self.nested_weights)} values for {len(self.dims or (1,))} dims; give one each"
            )
        if self.nested_weights is not None and not any(self.nested_weights):
            raise ValueError(f"nested_weights {list(self.nested_weights)} are all zero: nothing would train; raise one")
        if (self.dims_per_step or 1) > len(self.dims or (1,)):
            raise ValueError(
                f"dims_per_step {self.dims_per_step} exceeds the {len(self.dims or (1,))} dims; lower or drop it"
            )
        if strange := [
            name for name in self.tasks if not name or "." in name or hasattr(ModuleDict, name) or name == "training"
        ]:
            raise ValueError(f"task {strange[0]!r} is no name that a module can have; give another, without dots")
        if unknown := [name for name in self.balance if name not in self.mix]:
            raise ValueError(f"balance names {unknown[0]!r}, which mix does not have; it has {', '.join(self.mix)}")
        if pairs := [name for name, task in self.tasks.items() if task.field == "row" and self.views == 1]:
            raise ValueError(f"task {pairs[0]!r} compares the views of a picture; set views=2")
        self._check_workers()
        self._check_optimizer()
        self.pictures()
        for name in self.trackers:
            TRACKERS.get(name)  # an unknown name lists the valid ones
        return self

    def _check_workers(self) -> None:
        if self.batch_size % self.num_workers:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of num_workers {self.num_workers}")
        share = self.batch_size // self.num_workers
        if share % self.accumulation:
            raise ValueError(
                f"accumulation {self.accumulation} does not divide a worker's {share} rows (batch_size "
                f"{self.batch_size} over num_workers {self.num_workers})"
            )
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is above num_workers {self.num_workers}; lower it")
        if self.micro_batch % self.views:
            raise ValueError(
                f"a worker's part of a batch, {self.micro_batch} images, is no multiple of views {self.views}"
            )
        if self.loader_processes and self.decode_actors:
            raise ValueError(
                f"loader_processes {self.loader_processes} and decode_actors {self.decode_actors} exclude "
                "each other; set one of them to 0"
            )
        if self.precision == "float16" and not self.use_gpu:
            raise ValueError("precision float16 needs a GPU; set use_gpu=true, or precision=bfloat16")

    def _check_optimizer(self) -> None:
        if self.frozen_stages and self.trainable in ("full", "probe"):
            raise ValueError(
                f"trainable {self.trainable} and frozen_stages {self.frozen_stages} exclude each other; "
                "set trainable=partial, or frozen_stages=0"
            )
        if self.trainable == "partial" and not self.frozen_stages:
            raise ValueError("trainable partial needs frozen_stages of 1 or more")
        if (
            self.nesterov
            and min(self.momentum, self.momentum if self.proxy_momentum is None else self.proxy_momentum) == 0.0
        ):
            raise ValueError("nesterov needs a momentum above 0, for proxies too")
        if (self.schedule == "step") != bool(self.schedule_epochs):
            raise ValueError(
                f"schedule {self.schedule} with schedule_epochs {list(self.schedule_epochs)}: step needs "
                "epochs at which to fall, the others take none"
            )
        epochs = list(self.schedule_epochs)
        if epochs and (epochs[0] <= 0 or epochs != sorted(set(epochs))):
            raise ValueError(f"schedule_epochs {list(self.schedule_epochs)} must be positive and increasing")
        if epochs and epochs[-1] >= self.epochs:
            raise ValueError(
                f"schedule_epochs {list(self.schedule_epochs)} do not all come before the end, epochs "
                f"{self.epochs}; drop {epochs[-1]} or train longer"
            )
        if self.schedule == "cyclic" and self.peak_epoch >= self.epochs:
            raise ValueError(f"peak_epoch {self.peak_epoch} is not before the end, epochs {self.epochs}; lower it")

    @property
    def micro_batch(self) -> int:
        """Rows of one forward pass."""
        return self.batch_size // (self.num_workers * self.accumulation)

    def pictures(self) -> dict[str, int]:
        """Pictures of each dataset in a forward pass of a worker.

        Raises ``UsageError`` when a dataset gets none, or a balanced one's share is no multiple of its ``samples``.
        """
        counts = split_batch(self.micro_batch // self.views, self.mix)
        for name, balance in self.balance.items():
            if counts[name] % balance.samples:
                raise UsageError(
                    f"a worker's batch holds {counts[name]} pictures of dataset {name!r}, no multiple of "
                    f"balance.{name}.samples {balance.samples}; change batch_size, mix or samples"
                )
        return counts

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
        """Optimizer steps of the whole run."""
        train = self.train
        share = train.pictures()[next(iter(train.mix))] * train.num_workers * train.accumulation
        return max(1, round(train.epochs * self.rows_per_epoch / share))
