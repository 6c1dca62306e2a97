"""When two pictures are the same: the settings, the rule, and how well the rule does on labelled pairs.

Two pictures are twins when their bytes are equal, when PDQ hash and embedding agree, or when the embedding is nearly
certain and the hash does not contradict it. Every rule asks for a cosine, so a search by cosine finds all candidates.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from lookalike.config import Config
from lookalike.data.features import unit_rows, vectors_of

HASH_BITS = 256


class DedupConfig(Config):
    """When two pictures are the same, and how they are searched."""

    max_bits: int = Field(31, ge=0, le=256)
    """Differing PDQ bits of 256 of a hash pair: the bound PDQ's authors recommend."""
    min_quality: int = Field(50, ge=0, le=100)
    """PDQ quality below which a hash says too little and only embeddings and bytes count."""
    min_cosine: float = Field(0.9, ge=0, le=1)
    """Embedding cosine that confirms a hash pair."""
    sure_cosine: float = Field(0.985, ge=0, le=1)
    """Embedding cosine that makes a pair by itself ..."""
    sure_max_bits: int = Field(80, ge=0, le=256)
    """... when the hashes differ by no more than this."""
    mirrored: bool = False
    """Whether a mirror image is the same picture. Not by default: the icons of "next" and "previous", left turn and
    right turn are mirror images. Set it where a flipped test picture is a leak."""
    neighbours: int = Field(32, ge=1, le=1024)
    """Twins of a training row that are remembered a cell, the earliest in corpus order."""
    hold_out_groups: bool = True
    """Drop training rows whose group stands in a held-out split too: test products are then unseen. Set it to false
    where other pictures of the trained products are the test."""
    exact_rows: int = Field(100_000, ge=0, le=1_000_000)
    """Corpora up to this many images are searched exactly, by one task; larger ones in cells."""
    cell_rows: int = Field(20_000, ge=16, le=1_000_000)
    """Mean images of a cell before each also goes to its further cells. The square root of the images, divided by
    ``probes``, costs least."""
    probes: int = Field(2, ge=1, le=16)
    """Nearest cells in which an image is compared: more find more pairs and cost as much more."""
    within_train: bool = True
    """Drop copies among the training rows. False keeps them (an ablation); the leak firewall stands all the same."""
    labelled_pairs: str | None = None
    """Parquet or CSV with columns ``left``, ``right`` (image ids) and ``duplicate`` (0 or 1): the result then states
    precision and recall of the rule, and recall at 95% precision, on these pairs."""


class Pictures(NamedTuple):
    """What is compared of n pictures."""

    hashes: NDArray[np.uint64]
    """PDQ [n, 4]."""
    mirrors: NDArray[np.uint64]
    """PDQ of the mirror images [n, 4]; of no rows unless mirror images count."""
    quality: NDArray[np.int32]
    """PDQ quality [n], 0 to 100."""
    vectors: NDArray[np.float32]
    """Unit embeddings [n, d]."""
    contents: NDArray[np.uint64]
    """Digest of the bytes [n, 2]."""


def pictures_of(signatures: pa.Table, mirrored: bool) -> Pictures:
    """The arrays of a table of signatures."""
    hashes = words_of(signatures["pdq"])
    mirrors = words_of(signatures["mirror"]) if mirrored else hashes[:0]
    quality = signatures["quality"].to_numpy().astype(np.int32)
    return Pictures(hashes, mirrors, quality, unit_rows(vectors_of(signatures)), words_of(signatures["content"]))


