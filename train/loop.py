"""The training loop that runs on every Ray Train worker: DDP, checkpoints, resumption, metrics.

Pretraining and fine-tuning differ in configuration alone. A checkpoint holds model, optimizer, schedule and step; the
data position and the random state of augmentation follow from the step (see ``loader``), so a run that was killed ends
with the weights of one that was not (bitwise on CPU with the same number of workers).
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from pydantic import Field, model_validator
from ray.train import Checkpoint
from ray.train.torch import get_device, prepare_model
from torch import nn

from lookalike.artifacts import Artifact
from lookalike.config import Config, runtime
from lookalike.errors import UsageError
from lookalike.seeds import derive_seed
from lookalike.stages import StageConfig
from lookalike.telemetry import fields, get_logger, setup_logging
from lookalike.train.initialise import imprint_proxies, pca_projection, sample_features
from lookalike.train.loader import BatchDataset, build_loader, build_streams, list_units, split_batch
from lookalike.train.matryoshka import NestedCosine
from lookalike.train.tasks import MultiTaskModel, Task, TaskConfig, build_tasks
from lookalike.vision.encoder import EmbeddingModel, EncoderConfig, check_dims, read_encoder
from lookalike.vision.transforms import AugmentConfig, build_eval_transform, build_train_transform

log = get_logger(__name__)
CHECKPOINT_FILE = "state.pt"
TICK_STEPS = 5


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
    """Rows of a global batch, shared out among workers."""
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
    num_workers: int = Field(2, ge=1)
    """Ray Train workers (DDP processes); it shapes batches, so it belongs to the result."""
    use_gpu: bool = runtime(False)
    cpus_per_worker: int = runtime(1, ge=1)
    """CPUs and torch threads of a worker."""
    loader_processes: int = runtime(0, ge=0)
    """Processes a worker decodes images in besides its own."""
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
        return self

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
        share = split_batch(self.train.batch_size, self.train.mix)[first]
        return max(1, round(self.train.epochs * self.rows_per_epoch / share))


def train_worker(values: dict[str, Any]) -> None:
    """Ray Train's entry on each worker; ``values``: ``loop``, a dumped ``LoopConfig``, and ``progress``, an actor."""
    setup_logging()
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    config = LoopConfig.model_validate(values["loop"])
    train = config.train
    torch.set_num_threads(train.cpus_per_worker)
    torch.manual_seed(derive_seed(train.seed, "model"))
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    state = load_checkpoint()
    model = build_multitask_model(config, initialise=state is None)
    freeze(model, train)
    optimizer, schedule = build_optimizer(model, train, config.total_steps)
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    wrapped = prepare_model(model, parallel_strategy="ddp" if world > 1 else None)
    loader = build_loader(worker_batches(config, rank, world, start), train.loader_processes)

    def save(step: int, metrics: dict[str, float]) -> None:
        report(step, metrics, model, optimizer, schedule, rank)

    def tick(step: int, loss: float) -> None:
        if rank == 0:
            values["progress"].update.remote(step, fields(loss=loss))

    run_steps(wrapped, model, loader, optimizer, schedule, train, start, config.total_steps, save, tick)


def worker_batches(config: LoopConfig, rank: int, world: int, start: int) -> BatchDataset:
    """This worker's share of every batch from ``start`` on."""
    train = config.train
    files = {name: config.files[name] for name in train.mix}
    streams = build_streams(files, seed=train.seed, rank=rank, world=world, resample=train.resample)
    counts = split_batch(train.batch_size // world, train.mix)
    transform = build_train_transform(config.encoder.transform, train.augment)
    return BatchDataset(streams, counts, transform, seed=train.seed, start=start, stop=config.total_steps)


def build_multitask_model(config: LoopConfig, *, initialise: bool) -> MultiTaskModel:
    """Backbone of the source encoder, projection and heads; ``initialise`` starts the last two from training images."""
    train = config.train
    _, source = read_encoder(Artifact.open(config.source_encoder, "encoder"))
    encoder = EmbeddingModel(source.backbone, config.encoder.num_features,
                             config.encoder.dim if config.encoder.projection else None)  # fmt: skip
    dims = config.encoder.dims
    tasks = build_tasks(train.tasks, dims, config.num_classes, train.nested_weights or (1.0,) * len(dims))
    if initialise and train.initialise == "data":
        initialise_from_data(config, encoder, tasks)
    return MultiTaskModel(encoder, tasks).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def initialise_from_data(config: LoopConfig, encoder: EmbeddingModel, tasks: Mapping[str, Task]) -> None:
    """Fill projection and proxies from a sample of the dataset named first in ``mix``."""
    units = list_units(config.files[next(iter(config.train.mix))])
    cosine = [task for task in tasks.values() if isinstance(task.head, NestedCosine) and task.config.field != "labels"]
    if not config.encoder.projection and not cosine:
        return
    features, labels = sample_features(
        encoder.backbone, units, build_eval_transform(config.encoder.transform),
        sorted({task.config.field for task in cosine}), config.train.initialise_images,
    )  # fmt: skip
    if isinstance(encoder.projection, nn.Linear):
        weight = pca_projection(features, config.encoder.dim, config.train.projection_whitening)
        encoder.projection.weight.data.copy_(weight)
    with torch.no_grad():
        embedding = encoder.projection(features)
    for task in cosine:
        assert isinstance(task.head, NestedCosine)
        imprint_proxies(task.head, embedding, labels[task.config.field])


def freeze(model: MultiTaskModel, config: TrainConfig) -> None:
    """Stop gradients of the leading backbone stages, by timm's names for them; a backbone without raises
    ``UsageError``."""
    if not config.frozen_stages:
        return
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    prefixes = ["conv_stem", "bn1", "patch_embed", "stem", "cls_token", "pos_embed", "conv1"]
    prefixes += [f"{name}.{i}" for name in ("blocks", "stages") for i in range(config.frozen_stages)]
    prefixes += [f"layer{i + 1}" for i in range(config.frozen_stages)]
    frozen = [parameter for name, parameter in backbone.named_parameters()
              if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)]  # fmt: skip
    if not frozen:
        raise UsageError(f"frozen_stages {config.frozen_stages}: a {type(backbone).__name__} has no stages that are "
                         "known; set frozen_stages=0")  # fmt: skip
    for parameter in frozen:
        parameter.requires_grad = False


