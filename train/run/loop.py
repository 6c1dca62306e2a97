"""The training loop that runs on every Ray Train worker: DDP, accumulation, mixed precision, checkpoints, metrics.

Pretraining and fine-tuning differ only in configuration. The data comes in ``workers.num`` streams, however many
workers are left: a worker takes the streams ``rank``, ``rank + world``, ... one after the other and adds up their
gradients. A run that shrinks therefore reads the same batches, with the same augmentation and dropout; only the order
of floating-point sums changes, and batch-norm statistics if they are not frozen. With the same number of workers, a run
that was killed and resumed ends with the same weights as an undisturbed run, bit for bit on a CPU.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model
from torch import nn

from lookalike.errors import UsageError
from lookalike.seeds import derive_seed
from lookalike.telemetry import fields, get_logger, setup_logging
from lookalike.train.feed.loader import move_images, move_labels
from lookalike.train.run.batches import feed, worker_batches
from lookalike.train.run.checkpoints import Checkpoint, CheckpointWriter, last_checkpoint, sound_checkpoint
from lookalike.train.run.curves import Gauges, Pace, StepReader, StepValues, stop_if_bad
from lookalike.train.run.initialise import build_multitask_model
from lookalike.train.run.optimizer import hasten_batch_norm, require_batch_norm_rows, set_train_mode
from lookalike.train.run.settings import LoopConfig, TrainConfig
from lookalike.train.run.sharding import clip_gradients, ignore_in_ddp
from lookalike.train.run.state import Training
from lookalike.train.run.teacher import Teacher
from lookalike.train.run.trackers import TrackedRun, Tracker, start_trackers
from lookalike.train.tasks import MultiTaskModel, Shares
from lookalike.vision.tuning import recompute_activations

log = get_logger(__name__)
TICK_STEPS = 5
Batch = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """This process among the workers, and its instructions."""

    config: LoopConfig
    rank: int
    world: int
    device: torch.device
    folder: str
    """URI of the run's checkpoints."""
    progress: Any = None
    """Actor that shows the run's progress, or None."""

    @property
    def streams(self) -> range:
        return range(self.rank, self.config.train.workers.num, self.world)


def train_worker(values: dict[str, Any]) -> None:
    """Entry point of Ray Train on each worker.

    ``values``: ``loop`` (a dumped ``LoopConfig``), ``folder`` and ``progress``.
    """
    setup_logging()
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    context = ray.train.get_context()
    place = Place(
        LoopConfig.model_validate(values["loop"]),
        context.get_world_rank(),
        context.get_world_size(),
        get_device(),
        values["folder"],
        values["progress"],
    )
    train = place.config.train
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)  # workers of a node see all its GPUs, and nccl takes the current one
    require_even_rounds(train, place.world)
    torch.set_num_threads(train.workers.cpus)
    torch.manual_seed(derive_seed(train.seed, "model"))
    checkpoint = agree(sound_checkpoint(place.folder))
    announce(place, checkpoint)
    model = build_multitask_model(place.config, initialise=checkpoint is None)
    if train.compute.activation_checkpointing:
        recompute_activations(model.encoder.backbone)  # type: ignore[arg-type]
    hasten_batch_norm(model, place.config.total_steps)
    training = Training.begin(model.to(place.device), train, place.config.total_steps)
    require_batch_norm_rows(model, train)
    if checkpoint is not None:
        training.resume(checkpoint, place.rank, place.world)
    training.join(place.world)
    if train.compute.compile:
        model.encoder.compile()
    ignore_in_ddp(model)
    wrapped = prepare_model(model, parallel_strategy="ddp" if place.world > 1 else None)
    run_steps(training, wrapped, place)


def require_even_rounds(train: TrainConfig, world: int) -> None:
    """Raise ``UsageError`` if some workers would have no batch for a task that all workers compute together."""
    together = [name for name, task in train.tasks.items() if task.shard or task.across_workers]
    if together and train.workers.num % world:
        raise UsageError(
            f"task {together[0]!r} needs all workers at once, but {world} workers cannot share {train.workers.num} "
            f"data streams evenly; wait for all (workers.min=null), or for a number that divides {train.workers.num}"
        )


def announce(place: Place, checkpoint: Checkpoint | None) -> None:
    """Show in the progress what happens before the first step; it can take minutes."""
    if place.rank == 0 and place.progress is not None:
        place.progress.update.remote(checkpoint.step if checkpoint else 0, "resuming" if checkpoint else "initialising")


