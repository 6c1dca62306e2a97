"""The model before its first step: projection and proxies start from one pass of the backbone over training images.

The projection starts as the principal directions of the backbone's features, strongest first, so that prefixes begin
ordered. Class proxies start at the mean of their class's embeddings (weight imprinting, Qi et al. 2018); random proxies
would first destroy that order, most of all at the smallest nested dims.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from lookalike.artifacts import Artifact
from lookalike.train.feed.loader import attribute_fields, check_labels, open_pictures
from lookalike.train.feed.row_groups import RowGroup, list_row_groups, read_row_group, split_attributes
from lookalike.train.losses.matryoshka import NestedCosine
from lookalike.train.losses.proxies import workers
from lookalike.train.run.settings import LoopConfig
from lookalike.train.tasks import MultiTaskModel, Task, build_tasks
from lookalike.vision.encoder import EmbeddingModel, read_encoder
from lookalike.vision.transforms import Transform, build_eval_transform
from lookalike.vision.tuning import is_convolutional

BATCH = 64
MAX_ROW_GROUPS = 256  # row groups to read at most


def build_multitask_model(config: LoopConfig, *, initialise: bool) -> MultiTaskModel:
    """The source encoder's backbone with projection and heads; ``initialise`` starts these two as the settings say."""
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
    row_groups = list_row_groups(config.files[next(iter(config.train.mix))])
    cosine = [task for task in tasks.values() if isinstance(task.head, NestedCosine) and task.config.field != "labels"]
    if not config.encoder.projection and not cosine:
        return
    features, labels = sample_features(
        encoder.backbone,
        row_groups,
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


def sample_features(
    backbone: nn.Module,
    row_groups: Sequence[RowGroup],
    transform: Transform,
    fields: Sequence[str],
    max_images: int,
    *,
    num_classes: Mapping[str, int] | None = None,
    attributes: Sequence[str] = (),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features [n, F] float32 of up to ``max_images`` images, and the integer columns ``fields``, int64 [n] each.

    The images are spread evenly over the row groups, or over ``MAX_ROW_GROUPS`` of them. The workers of a process group
    share the work, and each returns the whole sample. ``attributes``: names in the shards' column ``attributes``, for
    fields such as ``attribute.colour``. Labels beyond ``num_classes`` (field -> classes) raise ``ArtifactError``.
    """
    num = len(row_groups)
    if num > MAX_ROW_GROUPS:
        row_groups = [row_groups[i * num // MAX_ROW_GROUPS] for i in range(MAX_ROW_GROUPS)]
    share = max(1, max_images // max(1, len(row_groups)))
    stated = attribute_fields(fields)
    columns = ["image_id", "image", *(["attributes"] if stated else []), *(f for f in fields if f not in stated)]
    rank, world = workers()
    backbone.eval()
    rows: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    with torch.no_grad():
        for row_group in row_groups[rank::world]:
            table = split_attributes(row_group, read_row_group(row_group, columns).slice(0, share), stated, attributes)
            check_labels(row_group, table, {field: n for field, n in (num_classes or {}).items() if field in fields})
            for start in range(0, table.num_rows, BATCH):
                part = table.slice(start, BATCH)
                images = torch.stack([transform(picture) for picture in open_pictures(row_group, part)])
                features = backbone(images.contiguous(memory_format=torch.channels_last))
                rows.append((features, {f: torch.tensor(part[f].to_pylist(), dtype=torch.int64) for f in fields}))
    gathered = [rows]
    if world > 1:
        gathered = [rows] * world
        dist.all_gather_object(gathered, rows)
    whole = [pair for part in gathered for pair in part]
    return torch.cat([f for f, _ in whole]), {f: torch.cat([labels[f] for _, labels in whole]) for f in fields}


def pca_projection(features: torch.Tensor, dim: int, whitening: float) -> torch.Tensor:
    """Weight [dim, F] float32: leading right singular vectors of the normalised features [n, F].

    Row i is divided by (s_i / s_0) ** ``whitening``; rows beyond the rank of the sample are orthogonal completions.
    """
    unit = functional.normalize(features).double()
    # eigenvectors of the F x F Gram matrix are the right singular vectors, and complete themselves beyond the rank
    eigenvalues, vectors = torch.linalg.eigh(unit.T @ unit)
    scale = eigenvalues.flip(0)[:dim].clamp_min(0.0).sqrt()
    scale = (scale / scale[0]).clamp_min(1e-3)
    weight: torch.Tensor = vectors.flip(1).T[:dim] / scale[:, None] ** whitening
    return weight.float()


def imprint_proxies(head: NestedCosine, embedding: torch.Tensor, labels: torch.Tensor) -> None:
    """Set each class's proxies to the normalised mean of its normalised embeddings [n, D].

    Rows with labels [n] below 0 are ignored; classes without a row keep their random start; a sharded head sets the
    classes it holds.
    """
    present_rows = (labels >= head.shard.first) & (labels < head.shard.stop)
    own = labels[present_rows] - head.shard.first
    with torch.no_grad():
        for m, proxy in zip(head.sizes, head.proxies, strict=True):
            unit = functional.normalize(embedding[present_rows, :m])
            total = torch.zeros_like(proxy).index_add_(0, own, unit)
            present = torch.zeros(len(proxy), dtype=torch.bool)
            present[own] = True
            proxy[present] = functional.normalize(total[present])
