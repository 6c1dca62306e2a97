"""The groups of ``TrainConfig``: backbone, initialise, optimizer, schedule, loader, compute, workers."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from lookalike.config import Config, runtime
from lookalike.train.feed.draws import BalanceConfig

_DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]


def refuse_idle(config: Config, read: Mapping[str, set[str]]) -> None:
    """Raise ``ValueError`` if a setting was changed that ``config.kind`` does not read.

    ``read``: kind -> what it reads, of the settings that only some kinds read.
    """
    kind = str(config.kind)  # type: ignore[attr-defined]
    for name in sorted(set().union(*read.values()) - read[kind]):
        if getattr(config, name) != type(config).model_fields[name].default:
            readers = ", ".join(other for other, names in read.items() if name in names)
            raise ValueError(f"kind {kind} does not read {name} ({readers} does); drop it, or set another kind")


class BackboneConfig(Config):
    """The backbone's input and regularisation, and the part of it that trains."""

    image_size: int | None = Field(None, ge=32, le=1024)
    """Side of the images in pixels; position embeddings are resized. None takes the starting encoder's."""
    drop_path: float = Field(0.0, ge=0.0, lt=1.0)
    """Stochastic depth: share of residual branches left out at the backbone's end, fewer before it."""
    trainable: Literal["full", "partial", "probe"] | None = None
    """``full``: everything; ``partial``: all but ``frozen_stages``; ``probe``: projection and heads, on a frozen
    backbone. None: partial when ``frozen_stages`` is set, else full."""
    frozen_stages: int = Field(0, ge=0)
    """Leading blocks of the backbone that do not train; the stem counts with the first."""
    freeze_batch_norm: bool = True
    """Keep batch-norm statistics of the starting backbone (small batches); those of frozen layers are kept anyway.
    False: they follow the batches, within a tenth of the run."""

    @model_validator(mode="after")
    def _check(self) -> "BackboneConfig":
        if self.frozen_stages and self.trainable in ("full", "probe"):
            raise ValueError(
                f"trainable {self.trainable} and frozen_stages {self.frozen_stages} exclude each other; "
                "set trainable=partial, or frozen_stages=0"
            )
        if self.trainable == "partial" and not self.frozen_stages:
            raise ValueError("trainable partial needs frozen_stages of 1 or more")
        return self


class InitialiseConfig(Config):
    """The start of projection and proxies."""

    method: Literal["data", "random"] = "data"
    """``data``: a PCA projection and class-mean proxies from a sample of training images (see ``initialise.py``)."""
    images: int = Field(4096, ge=1)
    """Size of that sample; it must span the embedding, so take a few times ``embedding_dim``."""
    whitening: float = Field(0.5, ge=0.0, le=1.0)
    """Power by which PCA directions are divided by their singular values: 0 keeps PCA, 1 whitens."""


class OptimizerConfig(Config):
    """The optimizer: separate parameter groups for the backbone's matrices, its vectors, projection, heads, proxies."""

    kind: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(3e-4, gt=0.0)
    """Peak learning rate of the backbone, at the global batch size given."""
    head_lr: float = Field(1e-2, gt=0.0)
    """Peak learning rate of classifiers, and of proxies unless they have their own."""
    projection_lr: float = Field(1e-3, gt=0.0)
    """Peak learning rate of the projection."""
    proxy_lr: float | None = Field(None, gt=0.0)
    """Peak learning rate of class proxies; None takes ``head_lr``."""
    weight_decay: float = Field(1e-4, ge=0.0)
    """Weight decay of matrices; vectors (biases, norms), position embeddings and class tokens have none."""
    head_weight_decay: float = Field(0.0, ge=0.0)
    """Weight decay of classifiers' matrices."""
    proxy_weight_decay: float = Field(0.0, ge=0.0)
    """Weight decay of proxies."""
    layer_decay: float | None = Field(None, gt=0.0, le=1.0)
    """Factor of the learning rate from each layer to the one below it: projection and heads stand above the backbone,
    whose top layer is at ``lr`` times the factor, as in BEiT and MAE. None gives all the same."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Momentum of SGD and LARS."""
    proxy_momentum: float | None = Field(None, ge=0.0, lt=1.0)
    """Momentum of proxies under SGD and LARS; None takes ``momentum``."""
    nesterov: bool = False
    """Nesterov's momentum for SGD and LARS."""
    betas: tuple[_DecayRate, _DecayRate] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    trust_coefficient: float = Field(0.001, gt=0.0)
    """LARS: share of a matrix's norm that one step at learning rate 1 may change, with or without weight decay."""
    clip_norm: float | None = Field(5.0, gt=0.0)
    """Largest norm of the whole gradient; None does not clip."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Decay of a moving average of the weights, warmed up; the encoder then holds the average. None: no average."""

    @property
    def slots(self) -> int:
        """Tensors kept for each parameter."""
        return 2 if self.kind == "adamw" else int(self.momentum > 0)

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        momentum = {"momentum", "proxy_momentum", "nesterov"}
        refuse_idle(
            self,
            {"adamw": {"betas"}, "sgd": momentum, "lars": {*momentum, "trust_coefficient"}},
        )
        momenta = (self.momentum, self.momentum if self.proxy_momentum is None else self.proxy_momentum)
        if self.nesterov and min(momenta) == 0.0:
            raise ValueError("nesterov needs a momentum above 0, for proxies too")
        return self