def words_of(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A fixed-size binary column without nulls as [n, bytes / 8]."""
    raw = b"".join(column.to_pylist())
    return np.frombuffer(raw, "<u8").reshape(-1, column.type.byte_width // 8)


def differing_bits(pictures: Pictures, left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.int32]:
    """PDQ distance [p] of the rows ``left`` [p] and ``right`` [p]; with mirrors the smaller of both ways."""
    bits = np.bitwise_count(pictures.hashes[left] ^ pictures.hashes[right]).sum(axis=1, dtype=np.int32)
    if not len(pictures.mirrors):
        return np.asarray(bits)
    turned = np.bitwise_count(pictures.hashes[left] ^ pictures.mirrors[right]).sum(axis=1, dtype=np.int32)
    return np.asarray(np.minimum(bits, turned))


def cosines(pictures: Pictures, left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float32]:
    """Cosine [p] of the rows ``left`` [p] and ``right`` [p]; the same whatever other pairs are asked for."""
    return np.asarray(np.einsum("ij,ij->i", pictures.vectors[left], pictures.vectors[right]), np.float32)


def same_bytes(pictures: Pictures, left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether the bytes are equal [p]."""
    return np.asarray((pictures.contents[left] == pictures.contents[right]).all(axis=1))


def are_sharp(pictures: Pictures, left: NDArray[Any], right: NDArray[Any], config: DedupConfig) -> NDArray[np.bool_]:
    """Whether both hashes say enough [p]."""
    return np.asarray(np.minimum(pictures.quality[left], pictures.quality[right]) >= config.min_quality)


def look_alike(
    bits: NDArray[np.int32], cosine: NDArray[np.float32], sharp: NDArray[np.bool_], config: DedupConfig
) -> NDArray[np.bool_]:
    """The rule for pictures whose bytes differ [p]."""
    near = sharp & (bits <= config.max_bits) & (cosine >= config.min_cosine)
    sure = (bits <= config.sure_max_bits) & (cosine >= config.sure_cosine)
    return near | sure


def rule_margin(
    bits: NDArray[np.int32], cosine: NDArray[np.float32], sharp: NDArray[np.bool_], config: DedupConfig
) -> NDArray[np.float64]:
    """How far inside the rule a pair lies [p]: not negative exactly where :func:`look_alike` holds.

    The larger of the two conditions' smaller slack, bits in units of 256 and cosines as they are, so that moving the
    threshold tightens or loosens hash and embedding together.
    """
    near = np.minimum((config.max_bits - bits) / HASH_BITS, cosine - np.float32(config.min_cosine))
    sure = np.minimum((config.sure_max_bits - bits) / HASH_BITS, cosine - np.float32(config.sure_cosine))
    return np.asarray(np.maximum(np.where(sharp, near, -np.inf), sure), np.float64)


def recall_at_precision(duplicate: NDArray[np.bool_], score: NDArray[np.float64], least: float) -> float:
    """The largest recall of ``score >= t`` over all t at which precision is at least ``least``; 0 where none is."""
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(duplicate[order])
    last = np.append(score[order][1:] != score[order][:-1], True)  # a threshold takes all pairs of equal score
    fine = last & (hits >= least * np.arange(1, len(score) + 1))
    return float(hits[fine].max(initial=0) / max(int(duplicate.sum()), 1))


def judge_pairs(
    pictures: Pictures, left: NDArray[Any], right: NDArray[Any], duplicate: NDArray[np.bool_], config: DedupConfig
) -> dict[str, float]:
    """Precision and recall of the rule and recall at 95% precision on labelled pairs [p] of rows of ``pictures``."""
    bits, cosine = differing_bits(pictures, left, right), cosines(pictures, left, right)
    sharp, same = are_sharp(pictures, left, right, config), same_bytes(pictures, left, right)
    found = same | look_alike(bits, cosine, sharp, config)
    score = np.where(same, 1.0 + HASH_BITS, rule_margin(bits, cosine, sharp, config))
    hits = int((found & duplicate).sum())
    return {"pairs": len(duplicate), "duplicates": int(duplicate.sum()),
            "precision": round(hits / max(int(found.sum()), 1), 4),
            "recall": round(hits / max(int(duplicate.sum()), 1), 4),
            "recall_at_p95": round(recall_at_precision(duplicate, score, 0.95), 4)}  # fmt: skip
