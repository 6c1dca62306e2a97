"""The encoder: dims are checked, a saved one loads bitwise, and vectors do not depend on the batch."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lookalike.artifacts import Artifact, Draft
from lookalike.config import parse_config
from lookalike.errors import ArtifactError, UsageError
from lookalike.vision.encoder import (
    Encoder,
    EncoderConfig,
    build_model,
    check_dims,
    read_encoder,
    save_encoder,
    to_bytes,
)
from lookalike.vision.images import ImageError
from lookalike.vision.transforms import TransformConfig

import timm  # isort: skip

BACKBONE = {"backbone": "test_efficientnet", "num_features": 256, "transform": TransformConfig(size=32)}


def publish(root: str, config: EncoderConfig) -> tuple[Artifact, Encoder]:
    torch.manual_seed(0)
    model = build_model(config)
    draft = Draft(root, "encoder", "tiny", "a" * 20)
    save_encoder(draft, model, config, "# tiny\n")
    artifact = draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)
    return artifact, Encoder(config, model, "in memory")


def pictures(num: int) -> list[bytes]:
    random = np.random.default_rng(2)
    return [to_bytes(Image.fromarray(random.integers(0, 256, (20 + i, 30, 3), np.uint8))) for i in range(num)]


@pytest.mark.parametrize("projection", [False, True])
def test_a_saved_encoder_loads_bitwise(tmp_path: Path, projection: bool) -> None:
    dims = (8, 24) if projection else (16, 256)
    config = EncoderConfig.model_validate({**BACKBONE, "dims": dims, "projection": projection})
    artifact, original = publish(str(tmp_path), config)
    loaded = Encoder.load(artifact.uri)
    assert (loaded.dim, loaded.dims, loaded.fingerprint) == (dims[-1], dims, "a" * 20)
    assert loaded.config == config
    images = pictures(5)
    vectors = loaded.encode(images)
    assert (vectors.shape, vectors.dtype) == ((5, dims[-1]), np.float32)
    assert np.array_equal(vectors, original.encode(images))
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1.0)  # normalising is left to the use


def test_vectors_depend_neither_on_the_batch_nor_on_bytes_or_picture(tmp_path: Path) -> None:
    config = EncoderConfig.model_validate({**BACKBONE, "dims": (256,)})
    _, encoder = publish(str(tmp_path), config)
    images = pictures(5)
    whole = encoder.encode(images)
    assert np.allclose(encoder.encode(images, batch_size=2), whole, atol=1e-5)
    assert np.allclose(np.concatenate([encoder.encode([image]) for image in images]), whole, atol=1e-5)
    import io

    assert np.array_equal(encoder.encode([Image.open(io.BytesIO(image)) for image in images]), whole)
    assert encoder.encode([]).shape == (0, 256)


def test_an_encoder_goes_on_at_another_resolution(tmp_path: Path) -> None:
    """Pinterest's 224 -> 384: the same weights, positions interpolated, and the configuration says so."""
    config = EncoderConfig(
        backbone="vit_tiny_patch16_224", num_features=192, dims=(192,), transform=TransformConfig(size=64)
    )
    artifact, original = publish(str(tmp_path), config)
    larger, model = read_encoder(artifact, size=96)
    assert (larger.transform.size, larger.dims, config.transform.size) == (96, (192,), 64)
    vectors = Encoder(larger, model, "larger").encode(pictures(3))
    assert vectors.shape == (3, 192)
    same, model = read_encoder(artifact, size=64)
    assert same == config
    assert np.array_equal(Encoder(same, model, "same").encode(pictures(3)), original.encode(pictures(3)))


def test_one_image_is_a_list_of_one_and_a_path_is_read(tmp_path: Path) -> None:
    _, encoder = publish(str(tmp_path), EncoderConfig.model_validate({**BACKBONE, "dims": (16, 256)}))
    (image,) = pictures(1)
    path = tmp_path / "chair \N{SNOWMAN}::1.png"
    path.write_bytes(image)
    wanted = encoder.encode([image])
    opened = Image.open(io.BytesIO(image))
    for one in (image, bytearray(image), memoryview(image), opened, (image,), iter([image]), path, str(path), [path]):
        np.testing.assert_array_equal(encoder.encode(one), wanted)
    assert encoder.encode([]).shape == (0, 256)
    for wrong in ({image}, np.zeros((2, 2, 3), np.uint8), None, [None], [3], {"a": image}):
        with pytest.raises(UsageError, match="images"):
            encoder.encode(wrong)  # type: ignore[arg-type]
    for lost in ("chair.jpg", tmp_path, "chair\0.jpg", "x" * 5000, "http://127.0.0.1/chair.jpg"):
        with pytest.raises(UsageError, match=r"images\[1\] is .*no file that can be read"):
            encoder.encode([image, lost])


