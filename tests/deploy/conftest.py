"""Offline checks of manifests: what an API server, KubeRay's CRDs and Serve would refuse is refused here."""

import copy
import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lookalike.serve.commands.check_config import check_serve_config
from lookalike.serve.settings.config import ServeConfig

Document = dict[str, Any]
Schemas = Mapping[str, Document]
DATA = Path(__file__).parent / "data"
KUBERNETES = "1.33"


def close(schema: Any) -> Any:
    """``schema`` as an API server applies it: fields it does not name are refused at all depths, null where allowed."""
    if not isinstance(schema, dict):
        return schema
    closed = {key: _close_part(key, value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        closed.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.get("nullable"):
        closed["type"] = [schema["type"], "null"]
    return closed


def _close_part(key: str, value: Any) -> Any:
    if key in ("properties", "$defs"):
        return {name: close(part) for name, part in value.items()}
    if key in ("items", "additionalProperties"):
        return close(value)
    return [close(part) for part in value] if key in ("anyOf", "allOf", "oneOf") else value


def fill(schema: Any, value: Any) -> Any:
    """``value`` with the schema's defaults, which the API server sets before it validates."""
    if isinstance(value, list):
        return [fill(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    others = others if isinstance(others, dict) else {}
    filled = {name: fill(known.get(name, others), item) for name, item in value.items()}
    for name, part in known.items():
        if name not in filled and "default" in part:
            filled[name] = copy.deepcopy(part["default"])
    return filled


def check_core(document: Document) -> None:
    """Raise ``kubernetes_validate.ValidationError`` unless this is a valid object of Kubernetes itself."""
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def check_custom(document: Document, schemas: Schemas) -> None:
    """Raise ``jsonschema.ValidationError`` (or as ``check_core``) unless this is a valid object of KubeRay's."""
    schema = schemas[document["kind"]]
    jsonschema.Draft202012Validator(close(schema)).validate(fill(schema, document))
    check_core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
    for template in pod_templates(document):
        check_core({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pods"}, "template": template})


def pod_templates(document: Document) -> list[Document]:
    """The pod templates of a RayCluster or RayService, the head's first; a RayJob here has none of its own."""
    cluster = document["spec"].get("rayClusterConfig", document["spec"])
    groups = [cluster[key] for key in ("headGroupSpec",) if key in cluster] + cluster.get("workerGroupSpecs", [])
    return [group["template"] for group in groups]


def check_own_config(text: str) -> ServeConfig:
    """The settings in the Serve config of a manifest; raises as ``check_serve_config`` does."""
    (settings,) = check_serve_config(yaml.safe_load(text), "serveConfigV2").values()
    assert settings is not None
    return settings


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    """Kind -> KubeRay's schema, as vendored."""
    return {
        path.name.removesuffix(".json.gz"): json.loads(gzip.decompress(path.read_bytes()))
        for path in DATA.glob("*.json.gz")
    }


@pytest.fixture
def check(schemas: Schemas) -> Callable[[Document], None]:
    """Raises unless a manifest document is valid."""

    def check_document(document: Document) -> None:
        if document["apiVersion"] == "ray.io/v1":
            check_custom(document, schemas)
        else:
            check_core(document)
        if document["kind"] == "RayService":
            check_own_config(document["spec"]["serveConfigV2"])

    return check_document


@pytest.fixture
def serve_settings() -> Callable[[str], ServeConfig]:
    """See ``check_own_config``."""
    return check_own_config
