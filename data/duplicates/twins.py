"""When two pictures are the same: the settings, the rule, and how well the rule does on labelled pairs.

Two pictures are twins in four cases: their bytes are equal; PDQ hash and embedding agree; the embedding is nearly
certain and the hash does not contradict it; or hash and colours without the margins are nearly equal, whatever the
embedding says, because a border changes the embedding. PDQ sees no colour, so the hash alone never decides. Every case
needs a large cosine or a close hash without margins, so searching by these two finds all candidates.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from lookalike.config import Config
from lookalike.data.duplicates.pdq import HASH_BITS
from lookalike.data.features import unit_rows, vectors_of
from lookalike.retrieval.metrics import recall_at_precision

COLOURS = 8 * 8 * 3  # bytes: RGB in cells


class DedupConfig(Config):
    """When two pictures are the same, and how twins are searched."""

    max_bits: int = Field(31, ge=0, le=256)
    """Differing PDQ bits of 256 of a hash pair: the bound PDQ's authors recommend."""
    min_quality: int = Field(50, ge=0, le=100)
    """PDQ quality below which a hash is ignored and only embeddings and bytes count."""
    min_cosine: float = Field(0.9, ge=0, le=1)
    """Embedding cosine that confirms a hash pair."""
    sure_cosine: float = Field(0.985, ge=0, le=1)
    """Embedding cosine that makes a pair without a close hash ..."""
    sure_max_bits: int = Field(80, ge=0, le=256)
    """... if the hashes differ by at most this many bits."""
    trimmed_bits: int = Field(16, ge=0, le=256)
    """Differing PDQ bits without margins that make a pair ..."""
    max_colour: int = Field(12, ge=0, le=255)
    """... if the colours of no cell of an 8 x 8 grid differ by more levels of 255. A mean over the grid would miss the
    sign in the middle of an icon."""
    mirrored: bool = False
    """Whether a mirror image is the same picture. Off by default: the icons of "next" and "previous" are mirror images
    of each other. Set it where a flipped test picture would be a leak."""
    neighbours: int = Field(32, ge=1, le=1024)
    """Twins of a training row that are remembered per cell, the earliest in corpus order."""
    hold_out_groups: bool = True
    """Drop training rows whose group also occurs in a held-out split, so that test products are unseen. Set it to false
    if the test consists of other pictures of trained products."""
    exact_rows: int = Field(100_000, ge=0, le=1_000_000)
    """One task searches a corpus of up to this many images exactly; larger ones are searched in cells."""
    cell_rows: int = Field(20_000, ge=16, le=1_000_000)
    """Images of a cell on average, counting each image once. The square root of the number of images, divided by
    ``probes``, costs least."""
    probes: int = Field(2, ge=1, le=16)
    """Nearest cells in which an image is compared. More cells find more pairs; the cost grows in proportion."""
    within_train: bool = True
    """Drop copies among the training rows. False keeps them (an ablation); the leak firewall still works."""
    hash_bands: int = Field(2, ge=0, le=16)
    """16-bit pieces of the hash without margins. Pictures with an equal piece are also compared, which finds copies
    with distant embeddings. Each piece costs as much as a probe."""
    labelled_pairs: str | None = None
    """Parquet or CSV file with the columns ``left``, ``right`` (image ids) and ``duplicate`` (0 or 1). The result then
    states precision and recall of the rule, and recall at 95% precision, on these pairs."""


class Pictures(NamedTuple):
    """The features by which n pictures are compared."""

    hashes: NDArray[np.uint64]
    """PDQ [n, 2, 4] of the whole picture and of the picture without margins."""
    mirrors: NDArray[np.uint64]
    """PDQ of the mirror images [n, 2, 4]; [0, 2, 4] unless mirror images count."""
    quality: NDArray[np.int32]
    """PDQ quality [n, 2], 0 to 100."""
    colours: NDArray[np.uint8]
    """Colours without margins [n, 8, 8, 3]."""
    vectors: NDArray[np.float32]
    """Unit embeddings [n, d]."""
    contents: NDArray[np.uint64]
    """Digest of the bytes [n, 2]."""


class PairDistances(NamedTuple):
    """How close pairs [p] are."""

    bits: NDArray[np.int32]
    """Differing PDQ bits of the whole pictures."""
    sharp: NDArray[np.bool_]
    """Whether both hashes have enough quality."""
    cosine: NDArray[np.float32]
    trimmed_bits: NDArray[np.int32]
    """Differing PDQ bits without margins; 257 if one of the hashes has too little quality."""
    colour: NDArray[np.int32]
    """Largest difference of a cell's colour, in levels of 255."""
    same: NDArray[np.bool_]
    """Whether the bytes are equal."""