def agree(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The first worker's checkpoint, on every worker: a dying worker may complete a file that only some have seen."""
    if not dist.is_initialized():
        return checkpoint
    shared: list[Checkpoint | None] = [checkpoint]
    dist.broadcast_object_list(shared)
    return shared[0]


class MicroBatch(NamedTuple):
    """What one forward pass reads."""

    batch: Batch
    shares: Shares
    last: bool
    """Whether it is the worker's last of the step."""


class Feed:
    """A worker's micro-batches on its device, with the teacher's embeddings if a task distils."""

    def __init__(self, place: Place, model: MultiTaskModel, done: int, pace: Pace) -> None:
        config = place.config
        self.place, self.done, self._model, self._pace = place, done, model, pace
        start = done * config.train.compute.accumulation
        self._loaders: Mapping[int, Iterator[Batch]] = {
            stream: feed(worker_batches(config, stream, start), config) for stream in place.streams
        }
        self._teacher = Teacher(config.teacher, config.encoder.transform).to(place.device) if config.teacher else None

    def step(self) -> Iterator[MicroBatch]:
        """Batches of the next step.

        All are loaded before the first is trained on, because each is told its share of the step (``step_shares``);
        their pixels wait as uint8 on the host.
        """
        train, transform = self.place.config.train, self.place.config.encoder.transform
        rounds = [(stream, part) for stream in self._loaders for part in range(train.compute.accumulation)]
        batches = [self._load(stream) for stream, _ in rounds]
        shares = self._model.step_shares(batches)
        for number, ((stream, part), share) in enumerate(zip(rounds, shares, strict=True), 1):
            # dropout depends on the place in the data, not on how many processes load or train
            torch.manual_seed(derive_seed(train.seed, "forward", stream, self.done * train.compute.accumulation + part))
            batch = move_images(batches.pop(0), self.place.device, transform)
            yield MicroBatch(batch, share, number == len(rounds))
        self.done += 1

    def _load(self, stream: int) -> Batch:
        """The next batch of a stream, its images still uint8 on the host."""
        began = time.monotonic()
        batch = next(self._loaders[stream])
        self._pace.waited(time.monotonic() - began)
        batch = move_labels(batch, self.place.device)
        if self._teacher is not None:
            normalized = move_images(batch, self.place.device, self.place.config.encoder.transform)
            batch["teacher"] = self._teacher(normalized["images"])
        return batch


def run_steps(training: Training, wrapped: nn.Module, place: Place) -> None:
    """Train from the current step to the last, with checkpoints and metrics on the way."""
    train, stop = place.config.train, place.config.total_steps
    pace = Pace(train.batch_size)
    feed = Feed(place, training.model, training.step, pace)
    writer = CheckpointWriter(place.folder, place.rank, place.world)
    reader = StepReader(place.device)
    report = Report(training, place, pace)
    try:
        for step in range(training.step + 1, stop + 1):
            gradients = forward_backward(training, wrapped, feed.step(), place)
            saves = step % train.checkpoint_every == 0 or step == stop
            reads = not reader.lags or saves or step % train.log_every == 0
            if reader.lags:
                report.take(reader.take(), writer)
            reader.put(step, *gradients, lr=training.lr, norm_may_overflow=training.scaler.is_enabled())
            if reads:
                report.take(reader.take(), writer)
            training.update(step)
            report.count_skipped()
            pace.step()
            if saves:
                writer.save(step, training.state(place.rank, pace.whole()))
        writer.wait()
        training.require_progress()
    finally:
        report.close()
        writer.close()


class StepGradients(NamedTuple):
    """What a step reports beside the gradients themselves."""

    losses: dict[str, torch.Tensor]
    """This worker's shares of the step's losses, scalars."""
    norm: torch.Tensor
    """Norm of the whole gradient before clipping."""
    ids: list[str]
    """Image ids of this worker's rows."""


def forward_backward(
    training: Training, wrapped: nn.Module, batches: Iterator[MicroBatch], place: Place
) -> StepGradients:
    """Compute and clip the gradients of one step."""
    train, low = place.config.train, place.config.train.compute.dtype
    set_train_mode(training.model, train.backbone)
    training.optimizer.zero_grad(set_to_none=True)
    shares: dict[str, torch.Tensor] = {}
    ids: list[str] = []
    for batch, parts, last in batches:
        ids += batch.get("ids") or []
        with nullcontext() if last or place.world == 1 else wrapped.no_sync():  # type: ignore[operator]
            with torch.autocast(place.device.type, dtype=low, enabled=low is not None):
                total, losses = wrapped(batch, training.step, parts)
            # DDP averages over workers; the losses are shares of a step's, to be added up
            training.scaler.scale(total * place.world).backward()
        for name, loss in {"loss": total, **{f"loss_{task}": value for task, value in losses.items()}}.items():
            shares[name] = shares[name] + loss.detach() if name in shares else loss.detach()
    training.scaler.unscale_(training.optimizer)
    norm = clip_gradients(training.model, train.optimizer.clip_norm or float("inf"))
    return StepGradients(shares, norm, ids)


class Report:
    """Logs, metrics and trackers of the first worker; every worker stops here at a loss that is not finite."""

    def __init__(self, training: Training, place: Place, pace: Pace) -> None:
        self._training, self._place, self._pace = training, place, pace
        self._skipped = training.skipped
        self._trackers: Sequence[Tracker] = ()
        if place.rank == 0:
            config = place.config
            run = TrackedRun(
                config.name, config.fingerprint, config.root, training.step, config.train.model_dump(mode="json")
            )
            self._trackers = start_trackers(config.train.trackers, run)
            self._gauges = Gauges(config.name)

    def take(self, figures: StepValues | None, writer: CheckpointWriter) -> None:
        """Check a step's losses, add them to the curve, and publish them every ``log_every`` steps."""
        if figures is None:
            return
        if figures.bad:
            writer.wait()
            stop_if_bad(figures, self._place.rank, self._last_good)
        self._training.curve.add(figures)
        if self._place.rank:
            return
        step, values, train = figures.step, figures.values, self._place.config.train
        if step % TICK_STEPS == 0 and self._place.progress is not None:
            self._place.progress.update.remote(step, fields(loss=values["loss"], **self._pace.whole()))
        if step % train.log_every == 0 or step == self._place.config.total_steps:
            values = {**values, **self._pace.read()}
            log.info("train %s", fields(step=step, of=self._place.config.total_steps, **values))
            self._gauges.set({"step": float(step), **values})
            for tracker in self._trackers:
                tracker.log(step, values)

    def count_skipped(self) -> None:
        """Log the steps that float16 skipped, once for each further one."""
        if self._training.skipped > self._skipped and not self._place.rank:
            log.warning("skipped %s", fields(step=self._training.step, skipped=self._training.skipped))
        self._skipped = self._training.skipped

    def _last_good(self) -> str:
        checkpoint = last_checkpoint(self._place.folder)
        return f"the last good checkpoint is {checkpoint.uri}" if checkpoint else "there is no checkpoint yet"

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
