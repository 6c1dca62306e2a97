"""``lookalike vectors``: from a file of vectors to an answer, without an encoder."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lookalike.cli import main
from lookalike.cluster import background
from lookalike.errors import UsageError
from lookalike.recipe import Recipe
from lookalike.retrieval.index_meta import read_index_meta
from lookalike.serve.client import Client
from lookalike.serve.commands.vectors import choose_shortlists
from lookalike.serve.local import LocalClient
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import RetrievalError

NUM, DIM = 400, 32
ROOT = Path(__file__).parents[3]


class Made(NamedTuple):
    """A folder with ``x.npy`` and ``t.parquet``."""

    folder: Path
    vectors: np.ndarray[Any, np.dtype[np.float32]]

    def nearest(self, query: Any, k: int) -> list[str]:
        """Ids by cosine, brute force."""
        unit = self.vectors / np.linalg.norm(self.vectors, axis=1, keepdims=True)
        return [f"sku-{row}" for row in np.argsort(-(unit @ query), kind="stable")[:k]]


def make(folder: Path) -> Made:
    vectors = np.random.default_rng(1).normal(size=(NUM, DIM)).astype(np.float32)
    np.save(folder / "x.npy", vectors)
    rows = [{"sku": f"sku-{n}", "name": f"thing {n}", "group": f"g{n % 4}"} for n in range(NUM)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return Made(folder, vectors)


def arguments(made: Made, *more: str) -> list[str]:
    table = ["--table", str(made.folder / "t.parquet"), "--id-column", "sku", "--column", "title=name"]
    root = ["--root", str(made.folder / "root"), "--set", "plan.num_queries=50", "--set", "plan.target=0.9"]
    return ["vectors", str(made.folder / "x.npy"), *table, "--model", "other/model-2", *root, *more]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def client(made: Made) -> Iterator[Client]:
    """The three steps, one by one, and the index on disk."""
    assert main(arguments(made)) == 0
    recipe = Recipe.load(str(made.folder / "root" / "recipe.yaml"))
    with background():  # in this process, without Ray
        index, plan = (recipe.run_step(name).uri for name in ("index", "plan"))
    with LocalClient(ServeConfig(index=index, plan=plan)) as opened:
        yield opened


def test_vectors_and_ids_are_queries_and_answers_are_exact(client: Client, made: Made) -> None:
    query = np.random.default_rng(2).normal(size=DIM).astype(np.float32)
    exact = client.search(vector=query, k=5, min_recall=1.0)
    assert exact.ids == made.nearest(query, 5)
    first = exact.hits[0]
    row = int(first.id.removeprefix("sku-"))
    assert first.metadata == {"title": f"thing {row}", "group": f"g{row % 4}"}
    own = client.search(image_id="sku-7", k=3)
    assert own.ids[0] == "sku-7"
    assert own.hits[0].score == pytest.approx(1, abs=1e-5)
    assert all(int(name[4:]) % 4 == 1 for name in client.search(vector=query, k=9, where={"group": ["g1"]}).ids)


def test_a_picture_is_refused_with_the_model_that_made_the_vectors(client: Client) -> None:
    with pytest.raises(RetrievalError, match=r"made elsewhere, by 'other/model-2', .* send a vector of that") as told:
        client.search(image=b"\x89PNG")
    assert told.value.code == grpc.StatusCode.FAILED_PRECONDITION
    description = client.describe()
    assert not description.has_encoder


def test_a_vector_of_another_model_size_is_refused(client: Client) -> None:
    with pytest.raises(RetrievalError, match="32"):
        client.search(vector=np.ones(31, np.float32))


def test_search_local_needs_no_setting(
    client: Client, made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    np.save(tmp_path / "q.npy", made.vectors[11])
    index = next((made.folder / "root" / "index" / "index").iterdir())
    assert main(["search", "--local", str(index), "--vector", str(tmp_path / "q.npy"), "-k", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["id"] == "sku-11"


def test_an_index_says_that_its_model_lies_elsewhere(client: Client, made: Made) -> None:
    from lookalike.artifacts import Artifact

    index = next((made.folder / "root" / "index" / "index").iterdir())
    encoder = read_index_meta(Artifact.open(str(index))).encoder
    assert (encoder.external, encoder.name) == (True, "other/model-2")


def test_the_recipe_holds_the_options_and_a_dry_run_writes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(tmp_path)
    assert main(arguments(made, "--dry-run")) == 0
    step = json.loads(capsys.readouterr().out)[0]
    assert step["state"] == "would run"
    assert step["preview"][0].endswith("x.npy: 400 vectors of 32, float32")
    assert not (tmp_path / "root").exists()
    assert main(arguments(made, "--nested", "--set", "index.dtype=int8", "--set", "port=0")) == 0
    out = capsys.readouterr().out
    assert "next: lookalike index" in out
    values = yaml.safe_load((tmp_path / "root" / "recipe.yaml").read_text())
    assert values["steps"]["index"]["settings"] == {"dtype": "int8", "shortlist_dims": [8, 16]}
    assert values["serve"] == {"port": 0}
    assert values["steps"]["vectors"]["settings"]["nested"] is True


def test_settings_that_nobody_has_are_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(tmp_path)
    cases = [
        (["--set", "indx.dtype=int8"], "--set 'indx.dtype=int8' names no setting"),
        (["--set", "index.dtyp=int8"], "unknown key 'dtyp' (did you mean 'dtype'?)"),
        (["--column", "title"], "--column 'title' is not NAME=COLUMN"),
        (["--column", "price=price"], "columns names 'price'"),
        (["--serve", "--set", "port=-1"], "'port' is -1"),
    ]
    for more, words in cases:
        assert main(arguments(made, *more)) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "root" / "recipe.yaml").exists()


def test_shortlists_of_a_nested_model_are_over_prefixes_and_of_others_over_the_end() -> None:
    dims = [8, 16, 32, 64, 128, 256, 512, 768]
    assert choose_shortlists(dims, nested=True) == [128, 256, 512]
    assert choose_shortlists(dims, nested=False) == [512, 768]
    assert choose_shortlists([4], nested=True) == choose_shortlists([4], nested=False) == [4]


def test_a_recipe_in_place_of_files_runs_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["vectors", "--help"])
    assert "With a recipe" in capsys.readouterr().out
    assert main(["vectors", "--describe"]) == 0
    assert "rows_per_part" in json.loads(capsys.readouterr().out)["properties"]
    assert main(["vectors", str(tmp_path / "gone.yaml")]) == 2
    assert "no recipe at" in capsys.readouterr().err
    with pytest.raises(UsageError, match="nothing at"):
        Recipe.load(
            str(ROOT / "deploy/recipes/vectors.yaml"), [f"root={tmp_path}", f"vectors.uri={tmp_path}/x.npy"]
        ).published("vectors")


@pytest.mark.ray
def test_one_command_leads_from_a_file_to_a_served_answer(tmp_path: Path) -> None:
    made = make(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-m", "lookalike.cli", *arguments(made, "--serve", "--set", "port=0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as service:
        try:
            assert service.stdout is not None
            line = service.stdout.readline()
            found = re.search(r" at (\S+:\d+);", line)
            assert found, line
            query = np.random.default_rng(2).normal(size=DIM).astype(np.float32)
            with Client(found[1], timeout_s=60.0) as client:
                client.wait_ready(60.0)
                assert client.search(vector=query, k=5, min_recall=1.0).ids == made.nearest(query, 5)
                assert client.search(image_id="sku-7", k=1).ids == ["sku-7"]
                with pytest.raises(RetrievalError, match="made elsewhere"):
                    client.search(image=b"\x89PNG")
        finally:
            service.send_signal(signal.SIGINT)
        assert service.wait(60) == 0
