"""Planted near-duplicates among composed pictures: recall and precision by kind, time and memory, one cell or several.

    python tests/benchmarks/labels_dedup.py [--quick] [--num N] [--seed S]

One JSON object a line; the last one has the ratios. On a busy machine ``cpu_seconds`` is the time to trust.

Negatives are collages of four pictures of the sample corpora, cut, scaled, turned and recoloured at random: no two are
the same picture, but every tenth shares its upper half with another. Planted copies are changed in one way each.
Collages have no margins; so the rule, not the search, is also tried on changed copies of pictures of the sample
corpora. The embedding is cheap and fixed, not a network: 16 x 16 grey levels and a colour histogram, averaged with the
mirror image's (as networks trained on flipped pictures nearly do) and projected to 128 dimensions by the pipeline's own
code.
"""

import argparse
import glob
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from lookalike.data.duplicates.dedup import decide_fates
from lookalike.data.duplicates.pair_search import (
    CellKeys,
    Cells,
    band_keys,
    merge_pairs,
    search_cell,
    train_cells,
)
from lookalike.data.duplicates.signatures import sign_pixels, signature_schema
from lookalike.data.duplicates.twins import DedupConfig, judge_pairs, look_alike, measure, pictures_of, words_of
from lookalike.data.features import project
from lookalike.progress import track
from lookalike.retrieval.machine import machine_facts

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
SIDE, DIM, CHUNK = 96, 128, 500
KINDS = ("resize", "jpeg", "crop", "border", "colour", "flip")
_sources: list[Image.Image] = []


