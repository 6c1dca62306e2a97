"""ONNX: the file computes what the encoder computes, at every batch size, and a file that does not is not exported."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lookalike.artifacts import Artifact
from lookalike.cli import main
from lookalike.errors import LookalikeError
from lookalike.train.publish.onnx import check_parity, write_onnx
from lookalike.vision.encoder import Encoder, read_encoder, read_pixels
from lookalike.vision.transforms import normalize_pixels
from tests.train.encoders import draw, publish_corpus, publish_encoder

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
FAMILIES = {
    "test_efficientnet": (256, 64, "native"),
    "test_vit": (64, 160, "native"),
    "test_resnet": (96, 64, "gem"),
    "efficientformer_l1": (448, 96, "native"),
}
"""Architecture -> width, image size, pooling: CNNs, one with a pooling of ours, a ViT, an EfficientFormer."""


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FAMILIES)
def test_an_exported_file_gives_the_encoder_s_vectors_for_any_batch(backbone: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    width, size, pooling = FAMILIES[backbone]
    parents = {"shards": [publish_corpus(str(tmp_path), files=1, groups=1, rows=6)]}
    encoder = publish_encoder(
        str(tmp_path), backbone=backbone, num_features=width, pooling=pooling, transform={"size": size}, parents=parents
    )
    assert main(["export", encoder.uri, "--to", str(tmp_path / "out"), "--onnx"]) == 0
    figures = Artifact.open(str(tmp_path / "out")).stats["onnx"]
    assert figures["pictures"] == 6
    assert figures["min_cosine"] > 0.99999
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    ours = Encoder.load(encoder)
    for num in (1, 2, 7):
        images = [draw(100 + n) for n in range(num)]
        batch = normalize_pixels(torch.from_numpy(read_pixels(images, ours.config.transform)), ours.config.transform)
        (vectors,) = session.run(["embedding"], {"images": batch.numpy()})
        assert np.allclose(vectors, ours.encode(images), atol=1e-4 * np.abs(vectors).max())
    card = (tmp_path / "out/README.md").read_text()
    assert "## ONNX" in card
    assert "On 6 pictures" in card


PAPERS = {"vit_base_patch32_224": 768, "deit_small_distilled_patch16_224": 384, "mobilevit_s": 640, "resnet50": 2048}
"""One of each family that the papers name -> width; tiny ones and EfficientFormer are tested above."""


@pytest.mark.soak
@pytest.mark.parametrize("backbone", PAPERS)
def test_every_family_of_the_papers_exports(backbone: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    encoder = publish_encoder(str(tmp_path), backbone=backbone, num_features=PAPERS[backbone], transform={"size": 64})
    config, model = read_encoder(encoder)
    write_onnx(str(tmp_path / "model.onnx"), model, 64)
    pixels = read_pixels([draw(n) for n in range(3)], config.transform)
    assert check_parity(str(tmp_path / "model.onnx"), model, config, pixels)["min_cosine"] > 0.99999


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    encoder = publish_encoder(str(tmp_path))
    config, model = read_encoder(encoder)
    path = str(tmp_path / "model.onnx")
    write_onnx(path, model, 32)
    pixels = read_pixels([draw(n) for n in range(3)], config.transform)
    assert check_parity(path, model, config, pixels)["pictures"] == 3
    with torch.no_grad():  # as if the exporter had lost one of the first dims
        model.projection.weight[2] *= 1.5  # type: ignore[index]
    with pytest.raises(
        LookalikeError,
        match=r"does not compute what the encoder computes: .*'min_cosine': 0\.\d+.*"
        r"nothing was exported",
    ):
        check_parity(path, model, config, pixels)


def test_pictures_come_from_a_folder_or_an_artifact_and_are_asked_for_when_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, out = publish_encoder(str(tmp_path / "root")), str(tmp_path / "out")
    assert main(["export", encoder.uri, "--to", out, "--onnx"]) == 2
    assert "no pictures among what the encoder was made from" in capsys.readouterr().err
    assert not Path(out).exists()
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        (tmp_path / f"pictures/{n}.jpg").write_bytes(draw(n))
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    assert main(["export", encoder.uri, "--to", out, "--onnx", "--images", str(tmp_path / "pictures")]) == 0
    assert Artifact.open(out).stats["onnx"]["pictures"] == 3
    assert main(["export", encoder.uri, "--to", out]) == 0  # without ONNX this time: the old file must not stay
    assert not (tmp_path / "out/model.onnx").exists()
    assert "onnx" not in Artifact.open(out).stats
