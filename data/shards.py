"""Stage ``shards``: training rows with their labels, shuffled once over the whole corpus, ready to stream.

A hash of the image id decides in which shard of its data set a row is, and where, so the order does not depend on the
blocks of the job. With ``together``, it is the hash of the row's class, and whole classes are shuffled. Most of the
cost is the shuffle of the image bytes. The driver holds the lists of classes (labels, categories, groups, attributes)
but no images.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.cluster import ensure_ray
from lookalike.config import runtime
from lookalike.data import attributes
from lookalike.data.parts import (
    Item,
    add_up,
    blocks_of,
    broadcast,
    map_parts,
    num_partitions,
    part_items,
    part_name,
    read_table,
    sum_images,
)
from lookalike.data.report.charts import plot_zipf
from lookalike.data.shard_files import write_shard
from lookalike.data.sources.survey import GROUPED
from lookalike.errors import ArtifactError
from lookalike.outlook import Outlook
from lookalike.sampling import image_repeat, label_repeats, mix_keys, stable_keys
from lookalike.schemas import SHARD
from lookalike.stages import Input, Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger, timed

log = get_logger(__name__)

_CENSUS = pa.schema([("kind", pa.string()), ("name", pa.string()), ("images", pa.int64())])
_PLACED = pa.schema(
    [*SHARD, pa.field("place", pa.string()), pa.field("bundle", pa.uint64()), pa.field("key", pa.uint64())]
)
LIGHT = ["image_id", "dataset", "category", "group", "attributes"]
"""Columns of the corpus that name the classes of a row."""


class ShardsConfig(StageConfig):
    """Which rows enter the shards, and how shards are cut."""

    rows_per_shard: int = Field(2048, ge=1, le=10_000_000)
    """Rows of a shard file on average."""
    rows_per_group: int = Field(256, ge=1, le=100_000)
    """Rows of a parquet row group, which a reader decodes at a time."""
    threshold: float = Field(0.01, gt=0, le=1)
    """t in r(h) = max(1, sqrt(t / f(h))): labels on a smaller share of the labelled images are repeated."""
    max_repeat: float = Field(8.0, ge=1)
    """Upper bound of r(I)."""
    categories: Literal["grouped", "all", "none"] = "all"
    """Rows whose category is a class of the category task: all rows, those with a group (a catalogue), or none.
    Rows that are left out are counted and logged."""
    min_images_per_category: int = Field(5, ge=1)
    """Fewest training images of a category that is a class; others are -1."""
    min_images_per_attribute: int = Field(5, ge=1)
    """Fewest training images of an attribute's value that is a class; others are -1. An attribute with fewer than two
    classes is left out. If a row has several values of an attribute, the alphabetically first class counts."""
    together: Literal["group", "category"] | None = None
    """Keep the rows of a class in one row group, for training with batches balanced by class; a class larger than a
    row group is cut. None: rows are shuffled one by one."""
    concurrency: int | None = runtime(None, ge=1)
    """Tasks at a time; None: one per CPU."""


def training_rows(corpus: pa.Table, labels: pa.Table, where: str) -> pa.Table:
    """The rows of a corpus part with a row in its ``image_labels`` part, and the column ``labels``."""
    place = pc.index_in(corpus["image_id"], value_set=labels["image_id"].combine_chunks())
    rows = corpus.filter(place.is_valid())
    if rows.num_rows != labels.num_rows:
        raise ArtifactError(
            f"{where}: {labels.num_rows - rows.num_rows} labelled images are not in this part of the "
            "corpus; give the corpus artifact that the labels were made from"
        )
    return rows.append_column("labels", labels["labels"].combine_chunks().take(place.drop_null().combine_chunks()))


def category_of(row: dict[str, Any], rule: str) -> str | None:
    """The category of a row that may be a class under ``rule`` (``ShardsConfig.categories``), else None."""
    if rule == "none" or (rule == "grouped" and row["group"] is None):
        return None
    return str(row["category"]) if row["category"] else None


def take_census(rows: pa.Table, rule: str) -> pa.Table:
    """``_CENSUS`` of a part: images of each data set, category, group and label, and with attributes; parts add up."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows.select(["dataset", "category", "group", "labels"]).to_pylist():
        counts[("dataset", row["dataset"])] += 1
        counts[("labelled", "")] += bool(row["labels"])
        counts.update(("label", str(label)) for label in row["labels"])
        if row["group"] is not None:
            counts[("group", row["group"])] += 1
        if (category := category_of(row, rule)) is not None:
            counts[("category", category)] += 1
        elif row["category"]:
            counts[("left out", "no_group" if rule == "grouped" else "categories_none")] += 1
    if stated := sum(bool(pairs) for pairs in attributes.pairs_of(rows)):
        counts[("attributes", "")] = stated
    keys = sorted(counts)
    return pa.table([[k for k, _ in keys], [n for _, n in keys], [counts[k] for k in keys]], schema=_CENSUS)