def pictures_of(signatures: pa.Table, mirrored: bool) -> Pictures:
    """``Pictures`` of a table of signatures."""
    hashes = np.stack([words_of(signatures[name]) for name in ("pdq", "trimmed")], axis=1)
    mirrors = hashes[:0]
    if mirrored:
        mirrors = np.stack([words_of(signatures[name]) for name in ("mirror", "trimmed_mirror")], axis=1)
    quality = np.stack([signatures[name].to_numpy() for name in ("quality", "trimmed_quality")], axis=1)
    colours = words_of(signatures["colours"]).view(np.uint8).reshape(-1, 8, 8, 3)
    vectors, contents = unit_rows(vectors_of(signatures)), words_of(signatures["content"])
    return Pictures(hashes, mirrors, quality.astype(np.int32), colours, vectors, contents)


def words_of(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A fixed-size binary column without nulls as [n, bytes / 8]."""
    raw = b"".join(column.to_pylist())
    return np.frombuffer(raw, "<u8").reshape(-1, column.type.byte_width // 8)


def measure(pictures: Pictures, left: NDArray[Any], right: NDArray[Any], config: DedupConfig) -> PairDistances:
    """Distances of the rows ``left`` [p] and ``right`` [p]; a pair's do not depend on the other pairs."""
    sharp = np.minimum(pictures.quality[left], pictures.quality[right]) >= config.min_quality
    bits = _count_bits(pictures.hashes[left], pictures.hashes[right])
    colour = _worst_cell(pictures.colours[left], pictures.colours[right])
    if len(pictures.mirrors):
        turned = _count_bits(pictures.hashes[left], pictures.mirrors[right])
        mirror = _worst_cell(pictures.colours[left], pictures.colours[right][:, :, ::-1])
        colour = np.where(turned[:, 1] < bits[:, 1], mirror, colour)
        bits = np.minimum(bits, turned)
    cosine = np.einsum("ij,ij->i", pictures.vectors[left], pictures.vectors[right])
    same = (pictures.contents[left] == pictures.contents[right]).all(axis=1)
    trimmed_bits = np.where(sharp[:, 1], bits[:, 1], HASH_BITS + 1)
    return PairDistances(bits[:, 0], sharp[:, 0], np.asarray(cosine, np.float32), trimmed_bits, colour, same)


def _count_bits(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.int32]:
    return np.asarray(np.bitwise_count(left ^ right).sum(axis=2, dtype=np.int32))


def _worst_cell(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.int32]:
    worst = np.maximum(left, right) - np.minimum(left, right)
    return np.asarray(worst.reshape(len(worst), COLOURS).max(axis=1), np.int32)


def look_alike(pairs: PairDistances, config: DedupConfig) -> NDArray[np.bool_]:
    """Whether each pair [p] of pictures with different bytes is the same picture."""
    near = pairs.sharp & (pairs.bits <= config.max_bits) & (pairs.cosine >= config.min_cosine)
    sure = (pairs.bits <= config.sure_max_bits) & (pairs.cosine >= config.sure_cosine)
    framed = (pairs.trimmed_bits <= config.trimmed_bits) & (pairs.colour <= config.max_colour)
    return near | sure | framed


def rule_margin(pairs: PairDistances, config: DedupConfig) -> NDArray[np.float64]:
    """How far inside the rule each pair lies [p]: at least 0 exactly where :func:`look_alike` holds.

    The slack of a condition is the smaller of its two thresholds' slacks, the margin is the largest slack of the three
    conditions. Bits and levels are divided by 256, so that one threshold on the margin tightens or loosens hash,
    embedding and colours together.
    """
    near = np.minimum((config.max_bits - pairs.bits) / HASH_BITS, pairs.cosine - np.float32(config.min_cosine))
    sure = np.minimum((config.sure_max_bits - pairs.bits) / HASH_BITS, pairs.cosine - np.float32(config.sure_cosine))
    framed = np.minimum(config.trimmed_bits - pairs.trimmed_bits, config.max_colour - pairs.colour) / HASH_BITS
    near = np.where(pairs.sharp, near, -np.inf)
    return np.asarray(np.maximum(np.maximum(near, sure), framed), np.float64)


def judge_pairs(
    pictures: Pictures, left: NDArray[Any], right: NDArray[Any], duplicate: NDArray[np.bool_], config: DedupConfig
) -> dict[str, float]:
    """Precision and recall of the rule and recall at 95% precision on labelled pairs [p] of rows of ``pictures``."""
    pairs = measure(pictures, left, right, config)
    judged = pairs.same | look_alike(pairs, config)
    score = np.where(pairs.same, 1.0 + HASH_BITS, rule_margin(pairs, config))
    hits = int((judged & duplicate).sum())
    return {
        "pairs": len(duplicate),
        "duplicates": int(duplicate.sum()),
        "precision": round(hits / max(int(judged.sum()), 1), 4),
        "recall": round(hits / max(int(duplicate.sum()), 1), 4),
        "recall_at_p95": round(recall_at_precision(duplicate, score, 0.95), 4),
    }
