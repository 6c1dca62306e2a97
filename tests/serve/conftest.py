"""A real, tiny chain of artifacts: encoder (random weights) -> embeddings of drawn pictures -> index -> plan."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from lookalike import schemas
from lookalike.artifacts import Artifact, Draft
from lookalike.retrieval.index_meta import INDEX_META, EncoderRef, IndexMeta, shard_of
from lookalike.retrieval.index_types import ShortlistOptions
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shard_meta import SHARD_META, ShardMeta
from lookalike.retrieval.shortlist import build_shortlist, shortlist_name
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.store_writer import write_store
from lookalike.serve.settings.config import ServeConfig, Writes
from lookalike.vision.encoder import Encoder, EncoderConfig, build_model, save_encoder, to_bytes
from lookalike.vision.transforms import TransformConfig

NUM_IMAGES = 60
DIMS = (8, 16, 64)
SHORTLIST_DIMS = (8, 16)


class World(NamedTuple):
    """What the tests search."""

    root: str
    index: str
    plan: str
    encoder: Encoder
    searcher: Searcher
    images: dict[str, bytes]
    vectors: dict[str, np.ndarray]
    encoder_uri: str


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = str(tmp_path_factory.mktemp("artifacts"))
    encoder_artifact = publish_encoder(root, "encoder", seed=0)
    encoder = Encoder.load(encoder_artifact)
    images = {f"img-{number:03d}": draw(number) for number in range(NUM_IMAGES)}
    vectors = dict(zip(images, encoder.encode(list(images.values())), strict=True))
    embeddings = publish_embeddings(root, encoder_artifact, vectors)
    index = publish_index(root, embeddings, vectors, encoder_artifact.manifest.fingerprint)
    plan = publish_plan(root, index, {"shortlist_dim": 16, "shortlist_k": 12, "rerank_dim": 64})
    return World(root, index.uri, plan.uri, encoder, Searcher.open(index.uri), images, vectors, encoder_artifact.uri)


@pytest.fixture(scope="session")
def other_encoder(world: World) -> str:
    return publish_encoder(world.root, "other", seed=1).uri


def view_of(image_id: str) -> str:
    """Thirds of the pictures by number."""
    return ("front", "side", "back")[int(image_id[-3:]) % 3]


def draw(number: int) -> bytes:
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (40, 32), tuple(rng.integers(0, 256, 3).tolist()))
    x, y = rng.integers(0, 20, 2).tolist()
    ImageDraw.Draw(image).ellipse((x, y, x + 15, y + 10), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return to_bytes(image)


def publish(draft: Draft, **parents: list[Artifact]) -> Artifact:
    return draft.publish(config={}, parents=parents, stage_version=1, duration_s=0.0)


def publish_encoder(root: str, name: str, seed: int) -> Artifact:
    import torch

    torch.manual_seed(seed)
    config = EncoderConfig(backbone="test_vit", num_features=64, dims=DIMS, transform=TransformConfig(size=160))
    draft = Draft(root, "encoder", name, f"{seed:020x}")
    save_encoder(draft, build_model(config), config, "# a test\n")
    return publish(draft)


def publish_embeddings(
    root: str, encoder: Artifact, vectors: dict[str, np.ndarray], fingerprint: str = "e" * 20
) -> Artifact:
    draft = Draft(root, "embeddings", "embed", fingerprint)
    reference = {"fingerprint": encoder.manifest.fingerprint, "name": "encoder", "uri": encoder.uri}
    draft.write_json("meta.json", {"dim": 64, "dims": DIMS, "encoder": reference, "rows": len(vectors)})
    rows = [
        {
            "image_id": name,
            "vector": vector.tolist(),
            "title": f"picture {name}",
            "category": None,
            "view": view_of(name),
        }
        for name, vector in vectors.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schemas.embeddings(64)), draft.path("part-0.parquet"))
    return publish(draft, encoder=[encoder])


def publish_index(
    root: str, embeddings: Artifact, vectors: dict[str, np.ndarray], model: str, fingerprint: str = "1" * 20
) -> Artifact:
    draft = Draft(root, "index", "index", fingerprint)
    names, offset, counts = ("shard-00000", "shard-00001"), 0, []
    for number, name in enumerate(names):
        ids = sorted(image_id for image_id in vectors if shard_of(image_id, len(names)) == number)
        meta = ShardMeta(num_rows=len(ids), row_offset=offset, dims=DIMS, shortlist_dims=SHORTLIST_DIMS)
        folder = Path(draft.path(name))
        folder.mkdir(parents=True)
        table = pa.table(
            {
                "image_id": ids,
                "title": [f"picture {i}" for i in ids],
                "category": pa.nulls(len(ids), pa.string()),
                "view": [view_of(i) for i in ids],
            }
        )
        stacked = np.stack([vectors[i] for i in ids])
        meta = write_store(str(folder), meta, table, [(np.arange(len(ids)), stacked)])
        store = PrefixStore(str(folder), meta)
        for dim in SHORTLIST_DIMS:
            built = build_shortlist("flat", store.unit_prefix(dim), ShortlistOptions())
            built.save(str(folder / shortlist_name(dim, "flat")))
        (folder / SHARD_META).write_text(meta.model_dump_json())
        offset += len(ids)
        counts.append(len(ids))
    meta_of_index = IndexMeta(
        dims=DIMS,
        num_rows=len(vectors),
        shards=names,
        shard_rows=tuple(counts),
        dtype="float32",
        shortlist="flat",
        shortlist_dims=SHORTLIST_DIMS,
        columns=("image_id", "title", "category", "view"),
        encoder=EncoderRef(fingerprint=model),
    )
    draft.write_json(INDEX_META, meta_of_index.model_dump(mode="json", exclude={"generation"}))
    return publish(draft, embeddings=[embeddings])


def publish_plan(root: str, index: Artifact, plan: dict[str, object], name: str = "plan") -> Artifact:
    draft = Draft(root, "plan", name, "2" * 20)
    Path(draft.uri).mkdir(parents=True)
    figures = ((0.91, 20.0, {**plan, "shortlist_k": 6}), (0.97, 40.0, plan), (0.5, 30.0, {**plan, "shortlist_dim": 8}))
    candidates = [{"recall_low": low, "model_us": cost, "plan": one} for low, cost, one in figures]
    Path(draft.path("plan.json")).write_text(json.dumps({"plan": plan, "candidates": candidates}))
    return publish(draft, index=[index])


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polls of writer and followers short enough for tests."""
    from lookalike.serve.generations import follower, news

    monkeypatch.setattr(news, "POLL_S", 0.2)
    monkeypatch.setattr(follower, "RETRY_S", 0.02)


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of the deployments that a test builds, by name."""
    from ray import serve

    options: dict[str, Any] = {}
    original = serve.deployment

    def deployment(**given: Any) -> Any:
        options[given["name"]] = given
        return original(**given)

    monkeypatch.setattr(serve, "deployment", deployment)
    return options


@pytest.fixture
def config(world: "World", tmp_path: Path) -> ServeConfig:
    """A service that takes writes."""
    return ServeConfig(index=world.index, encoder="none", writes=Writes(state=str(tmp_path / "state")))


@pytest.fixture(scope="session")
def indexes(world: "World") -> list[str]:
    """Two more indexes of the same model, of forty and of thirty pictures."""
    encoder, uris = Artifact.open(world.encoder_uri), []
    for number, size in enumerate((40, 30)):
        vectors = dict(list(world.vectors.items())[:size])
        embeddings = publish_embeddings(world.root, encoder, vectors, fingerprint=f"{number:04d}" + "b" * 16)
        uris.append(
            publish_index(
                world.root, embeddings, vectors, encoder.manifest.fingerprint, fingerprint=f"{number:04d}" + "c" * 16
            ).uri
        )
    return uris
