"""Rebuild the committed sample corpora (real pictures, messy text) from their Debian packages.

    apt-get download openclipart-png openclipart-svg
    for deb in openclipart-*.deb; do dpkg-deb -x "$deb" unpacked; done
    python data/samples/build.py --openclipart unpacked/usr/share/openclipart \
        --furniture furniture.parquet --out data/samples

Open Clip Art: the PNG has the pixels, the SVG at the same relative path has the RDF metadata. A link into a
second category stays in as its own row, with its own keyword list, and so do blank pictures: removing
near-duplicates and junk is the platform's work. Files whose metadata names a copyleft licence are left out.

Furniture: `furniture.parquet` holds the Sweet Home 3D catalogue of the Debian package `sweethome3d-furniture`
(1.8-1): per product the catalogue icon, and four views that were rendered for this project from the package's
3D models. Its columns are image_id, image (JPEG), title, titles, keywords, category, view, group, creator,
licence. Views of one flat colour are renderings that failed, not data: they are left out.

Needs pyarrow, pillow (with WebP), numpy and pdqhash; the same versions of these write the same bytes again.
The largest source pictures have 169 megapixels: allow 2 GB of memory. One core takes about three minutes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import logging
import re
import warnings
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pdqhash
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LOGGER = logging.getLogger("samples")

MAX_SIDE_PX = 144
WEBP_QUALITY = 80
MAX_SOURCE_PIXELS = 180_000_000  # larger sources are treated as decompression bombs
ROWS_PER_GROUP = 1024
TEST_FRACTION = 0.2
# The match bound that PDQ's authors recommend, of 256 bits. One object under two names (a car and its second
# version) lies at 16 to 26 bits; the nearest icons of different objects at 34.
NEAR_DUPLICATE_BITS = 31

OPENCLIPART_SOURCE = "debian openclipart-png 1:0.18+dfsg-19"
FURNITURE_SOURCE = "debian sweethome3d-furniture 1.8-1"
PUBLIC_DOMAIN = "CC-PDDC"  # SPDX: Creative Commons Public Domain Dedication and Certification
COPYLEFT = re.compile(r"\bGPL\b|copyleft", re.IGNORECASE)

CC = "{http://web.resource.org/cc/}"
DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"

Row = dict[str, Any]

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("description", pa.string()),
        pa.field("keywords", pa.list_(pa.string()), nullable=False),
        pa.field("category", pa.string(), nullable=False),
        pa.field("locale", pa.string()),
        pa.field("titles", pa.string()),
        pa.field("group", pa.string()),
        pa.field("view", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("creator", pa.string()),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)


class RejectedError(Exception):
    """A source record that must not enter the corpus; the message is the reason."""


def encode(source: bytes) -> bytes:
    """Re-encode a picture as a small WebP on white, longest side at most `MAX_SIDE_PX` and never enlarged.

    Raises:
        RejectedError: the source cannot be decoded or is too large.
    """
    try:
        with Image.open(io.BytesIO(source)) as opened:
            picture: Image.Image = opened.convert("RGBA") if opened.mode == "P" else opened.copy()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectedError(f"too large ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise RejectedError(f"unreadable ({error})") from error
    scale = min(1.0, MAX_SIDE_PX / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Pillow premultiplies by alpha here, so resizing before compositing is exact and cheap.
    small = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).convert("RGBA")
    canvas = Image.new("RGB", size, "white")
    canvas.paste(small, mask=small.getchannel("A"))
    out = io.BytesIO()
    canvas.save(out, "WEBP", quality=WEBP_QUALITY, method=6)
    return out.getvalue()


def is_flat(image: bytes) -> bool:
    """Whether all pixels of a decodable picture have one colour."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).reshape(-1, 3)
    return bool((pixels == pixels[0]).all())


def text_of(node: ET.Element, path: str) -> str | None:
    """Return the stripped text at `path`, or None when it is missing or empty."""
    return (node.findtext(path) or "").strip() or None


def read_metadata(svg: Path) -> Row:
    """Read the first RDF work of an SVG; texts stay as they are, junk included.

    Raises:
        RejectedError: the work's licence or rights name a copyleft licence.
    """
    work = ET.fromstring(svg.read_bytes()).find(f".//{CC}Work")
    if work is None:
        raise RejectedError("no metadata")
    terms = [node.get(f"{RDF}resource") or "" for node in work.iter(f"{CC}license")]
    terms += ["".join(node.itertext()) for node in work.iter(f"{DC}rights")]
    if any(COPYLEFT.search(term) for term in terms):
        raise RejectedError(f"copyleft licence ({' '.join(' '.join(terms).split())})")
    keywords = [(item.text or "").strip() for item in work.iterfind(f"{DC}subject//{RDF}li")]
    return {
        "title": text_of(work, f"{DC}title"),
        "description": text_of(work, f"{DC}description"),
        "keywords": [keyword for keyword in keywords if keyword],
        "locale": text_of(work, f"{DC}language"),
        "creator": text_of(work, f"{DC}creator/{CC}Agent/{DC}title"),
    }


