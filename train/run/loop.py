"""The training loop that runs on every Ray Train worker: DDP, accumulation, mixed precision, checkpoints, metrics.

Pretraining and fine-tuning differ in configuration alone. The data comes in ``workers.num`` streams, however many
workers are left: a worker takes the streams ``rank``, ``rank + world``, ... one after the other and adds up their
gradients. So a run that shrinks reads the same batches, with the same augmentation and dropout, and differs from one
that did not in the order of floating-point sums alone (and in batch-norm statistics where they are not frozen). With
the same number of workers a run that was killed ends with the weights of one that was not, bit by bit on a CPU.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device, prepare_model
from torch import nn

from lookalike.artifacts import Artifact
from lookalike.errors import UsageError
from lookalike.seeds import derive_seed
from lookalike.telemetry import fields, get_logger, setup_logging
from lookalike.train.feed.units import list_units
from lookalike.train.losses.matryoshka import NestedCosine
from lookalike.train.run.batches import feed, worker_batches
from lookalike.train.run.checkpoints import Checkpoint, CheckpointWriter, last_checkpoint
from lookalike.train.run.curves import Gauges, Pace, StepReader, StepValues, publish, stop_if_bad
from lookalike.train.run.initialise import imprint_proxies, pca_projection, sample_features
from lookalike.train.run.optimizer import hasten_batch_norm, set_train_mode
from lookalike.train.run.settings import LoopConfig, TrainConfig
from lookalike.train.run.shards import clip_gradients, ignore_in_ddp
from lookalike.train.run.state import Training
from lookalike.train.run.teacher import Teacher
from lookalike.train.run.trackers import TrackedRun, Tracker, start_trackers
from lookalike.train.tasks import MultiTaskModel, Task, build_tasks
from lookalike.vision.encoder import EmbeddingModel, read_encoder
from lookalike.vision.transforms import build_eval_transform
from lookalike.vision.tuning import is_convolutional, recompute_activations

log = get_logger(__name__)
TICK_STEPS = 5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Batch = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where this process stands among the workers, and what it was told."""

    config: LoopConfig
    rank: int
    world: int
    device: torch.device
    folder: str
    """Where the run's checkpoints are."""
    progress: Any = None
    """Actor that shows the run's progress, or None."""

    @property
    def streams(self) -> range:
        """The data streams that this worker reads."""
        return range(self.rank, self.config.train.workers.num, self.world)

    @property
    def parts(self) -> int:
        """Forward passes of all workers in one step."""
        return self.config.train.parts


def train_worker(values: dict[str, Any]) -> None:
    """Ray Train's entry on each worker; ``values``: ``loop``, a dumped ``LoopConfig``, ``folder`` and ``progress``."""
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
    found = agree(last_checkpoint(place.folder))
    announce(place, found)
    model = build_multitask_model(place.config, initialise=found is None)
    if train.compute.activation_checkpointing:
        recompute_activations(model.encoder.backbone)  # type: ignore[arg-type]
    hasten_batch_norm(model, place.config.total_steps)
    training = Training.begin(model.to(place.device), train, place.config.total_steps)
    if found is not None:
        training.resume(found, place.rank, place.world)
    training.join(place.world)
    if train.compute.compile:
        model.encoder.compile()
    ignore_in_ddp(model)
    wrapped = prepare_model(model, parallel_strategy="ddp" if place.world > 1 else None)
    run_steps(training, wrapped, place)


def require_even_rounds(train: TrainConfig, world: int) -> None:
    """Raise ``UsageError`` when tasks that all workers compute together would find some without a batch."""
    together = [name for name, task in train.tasks.items() if task.shard or task.across_workers]
    if together and train.workers.num % world:
        raise UsageError(
            f"task {together[0]!r} needs all workers at once, but {world} of them cannot share "
            f"{train.workers.num} data streams evenly; wait for all (workers.min=null), or for a number "
            f"that divides {train.workers.num}"
        )


