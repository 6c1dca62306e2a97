"""The data-driven start: PCA directions against scikit-learn, proxies against class means."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from lookalike.errors import ArtifactError
from lookalike.train.feed.row_groups import list_row_groups, read_row_group
from lookalike.train.losses.matryoshka import NestedCosine, Nesting
from lookalike.train.run import initialise
from lookalike.train.run.initialise import imprint_proxies, pca_projection, sample_features
from lookalike.vision.backbones import create_backbone
from lookalike.vision.images import decode
from lookalike.vision.transforms import TransformConfig, build_eval_transform
from tests.train.conftest import shard_rows, write_shard


def features(n: int, width: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(n, width) * torch.linspace(3, 0.2, width) + 0.5


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_directions_are_those_of_scikit_learn_up_to_sign(whitening: float) -> None:
    z = features(200, 12)
    weight = pca_projection(z, 6, whitening).numpy()
    oracle = TruncatedSVD(6, algorithm="arpack", random_state=0).fit(normalize(z.numpy().astype(np.float64)))
    scale = (oracle.singular_values_ / oracle.singular_values_[0]) ** whitening
    signs = np.sign((weight * oracle.components_).sum(axis=1, keepdims=True))
    assert np.allclose(weight * signs, oracle.components_ / scale[:, None], atol=1e-4)


def test_directions_complete_themselves_beyond_the_rank_of_the_sample() -> None:
    weight = pca_projection(features(5, 12), 12, 0.0)
    assert torch.allclose(weight @ weight.T, torch.eye(12), atol=1e-5)
    assert torch.isfinite(pca_projection(features(5, 12), 12, 1.0)).all()


@pytest.mark.parametrize("nesting", ["mrl", "mrl-e"])
def test_proxies_are_the_normalised_means_of_their_class(nesting: Nesting) -> None:
    torch.manual_seed(1)
    head = NestedCosine((2, 6), 4, nesting)
    start = [proxy.detach().clone() for proxy in head.proxies]
    z, labels = features(30, 6), torch.tensor([-1, 0, 2] * 10)
    imprint_proxies(head, z, labels)
    for m, proxy, before in zip((2, 6) if nesting == "mrl" else (6,), head.proxies, start, strict=True):
        for label in (0, 2):
            mean = normalize(z[labels == label, :m].numpy()).mean(axis=0)
            assert np.allclose(proxy[label].detach().numpy(), mean / np.linalg.norm(mean), atol=1e-6)
        assert torch.equal(proxy[[1, 3]], before[[1, 3]])  # classes without a row


def test_sampled_features_are_the_backbone_s_of_the_images_named(tmp_path: Path) -> None:
    units = list_row_groups([write_shard(str(tmp_path / "part-0.parquet"), shard_rows("catalogue", 12, 0), 4)])
    backbone = create_backbone("test_efficientnet")
    transform = build_eval_transform(TransformConfig(size=32))
    found, labels = sample_features(backbone, units, transform, ["group"], 6)
    tables = [read_row_group(unit).slice(0, 2) for unit in units]  # 6 images over 3 units
    assert labels["group"].tolist() == [value for table in tables for value in table["group"].to_pylist()]
    images = torch.stack([transform(decode(value.as_py())) for table in tables for value in table["image"]])
    with torch.no_grad():
        assert torch.allclose(found, backbone.eval()(images), atol=1e-5)


def test_a_large_dataset_is_looked_into_at_a_few_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialise, "MAX_ROW_GROUPS", 3)
    rows = shard_rows("catalogue", 20, 0)
    units = list_row_groups([write_shard(str(tmp_path / "part-0.parquet"), rows, 2)])
    transform = build_eval_transform(TransformConfig(size=32))
    _, labels = sample_features(create_backbone("test_efficientnet"), units, transform, ["group"], 6)
    assert labels["group"].tolist() == [rows[i]["group"] for i in (0, 1, 6, 7, 12, 13)]


def test_a_label_beyond_the_classes_is_named_before_proxies_are_made(tmp_path: Path) -> None:
    units = list_row_groups([write_shard(str(tmp_path / "part-0.parquet"), shard_rows("catalogue", 12, 0), 4)])
    transform = build_eval_transform(TransformConfig(size=32))
    with pytest.raises(ArtifactError, match=r"row group 0: column 'group' holds 2, but classes\.json has 2 classes"):
        sample_features(
            create_backbone("test_efficientnet"), units, transform, ["group"], 12, num_classes={"group": 2, "labels": 1}
        )
