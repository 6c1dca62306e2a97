"""Export: the folder loads as the encoder it was made from, says where it comes from, and refuses to lie."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from lookalike.artifacts import Artifact, Draft
from lookalike.cli import main
from lookalike.errors import ArtifactError
from lookalike.vision.encoder import Encoder
from tests.platform.test_hub import FakeHub, fake  # noqa: F401
from tests.train.encoders import draw, publish_corpus, publish_encoder, publish_report

IMAGES = [draw(n) for n in range(4)]


@pytest.fixture
def encoder(tmp_path: Path) -> Artifact:
    root = str(tmp_path / "root")
    return publish_encoder(root, parents={"shards": [publish_corpus(root, files=1)]})


def front_matter(card: str) -> dict[str, object]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_folder_is_the_same_encoder_without_the_root_it_came_from(encoder: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    expected = Encoder.load(encoder).encode(IMAGES)
    assert main(["export", encoder.uri, "--to", str(folder)]) == 0
    shutil.rmtree(encoder.root)
    loaded = Encoder.load(str(folder))
    assert np.array_equal(loaded.encode(IMAGES), expected)
    assert loaded.fingerprint == encoder.manifest.fingerprint  # vectors of either copy belong together
    assert loaded.dims == (4, 16)
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
        "manifest.json",
    }


def test_an_export_is_an_artifact_that_show_prints_and_recipes_read(
    encoder: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["export", encoder.uri, "--to", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert main(["show", str(folder)]) == 0
    made = Artifact.open(str(folder), "encoder").manifest
    assert (made.parents, made.fingerprint, made.config) == ({}, encoder.manifest.fingerprint, {"seed": 1})
    facts = made.stats["exported"]
    assert facts["digest"] == encoder.digest
    assert facts["lineage"] == [f"shards: corpus `corpus` {'c' * 20}, {encoder.manifest.created[:10]}"]


def test_the_card_may_be_edited_and_the_weights_may_not(encoder: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert main(["export", encoder.uri, "--to", str(folder)]) == 0
    (folder / "README.md").write_text("# mine now\n")
    Encoder.load(str(folder))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.safetensors does not match its SHA-256"):
        Encoder.load(str(folder))


def test_the_card_carries_figures_of_this_encoder_alone(encoder: Artifact, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    report = publish_report(encoder.root, encoder)
    folder = tmp_path / "out"
    args = ["export", encoder.uri, "--to", str(folder), "--report", report.uri, "--licence", "apache-2.0"]
    assert main(args) == 0
    card = (folder / "README.md").read_text()
    assert front_matter(card)["license"] == "apache-2.0"
    assert "| 4 | 0.2500 | 0.5400 |\n| 16 | 0.2500 | 0.6600 |" in card
    assert card.count("0.6600") == 2  # one a task; the other encoder's .86 nowhere
    assert "0.86" not in card
    for words in ("Trained on nothing at all.", "## Lineage", "corpus `corpus`", "nested dims | 4, 16", "apache-2.0"):
        assert words in card, words
    results = ModelCard(card).data.eval_results  # the hub's own reader
    assert results is not None
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in results}
    assert found == {
        (task, metric): value
        for task in ("product", "category")
        for metric, value in (("p_at_1", 0.66), ("map_at_10_by_k", 0.25))
    }


def test_the_card_s_snippet_runs(encoder: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    assert main(["export", encoder.uri, "--to", str(folder)]) == 0
    monkeypatch.chdir(tmp_path)
    Path("picture.jpg").write_bytes(IMAGES[0])
    space: dict[str, np.ndarray] = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], space)
    assert space["prefix"].shape == (1, 16)
    assert np.allclose(np.linalg.norm(space["prefix"], axis=1), 1.0)


def test_a_copy_of_a_copy_says_the_same(encoder: Artifact, tmp_path: Path) -> None:
    report, first, second = publish_report(encoder.root, encoder), tmp_path / "first", tmp_path / "second"
    assert main(["export", encoder.uri, "--to", str(first), "--report", report.uri, "--licence", "mit"]) == 0
    shutil.rmtree(encoder.root)
    assert main(["export", str(first), "--to", str(second)]) == 0
    cards = [(folder / "README.md").read_text().replace(str(folder), "PATH") for folder in (first, second)]
    assert cards[0] == cards[1]
    made = [Artifact.open(str(folder)).manifest for folder in (first, second)]
    assert made[0].stats == made[1].stats
    assert made[0].digest == made[1].digest


def test_a_hub_repository_is_pushed_and_pulled(encoder: Artifact, tmp_path: Path, fake: FakeHub) -> None:  # noqa: F811
    assert main(["export", encoder.uri, "--to", "hf://shop/encoder"]) == 0
    expected = Encoder.load(encoder).encode(IMAGES)
    assert np.array_equal(Encoder.load("hf://shop/encoder").encode(IMAGES), expected)
    card = (fake.root / "shop/encoder/README.md").read_text()
    assert 'Encoder.load("hf://shop/encoder")' in card
    assert str(tmp_path) not in card  # no path of this machine goes public
    assert str(tmp_path) not in (fake.root / "shop/encoder/manifest.json").read_text()
    folder = tmp_path / "pulled"
    assert main(["export", "hf://shop/encoder", "--to", str(folder)]) == 0
    assert np.array_equal(Encoder.load(str(folder)).encode(IMAGES), expected)
    assert [name for name, _ in fake.calls].count("upload_folder") == 1


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["ENCODER", "--to", "SHARDS"], 2, "is the corpus artifact 'corpus', which an export would overwrite"),
        (["ENCODER", "--to", "ENCODER"], 2, "is the encoder artifact 'tiny', which an export would overwrite"),
        (["SHARDS", "--to", "OUT"], 3, "kind 'corpus', not of kind 'encoder'"),
        (["/no/such", "--to", "OUT"], 3, "no artifact at /no/such"),
        (["ENCODER", "--to", "hf://name"], 2, "names no repository"),
        (["ENCODER", "--to", "OUT", "--report", "SHARDS"], 3, "not of kind 'report'"),
    ],
)
def test_mistakes_are_explained_and_leave_everything_as_it_was(  # noqa: PLR0917
    args: list[str], code: int, words: str, encoder: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = f"{encoder.root}/corpus/corpus/{'c' * 20}"
    places = {"ENCODER": encoder.uri, "SHARDS": shards, "OUT": str(tmp_path / "out")}
    assert main(["export", *(places.get(arg, arg) for arg in args)]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    Artifact.open(encoder.uri)
    Artifact.open(shards)


def test_without_the_packages_onnx_names_its_extra(
    encoder: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("lookalike.train.publish.onnx.import_module", missing)
    assert main(["export", encoder.uri, "--to", str(tmp_path / "out"), "--onnx"]) == 1
    assert "onnx is not installed; pip install 'lookalike[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_of_other_encoders_is_refused(
    encoder: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = Draft(str(tmp_path / "elsewhere"), "encoder", "stranger", "s" * 20)
    stranger.write_json("config.json", json.loads(Path(encoder.path("config.json")).read_text()))
    report = publish_report(
        str(tmp_path / "elsewhere"), stranger.publish(config={}, parents={}, stage_version=1, duration_s=0.0)
    )
    assert main(["export", encoder.uri, "--to", str(tmp_path / "out"), "--report", report.uri]) == 2
    assert f"measures vectors (encoder {'s' * 20}), other" in capsys.readouterr().err


def test_a_crash_in_the_middle_leaves_no_artifact(
    encoder: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    assert main(["export", encoder.uri, "--to", str(folder)]) == 0

    def crash(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lookalike.train.publish.export.model_card", crash)
    assert main(["export", encoder.uri, "--to", str(folder)]) == 130
    with pytest.raises(ArtifactError, match="unfinished draft"):
        Encoder.load(str(folder))
