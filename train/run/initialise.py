"""A data-driven start for projection and proxies, from one pass of the starting backbone over training images.

The projection starts as the principal directions of the backbone's features, the strongest first, so that prefixes
begin ordered. Class proxies start at the mean of their class's embeddings (weight imprinting, Qi et al. 2018): random
proxies would first tear that order apart, most of all at the smallest nested dims, where there is no room to be wrong.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from lookalike.train.feed.loader import attribute_fields, check_labels, open_pictures
from lookalike.train.feed.units import Unit, read_unit, split_attributes
from lookalike.train.losses.matryoshka import NestedCosine
from lookalike.vision.transforms import Transform

BATCH = 64
MAX_UNITS = 256  # row groups that are looked into, however many there are


def sample_features(
    backbone: nn.Module,
    units: Sequence[Unit],
    transform: Transform,
    fields: Sequence[str],
    max_images: int,
    *,
    num_classes: Mapping[str, int] | None = None,
    attributes: Sequence[str] = (),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features [n, F] float32 of up to ``max_images`` images, and the integer columns ``fields``, int64 [n] each.

    The images are spread evenly over the units, or over ``MAX_UNITS`` of them; workers of a process group share the
    work and all get the whole. Labels beyond ``num_classes`` (field -> classes) raise ``ArtifactError``.
    ``attributes``: what the shards' column of that name holds, for fields such as ``attribute.colour``.
    """
    units = units if len(units) <= MAX_UNITS else [units[i * len(units) // MAX_UNITS] for i in range(MAX_UNITS)]
    share = max(1, max_images // max(1, len(units)))
    stated = attribute_fields(fields)
    columns = ["image_id", "image", *(["attributes"] if stated else []), *(f for f in fields if f not in stated)]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    backbone.eval()
    rows: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    with torch.no_grad():
        for unit in list(units)[rank::world]:
            table = split_attributes(unit, read_unit(unit, columns).slice(0, share), stated, attributes)
            check_labels(unit, table, {field: n for field, n in (num_classes or {}).items() if field in fields})
            for start in range(0, table.num_rows, BATCH):
                part = table.slice(start, BATCH)
                images = torch.stack([transform(picture) for picture in open_pictures(unit, part)])
                features = backbone(images.contiguous(memory_format=torch.channels_last))
                rows.append((features, {f: torch.tensor(part[f].to_pylist(), dtype=torch.int64) for f in fields}))
    gathered = [rows]
    if world > 1:
        gathered = [rows] * world
        dist.all_gather_object(gathered, rows)
    whole = [pair for part in gathered for pair in part]
    return torch.cat([f for f, _ in whole]), {f: torch.cat([known[f] for _, known in whole]) for f in fields}


def pca_projection(features: torch.Tensor, dim: int, whitening: float) -> torch.Tensor:
    """Weight [dim, F] float32: leading right singular vectors of the normalised features [n, F].

    Row i is divided by (s_i / s_0) ** ``whitening``; beyond the rank of the sample stand orthogonal completions.
    """
    unit = functional.normalize(features).double()
    # eigenvectors of the F x F Gram matrix are the right singular vectors, and complete themselves beyond the rank
    eigenvalues, vectors = torch.linalg.eigh(unit.T @ unit)
    scale = eigenvalues.flip(0)[:dim].clamp_min(0.0).sqrt()
    scale = (scale / scale[0]).clamp_min(1e-3)
    weight: torch.Tensor = vectors.flip(1).T[:dim] / scale[:, None] ** whitening
    return weight.float()


def imprint_proxies(head: NestedCosine, embedding: torch.Tensor, labels: torch.Tensor) -> None:
    """Set each class's proxies to the normalised mean of its normalised embeddings [n, D]; labels [n] below 0 are
    left out, and classes without a row keep their random start. A sharded head takes the classes it holds."""
    known = (labels >= head.shard.first) & (labels < head.shard.stop)
    own = labels[known] - head.shard.first
    with torch.no_grad():
        for m, proxy in zip(head.sizes, head.proxies, strict=True):
            unit = functional.normalize(embedding[known, :m])
            total = torch.zeros_like(proxy).index_add_(0, own, unit)
            seen = torch.zeros(len(proxy), dtype=torch.bool)
            seen[own] = True
            proxy[seen] = functional.normalize(total[seen])
