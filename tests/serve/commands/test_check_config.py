"""``lookalike serve --check-config``: what Serve would ignore is refused, with the key that was meant."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from lookalike.cli import main
from lookalike.errors import UsageError
from lookalike.serve.commands.check_config import check_file, check_serve_config
from lookalike.serve.commands.serve import emit_config
from lookalike.serve.settings.config import ServeConfig

GOOD = yaml.safe_load(emit_config(ServeConfig(index="/index")))


def changed(path: str, value: Any) -> Any:
    document = copy.deepcopy(GOOD)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target = document
    for part in parents:
        target = target[part]
    target[last] = value
    return document


def test_what_the_command_emits_is_good() -> None:
    assert check_serve_config(GOOD, "it") == {"lookalike": ServeConfig(index="/index", loopback_only=False)}


DEPLOYMENT = "applications.0.deployments"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("grpc_option", {}, "would ignore 'grpc_option' (did you mean 'grpc_options'?); valid keys: applications, "),
        ("grpc_options.prt", 1, "'grpc_options.prt' (did you mean 'port'?)"),
        ("http_options.keepalive_timeout_s", 1, "(did you mean 'keep_alive_timeout_s'?)"),
        ("logging_config.enable_acces_log", True, "(did you mean 'enable_access_log'?)"),
        ("applications.0.route_prefx", "/", "'applications.0.route_prefx' (did you mean 'route_prefix'?)"),
        ("applications.0.arg", {}, "(did you mean 'args'?)"),
        (DEPLOYMENT, [{"name": "a", "max_ongoing": 1}], f"'{DEPLOYMENT}.0.max_ongoing'"),
        (DEPLOYMENT, [{"name": "a", "ray_actor_options": {"num_cpu": 1}}], "(did you mean 'num_cpus'?)"),
        (DEPLOYMENT, [{"name": "a", "autoscaling_config": {"min_replica": 1}}], "(did you mean 'min_replicas'?)"),
        (DEPLOYMENT, [{"name": "a", "autoscaling_config": {"policy": {"polcy_function": "x"}}}], "'policy_function'"),
        (DEPLOYMENT, [{"name": "a", "num_replicas": -1}], "Serve refuses applications.0.deployments.0.num_replicas"),
        ("proxy_location", "Everywhere", "Serve refuses"),
        ("applications", [], "holds no application"),
        ("applications.0.import_path", "lookalike.serve.app:buidl", "ours is lookalike.serve.app:build"),
        ("applications.0.args.limits", {"max_kk": 3}, "unknown key 'limits.max_kk' (did you mean 'max_k'?)"),
        ("applications.0.args.placement", "all", "'placement' is 'all'"),
        ("applications.0.args.tls", {"port": 1}, "'tls' is only for `lookalike serve`"),
    ],
)
def test_a_mistake_is_named_with_its_place(path: str, value: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_serve_config(changed(path, value), "it")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (DEPLOYMENT, [{"name": "a", "user_config": {"any": {"thing": 1}}}]),
        (DEPLOYMENT, [{"name": "a", "autoscaling_config": {"policy": {"policy_kwargs": {"mine": 1}}}}]),
        (DEPLOYMENT, [{"name": "a", "ray_actor_options": {"resources": {"mine": 1}, "runtime_env": {"env_vars": {}}}}]),
        (DEPLOYMENT, [{"name": "a", "request_router_config": {"request_router_kwargs": {"mine": 1}}}]),
        ("applications.0.runtime_env", {"env_vars": {"MINE": "1"}}),
    ],
)
def test_what_is_free_stays_free(path: str, value: Any) -> None:
    check_serve_config(changed(path, value), "it")


def test_files_and_manifests_and_other_applications(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "it.yaml"
    other = {"name": "other", "import_path": "some.module:app", "route_prefix": "/other", "args": {"any": 1}}
    both = {**GOOD, "applications": [*GOOD["applications"], other]}
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "s"},
        "spec": {"serveConfigV2": yaml.safe_dump(both)},
    }
    wanted = ["lookalike: serves /index", "other: not ours, its args are not checked"]
    path.write_text(yaml.safe_dump(both))
    assert check_file(str(path)) == wanted
    path.write_text(yaml.safe_dump_all([{"apiVersion": "v1", "kind": "Secret"}, service]))
    assert main(["serve", "--check-config", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == wanted
    service["spec"] = {"serveConfigV2": yaml.safe_dump(changed("grpc_options.prt", 1))}
    path.write_text(yaml.safe_dump(service))
    assert main(["serve", "--check-config", str(path)]) == 2
    assert f"{path} RayService s: Serve would ignore 'grpc_options.prt'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1", "holds a list where a mapping"),
        ("", "neither a Serve config nor a RayService"),
        ("apiVersion: v1\nkind: Service", "neither"),
        ("apiVersion: v1\nkind: RayService\nspec: {}", "give it YAML text"),
        ("apiVersion: v1\nkind: RayService\nspec: {serveConfigV2: 'a: ['}", "is not valid YAML"),
        ("apiVersion: v1\nkind: RayService\nspec: {serveConfigV2: 'text'}", "Serve refuses"),
    ],
)
def test_files_that_hold_nothing_to_check_are_explained(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "it.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=words):
        check_file(str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        check_file(str(tmp_path / "missing"))