def load_sources(count: int) -> list[Image.Image]:
    """Distinct pictures of the sample corpora, 72 px wide, that are not one flat colour."""
    found: dict[bytes, Image.Image] = {}
    for file in sorted(glob.glob(str(SAMPLES / "*" / "part-*.parquet"))):
        for data in pq.read_table(file, columns=["image"])["image"].to_pylist()[::3]:
            image = Image.open(io.BytesIO(data)).convert("RGB").resize((72, 72))
            if np.asarray(image).std() > 25:
                found.setdefault(image.tobytes(), image)
    return list(found.values())[:: max(1, len(found) // count)]


def compose(seed: int, picture: int) -> Image.Image:
    """A collage of four pieces; that of a ``picture`` which ends in 9 has the first two of the one before."""
    rng = np.random.default_rng([seed, picture - (picture % 10 == 9)])
    canvas = Image.new("RGB", (SIDE, SIDE))
    x, y = (int(v) for v in rng.integers(SIDE * 3 // 10, SIDE * 7 // 10, 2))
    for place, box in enumerate(((0, 0, x, y), (x, 0, SIDE, y), (0, y, x, SIDE), (x, y, SIDE, SIDE))):
        if place == 2 and picture % 10 == 9:
            rng = np.random.default_rng([seed, picture])
        source = _sources[int(rng.integers(len(_sources)))]
        left, top = (int(v) for v in rng.integers(0, 24, 2))
        size = (box[2] - box[0], box[3] - box[1])
        piece = source.resize(size, Image.Resampling.BILINEAR, (left, top, left + 48, top + 48))
        piece = piece.transpose(Image.Transpose(int(rng.integers(0, 5))))
        pixels = np.asarray(piece.resize(size))[..., rng.permutation(3)]
        canvas.paste(Image.fromarray(255 - pixels if rng.random() < 0.5 else np.ascontiguousarray(pixels)), box[:2])
    return canvas


def change(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """A copy of ``image`` as the web makes them."""
    width, height = image.size
    if kind == "resize":
        scale = rng.uniform(0.5, 0.92)
        return image.resize((int(scale * width), int(scale * height)), Image.Resampling.BILINEAR)
    if kind == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(30, 91)))
        return Image.open(buffer).convert("RGB")
    if kind == "crop":
        cut = rng.dirichlet(np.ones(2), 2) * [[width], [height]] * rng.uniform(0.05, 0.10)
        return image.crop((int(cut[0, 0]), int(cut[1, 0]), width - int(cut[0, 1]), height - int(cut[1, 1])))
    if kind == "border":
        return ImageOps.expand(image, 1 + int(width * rng.uniform(0.02, 0.05)), tuple(rng.integers(0, 256, 3).tolist()))
    if kind == "colour":
        for tool in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = tool(image).enhance(rng.uniform(0.75, 1.3))
        return image
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def embed(image: Image.Image) -> NDArray[np.float32]:
    """Pixel features [320] of a picture, the same for its mirror image."""
    grey = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), np.float32)
    grey = grey - grey.mean()
    grey = (grey + grey[:, ::-1]).ravel()
    small = np.asarray(image.resize((32, 32), Image.Resampling.BOX)).reshape(-1, 3) >> 6
    colours = np.sqrt(np.bincount(small @ np.array([16, 4, 1]), minlength=64).astype(np.float32))
    colours -= colours.mean()
    return np.concatenate([grey / max(np.linalg.norm(grey), 1), 0.5 * colours / np.linalg.norm(colours)])


def sign_chunk(task: tuple[int, list[tuple[int, str]]]) -> dict[str, list[Any]]:
    """Signatures of pictures given as (picture, kind of change or "")."""
    seed, wanted = task
    images = []
    for picture, kind in wanted:
        image = compose(seed, picture)
        if kind:
            image = change(image, kind, np.random.default_rng([seed, picture, KINDS.index(kind)]))
        images.append(image)
    rows = [row | {"vector": embed(image)} for image, row in zip(images, sign_pixels(images, True), strict=True)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def as_table(signed: dict[str, list[Any]], seed: int) -> pa.Table:
    """Signatures of training rows without groups and of no equal bytes."""
    num = len(signed["pdq"])
    small = project(np.stack(signed["vector"]), DIM, seed).astype(np.float16)
    given = signed | {
        "image_id": [f"{n:07d}" for n in range(num)],
        "row": np.arange(num),
        "group": [None] * num,
        "content": [n.to_bytes(16) for n in range(num)],
        "split": ["train"] * num,
        "dataset": ["bench"] * num,
    }
    flat = pa.FixedSizeListArray.from_arrays(pa.array(small.reshape(-1)), DIM)
    schema = signature_schema(DIM)
    arrays = [flat if field.name == "vector" else pa.array(given[field.name], field.type) for field in schema]
    return pa.table(arrays, schema=schema)


def make_corpus(num: int, seed: int) -> tuple[pa.Table, pl.DataFrame]:
    """Signatures of ``num`` pictures in random order and what each is: (picture, kind, row); a tenth is planted."""
    _sources.extend(load_sources(3000))
    planted = num // 10
    rng = np.random.default_rng(seed)
    wanted = [(picture, "") for picture in range(num - planted)]
    wanted += [(int(p), KINDS[n % len(KINDS)]) for n, p in enumerate(rng.permutation(num - planted)[:planted])]
    wanted = [wanted[place] for place in rng.permutation(num)]
    tasks = [(seed, wanted[start : start + CHUNK]) for start in range(0, num, CHUNK)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        chunks = list(track(pool.imap(sign_chunk, tasks), "compose", len(tasks), unit="chunk"))
    signed = {name: [value for chunk in chunks for value in chunk[name]] for name in chunks[0]}
    facts = pl.DataFrame({"picture": [p for p, _ in wanted], "kind": [k for _, k in wanted], "row": np.arange(num)})
    return as_table(signed, seed), facts


def try_samples(count: int, seed: int) -> dict[str, Any]:
    """Recall of the rule on changed copies of ``count`` pictures of the sample corpora, with their own margins.

    By kind: in all, and by hash and colours without margins alone. ``met``: of the latter, those that ``hash_bands``
    bring together.
    """
    files = sorted(glob.glob(str(SAMPLES / "*" / "part-*.parquet")))
    data = [value for file in files for value in pq.read_table(file, columns=["image"])["image"].to_pylist()]
    images = [Image.open(io.BytesIO(value)).convert("RGB") for value in data[:: len(data) // count]]
    config, result, met = DedupConfig(), {}, []
    for number, kind in enumerate((*KINDS, "crop, jpeg", "border, jpeg", "border, resize, jpeg")):
        rng, copies = np.random.default_rng([seed, number]), images
        for step in kind.split(", "):
            copies = [change(image, step, rng) for image in copies]
        both = images + copies
        rows = [row | {"vector": embed(image)} for image, row in zip(both, sign_pixels(both, True), strict=True)]
        signed = as_table({name: [row[name] for row in rows] for name in rows[0]}, seed)
        place = np.arange(len(images))
        pairs = measure(pictures_of(signed, False), place, place + len(images), config)
        alone = pairs._replace(cosine=np.zeros_like(pairs.cosine))
        words = words_of(signed["trimmed"]).view(np.uint16)
        met.append((words[: len(images)] == words[len(images) :])[look_alike(alone, config)])
        result[kind] = [round(float(look_alike(found, config).mean()), 3) for found in (pairs, alone)]
    equal = np.concatenate(met)
    bands = {count: round(float(equal[:, :count].any(axis=1).mean()), 3) for count in (1, 2, 3, 4, 6, 8)}
    return {"pictures": len(images), "recall_and_without_embedding": result, "met": bands}


def search(signatures: pa.Table, cells: int, config: DedupConfig, seed: int) -> pl.DataFrame:
    """All pairs, by one cell or by ``cells`` of them one after the other."""
    if cells == 1:
        return merge_pairs(search_cell(signatures, config))
    vectors = np.stack(signatures["vector"].to_numpy()).astype(np.float32)
    centroids = train_cells(vectors[:: max(1, len(vectors) // (64 * cells))], cells, seed)
    nearest = Cells(centroids, config.probes).nearest(vectors)
    cell_keys = CellKeys(np.bincount(nearest.ravel(), minlength=cells))
    sharp = signatures["trimmed_quality"].to_numpy() >= config.min_quality
    bands = band_keys(words_of(signatures["trimmed"]), sharp, cell_keys.total, cells, config.hash_bands)
    keys = np.concatenate([cell_keys.of(nearest, words_of(signatures["pdq"])), bands], axis=1)
    found = [
        search_cell(signatures.take(pa.array(np.nonzero((keys == key).any(axis=1))[0])), config)
        for key in np.unique(keys[keys >= 0]).tolist()
    ]
    return merge_pairs(pa.concat_tables(found))


def score(pairs: pl.DataFrame, facts: pl.DataFrame) -> dict[str, Any]:
    """Recall of the planted pairs by kind and in all; precision of all pairs found."""
    originals = facts.filter(pl.col("kind") == "").select("picture", original="row")
    planted = (
        facts.filter(pl.col("kind") != "")
        .join(originals, on="picture")
        .with_columns(low=pl.min_horizontal("row", "original"), high=pl.max_horizontal("row", "original"))
    )
    found = planted.join(pairs.select(high="row", low="twin"), on=["low", "high"])
    by_kind = {
        kind: round(
            found.filter(pl.col("kind") == kind).height / max(planted.filter(pl.col("kind") == kind).height, 1), 4
        )
        for kind in KINDS
    }
    return {
        "planted": planted.height,
        "pairs": pairs.height,
        "recall": round(found.height / planted.height, 4),
        "recall_by_kind": by_kind,
        "precision": round(found.height / max(pairs.height, 1), 4),
        "dropped": sum(1 for fate in decide_fates(pairs)["reason"].to_pylist() if fate),
    }


def judge(signatures: pa.Table, facts: pl.DataFrame, config: DedupConfig) -> dict[str, float]:
    """The rule and its threshold on labelled pairs: all planted ones, those that share half, as many at random."""
    originals = facts.filter(pl.col("kind") == "").select("picture", original="row").sort("picture")
    planted = facts.filter(pl.col("kind") != "").join(originals, on="picture")
    place = originals["original"].to_numpy()
    shared = np.arange(9, len(place), 10)
    left = np.concatenate([planted["row"].to_numpy(), place[shared], place[:-7:10]])
    right = np.concatenate([planted["original"].to_numpy(), place[shared - 1], place[7::10][: len(place[:-7:10])]])
    duplicate = np.arange(len(left)) < planted.height
    return judge_pairs(pictures_of(signatures, config.mirrored), left, right, duplicate, config)


def _case(sender: Any, signatures: pa.Table, cells: int, config: DedupConfig, seed: int) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    pairs = search(signatures, cells, config, seed)
    facts = {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_rss_mb": round(peak_mb()),
    }
    sender.send((pairs, facts))


def peak_mb() -> float:
    """Most memory this process has had, MB; getrusage would tell that of the process which started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run_case(*arguments: Any) -> tuple[pl.DataFrame, dict[str, float]]:
    """(pairs, time and memory) of :func:`search` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_case, args=(sender, *arguments))
    process.start()
    sender.close()
    result: tuple[pl.DataFrame, dict[str, float]] = receiver.recv()
    process.join()
    return result


def rows(quick: bool, num: int | None = None, seed: int = 17) -> Iterator[dict[str, Any]]:
    """One row a case and a summary."""
    num = num or (6_000 if quick else 100_000)
    start = time.perf_counter()
    signatures, facts = make_corpus(num, seed)
    common = {
        "bench": "labels_dedup",
        "images": num,
        "dim": DIM,
        "seed": seed,
        "threads": 1,
        "machine": machine_facts(),
    }
    yield common | {"case": "compose and sign", "seconds": round(time.perf_counter() - start, 1)}
    yield common | {"case": "sample pictures", **try_samples(600, seed)}
    for mirrored in (False, True):
        yield common | {
            "case": "labelled pairs" + ", mirrored" * mirrored,
            **judge(signatures, facts, DedupConfig(mirrored=mirrored)),
        }
    cells = max(2, num // 5000)
    cases: dict[str, tuple[int, DedupConfig]] = {"exact": (1, DedupConfig())}
    for count in (cells, num // 100):
        for probes in (1, 2, 3):
            cases[f"{count} cells, {probes} probes"] = (count, DedupConfig(probes=probes))
    for bands in (0, 4):
        cases[f"{cells} cells, 2 probes, {bands} bands"] = (cells, DedupConfig(hash_bands=bands))
    cases[f"{cells} cells, 2 probes, mirrored"] = (cells, DedupConfig(mirrored=True))
    ratios: dict[str, Any] = {}
    exact: pl.DataFrame | None = None
    for name, (count, config) in cases.items():
        pairs, cost = run_case(signatures, count, config, seed)
        exact = pairs if exact is None else exact
        same = pairs.join(exact.select("row", "twin"), on=["row", "twin"]).height / max(exact.height, 1)
        row = {
            "case": name,
            **score(pairs, facts),
            **cost,
            "recall_vs_exact": round(same, 4),
            "seconds_per_1000": round(cost["seconds"] / num * 1000, 4),
        }
        ratios[name] = row["recall_vs_exact"]
        yield common | row
    two = f"{cells} cells, 2 probes"
    found = {"recall_cells_vs_exact": ratios[two], "recall_vs_exact_by_case": ratios}
    yield common | {"summary": True, "ratios": found}


def main() -> int:
    """Print one line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="6,000 pictures instead of 100,000")
    parser.add_argument("--num", type=int)
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    for row in rows(arguments.quick, arguments.num, arguments.seed):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
