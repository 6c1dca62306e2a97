"""The driver of a training stage: resolve the model, run Ray Train over the workers, publish an encoder.

The run's checkpoints lie in the draft, so a stage that is run again after a crash of the driver continues from the last
one; workers that die are started again within the run, and an error that another attempt would meet as well ends it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.errors import ArtifactError, LookalikeError, UsageError
from lookalike.progress import follow_remote
from lookalike.registry import nearest
from lookalike.stages import Input, StageRun
from lookalike.telemetry import fields, get_logger
from lookalike.train.feed.streams import require_units
from lookalike.train.feed.units import REMEDY, THREADS, explained, list_units
from lookalike.train.run.checkpoints import last_checkpoint
from lookalike.train.run.loop import train_worker
from lookalike.train.run.memory import require_memory
from lookalike.train.run.settings import LoopConfig, TrainConfig
from lookalike.train.run.state import export_weights
from lookalike.train.tasks import ATTRIBUTE
from lookalike.vision.encoder import EncoderConfig, build_model, read_config, save_encoder

log = get_logger(__name__)
INPUTS = {"shards": Input("shards"), "encoder": Input("encoder")}
LABEL_FIELDS = ("labels", "category", "group")
DISTILL = "distill"
"""Kind of the tasks that learn from the teacher."""


def run_training(run: StageRun[TrainConfig]) -> None:
    """Train as configured and fill the draft with the encoder."""
    config = resolve(run)
    folder = run.out.work("train")
    with follow_remote(run.out.name, config.total_steps, unit="step") as progress:
        fit(config, folder, progress)
    found = last_checkpoint(folder)
    if found is None or found.step != config.total_steps:
        raise LookalikeError(
            f"training {run.out.name!r} ended at {found.uri if found else 'no checkpoint'}, before "
            f"step {config.total_steps}; run it again to go on"
        )
    state = found.read()
    encoder = build_model(config.encoder)
    export_weights(state, encoder)
    points = state["curve"]["points"]
    run.out.write_json("history.json", points)
    run.out.stats.update(
        steps=config.total_steps,
        images=config.total_steps * run.config.batch_size,
        dims=list(config.encoder.dims),
        workers=state["worlds"],
        **_rounded(points[-1]),
        **_rounded(state["pace"]),
    )
    save_encoder(run.out, encoder, config.encoder, model_card(run.out.name, config, points[-1]))


def resolve(run: StageRun[TrainConfig]) -> LoopConfig:
    """Everything a worker needs, checked: datasets, classes, nested dims; wrong names raise ``UsageError``."""
    train, shards, source = run.config, run.one("shards"), run.one("encoder")
    files = find_files(train, shards)
    teacher = find_teacher(train, run.many("teacher"))
    encoder, num_classes = resolve_encoder(train, read_config(source)), count_classes(train, shards, teacher)
    require_task_memory(train, encoder, num_classes)
    require_labels(train, files)
    first = next(iter(train.mix))
    return LoopConfig(
        name=run.out.name,
        fingerprint=run.out.fingerprint,
        root=run.out.root,
        train=train,
        encoder=encoder,
        source_encoder=source.uri,
        files=files,
        teacher=teacher.uri if teacher else None,
        num_classes=num_classes,
        attributes=attribute_names(shards) if any(name.startswith(ATTRIBUTE) for name in num_classes) else (),
        rows_per_epoch=expected_rows(files[first], train.loader.resample),
    )


def find_files(train: TrainConfig, shards: Artifact) -> dict[str, list[str]]:
    """Dataset of the mix -> its shard files; names that are not there, and datasets with fewer row groups than data
    streams, raise ``UsageError``."""
    files: dict[str, list[str]] = {}
    for name in train.mix:
        files[name] = shards.files(f"{name}/", ".parquet")
        if files[name]:
            require_units(name, list_units(files[name]), train.workers.num)
        else:
            valid = sorted({uri.rsplit("/", 2)[-2] for uri in shards.files(suffix=".parquet")})
            raise UsageError(f"mix names dataset {name!r}{nearest(name, valid)}; {shards.uri} has {', '.join(valid)}")
    return files


def require_labels(train: TrainConfig, files: Mapping[str, Sequence[str]]) -> None:
    """Raise ``UsageError`` for a task whose labels no row of the mix has: its loss would be zero to the end.

    The statistics of the files say so; where they say nothing a file is taken to have labels.
    """
    for name, task in train.tasks.items():
        if task.field in LABEL_FIELDS and not any(
            _may_hold(uri, task.field) for uris in files.values() for uri in uris
        ):
            raise UsageError(
                f"task {name!r} reads {task.field!r}, and no row of {', '.join(files)} has one; drop the "
                "task, or add a dataset with labels to mix"
            )


def _may_hold(uri: str, field: str) -> bool:
    filesystem, path = storage.arrow_filesystem(uri)
    with explained(uri):
        meta = pq.read_metadata(path, filesystem=filesystem)
    for group in map(meta.row_group, range(meta.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.partition(".")[0] == field:
                known = chunk.statistics
                if known is None or (known.has_min_max and known.max >= 0):
                    return True
                if not known.has_min_max and known.null_count != chunk.num_values:
                    return True
    return False


def require_task_memory(train: TrainConfig, encoder: EncoderConfig, num_classes: dict[str, int]) -> None:
    """Raise ``UsageError`` if the tasks need more than ``compute.task_memory_gib`` on a worker."""
    require_memory(
        train.tasks,
        encoder.dims,
        num_classes,
        rows=train.micro_batch,
        world=train.workers.num,
        slots=train.optimizer.slots,
        limit_gib=train.compute.task_memory_gib,
    )


def resolve_encoder(train: TrainConfig, base: EncoderConfig) -> EncoderConfig:
    """The configuration of the encoder that training from ``base`` makes."""
    size = {} if train.backbone.image_size is None else {"size": train.backbone.image_size}
    return EncoderConfig(
        backbone=base.backbone,
        num_features=base.num_features,
        dims=train.resolve_dims(base.num_features),
        projection=train.embedding_dim is not None,
        pooling=base.pooling,
        transform=base.transform.model_copy(update=size),
    )


def count_classes(train: TrainConfig, shards: Artifact, teacher: Artifact | None) -> dict[str, int]:
    """Field -> its number of classes, of attributes those that tasks read; ``teacher`` -> the size of its embedding."""
    classes = shards.read_json("classes.json")
    counts = {field: len(classes[field]) for field in LABEL_FIELDS}
    for name, task in train.tasks.items():
        if task.field.startswith(ATTRIBUTE):
            counts[task.field] = _count_values(name, task.field, classes.get("attributes", {}), shards.uri)
        if counts.get(task.field, 2) < 2:  # a field that holds no classes has no count
            raise UsageError(
                f"task {name!r} reads {task.field!r}, of which the shards have {counts[task.field]} "
                "classes; two are needed"
            )
    return counts if teacher is None else {**counts, "teacher": read_config(teacher).dim}


def _count_values(task: str, field: str, attributes: Mapping[str, Sequence[str]], uri: str) -> int:
    name = field.removeprefix(ATTRIBUTE)
    if name in attributes:
        return len(attributes[name])
    there = (
        f"have {', '.join(attributes)}"
        if attributes
        else "have none; map the source's columns to the corpus field attributes, and run the steps again"
    )
    raise UsageError(
        f"task {task!r} reads {field!r}, and the shards have no attribute {name!r}"
        f"{nearest(name, list(attributes))}; {uri}: they {there}. An attribute needs two values that "
        "shards.min_images_per_attribute training images have"
    )


def attribute_names(shards: Artifact) -> tuple[str, ...]:
    """What the column ``attributes`` of the shards holds, in its order; shards of older versions have none."""
    return tuple(shards.read_json("classes.json").get("attributes", {}))


def find_teacher(train: TrainConfig, given: list[Artifact]) -> Artifact | None:
    """The teacher's artifact when a task distils; one that is missing, or that no task uses, raises ``UsageError``."""
    tasks = [name for name, task in train.tasks.items() if task.kind == DISTILL]
    if tasks and not given:
        raise UsageError(
            f"task {tasks[0]!r} distils and there is no teacher; give the step an input teacher, the "
            "encoder to learn from"
        )
    if given and not tasks:
        raise UsageError(
            f"input teacher is {given[0].uri} and no task distils; add a task of kind {DISTILL!r}, or drop the input"
        )
    return given[0] if given else None


