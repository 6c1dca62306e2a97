"""``lookalike serve`` and ``lookalike search`` as a user types them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import yaml

from lookalike.cli import main
from lookalike.errors import ArtifactError, UsageError
from lookalike.serve.client import Client
from lookalike.serve.commands.serve import emit_config, is_setting, resolve
from lookalike.serve.wire.errors import RetrievalError

if TYPE_CHECKING:
    from tests.serve.conftest import World


def test_search_in_an_index_on_disk(world: "World", tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, vector = tmp_path / "q.png", tmp_path / "q.npy"
    picture.write_bytes(world.images["img-021"])
    np.save(vector, world.vectors["img-021"])
    for query in (["--image", str(picture)], ["--vector", str(vector)], ["--id", "img-021"]):
        assert main(["search", *query, "--local", world.index, "-k", "2", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["hits"][0]["id"] == "img-021"
        assert len(result["hits"]) == 2
    assert main(["search", "--id", "img-021", "--local", world.index, "-k", "1"]) == 0
    assert "1  +1.0000  img-021  title=picture img-021  view=front" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"serve": {"placement": "everywhere"}}, "placement"),
        ({"demo": {"queries": "many"}}, "queries"),
        ({"steps": {"plan": None}}, "has no 'plan' step"),
    ],
)
def test_what_would_stop_a_quickstart_at_its_end_stops_it_at_once(
    change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((Path(__file__).parents[3] / "deploy/recipes/smoke.yaml").read_text())
    for section, values in change.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    recipe["steps"] = {name: step for name, step in recipe["steps"].items() if step}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for arguments in (["--dry-run"], []):
        assert main(["quickstart", str(tmp_path / "recipe.yaml"), *arguments]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (["--id", "img-777"], "no image 'img-777'", 2),
        (["--image", "/no/such.png"], "/no/such.png cannot be read", 2),
        (["--vector", __file__], "is not a .npy file", 2),
        (["--id", "img-000", "-k", "0"], "k=0 is less than 1", 2),
        (["--id", "img-000", "-k", "99999999999"], "k=99999999999 is more than", 2),
        (["--id", "\udcff"], "half of a surrogate pair", 2),
        (["--id", "img-000", "--where", "view=\udcff"], "half of a surrogate pair", 2),
        (["--id", "img-000", "--timeout", "nan"], "timeout_s=nan", 2),
        (["--id", "img-000", "--timeout", "1e10"], "timeout_s=10000000000.0", 2),
        (["--id", "img-000", "--min-recall", "nan"], "min_recall=nan", 2),
        (["--vector", "/dev/null"], "is not a .npy file", 2),
    ],
)
def test_search_explains_mistakes(
    world: "World", capsys: pytest.CaptureFixture[str], args: list[str], words: str, code: int
) -> None:
    assert main(["search", *args, "--local", world.index]) == code
    assert words in capsys.readouterr().err


def test_a_file_of_several_arrays_is_no_vector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "q.npz", a=np.ones(3))
    assert main(["search", "--vector", str(tmp_path / "q.npz")]) == 2
    assert "holds several arrays" in capsys.readouterr().err


def test_search_without_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--id", "x", "--address", "127.0.0.1:1", "--timeout", "1"]) == 1
    error = capsys.readouterr().err
    assert "UNAVAILABLE" in error or "DEADLINE_EXCEEDED" in error


def test_search_says_what_to_do_where_no_service_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Client, **asked: Any) -> None:
        raise RetrievalError(grpc.StatusCode.UNAVAILABLE, "Connection refused")

    monkeypatch.setattr(Client, "search", refuse)
    assert main(["search", "--id", "x", "--address", "127.0.0.1:7"]) == 1
    message = capsys.readouterr().err
    assert "Connection refused; if none runs at 127.0.0.1:7, start a service with `lookalike serve RECIPE`" in message


def test_search_in_a_missing_index(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--id", "x", "--local", "/no/index"]) == 3
    assert "no artifact at /no/index" in capsys.readouterr().err


def test_serve_dry_run_and_emit(world: "World", capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "port=0", "limits.max_k=7", "--index", world.index, "--dry-run"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["index"], config["port"], config["limits"]["max_k"]) == (world.index, 0, 7)
    assert main(["serve", "--index", world.index, "--emit-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["applications"][0]["args"]["index"] == world.index


def test_what_is_emitted_is_checked_as_a_cluster_runs_it(
    world: "World", tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")  # as the image does
    emit = ["serve", "--index", world.index, "--emit-config"]
    assert main(emit) == 0
    assert yaml.safe_load(capsys.readouterr().out)["applications"][0]["args"]["loopback_only"] is False
    assert main([*emit, "loopback_only=true"]) == 2
    assert main([*emit, f"writes.state={tmp_path}"]) == 2
    assert "set serve.tenants" in capsys.readouterr().err


def test_serve_checks_the_arms_of_an_experiment(world: "World", tmp_path: Path) -> None:
    arms = f"[{{name: a}}, {{name: b, index: {tmp_path}/nothing}}]"
    with pytest.raises(ArtifactError, match="it is not there"):
        resolve(None, [f"experiment={{name: trial, arms: {arms}}}"], world.index)
    config = resolve(None, ["experiment={name: trial, arms: [{name: a}, {name: b, plan: none}]}"], world.index)
    assert config.experiment is not None
    assert "name: trial" in emit_config(config)


def test_serve_reads_the_recipe(world: "World", tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    served = {"index": world.index, "plan": world.plan, "placement": "fused"}
    recipe.write_text(yaml.safe_dump({"name": "r", "root": str(tmp_path), "steps": {}, "serve": served}))
    config = resolve(str(recipe), ["placement=staged"], None)
    assert (config.index, config.plan, config.placement) == (world.index, world.plan, "staged")
    assert resolve(str(recipe), [], world.index).plan is None  # another index: the recipe's plan is not its own
    assert resolve(str(recipe), [f"plan={world.plan}"], world.index).plan == world.plan  # unless it is asked for


def test_a_steps_setting_is_not_the_services() -> None:
    keys = ["index", "limits.max_k", "placement", "index.num_shards", "plan.target", "root", "finetune.seed"]
    assert [is_setting(key) for key in keys] == [True, True, True, False, False, False, False]


def test_a_setting_of_neither_service_nor_recipe_is_named(world: "World", tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    values = {"name": "r", "root": str(tmp_path), "steps": {}, "serve": {"index": world.index}}
    recipe.write_text(yaml.safe_dump(values))
    for wrong in ("limit.max_k=3", "prot=0"):
        words = rf"'{wrong}' is not a setting of the service, nor of the recipe \(did you mean"
        with pytest.raises(UsageError, match=words):
            resolve(str(recipe), [wrong], None)
    recipe.write_text("{name: r, root: r, steps: 3}")
    with pytest.raises(UsageError, match="'steps' is 3"):
        resolve(str(recipe), ["seed=3"], None)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "nothing to serve"),
        (["colour=red"], "'colour=red' is not a setting of the service"),
        (["limits.max_kk=3", "index=x"], "unknown key 'limits.max_kk'"),
        (["placement=spread", "index=x"], "'placement'"),
    ],
)
def test_serve_explains_mistakes(args: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve(None, args, None)