@pytest.mark.parametrize("kind", ["turned", "see-through", "palette", "16 bits", "floats", "CMYK", "1 bit"])
def test_a_picture_that_was_opened_elsewhere_is_the_file_s(tmp_path: Path, kind: str) -> None:
    """Pillow's own conversion would leave it turned, put it on black, or clip it to white."""
    _, encoder = publish(str(tmp_path), EncoderConfig.model_validate({**BACKBONE, "dims": (256,)}))
    rgb, file = Image.open(io.BytesIO(pictures(1)[0])).convert("RGB"), io.BytesIO()
    grey = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = rgb.copy()
    clear.putalpha(rgb.convert("L"))
    save, settings = {
        "turned": (rgb, {"format": "PNG", "exif": exif}),
        "see-through": (clear, {"format": "PNG"}),
        "palette": (rgb.quantize(16), {"format": "PNG", "transparency": 3}),
        "16 bits": (Image.fromarray(grey), {"format": "PNG"}),
        "floats": (Image.fromarray(grey.astype(np.float32) / 65535), {"format": "TIFF"}),
        "CMYK": (rgb.convert("CMYK"), {"format": "TIFF"}),
        "1 bit": (rgb.convert("1"), {"format": "PNG"}),
    }[kind]
    save.save(file, **settings)  # type: ignore[arg-type]
    np.testing.assert_array_equal(encoder.encode(Image.open(file)), encoder.encode(file.getvalue()))


def test_a_picture_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    _, encoder = publish(str(tmp_path), EncoderConfig.model_validate({**BACKBONE, "dims": (256,)}))
    (image,) = pictures(1)
    closed = Image.open(io.BytesIO(image))
    closed.close()
    for picture, reason in (
        (Image.new("RGB", (0, 5)), "empty"),
        (Image.fromarray(np.full((8, 8), 300.5, np.float32)), "no_value_range"),
        (Image.open(io.BytesIO(image[: len(image) // 2])), "truncated"),
        (closed, "damaged"),
    ):
        with pytest.raises(ImageError) as caught:
            encoder.encode(picture)
        assert caught.value.reason == reason


@pytest.mark.parametrize("mode", ["RGBX", "HSV", "YCbCr", "LA", "La", "RGBa", "PA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_every_mode_are_taken(tmp_path: Path, mode: str) -> None:
    _, encoder = publish(str(tmp_path), EncoderConfig.model_validate({**BACKBONE, "dims": (256,)}))
    assert np.isfinite(encoder.encode(Image.new(mode, (40, 30)))).all()


def test_bad_bytes_are_refused(tmp_path: Path) -> None:
    _, encoder = publish(str(tmp_path), EncoderConfig.model_validate({**BACKBONE, "dims": (256,)}))
    with pytest.raises(ImageError, match=r"zero bytes"):
        encoder.encode([*pictures(1), b""])
    with pytest.raises(ImageError, match=r"the limit is 100"):
        encoder.encode(pictures(1), max_pixels=100)


def test_another_kind_of_artifact_is_refused(tmp_path: Path) -> None:
    draft = Draft(str(tmp_path), "corpus", "c", "a" * 20)
    draft.write_json("x.json", 1)
    corpus = draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)
    with pytest.raises(ArtifactError, match=r"kind 'corpus', not of kind 'encoder'"):
        Encoder.load(corpus.uri)


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ([8, 2048], r"dims \[8, 2048\] exceed the model's 768; drop 2048 or set embedding_dim=2048"),
        ([8, 1000, 2048], r"exceed the model's 768; drop 1000, 2048 or set embedding_dim=2048"),
        ([8, 16], r"dims \[8, 16\] must end at the whole embedding, 768; append it"),
        ([16, 8, 768], "positive and strictly increasing"),
        ([8, 8, 768], "strictly increasing"),
        ([0, 768], "positive"),
        ([], "positive"),
    ],
)
def test_dims_that_do_not_fit_are_explained(dims: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_dims(dims, 768)


def test_dims_that_fit() -> None:
    check_dims([768], 768)
    check_dims([8, 100, 768], 768)


def test_a_configuration_with_wrong_dims_is_refused() -> None:
    with pytest.raises(UsageError, match=r"encoder: dims \[8, 512\] exceed the model's 256; drop 512"):
        parse_config(EncoderConfig, {**BACKBONE, "dims": (8, 512)}, "encoder")


def test_a_backbone_is_an_encoder_in_one_line() -> None:
    torch.manual_seed(5)
    encoder = Encoder.of_backbone("test_efficientnet")
    torch.manual_seed(5)
    model = timm.create_model("test_efficientnet", num_classes=0).eval()
    assert (encoder.dims, encoder.config.transform.interpolation) == ((256,), "bicubic")
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8))
    tensor = torch.from_numpy(np.asarray(square, np.float32) / 255).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(timm.data.resolve_model_data_config(model)[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        expected = model((tensor - mean) / std)[0].numpy()
    np.testing.assert_allclose(encoder.encode(square)[0], expected, atol=1e-4)
    with pytest.raises(UsageError, match="unknown backbone 'efficientnet_light0'"):
        Encoder.of_backbone("efficientnet_light0")
    with pytest.raises(UsageError, match="weights 'efficientnet-lite0' fit 'tf_efficientnet_lite0', not"):
        Encoder.of_backbone("test_efficientnet", "efficientnet-lite0")