def read_openclipart(root: Path) -> list[Row]:
    """All usable Open Clip Art pictures under `root` (which holds `png/` and `svg/`), unordered."""
    rows: list[Row] = []
    encoded: dict[str, bytes] = {}
    for index, png in enumerate(sorted(root.glob("png/**/*.png"))):
        if index % 1000 == 0:
            LOGGER.info("dataset=openclipart num_read=%d", index)
        path = png.relative_to(root / "png").with_suffix("")
        try:
            row = read_metadata(root / "svg" / path.parent / f"{path.name}.svg")
            source = png.read_bytes()
            digest = hashlib.sha256(source).hexdigest()
            if digest not in encoded:
                encoded[digest] = encode(source)
        except RejectedError as error:
            LOGGER.warning("rejected=openclipart/%s reason=%s", path.as_posix(), error)
            continue
        row |= {"image_id": f"openclipart/{path.as_posix()}", "image": encoded[digest]}
        row |= {"category": path.parent.as_posix(), "split": "train", "dataset": "openclipart"}
        rows.append(row | {"licence": PUBLIC_DOMAIN, "source": OPENCLIPART_SOURCE})
    return rows


def read_furniture(source: Path) -> list[Row]:
    """All usable furniture pictures of the parquet file `source`, unordered, with their split."""
    rows: list[Row] = []
    for record in pq.read_table(source).to_pylist():
        image_id = f"furniture/{record['group']}/{record['view']}"
        if is_flat(record["image"]):
            LOGGER.warning("rejected=%s reason=one flat colour", image_id)
            continue
        row = {name: record[name] for name in ("title", "titles", "keywords", "category", "view", "group")}
        row |= {"image_id": image_id, "image": encode(record["image"])}
        row |= {"locale": "en", "dataset": "furniture"}
        row |= {"creator": record["creator"], "licence": record["licence"], "source": FURNITURE_SOURCE}
        rows.append(row)
    test = choose_test_groups(near_duplicate_components(rows))
    for row in rows:
        row["split"] = "test" if row["group"] in test else "train"
    return rows


def near_duplicate_components(rows: Iterable[Row]) -> list[list[str]]:
    """Group products with pictures within `NEAR_DUPLICATE_BITS`, transitively; each group sorted by name."""
    pictures = sorted((str(row["group"]), bytes(row["image"])) for row in rows)
    pixels = (np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for _, image in pictures)
    bits = np.array([pdqhash.compute(array)[0] for array in pixels], dtype=np.float32)
    ones = bits.sum(axis=1)
    distance = ones[:, None] + ones[None, :] - 2 * bits @ bits.T
    root = {group: group for group, _ in pictures}
    for left, right in np.argwhere(np.triu(distance <= NEAR_DUPLICATE_BITS, k=1)).tolist():
        keep, replace = sorted((root[pictures[left][0]], root[pictures[right][0]]))
        root = {group: keep if value == replace else value for group, value in root.items()}
    components: dict[str, list[str]] = defaultdict(list)
    for group, value in root.items():
        components[value].append(group)
    for members in components.values():
        if len(members) > 1:
            LOGGER.info("near_duplicates=%s", ",".join(members))
    return list(components.values())


def choose_test_groups(components: Sequence[list[str]]) -> set[str]:
    """Hold out `TEST_FRACTION` of the groups, whole components only, ranked by sha256 of the first name."""
    room = round(TEST_FRACTION * sum(map(len, components)))
    test: set[str] = set()
    for members in sorted(components, key=lambda names: hashlib.sha256(names[0].encode()).digest()):
        if len(test) + len(members) <= room:
            test.update(members)
    return test


def write_parts(rows: Iterable[Row], folder: Path, *, rows_per_part: int) -> None:
    """Write rows in order of image_id as `part-00N.parquet`, replacing the parts that are there."""
    ordered = sorted(rows, key=lambda row: str(row["image_id"]))
    if len({row["image_id"] for row in ordered}) != len(ordered):
        raise ValueError(f"image_id is not unique among the rows for {folder.name}; rename the source files")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("part-*.parquet"):
        stale.unlink()
    for part, start in enumerate(range(0, len(ordered), rows_per_part)):
        pq.write_table(
            pa.Table.from_pylist(ordered[start : start + rows_per_part], schema=SCHEMA),
            folder / f"part-{part:03d}.parquet",
            row_group_size=ROWS_PER_GROUP,
            compression={name: "none" if name == "image" else "zstd" for name in column_paths()},
            # A dictionary page that never overflows stores identical pictures of a row group once.
            dictionary_pagesize_limit=1 << 30,
        )
    splits = Counter(str(row["split"]) for row in ordered)
    LOGGER.info("written=%s num_rows=%d splits=%s", folder.name, len(ordered), dict(splits))


def column_paths() -> list[str]:
    """Parquet leaf paths of the schema: `keywords` is a list, so its leaf is nested."""
    return ["keywords.list.element" if name == "keywords" else name for name in SCHEMA.names]


def write_attribution(rows: Iterable[Row], target: Path) -> None:
    """Write one line per furniture product: product, title, creator, licence."""
    columns = ("group", "title", "creator", "licence")
    lines = sorted({tuple(str(row[name]) for name in columns) for row in rows})
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("product", *columns[1:]))
        writer.writerows(lines)


def main() -> None:
    """Rebuild both corpora and the attribution table."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--openclipart", type=Path, required=True, help="folder with png/ and svg/")
    parser.add_argument("--furniture", type=Path, required=True, help="furniture.parquet")
    parser.add_argument("--out", type=Path, required=True, help="where the corpora are written")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    Image.MAX_IMAGE_PIXELS = MAX_SOURCE_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    furniture = read_furniture(arguments.furniture)
    write_parts(furniture, arguments.out / "furniture", rows_per_part=4 * ROWS_PER_GROUP)
    write_attribution(furniture, arguments.out / "ATTRIBUTION.csv")
    openclipart = read_openclipart(arguments.openclipart)
    write_parts(openclipart, arguments.out / "openclipart", rows_per_part=2 * ROWS_PER_GROUP)


if __name__ == "__main__":
    main()
