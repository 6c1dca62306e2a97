"""Step 5, near-duplicates: inside the training rows, and between them and every evaluation split (the leak firewall).

Candidates come from perceptual hashes (PDQ, 256 bits) and from embeddings; a pair counts when both agree, or when the
bytes are equal. Training rows that pair with a test row go. Among the other training rows pairs close into components,
and inside one the rows are taken in corpus order: a row stays unless it pairs with one that stayed, so that every row
dropped has a verified twin and a chain of small differences does not swallow a family of pictures.

Views of a product are not duplicates of each other, and two products of a catalogue that look alike are signal, not
noise: between rows that both have a group only equal bytes count. Against a test row no such excuse is made.
"""

import hashlib
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from lookalike.config import Config
from lookalike.vision.images import decode

HASH_BITS = 256
EXACT_SCAN_ROWS = 100_000  # up to here every pair of hashes is compared; above, hash tables find the same pairs

SIGNATURES = pa.schema([
    pa.field("image_id", pa.string(), nullable=False), pa.field("content", pa.binary(16)),
    pa.field("pdq", pa.binary(HASH_BITS // 8)), pa.field("quality", pa.int32()),
    pa.field("group", pa.string()), pa.field("split", pa.string()),
])  # fmt: skip
DUPLICATES = pa.schema([
    pa.field("image_id", pa.string(), nullable=False), pa.field("keeper_id", pa.string()),
    pa.field("component", pa.int64()), pa.field("reason", pa.string()),
    pa.field("bits", pa.int32()), pa.field("cosine", pa.float32()),
])  # fmt: skip
"""One row a training image that is dropped: its twin, the component (smallest row number in it), why (``duplicate``,
``near_duplicate``, ``overlaps_test``, ``group_in_test``), and how close the twin is."""


class DedupConfig(Config):
    """When two pictures are the same."""

    max_bits: int = Field(31, ge=0, le=31)
    """Differing PDQ bits of 256 of a hash pair: the bound PDQ's authors recommend."""
    min_quality: int = Field(50, ge=0, le=100)
    """PDQ quality below which a hash says too little and only embeddings and bytes count."""
    min_cosine: float = Field(0.9, ge=0, le=1)
    """Embedding cosine that confirms a hash pair."""
    sure_cosine: float = Field(0.985, ge=0, le=1)
    """Embedding cosine that makes a pair by itself ..."""
    sure_max_bits: int = Field(80, ge=0, le=256)
    """... when the hashes differ by no more than this."""
    neighbours: int = Field(32, ge=1, le=1024)
    """Nearest embeddings of an image that are looked at."""
    hold_out_groups: bool = True
    """Drop training rows whose group stands in a held-out split too: test products are then unseen. Set it to false
    where other pictures of the trained products are the test."""


def sign_images(table: pa.Table) -> pa.Table:
    """``SIGNATURES`` of a corpus part: BLAKE2 of the bytes, PDQ hash (bits packed) and its quality."""
    import pdqhash

    contents, hashes, qualities = [], [], []
    for data in table["image"].to_pylist():
        bits, quality = pdqhash.compute(np.asarray(decode(data)))
        contents.append(hashlib.blake2b(data, digest_size=16).digest())
        hashes.append(np.packbits(np.asarray(bits, dtype=np.uint8)).tobytes())
        qualities.append(int(quality))
    columns = [table["image_id"], pa.array(contents, pa.binary(16)), pa.array(hashes, pa.binary(HASH_BITS // 8)),
               pa.array(qualities, pa.int32()), table["group"], table["split"]]  # fmt: skip
    return pa.table(columns, schema=SIGNATURES)


def hash_pairs(hashes: NDArray[np.uint8], max_bits: int) -> NDArray[np.int64]:
    """All pairs (i < j) [p, 2] of packed hashes [n, 32] that differ in at most ``max_bits`` <= 31 bits, exactly."""
    import faiss

    if not len(hashes):
        return np.zeros((0, 2), np.int64)
    index: Any = faiss.IndexBinaryFlat(HASH_BITS)
    if len(hashes) > EXACT_SCAN_ROWS:
        # 16 tables of 16 bits, looked up with one bit flipped: 31 differing bits leave a table with one at the most.
        index = faiss.IndexBinaryMultiHash(HASH_BITS, 16, 16)
        index.nflip = 1
    index.add(hashes)
    limits, _, found = index.range_search(hashes, max_bits + 1)
    lengths: NDArray[np.int64] = limits[1:].astype(np.int64) - limits[:-1].astype(np.int64)
    return _ordered_pairs(np.repeat(np.arange(len(hashes)), lengths), found)


def embedding_pairs(vectors: NDArray[np.float32], min_cosine: float, neighbours: int) -> NDArray[np.int64]:
    """Pairs (i < j) [p, 2] of unit vectors [n, d] at or above ``min_cosine``, among each one's nearest."""
    import faiss

    if not len(vectors):
        return np.zeros((0, 2), np.int64)
    exact = len(vectors) <= EXACT_SCAN_ROWS
    kind = "Flat" if exact else f"IVF{int(4 * len(vectors) ** 0.5)},Flat"
    index: Any = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if not exact:
        index.nprobe = 8
        index.train(vectors)
    index.add(vectors)
    scores, found = index.search(vectors, min(neighbours + 1, len(vectors)))
    rows, columns = np.nonzero((scores >= min_cosine) & (found >= 0))
    return _ordered_pairs(rows, found[rows, columns])


def _ordered_pairs(left: NDArray[np.integer], right: NDArray[np.integer]) -> NDArray[np.int64]:
    pairs = np.stack([np.minimum(left, right), np.maximum(left, right)], axis=1).astype(np.int64)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def content_pairs(contents: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Pairs (first, later) [p, 2] of rows with equal bytes."""
    _, codes = np.unique(contents, return_inverse=True)
    order = np.lexsort((np.arange(len(codes)), codes))
    firsts = np.concatenate([[True], codes[order][1:] != codes[order][:-1]]) if len(codes) else np.zeros(0, bool)
    leader = order[firsts][np.cumsum(firsts) - 1] if len(codes) else order
    return _ordered_pairs(leader, order)


def find_pairs(signatures: pa.Table, vectors: NDArray[np.float32], config: DedupConfig) -> pl.DataFrame:
    """Verified pairs of rows: ``left < right``, ``same`` (equal bytes), ``bits``, ``cosine``."""
    hashes = np.frombuffer(b"".join(signatures["pdq"].to_pylist()), np.uint8).reshape(-1, HASH_BITS // 8)
    contents = np.array([value.hex() for value in signatures["content"].to_pylist()], dtype="S32")
    quality = signatures["quality"].to_numpy()
    rough = np.concatenate([
        content_pairs(contents),
        hash_pairs(hashes, config.max_bits),
        embedding_pairs(vectors, config.sure_cosine, config.neighbours),
    ])  # fmt: skip
    pairs = np.unique(rough, axis=0)
    left, right = pairs[:, 0], pairs[:, 1]
    bits = np.bitwise_count(hashes[left] ^ hashes[right]).sum(axis=1).astype(np.int32)
    cosine = np.einsum("ij,ij->i", vectors[left], vectors[right]) if len(pairs) else np.zeros(0, np.float32)
    same = contents[left] == contents[right]
    sharp = np.minimum(quality[left], quality[right]) >= config.min_quality
    near = sharp & (bits <= config.max_bits) & (cosine >= config.min_cosine)
    sure = (cosine >= config.sure_cosine) & (bits <= config.sure_max_bits)
    keep = same | near | sure
    return pl.DataFrame({"left": left[keep], "right": right[keep], "same": same[keep], "bits": bits[keep],
                         "cosine": cosine[keep].astype(np.float32)})  # fmt: skip


def find_duplicates(signatures: pa.Table, vectors: NDArray[np.float32], config: DedupConfig) -> pa.Table:
    """``DUPLICATES``: the training rows to drop, by row. ``signatures`` in corpus order, ``vectors`` unit [n, d]."""
    pairs = find_pairs(signatures, vectors, config)
    split = np.array(signatures["split"].to_pylist(), dtype=object)
    groups = np.array(signatures["group"].to_pylist(), dtype=object)
    test = split != "train"  # any other split is held out
    dropped: dict[int, dict[str, Any]] = {}
    left, right = pairs["left"].to_numpy(), pairs["right"].to_numpy()
    for train, other, pair in _test_overlaps(left, right, test):
        best = dropped.get(train)
        close = (pairs["bits"][pair], -pairs["cosine"][pair], other)
        if best is None or close < best["close"]:
            dropped[train] = {"keeper": other, "pair": pair, "reason": "overlaps_test", "close": close}
    held_out = {group for group in groups[test] if group is not None} if config.hold_out_groups else set()
    for row in np.nonzero(~test)[0].tolist():
        if row not in dropped and groups[row] is not None and groups[row] in held_out:
            dropped[row] = {"keeper": None, "pair": None, "reason": "group_in_test"}
    both = np.array([a is not None and b is not None for a, b in zip(groups[left], groups[right], strict=True)], bool)
    inside = ~test[left] & ~test[right] & (pairs["same"].to_numpy() | ~both)
    components = _components(left[inside], right[inside], len(split))
    _keep_first(left, right, np.nonzero(inside)[0], dropped, pairs["same"].to_numpy())
    return _duplicates_table(signatures["image_id"].to_pylist(), dropped, pairs, components)


def _test_overlaps(left: NDArray[Any], right: NDArray[Any], test: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    across = np.nonzero(test[left] != test[right])[0]
    return [(int(right[p]), int(left[p]), int(p)) if test[left[p]] else (int(left[p]), int(right[p]), int(p))
            for p in across]  # fmt: skip


def _keep_first(left: NDArray[Any], right: NDArray[Any], inside: NDArray[Any], dropped: dict[int, dict[str, Any]],
                same: NDArray[np.bool_]) -> None:  # fmt: skip
    """Go through pairs by their later row; a row goes when an earlier one it pairs with has stayed."""
    for pair in inside[np.lexsort((left[inside], right[inside]))].tolist():
        keeper, row = int(left[pair]), int(right[pair])
        if row not in dropped and keeper not in dropped:
            reason = "duplicate" if same[pair] else "near_duplicate"
            dropped[row] = {"keeper": keeper, "pair": pair, "reason": reason}


def _components(left: NDArray[Any], right: NDArray[Any], count: int) -> NDArray[np.int64]:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    smallest = np.full(int(labels.max(initial=-1)) + 1, count, np.int64)
    np.minimum.at(smallest, labels, np.arange(count))
    return np.asarray(smallest[labels], dtype=np.int64)


def _duplicates_table(
    ids: list[str], dropped: dict[int, dict[str, Any]], pairs: pl.DataFrame, components: NDArray[np.int64]
) -> pa.Table:
    bits, cosine = pairs["bits"].to_list(), pairs["cosine"].to_list()
    rows = []
    for row in sorted(dropped):
        entry = dropped[row]
        keeper, pair = entry["keeper"], entry["pair"]
        rows.append({"image_id": ids[row], "keeper_id": None if keeper is None else ids[keeper],
                     "component": int(components[row]), "reason": entry["reason"],
                     "bits": None if pair is None else bits[pair],
                     "cosine": None if pair is None else cosine[pair]})  # fmt: skip
    return pa.Table.from_pylist(rows, schema=DUPLICATES)


def keep_training(rows: pa.Table, duplicates: pa.Table) -> pa.Table:
    """The rows of a corpus part that train: split ``train`` and not dropped."""
    train = pc.equal(rows["split"], "train")
    dropped = pc.is_in(rows["image_id"], value_set=duplicates["image_id"].combine_chunks())
    return rows.filter(pc.and_(train, pc.invert(dropped)))


def borrow(annotations: pa.Table, duplicates: pa.Table) -> pa.Table:
    """Annotations of dropped copies under their keeper's id: a picture keeps what any of its copies was called.

    Rows dropped because of the test split lend nothing.
    """
    frame = pl.DataFrame(pl.from_arrow(duplicates)).filter(pl.col("reason").is_in(["duplicate", "near_duplicate"]))
    named = pl.DataFrame(pl.from_arrow(annotations)).join(frame.select("image_id", "keeper_id"), on="image_id")
    lent = named.with_columns(image_id=pl.col("keeper_id")).select(annotations.column_names)
    return lent.to_arrow().cast(annotations.schema)