class Classes:
    """Names of all classes, and where rows go: made from the census, broadcast to the tasks."""

    def __init__(
        self,
        counts: dict[tuple[str, str], int],
        num_labels: int,
        config: ShardsConfig,
        seed: int,
        stated: attributes.AttributeClasses | None = None,
    ) -> None:
        self.config, self.seed, self.attributes = config, seed, dict(stated or {})
        images = np.array([counts.get(("label", str(label)), 0) for label in range(num_labels)], np.int64)
        self.label_frequency = images / max(counts.get(("labelled", ""), 0), 1)
        self.repeats = np.minimum(label_repeats(self.label_frequency, config.threshold), config.max_repeat)
        self.categories = sorted(
            name for (kind, name), n in counts.items() if kind == "category" and n >= config.min_images_per_category
        )
        self.groups = sorted(name for kind, name in counts if kind == "group")
        self._category = {name: number for number, name in enumerate(self.categories)}
        self._group = {name: number for number, name in enumerate(self.groups)}
        # the hashes of its images spread a large class over bundles of about half a row group, all over the data set
        self.cuts = {
            name: -(-2 * n // config.rows_per_group)
            for (kind, name), n in counts.items()
            if kind == config.together and n > config.rows_per_group
        }
        self.shards = {
            name: -(-n // config.rows_per_shard) for (kind, name), n in sorted(counts.items()) if kind == "dataset"
        }

    def place(self, rows: pa.Table) -> pa.Table:
        """``_PLACED`` rows: ``SHARD`` rows with their file and sort key."""
        listed = rows.select(["dataset", "category", "group", "labels"]).to_pylist()
        keys = mix_keys(stable_keys(rows["image_id"].to_pylist()), self.seed, "shuffle")
        bundles = self._bundles(listed, keys)
        shards = [
            f"{row['dataset']}/{part_name(int(bundle % np.uint64(self.shards[row['dataset']])))}"
            for row, bundle in zip(listed, bundles, strict=True)
        ]
        rule = self.config.categories
        columns = [
            rows["image_id"],
            rows["image"],
            rows["dataset"],
            [row["labels"] for row in listed],
            [self._category.get(category_of(row, rule) or "", -1) for row in listed],
            [self._group.get(row["group"], -1) for row in listed],
            attributes.classes_of_rows(rows, self.attributes),
            [image_repeat(row["labels"], self.repeats) for row in listed],
            shards,
            bundles,
            keys,
        ]
        arrays = [
            c.combine_chunks() if isinstance(c, pa.ChunkedArray) else pa.array(c, f.type)
            for c, f in zip(columns, _PLACED, strict=True)
        ]
        return pa.table(arrays, schema=_PLACED)

    def _bundles(self, listed: list[dict[str, Any]], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Sort key [n]: each row's own, its class's, or that of a cut of its class. Rows with one key stay together."""
        together = self.config.together
        if together is None:
            return keys
        names = [row["group"] if together == "group" else category_of(row, self.config.categories) for row in listed]
        if together == "category":
            names = [name if name in self._category else None for name in names]
        cuts = np.array([self.cuts.get(name or "", 1) for name in names], np.uint64)
        texts = [f"{name}/{cut}" for name, cut in zip(names, (keys % cuts).tolist(), strict=True)]
        shared = mix_keys(stable_keys(texts), self.seed, "shuffle")
        return np.where([name is None for name in names], keys, shared)


def _read(item: Item, columns: list[str]) -> pa.Table:
    return training_rows(read_table(item["uri"], columns), read_table(item["labels"]), item["uri"])


def _items(run: StageRun[ShardsConfig]) -> list[Item]:
    items = part_items(run.one("corpus").files("part-", ".parquet"))
    labels = run.one("labels").files("image_labels.parquet/", ".parquet")
    if len(labels) != len(items):
        raise ArtifactError(
            f"{run.one('labels').uri} labels {len(labels)} parts, the corpus has {len(items)}; give "
            "the corpus artifact that the labels were made from"
        )
    return [{**item, "labels": uri} for item, uri in zip(items, labels, strict=True)]


def count_attributes(items: list[Item], config: ShardsConfig) -> dict[str, list[str]]:
    """The classes of every attribute.

    A shuffle sums the values, and the driver sees only those that are classes: there may be as many values as images
    (serial numbers).
    """

    def count(item: Item) -> pa.Table:
        return attributes.count_values(_read(item, ["image_id", "attributes"]))

    counts = map_parts(items, count, concurrency=config.concurrency)
    keep = partial(attributes.frequent_values, min_images=config.min_images_per_attribute)
    frequent = sum_images(counts, ["name", "value"], num_partitions(items), keep, attributes.COUNTS)
    return attributes.choose_classes(frequent)


def count_classes(items: list[Item], config: ShardsConfig) -> dict[tuple[str, str], int]:
    """(kind, name) -> images, of the ``_CENSUS`` of all parts."""
    parts = map_parts(
        items, lambda item: take_census(_read(item, LIGHT), config.categories), concurrency=config.concurrency
    )
    census = add_up(blocks_of(parts), ["kind", "name"], _CENSUS)
    return {(row["kind"], row["name"]): row["images"] for row in census.to_pylist()}


class ShardTotals(NamedTuple):
    """The sums over all shards."""

    rows: dict[str, int]
    """File -> rows."""
    epoch: float
    """Expected copies per epoch of all images."""
    label_epoch: NDArray[np.float64]
    """The same of the images of each label, [num_labels]."""
    with_class: NDArray[np.int64]
    """Images with a class of each attribute, [num_attributes]."""


def write_shards(items: list[Item], classes: Classes, out: str, num_labels: int) -> ShardTotals:
    """Shuffle the rows of all parts into shard files."""
    config, shared = classes.config, broadcast(classes)
    columns = [*LIGHT, "image"]
    placed = map_parts(items, lambda item: shared().place(_read(item, columns)), concurrency=config.concurrency)
    by_shard = placed.groupby("place", num_partitions=num_partitions(items, sum(classes.shards.values())))
    write = partial(write_shard, out=out, rows_per_group=config.rows_per_group, num_labels=num_labels)
    rows, epoch = {}, 0.0
    label_epoch, with_class = np.zeros(num_labels), np.zeros(len(classes.attributes), np.int64)
    for block in blocks_of(by_shard.map_groups(write, batch_format="pyarrow", concurrency=config.concurrency)):
        for entry in block.to_pylist():
            rows[entry["file"]] = entry["rows"]
            epoch += entry["epoch"]
            label_epoch += entry["label_epoch"]
            with_class += np.array(entry["attributes"], np.int64)
    return ShardTotals(rows, epoch, label_epoch, with_class)


def run(run: StageRun[ShardsConfig]) -> None:
    """Census, then one shuffle into shard files."""
    ensure_ray()
    config, items = run.config, _items(run)
    names = [entry["name"] for entry in run.one("labels").read_json("classes.json")]
    with timed(log, "census"):
        counts = count_classes(items, config)
    stated = count_attributes(items, config) if ("attributes", "") in counts else {}
    classes = Classes(counts, len(names), config, config.seed, stated)
    left_out = categories_left_out(counts, classes)
    with timed(log, "shuffle", shards=sum(classes.shards.values())):
        totals = write_shards(items, classes, run.out.uri, len(names))
    run.out.write_json(
        "classes.json",
        {
            "labels": names,
            "category": classes.categories,
            "group": classes.groups,
            "attributes": classes.attributes,
            "label_frequency": classes.label_frequency.round(9).tolist(),
        },
    )
    assert sum(totals.rows.values()) == sum(n for (kind, _), n in counts.items() if kind == "dataset")
    run.out.stats = {**_stats(counts, classes, totals), "categories_left_out": left_out}
    images = classes.label_frequency * counts.get(("labelled", ""), 0)
    chart = plot_zipf({"images": images.tolist(), "expected copies an epoch": totals.label_epoch.tolist()})
    storage.write_atomic(run.out.path("resampling.png"), chart)


def categories_left_out(counts: dict[tuple[str, str], int], classes: Classes) -> dict[str, int]:
    """Reason -> rows whose category is no class, and a log line with the remedy if there are any."""
    out = {name: n for (kind, name), n in sorted(counts.items()) if kind == "left out"}
    few = sum(n for (kind, _), n in counts.items() if kind == "category") - sum(
        counts[("category", name)] for name in classes.categories
    )
    out |= {"too_few_images": few} if few else {}
    if out:
        remedy = "categories: all keeps rows without a group; min_images_per_category keeps rare categories"
        log.warning("rows whose category is no class %s", fields(**out, classes=len(classes.categories), remedy=remedy))
    return out


def _stats(counts: dict[tuple[str, str], int], classes: Classes, totals: ShardTotals) -> dict[str, Any]:
    labelled = counts.get(("labelled", ""), 0)
    return {
        "images": sum(totals.rows.values()),
        "shards": len(totals.rows),
        "labelled": labelled,
        "datasets": {name: n for (kind, name), n in sorted(counts.items()) if kind == "dataset"},
        "labels": len(classes.repeats),
        "categories": len(classes.categories),
        "groups": len(classes.groups),
        "repeat": {
            "mean_label": round(float(classes.repeats.mean()), 3) if len(classes.repeats) else 1.0,
            "max_label": round(float(classes.repeats.max(initial=1.0)), 3),
            "expected_epoch": round(totals.epoch, 1),
            "rarest_share_before": _share(classes.label_frequency * labelled),
            "rarest_share_after": _share(totals.label_epoch),
        },
        "attributes": {
            name: {"classes": len(values), "images": int(images)}
            for (name, values), images in zip(classes.attributes.items(), totals.with_class, strict=True)
        },
    }


def _share(images: NDArray[np.floating]) -> float:
    return round(float(images.min() / max(images.sum(), 1)), 6) if len(images) else 0.0


def foresee(config: ShardsConfig, given: Mapping[str, Mapping[str, Outlook]], made: Artifact | None) -> Outlook:
    """See ``Stage.foresee``: the classes that training may find, by what the corpus holds or what was made of it."""
    if made is not None:
        names, rows = made.read_json("classes.json"), made.stats["images"]
        fields_of = {f"attribute.{name}": values for name, values in names["attributes"].items()}
        fields_of |= {
            "attribute": list(names["attributes"]),
            **{key: names[key] for key in ("labels", "category", "group")},
        }
        return {"dataset": made.stats["datasets"]} | {key: dict.fromkeys(some, rows) for key, some in fields_of.items()}
    (corpus,) = given["corpus"].values()
    outlook = {name: corpus[name] for name in ("dataset", "group") if name in corpus}
    for labels in given["labels"].values():
        outlook |= {name: labels[name] for name in ("labels",) if name in labels}
    source = {"all": "category", "grouped": GROUPED, "none": ""}[config.categories]
    if not source or source in corpus:
        outlook["category"] = _frequent(corpus.get(source, {}), config.min_images_per_category)
    if "attribute" in corpus:
        values = {key: known for key, known in corpus.items() if key.startswith("attribute.")}
        classes = {key: _frequent(known, config.min_images_per_attribute) for key, known in values.items()}
        outlook |= classes
        outlook["attribute"] = {
            key.partition(".")[2]: sum(some.values()) for key, some in classes.items() if len(some) > 1
        }
    return outlook


def _frequent(images: Mapping[str, int], least: int) -> dict[str, int]:
    return {name: most for name, most in images.items() if most >= least}


STAGE: Stage[ShardsConfig] = Stage(
    "shards",
    "shards",
    ShardsConfig,
    run,
    version=4,
    inputs={"corpus": Input("corpus"), "labels": Input("labels")},
    foresee=foresee,
)
