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
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint
from ray.train.torch import get_device, prepare_model
from torch import nn

from lookalike.artifacts import Artifact
from lookalike.seeds import derive_seed
from lookalike.telemetry import fields, get_logger, setup_logging
from lookalike.train.batches import feed, worker_batches
from lookalike.train.initialise import imprint_proxies, pca_projection, sample_features
from lookalike.train.loader import list_units
from lookalike.train.matryoshka import NestedCosine
from lookalike.train.optimizer import build_optimizer, freeze
from lookalike.train.settings import LoopConfig, TrainConfig
from lookalike.train.tasks import MultiTaskModel, Task, build_tasks
from lookalike.vision.encoder import EmbeddingModel, read_encoder
from lookalike.vision.transforms import build_eval_transform

log = get_logger(__name__)
CHECKPOINT_FILE = "state.pt"
TICK_STEPS = 5


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
    loader = feed(worker_batches(config, rank, world, start), config, get_device())

    def save(step: int, metrics: dict[str, float]) -> None:
        report(step, metrics, model, optimizer, schedule, rank)

    def tick(step: int, loss: float) -> None:
        if rank == 0:
            values["progress"].update.remote(step, fields(loss=loss))

    run_steps(wrapped, model, loader, optimizer, schedule, train, start, config.total_steps, save, tick)


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
        num_classes=config.num_classes,
    )  # fmt: skip
    if isinstance(encoder.projection, nn.Linear):
        weight = pca_projection(features, config.encoder.dim, config.train.projection_whitening)
        encoder.projection.weight.data.copy_(weight)
    with torch.no_grad():
        embedding = encoder.projection(features)
    for task in cosine:
        assert isinstance(task.head, NestedCosine)
        imprint_proxies(task.head, embedding, labels[task.config.field])


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
        batch = next(iterator)
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