class ScheduleConfig(Config):
    """The learning rate, step by step."""

    kind: Literal["cosine", "linear", "polynomial", "step", "constant", "cyclic"] = "cosine"
    """What follows the warm-up: down to zero as a cosine, a line or a power; down in steps; or constant. ``cyclic`` is
    a line up to ``peak_epoch`` and one down to zero (Kusupati et al. 2022, appendix C), its own warm-up."""
    warmup_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises linearly."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same as a number of steps; it goes before ``warmup_fraction``."""
    power: float = Field(2.0, gt=0.0)
    """Exponent of ``polynomial``."""
    drop_epochs: tuple[float, ...] = ()
    """Epochs at whose end ``step`` multiplies the learning rate by ``drop_factor``."""
    drop_factor: float = Field(0.1, gt=0.0, lt=1.0)
    """Factor of the learning rate at each of ``drop_epochs``."""
    peak_epoch: float = Field(2.0, gt=0.0)
    """Epoch at whose end ``cyclic`` stands at its peak."""

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        warmup = {"warmup_fraction", "warmup_steps"}
        drops = {"drop_epochs", "drop_factor"}
        own = {"polynomial": {*warmup, "power"}, "step": {*warmup, *drops}, "cyclic": {"peak_epoch"}}
        refuse_idle(self, {**dict.fromkeys(("cosine", "linear", "constant"), warmup), **own})
        epochs = list(self.drop_epochs)
        if (self.kind == "step") != bool(epochs):
            raise ValueError(
                f"kind {self.kind} with drop_epochs {epochs}: step needs epochs at which to fall, the others take none"
            )
        if epochs and (epochs[0] <= 0 or epochs != sorted(set(epochs))):
            raise ValueError(f"drop_epochs {epochs} must be positive and increasing")
        return self

    def require_within(self, epochs: float) -> None:
        """Raise ``ValueError`` if a drop or the peak does not come before the end of ``epochs``."""
        if self.drop_epochs and self.drop_epochs[-1] >= epochs:
            raise ValueError(
                f"schedule.drop_epochs {list(self.drop_epochs)} do not all come before the end, epochs {epochs}; "
                f"drop {self.drop_epochs[-1]} or train longer"
            )
        if self.kind == "cyclic" and self.peak_epoch >= epochs:
            raise ValueError(f"schedule.peak_epoch {self.peak_epoch} is not before the end, epochs {epochs}; lower it")


class LoaderConfig(Config):
    """Which rows fill a batch, and who decodes them."""

    resample: bool = True
    """Repeat rare labels' images by their repeat factor."""
    views: int = Field(1, ge=1, le=2)
    """Augmented views of each picture in a batch: two for losses that compare them."""
    balance: dict[str, BalanceConfig] = {}
    """Dataset of the mix -> how many pictures of a class stand together in its share of a batch. Row groups should hold
    classes whole then: ``shards.together``. Classes with fewer pictures repeat them, beyond what ``epochs`` counts."""
    processes: int = runtime(0, ge=0)
    """Processes a worker decodes images in besides its own, on its node."""
    actors: int = runtime(0, ge=0)
    """Ray actors a worker decodes images in, on any node of the cluster; they take the place of ``processes``."""
    actor_cpus: float = runtime(1.0, gt=0.0)
    """CPUs of each of these actors."""
    actor_resource: str | None = runtime(None)
    """Custom Ray resource that a node must offer to hold these actors; None: any node."""

    @model_validator(mode="after")
    def _check(self) -> "LoaderConfig":
        if self.processes and self.actors:
            raise ValueError(
                f"processes {self.processes} and actors {self.actors} exclude each other; set one of them to 0"
            )
        return self


class ComputeConfig(Config):
    """Precision and memory of a step."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the forward pass (autocast); ``float16`` needs a GPU and scales the loss."""
    accumulation: int = Field(1, ge=1)
    """Parts that a worker's share of a batch is cut into, one in memory at a time. Losses that compare rows with each
    other, and batch-norm, see one part."""
    activation_checkpointing: bool = runtime(False)
    """Compute the backbone's activations a second time in the backward pass instead of keeping them."""
    compile: bool = runtime(False)
    """Compile the encoder with torch.compile; its kernels round differently."""
    task_memory_gib: float | None = runtime(None, gt=0.0)
    """Memory of a worker tasks may take (weights, gradients, optimizer, scores); a run that needs more is refused."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The format of autocast; None for float32."""
        return None if self.precision == "float32" else getattr(torch, self.precision)


class WorkersConfig(Config):
    """The Ray Train workers."""

    num: int = Field(2, ge=1)
    """DDP processes, each with a data stream of its own; the number shapes batches, so it belongs to the result."""
    min: int | None = runtime(None, ge=1)
    """Fewest workers to carry on with when nodes are lost; the remaining ones share the streams: the same batches,
    summed in another order. None waits for all ``num``."""
    use_gpu: bool = runtime(False)
    """A GPU for each worker."""
    cpus: int = runtime(1, ge=1)
    """CPUs and torch threads of each worker."""
    max_failures: int = runtime(3, ge=0)
    """Restarts of the worker group after a worker dies."""

    @model_validator(mode="after")
    def _check(self) -> "WorkersConfig":
        if self.min is not None and self.min > self.num:
            raise ValueError(f"min {self.min} is above num {self.num}; lower it")
        return self
