import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.metrics import precision_recall_curve, precision_score, recall_score

from lookalike.data.duplicates.signatures import sign_images
from lookalike.data.duplicates.twins import (
    DedupConfig,
    PairDistances,
    Pictures,
    judge_pairs,
    look_alike,
    measure,
    pictures_of,
    rule_margin,
)
from lookalike.retrieval.metrics import recall_at_precision
from lookalike.schemas import CORPUS
from tests.data.conftest import make_rows


@settings(max_examples=80)
@given(pairs=st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=40), least=st.floats(0.1, 1))
def test_recall_at_precision_is_read_off_the_curve(pairs: list[tuple[bool, int]], least: float) -> None:
    duplicate, score = np.array([d for d, _ in pairs]), np.array([s for _, s in pairs], float)
    found = recall_at_precision(duplicate, score, least)
    if not duplicate.any():
        assert found == 0
        return
    precision, recall, _ = precision_recall_curve(duplicate, score)
    assert found == pytest.approx(max(r for p, r in zip(precision, recall, strict=True) if p >= least - 1e-12))


@settings(max_examples=80)
@given(seed=st.integers(0, 10**6))
def test_the_margin_is_not_negative_exactly_where_the_rule_holds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = DedupConfig(min_cosine=0.5, sure_cosine=0.75)
    bits, sharp = rng.integers(0, 100, 200).astype(np.int32), rng.random(200) < 0.5
    cosine = (rng.integers(0, 9, 200) / 8).astype(np.float32)  # bounds are hit exactly
    colour, same = rng.integers(0, 25, 200).astype(np.int32), np.zeros(200, bool)
    trimmed = np.where(rng.random(200) < 0.5, rng.integers(0, 40, 200), 257).astype(np.int32)
    pairs = PairDistances(bits, sharp, cosine, trimmed, colour, same)
    assert ((rule_margin(pairs, config) >= 0) == look_alike(pairs, config)).all()


def pictures(seed: int, count: int) -> Pictures:
    """Pairs (2n, 2n + 1) of which some are close."""
    rng = np.random.default_rng(seed)
    bits = rng.random((count, 256)) < 0.5
    bits[1::2] = bits[::2] ^ (rng.random((count // 2, 256)) < rng.random((count // 2, 1)) / 4)
    angle = rng.uniform(0, 0.6, count) * (np.arange(count) % 2)
    hashes = np.packbits(bits, axis=1).view("<u8").copy()
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    hashes = np.stack([hashes, np.zeros_like(hashes)], axis=1)
    colours = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    contents = np.arange(2 * count, dtype=np.uint64).reshape(-1, 2)
    return Pictures(hashes, hashes[:0], np.full((count, 2), (100, 0), np.int32), colours, vectors, contents)


def test_labelled_pairs_are_judged_as_scikit_learn_does() -> None:
    found, config = pictures(3, 400), DedupConfig(max_bits=25, min_cosine=0.9)
    left, right = np.arange(0, 400, 2), np.arange(1, 400, 2)
    bits = np.unpackbits((found.hashes[left, 0] ^ found.hashes[right, 0]).view(np.uint8), axis=1).sum(axis=1)
    cosine = (found.vectors[left] * found.vectors[right]).sum(axis=1)
    truth = bits + 40 * (1 - cosine) + np.random.default_rng(0).normal(0, 8, 200) < 28
    rule = ((bits <= 25) & (cosine >= 0.9)) | ((bits <= 80) & (cosine >= 0.985))
    result = judge_pairs(found, left, right, truth, config)
    assert result["precision"] == pytest.approx(precision_score(truth, rule), abs=1e-4)
    assert result["recall"] == pytest.approx(recall_score(truth, rule), abs=1e-4)
    assert 0 < result["recall_at_p95"] < 1
    assert result["pairs"], result["duplicates"] == (200, int(truth.sum()))


def sign(images: list[Any], mirrored: bool) -> pa.Table:
    """Signatures of pictures given as bytes; their vectors say nothing."""
    rows = [
        dict.fromkeys(CORPUS.names) | {"image_id": str(n), "image": image, "split": "train"}
        for n, image in enumerate(images)
    ]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * len(images), np.float16)), 2)
    return sign_images(pa.Table.from_pylist(rows, schema=CORPUS), vectors, 1, mirrored)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_recompressed_copy_is_close_and_a_mirror_image_only_when_asked_for() -> None:
    rng = np.random.default_rng(4)
    small = Image.fromarray(rng.integers(0, 255, (8, 10, 3)).astype(np.uint8))
    image = small.resize((100, 80), Image.Resampling.BICUBIC)
    turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    signed = sign([encode(image, "PNG"), encode(image, "JPEG", quality=40), encode(turned, "PNG")], mirrored=True)
    left, right = np.array([0, 0, 2]), np.array([1, 2, 0])
    config = DedupConfig()
    straight, either = (measure(pictures_of(signed, mirrored), left, right, config) for mirrored in (False, True))
    for name in ("bits", "trimmed_bits"):
        assert (getattr(straight, name) <= 31).tolist() == [True, False, False]
        assert (getattr(either, name) <= 31).all()
    assert (either.colour <= 12).all()
    assert straight.colour[1] > 50
    assert signed["row"].to_pylist() == [(1 << 32) + n for n in range(3)]
    plain = sign([encode(image, "PNG")], mirrored=False)
    assert plain["mirror"].null_count == 1
    assert plain["pdq"][0] == signed["pdq"][0]


def test_a_bordered_copy_has_its_hash_and_colours_without_the_border() -> None:
    rng = np.random.default_rng(4)
    small = Image.fromarray(rng.integers(0, 200, (8, 10, 3)).astype(np.uint8))
    image = ImageOps.expand(small.resize((100, 80), Image.Resampling.BICUBIC), 20, "white")
    others = [ImageOps.expand(image, 9, "navy"), image.crop((12, 8, 130, 112)), image.rotate(90)]
    signed = sign([encode(other, "PNG") for other in (image, *others)], mirrored=False)
    pairs = measure(pictures_of(signed, False), np.zeros(3, int), np.arange(1, 4), DedupConfig())
    assert (pairs.bits > 60).all()
    assert (pairs.trimmed_bits <= 16).tolist() == [True, True, False]
    assert (pairs.colour <= 12).tolist() == [True, True, False]
    unlike = pairs._replace(cosine=np.zeros(3, np.float32))
    assert look_alike(unlike, DedupConfig()).tolist() == [True, True, False]
    assert not look_alike(unlike._replace(colour=unlike.colour + 13), DedupConfig()).any()


def test_equal_bytes_have_equal_digests() -> None:
    contents = sign([row["image"] for row in make_rows(60)], mirrored=False)["content"].to_pylist()
    assert contents[29] == contents[49]
    assert len(set(contents)) == 59