def announce(place: Place, found: Checkpoint | None) -> None:
    """Say what comes before the first step, which can take minutes, in the run's progress."""
    if place.rank == 0 and place.progress is not None:
        place.progress.update.remote(found.step if found else 0, "resuming" if found else "initialising")


def agree(found: Checkpoint | None) -> Checkpoint | None:
    """The first worker's finding: a file that a dying worker still writes must not be seen by some alone."""
    if not dist.is_initialized():
        return found
    shared: list[Checkpoint | None] = [found]
    dist.broadcast_object_list(shared)
    return shared[0]


def build_multitask_model(config: LoopConfig, *, initialise: bool) -> MultiTaskModel:
    """Backbone of the source encoder, projection and heads; ``initialise`` starts the last two from training images."""
    train = config.train
    _, source = read_encoder(
        Artifact.open(config.source_encoder, "encoder"),
        size=config.encoder.transform.size,
        drop_path=train.backbone.drop_path,
    )
    encoder = EmbeddingModel(
        source.backbone, config.encoder.num_features, config.encoder.dim if config.encoder.projection else None
    )
    dims = config.encoder.dims
    tasks = build_tasks(
        train.tasks,
        dims,
        config.class_fields,
        train.nested_weights or (1.0,) * len(dims),
        seed=train.seed,
        dims_per_step=train.dims_per_step,
    )
    if initialise and train.initialise.method == "data":
        initialise_from_data(config, encoder, tasks)
    model = MultiTaskModel(encoder, tasks)
    if is_convolutional(encoder.backbone):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def initialise_from_data(config: LoopConfig, encoder: EmbeddingModel, tasks: Mapping[str, Task]) -> None:
    """Fill projection and proxies from a sample of the dataset named first in ``mix``."""
    units = list_units(config.files[next(iter(config.train.mix))])
    cosine = [task for task in tasks.values() if isinstance(task.head, NestedCosine) and task.config.field != "labels"]
    if not config.encoder.projection and not cosine:
        return
    features, labels = sample_features(
        encoder.backbone,
        units,
        build_eval_transform(config.encoder.transform),
        sorted({task.config.field for task in cosine}),
        config.train.initialise.images,
        num_classes=config.class_fields,
        attributes=config.attributes,
    )
    if isinstance(encoder.projection, nn.Linear):
        weight = pca_projection(features, config.encoder.dim, config.train.initialise.whitening)
        encoder.projection.weight.data.copy_(weight)
    with torch.no_grad():
        embedding = encoder.projection(features)
    for task in cosine:
        assert isinstance(task.head, NestedCosine)
        imprint_proxies(task.head, embedding, labels[task.config.field])


class Feed:
    """A worker's micro-batches on its device, with the teacher's embeddings where a task distils."""

    def __init__(self, place: Place, done: int, pace: Pace) -> None:
        config = place.config
        self.place, self.done, self._pace = place, done, pace
        start = done * config.train.compute.accumulation
        self._loaders: Mapping[int, Iterator[Batch]] = {
            stream: feed(worker_batches(config, stream, start), config, place.device) for stream in place.streams
        }
        self._teacher = Teacher(config.teacher, config.encoder.transform).to(place.device) if config.teacher else None

    def step(self) -> Iterator[tuple[Batch, bool]]:
        """The batches of the next step, and whether each is the worker's last."""
        train = self.place.config.train
        rounds = [(stream, part) for stream in self._loaders for part in range(train.compute.accumulation)]
        for number, (stream, part) in enumerate(rounds, 1):
            asked = time.monotonic()
            batch = next(self._loaders[stream])
            self._pace.waited(time.monotonic() - asked)
            # dropout and the like depend on the place in the data, not on how many processes load or train
            torch.manual_seed(derive_seed(train.seed, "forward", stream, self.done * train.compute.accumulation + part))
            if self._teacher is not None:
                batch["teacher"] = self._teacher(batch["images"])
            yield batch, number == len(rounds)
        self.done += 1