def build_optimizer(
    model: MultiTaskModel, config: TrainConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Groups: backbone matrices, backbone vectors (no decay), projection, heads (no decay); warm-up, then cosine."""
    encoder = model.encoder
    assert isinstance(encoder, EmbeddingModel)
    backbone = [p for p in encoder.backbone.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in backbone if p.ndim > 1], "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in backbone if p.ndim <= 1], "lr": config.lr, "weight_decay": 0.0},
        {"params": list(encoder.projection.parameters()), "lr": config.projection_lr,
         "weight_decay": config.weight_decay},
        {"params": list(model.tasks.parameters()), "lr": config.head_lr, "weight_decay": 0.0},
    ]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=config.lr)
    else:
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    warmup = min(round(config.warmup_fraction * total_steps), total_steps - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, total_steps - warmup))
    if warmup == 0:
        return optimizer, cosine
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0 / (warmup + 1), total_iters=warmup)
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, cosine], milestones=[warmup])


def run_steps(  # noqa: PLR0917  (the loop's own state, called once)
    wrapped: nn.Module, model: MultiTaskModel, batches: Any, optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler, config: TrainConfig, start: int, stop: int,
    save: Callable[[int, dict[str, float]], None], tick: Callable[[int, float], None],
) -> None:  # fmt: skip
    """Train from step ``start`` to ``stop``.

    ``save(step, metrics)`` is called by every worker at the same steps; ``tick(step, loss)`` every few, for progress.
    """
    clock, waited = time.monotonic(), 0.0
    iterator = iter(batches)
    since = start
    for step in range(start + 1, stop + 1):
        asked = time.monotonic()
        batch = move(next(iterator), get_device())
        waited += time.monotonic() - asked
        set_train_mode(model, config)
        total, losses = wrapped(batch)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        if step % TICK_STEPS == 0:
            tick(step, float(total))
        if step % config.checkpoint_every and step != stop:
            continue
        seconds = time.monotonic() - clock
        metrics = {"step": float(step), "loss": float(total), "grad_norm": float(norm),
                   "images_per_s": (step - since) * config.batch_size / seconds, "data_wait": waited / seconds,
                   **{f"loss_{name}": float(loss) for name, loss in losses.items()}}  # fmt: skip
        log.info("train %s", fields(of=stop, **metrics))
        save(step, metrics)
        clock, waited, since = time.monotonic(), 0.0, step


def set_train_mode(model: nn.Module, config: TrainConfig) -> None:
    """Training mode, with batch-norm layers left in evaluation mode when their statistics are frozen."""
    model.train()
    if config.freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def move(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on ``device``."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def load_checkpoint() -> dict[str, Any] | None:
    """The state of Ray Train's latest checkpoint of this run, or None at its beginning."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return read_state(folder)


def read_state(folder: str) -> dict[str, Any]:
    """The state saved in a checkpoint folder (tensors and plain values only)."""
    state: dict[str, Any] = torch.load(Path(folder) / CHECKPOINT_FILE, map_location="cpu", weights_only=True)
    return state


def report(  # noqa: PLR0917
    step: int, metrics: dict[str, float], model: nn.Module, optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler, rank: int,
) -> None:  # fmt: skip
    """Report metrics from every worker, with a checkpoint from the first one."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "schedule": schedule.state_dict(), "step": step}  # fmt: skip
            torch.save(state, os.path.join(folder, CHECKPOINT_FILE))
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)