def expected_rows(uris: list[str], resample: bool) -> int:
    """Rows of one epoch: all rows, or the sum of their repeat factors."""

    def of_file(uri: str) -> float:
        filesystem, path = storage.arrow_filesystem(uri)
        with explained(uri):
            if not resample:
                return float(pq.read_metadata(path, filesystem=filesystem).num_rows)
            repeat = pq.read_table(path, columns=["repeat"], filesystem=filesystem)["repeat"]
            rows = float(pc.sum(repeat).as_py() or 0.0)
        if not math.isfinite(rows):
            raise ArtifactError(f"{uri}: column 'repeat' adds up to {rows}; {REMEDY}")
        return rows

    with ThreadPoolExecutor(THREADS) as pool:
        return max(1, round(math.fsum(pool.map(of_file, uris))))


def fit(config: LoopConfig, folder: str, progress: Any) -> None:
    """Run the worker group to the end; a run found in ``folder`` continues from its last checkpoint."""
    train = config.train
    check_resources(train)
    storage.make_directory(folder)
    storage.remove_temporaries(folder)
    filesystem, path = storage.arrow_filesystem(folder)
    workers = train.workers.num if train.workers.min is None else (train.workers.min, train.workers.num)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"loop": config.model_dump(mode="json"), "folder": folder, "progress": progress},
        torch_config=TorchConfig(backend="nccl" if train.workers.use_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]
            use_gpu=train.workers.use_gpu,
            resources_per_worker={"CPU": train.workers.cpus, **({"GPU": 1} if train.workers.use_gpu else {})},
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=os.path.abspath(path) if storage.is_local(folder) else path,
            storage_filesystem=filesystem,
            callbacks=[StopAtOwnErrors()],  # type: ignore[list-item]
            failure_config=FailureConfig(max_failures=train.workers.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps the workers' errors in types of its own
        raise own_error(error) or LookalikeError(f"training failed: {error}") from error


def check_resources(train: TrainConfig) -> None:
    """Raise ``UsageError`` when this Ray has too few CPUs or GPUs: on one machine the run would wait for ever. A
    cluster that was joined may grow, so there it is a warning."""
    workers = train.workers.min or train.workers.num
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, each in (("CPU", train.workers.cpus), ("GPU", int(train.workers.use_gpu))):
        if workers * each <= there.get(name, 0.0):
            continue
        setting = (
            "workers.use_gpu=false, or take a machine with GPUs"
            if name == "GPU"
            else "cluster.num_cpus, a smaller workers.num"
        )
        message = (
            f"{workers} workers need {workers * each} {name}s and Ray has {there.get(name, 0.0):g}; set "
            f"{setting}, or workers.min"
        )
        if not os.environ.get("RAY_ADDRESS"):
            raise UsageError(message)
        log.warning("waiting %s", fields(reason=message))


class StopAtOwnErrors(UserCallback):  # type: ignore[misc]
    """Ends the run at an error of ours (wrong input, a loss that is no number): another attempt would end alike."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller when workers failed."""
        for failure in worker_exceptions.values():
            if (error := _own(failure)) is not None:
                raise error


def own_error(error: BaseException) -> LookalikeError | None:
    """The error of ours that ended a run, or None when it was something else."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None), error]
    return next((own for failure in failures if failure is not None and (own := _own(failure)) is not None), None)


def _own(failure: BaseException) -> LookalikeError | None:
    for name in ("", "_base_exc", "cause", "__cause__"):
        candidate = getattr(failure, name, None) if name else failure
        if isinstance(candidate, LookalikeError):
            return candidate
    return None


def _rounded(point: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in point.items() if key != "step"}


def _values(config: LoopConfig, field: str) -> str:
    count = config.num_classes.get(field)
    return f"`{field}`" if count is None or field == "teacher" else f"{count} classes of `{field}`"


def model_card(name: str, config: LoopConfig, last: dict[str, float]) -> str:
    """A short model card in Markdown; ``last``: the last point of the loss curve."""
    train, encoder = config.train, config.encoder
    tasks = "\n".join(
        f"- `{task}`: {settings.kind} over {_values(config, settings.field)}, {settings.nesting}, "
        f"weight {settings.weight}"
        for task, settings in train.tasks.items()
    )
    losses = ", ".join(f"{key} {value:.3f}" for key, value in last.items() if key.startswith("loss"))
    return f"""# {name}

Image encoder: `{encoder.backbone}` at {encoder.transform.size} px, embedding of {encoder.dim} dimensions, nested at
{", ".join(map(str, encoder.dims))}. Vectors come unnormalised; truncate first, then normalise, then compare by cosine.

Trained for {config.total_steps} steps of {train.batch_size} images on {", ".join(train.mix)}, seed {train.seed}:

{tasks}

Last losses: {losses or "none recorded"}. The manifest beside this file names every input.
"""