def run_steps(training: Training, wrapped: nn.Module, place: Place) -> None:
    """Train from where ``training`` stands to the last step, with checkpoints and metrics on the way."""
    train, stop = place.config.train, place.config.total_steps
    pace = Pace(train.batch_size)
    feed = Feed(place, training.step, pace)
    writer = CheckpointWriter(place.folder, place.rank, place.world)
    reader = StepReader(place.device)
    said = Report(training, place, pace)
    try:
        for step in range(training.step + 1, stop + 1):
            losses, norm, ids = forward_backward(training, wrapped, feed.step(), place)
            saves = step % train.checkpoint_every == 0 or step == stop
            looks = not reader.lags or saves or step % train.log_every == 0
            if reader.lags:
                said.take(reader.take(), writer)
            reader.put(step, losses, norm, lr=training.lr, ids=ids, norm_may_overflow=training.scaler.is_enabled())
            if looks:
                said.take(reader.take(), writer)
            training.update(step)
            pace.step()
            if saves:
                writer.save(step, training.state(place.rank, pace.whole()))
        writer.wait()
    finally:
        said.close()
        writer.close()


def forward_backward(
    training: Training, wrapped: nn.Module, batches: Iterator[tuple[Batch, bool]], place: Place
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[str]]:
    """Gradients of one step, clipped: this worker's shares of the mean losses, the gradient's norm, the image ids."""
    train = place.config.train
    set_train_mode(training.model, train.backbone)
    training.optimizer.zero_grad(set_to_none=True)
    shares: dict[str, torch.Tensor] = {}
    ids: list[str] = []
    for batch, last in batches:
        ids += batch.get("ids") or []
        with nullcontext() if last or place.world == 1 else wrapped.no_sync():  # type: ignore[operator]
            with autocast(place):
                total, losses = wrapped(batch, training.step)
            # DDP averages over workers; the step wants the mean over parts
            training.scaler.scale(total * (place.world / place.parts)).backward()
        for name, loss in {"loss": total, **{f"loss_{task}": value for task, value in losses.items()}}.items():
            share = loss.detach() / place.parts
            shares[name] = shares[name] + share if name in shares else share
    training.scaler.unscale_(training.optimizer)
    norm = clip_gradients(training.model, train.optimizer.clip_norm or float("inf"))
    return shares, norm, ids


def autocast(place: Place) -> AbstractContextManager[Any]:
    """The forward pass's number format."""
    dtype = DTYPES.get(place.config.train.compute.precision)
    return nullcontext() if dtype is None else torch.autocast(place.device.type, dtype=dtype)


class Report:
    """What the first worker tells the world; every worker stops here when a loss is no number."""

    def __init__(self, training: Training, place: Place, pace: Pace) -> None:
        self._training, self._place, self._pace = training, place, pace
        self._trackers: Sequence[Tracker] = ()
        if place.rank == 0:
            config = place.config
            run = TrackedRun(
                config.name, config.fingerprint, config.root, training.step, config.train.model_dump(mode="json")
            )
            self._trackers = start_trackers(config.train.trackers, run)
            self._gauges = Gauges(config.name)

    def take(self, taken: StepValues | None, writer: CheckpointWriter) -> None:
        """Check a step's losses, add them to the curve, and publish them when it is time."""
        if taken is None:
            return
        if taken.bad:
            writer.wait()
            stop_if_bad(taken, self._place.rank, self._last_good)
        self._training.curve.add(taken)
        if self._place.rank:
            return
        step, values, train = taken.step, taken.values, self._place.config.train
        if step % TICK_STEPS == 0 and self._place.progress is not None:
            self._place.progress.update.remote(step, fields(loss=values["loss"], **self._pace.whole()))
        if step % train.log_every == 0 or step == self._place.config.total_steps:
            values = {**values, **self._pace.read()}
            log.info("train %s", fields(step=step, of=self._place.config.total_steps, **values))
            publish(step, values, self._gauges, self._trackers)

    def _last_good(self) -> str:
        found = last_checkpoint(self._place.folder)
        return f"the last good checkpoint is {found.uri}" if found else "there is no checkpoint yet"

    def close(self) -> None:
        """End the trackers."""
        for tracker in self._trackers:
            tracker.close()
