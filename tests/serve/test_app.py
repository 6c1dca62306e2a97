"""What ``build`` refuses before anything is served."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from lookalike.config import parse_config
from lookalike.errors import ArtifactError, UsageError
from lookalike.serve.app import build, free_port
from lookalike.serve.commands.serve import emit_config
from lookalike.serve.front.ingress import Ingress
from lookalike.serve.generations.generation import find_encoder
from lookalike.serve.generations.writer import Writer
from lookalike.serve.search.encoding import BatchingEncoder
from lookalike.serve.search.workers import RerankWorker, ShardWorker
from lookalike.serve.settings.config import ServeConfig, Writes

if TYPE_CHECKING:
    from tests.serve.conftest import World


@pytest.mark.parametrize(
    ("placement", "wanted"),
    [
        ("fused", {"ingress"}),
        ("sharded", {"ingress", "shard-000", "shard-001", "encoder"}),
        ("staged", {"ingress", "shard-000", "shard-001", "rerank", "encoder"}),
    ],
)
def test_placement_decides_the_deployments(
    world: "World", deployed: dict[str, Any], placement: str, wanted: set[str]
) -> None:
    build(parse_config(ServeConfig, {"index": world.index, "placement": placement}, "serve"))
    assert set(deployed) == wanted


@pytest.mark.parametrize("kind", [Ingress, ShardWorker, RerankWorker, BatchingEncoder, Writer])
def test_health_is_asked_in_the_loop_that_answers_calls(kind: type[Any]) -> None:
    """Else Serve answers in another loop, which lives on (https://github.com/ray-project/ray/issues/61263)."""
    assert inspect.iscoroutinefunction(kind.check_health)


def test_unknown_settings_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'limits.max_kk' \(did you mean 'max_k'\?\)"):
        parse_config(ServeConfig, {"index": "x", "limits": {"max_kk": 3}}, "serve")
    with pytest.raises(ValidationError, match="placment"):  # what Serve itself raises for args: of a config file
        ServeConfig.model_validate({"index": "x", "placment": "fused"})
    with pytest.raises(UsageError, match="'index' is required"):
        parse_config(ServeConfig, {}, "serve")


def test_an_encoder_of_another_model_is_refused(world: "World", other_encoder: str) -> None:
    with pytest.raises(UsageError, match="serve it with its own encoder"):
        build(ServeConfig(index=world.index, encoder=other_encoder))


def test_auto_finds_the_encoder_in_the_lineage(world: "World") -> None:
    meta = world.searcher.meta
    uri = find_encoder("auto", world.index, meta)
    assert uri is not None
    assert uri.endswith(world.encoder.fingerprint)
    unknown = meta.model_copy(update={"encoder": meta.encoder.model_copy(update={"fingerprint": "f00"})})
    with pytest.raises(ArtifactError, match="no encoder f00 in the lineage"):
        find_encoder("auto", world.index, unknown)


def test_missing_and_mistaken_artifacts(world: "World", tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it is not there"):
        build(ServeConfig(index=str(tmp_path / "nothing")))
    with pytest.raises(ArtifactError, match="kind 'plan', not of kind 'index'"):
        build(ServeConfig(index=world.plan))
    with pytest.raises(ArtifactError, match="kind 'index', not of kind 'plan'"):
        build(ServeConfig(index=world.index, plan=world.index))


def test_the_loopback_guard_is_not_claimed_behind_haproxy(world: "World", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(UsageError, match="loopback_only=false"):
        build(ServeConfig(index=world.index))
    build(ServeConfig(index=world.index, loopback_only=False))


def test_nobody_writes_from_elsewhere_without_a_token(world: "World", tmp_path: Path) -> None:
    open_to_all = ServeConfig(index=world.index, loopback_only=False, writes=Writes(state=str(tmp_path / "state")))
    with pytest.raises(UsageError, match=r"set serve\.tenants"):
        build(open_to_all)
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text("tenants:\n- {name: a, token_sha256: ['" + "0" * 64 + "'], role: write}\n")
    build(open_to_all.model_copy(update={"tenants": str(tenants)}))


def test_a_port_in_use_is_named() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} cannot be used"):
            free_port(port)


def test_the_emitted_config_is_what_serve_reads(world: "World") -> None:
    document = yaml.safe_load(emit_config(ServeConfig(index=world.index, placement="staged", port=9100)))
    schema = ServeDeploySchema.model_validate(document)
    assert schema.grpc_options.port == 9100
    (application,) = schema.applications
    again = ServeConfig.model_validate(application.args)
    assert (again.index, again.placement, again.loopback_only) == (world.index, "staged", False)
