"""From settings and inputs to a worker's ``LoopConfig``; whatever cannot work is refused before any worker starts."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow.compute as pc
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.errors import ArtifactError, UsageError
from lookalike.registry import nearest
from lookalike.stages import StageRun
from lookalike.telemetry import fields, get_logger
from lookalike.train.feed.row_groups import REMEDY, THREADS, explained, list_row_groups
from lookalike.train.feed.streams import require_row_groups
from lookalike.train.run.footprint import describe, measure, require_memory
from lookalike.train.run.settings import LoopConfig, TrainConfig
from lookalike.train.tasks import ATTRIBUTE
from lookalike.vision.encoder import EncoderConfig, read_config

LABEL_FIELDS = ("labels", "category", "group")
REMEDIES = {
    "labels": "give the records titles or keywords, and in the labels step set words: true or lower "
    "min_images_per_label",
    "category": "map the source's column to the corpus field category, and in the shards step set categories: all "
    "(grouped counts only rows with a group) or lower min_images_per_category",
    "group": "map the source's column of products to the corpus field group",
}
log = get_logger(__name__)
SHARE_TOLERANCE = 0.005
DISTILL = "distill"
"""Kind of the tasks that learn from the teacher."""


def resolve(run: StageRun[TrainConfig]) -> LoopConfig:
    """Everything a worker needs; wrong datasets, classes, dims or teachers raise ``UsageError``."""
    train, shards, source = run.config, run.one("shards"), run.one("encoder")
    files = find_files(train, shards)
    teacher = find_teacher(train, run.many("teacher"))
    encoder, num_classes = resolve_encoder(train, read_config(source)), count_classes(train, shards, teacher)
    require_memory(train, encoder.dims, num_classes)
    require_labels(train, files)
    first = next(iter(train.mix))
    reads_attributes = any(name.startswith(ATTRIBUTE) for name in num_classes)
    config = LoopConfig(
        name=run.out.name,
        fingerprint=run.out.fingerprint,
        root=run.out.root,
        train=train,
        encoder=encoder,
        source_encoder=source.uri,
        files=files,
        teacher=teacher.uri if teacher else None,
        num_classes=num_classes,
        attributes=tuple(shards.read_json("classes.json")["attributes"]) if reads_attributes else (),
        rows_per_epoch=expected_rows(files[first], train.loader.resample),
    )
    check_mixture(train, config.total_steps)
    return config


def check_mixture(train: TrainConfig, steps: int) -> None:
    """Raise ``UsageError`` for a dataset that no step will read; log a balanced one whose share had to be rounded."""
    mixture = train.mixture
    for name, rows in mixture.first(steps * train.parts).items():
        wanted, share = mixture.wanted(name), mixture.share(name)
        if not rows:
            raise UsageError(
                f"mix leaves dataset {name!r} no picture: {float(wanted):.2g} of the {steps * train.batch_size} of "
                f"{steps} steps; raise its weight, batch_size or epochs, or leave it out"
            )
        if abs(share - wanted) > SHARE_TOLERANCE:
            log.warning(
                "mix %s",
                fields(
                    dataset=name,
                    share=f"{float(share):.3f}",
                    wanted=f"{float(wanted):.3f}",
                    why="balanced datasets have whole pictures of every pass",
                    remedy="change batch_size or mix",
                ),
            )


def remedy(field: str) -> str:
    """What gives a field of the shards more classes."""
    return REMEDIES.get(field) or (
        "map the source's column to the corpus field attributes, or lower min_images_per_attribute in the shards step"
    )


def preview(run: StageRun[TrainConfig]) -> list[str]:
    """Memory of one step as text lines; raises the ``UsageError`` that would stop the run at its start."""
    train, shards = run.config, run.one("shards")
    find_files(train, shards)
    teacher = find_teacher(train, run.many("teacher"))
    encoder = resolve_encoder(train, read_config(run.one("encoder")))
    classes = count_classes(train, shards, teacher)
    require_memory(train, encoder.dims, classes)
    return describe(measure(train, encoder, classes, read_config(teacher) if teacher else None), train, encoder)


def find_files(train: TrainConfig, shards: Artifact) -> dict[str, list[str]]:
    """Dataset of the mix -> its shard files.

    Raises ``UsageError`` for an unknown dataset, and for one with fewer row groups than data streams.
    """
    files: dict[str, list[str]] = {}
    for name in train.mix:
        files[name] = shards.files(f"{name}/", ".parquet")
        if files[name]:
            require_row_groups(name, list_row_groups(files[name]), train.workers.num)
        else:
            valid = sorted({uri.rsplit("/", 2)[-2] for uri in shards.files(suffix=".parquet")})
            raise UsageError(f"mix names dataset {name!r}{nearest(name, valid)}; {shards.uri} has {', '.join(valid)}")
    return files


def require_labels(train: TrainConfig, files: Mapping[str, Sequence[str]]) -> None:
    """Raise ``UsageError`` for a task whose labels no row of the mix has: its loss would always be zero.

    The parquet statistics tell; a file without statistics counts as having labels.
    """
    for name, task in train.tasks.items():
        if task.field in LABEL_FIELDS and not any(
            _may_hold(uri, task.field) for uris in files.values() for uri in uris
        ):
            raise UsageError(
                f"task {name!r} reads {task.field!r}, and no row of {', '.join(files)} has one; "
                f"{remedy(task.field)}; or drop the task, or add a dataset with labels to mix"
            )


def _may_hold(uri: str, field: str) -> bool:
    filesystem, path = storage.arrow_filesystem(uri)
    with explained(uri):
        meta = pq.read_metadata(path, filesystem=filesystem)
    for group in map(meta.row_group, range(meta.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.partition(".")[0] == field:
                stats = chunk.statistics
                if stats is None or (stats.has_min_max and stats.max >= 0):
                    return True
                if not stats.has_min_max and stats.null_count != chunk.num_values:
                    return True
    return False


def resolve_encoder(train: TrainConfig, base: EncoderConfig) -> EncoderConfig:
    """Configuration of the encoder that training makes from ``base``."""
    size = {} if train.backbone.image_size is None else {"size": train.backbone.image_size}
    if train.initialise.method == "data" and (train.embedding_dim or 0) > base.num_features:
        raise UsageError(
            f"embedding_dim {train.embedding_dim} is wider than the backbone's {base.num_features} features, and a "
            f"projection by PCA has no more directions; set embedding_dim={base.num_features} or less, or "
            "initialise.method=random"
        )
    return EncoderConfig(
        backbone=base.backbone,
        num_features=base.num_features,
        dims=train.resolve_dims(base.num_features),
        projection=train.embedding_dim is not None,
        pooling=base.pooling,
        transform=base.transform.model_copy(update=size),
    )


def count_classes(train: TrainConfig, shards: Artifact, teacher: Artifact | None) -> dict[str, int]:
    """Field -> number of classes (of the attributes, those that tasks read); ``teacher`` -> size of its embedding."""
    classes = shards.read_json("classes.json")
    counts = {field: len(classes[field]) for field in LABEL_FIELDS}
    for name, task in train.tasks.items():
        if task.field.startswith(ATTRIBUTE):
            counts[task.field] = _count_values(name, task.field, classes.get("attributes", {}), shards.uri)
        if counts.get(task.field, 2) < 2:  # a field that holds no classes has no count
            raise UsageError(
                f"task {name!r} reads {task.field!r}, and the shards have {counts[task.field]} classes of it; "
                f"a task needs two; {remedy(task.field)}, or drop the task"
            )
    return counts if teacher is None else {**counts, "teacher": read_config(teacher).dim}


def _count_values(task: str, field: str, attributes: Mapping[str, Sequence[str]], uri: str) -> int:
    name = field.removeprefix(ATTRIBUTE)
    if name in attributes:
        return len(attributes[name])
    stated = (
        f"have {', '.join(attributes)}"
        if attributes
        else "have none; map the source's columns to the corpus field attributes, and run the steps again"
    )
    raise UsageError(
        f"task {task!r} reads {field!r}, and the shards have no attribute {name!r}"
        f"{nearest(name, list(attributes))}; {uri}: they {stated}. An attribute needs two values, each on "
        "shards.min_images_per_attribute training images"
    )


def find_teacher(train: TrainConfig, given: list[Artifact]) -> Artifact | None:
    """The teacher's artifact if a task distils. Raises ``UsageError`` if it is missing, or if no task uses it."""
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
    """Rows of one epoch: all rows, or, resampled, the sum of their repeat factors."""

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
