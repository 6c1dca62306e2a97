"""``lookalike serve --check-config``: compare a Serve config file, key by key, with Serve's own schema and ours.

Serve ignores most keys that it does not know, so a misspelt setting would silently keep its default.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.plain_yaml import parse_documents, parse_yaml
from lookalike.registry import nearest
from lookalike.serve.settings.config import ServeConfig

IMPORT_PATH = "lookalike.serve.app:build"


def check_file(path: str) -> list[str]:
    """Return a line for each application in a Serve config file, or in the RayService manifests of a YAML file.

    Raises ``UsageError`` for what Serve refuses, for keys that it would ignore, and for unknown settings of ours.
    """
    try:
        documents = [document for document in parse_documents(Path(path).read_bytes(), path) if document is not None]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); give a Serve config file") from None
    configs = list(_configs(documents, path))
    if not configs:
        raise UsageError(f"{path} holds neither a Serve config nor a RayService; give one of them")
    return [
        f"{name}: " + ("not ours, its args are not checked" if settings is None else f"serves {settings.index}")
        for where, config in configs
        for name, settings in check_serve_config(config, where).items()
    ]


def _configs(documents: list[Any], path: str) -> Iterator[tuple[str, Any]]:
    for document in documents:
        if not isinstance(document, dict):
            raise UsageError(f"{path} holds a {type(document).__name__} where a mapping is needed")
        if "apiVersion" not in document:
            yield path, document
        elif document.get("kind") == "RayService":
            name = f"{path} RayService {document.get('metadata', {}).get('name')}"
            yield name, _read_manifest(document, name)


def _read_manifest(document: Mapping[str, Any], where: str) -> Any:
    text = document.get("spec", {}).get("serveConfigV2")
    if not isinstance(text, str):
        raise UsageError(f"{where}: spec.serveConfigV2 is {type(text).__name__}; give it YAML text")
    return parse_yaml(text, f"{where}: spec.serveConfigV2")


def check_serve_config(config: Any, where: str) -> dict[str, ServeConfig | None]:
    """Return the settings of each application by name, None for a foreign one; raises as ``check_file`` does."""
    from ray.serve.schema import ServeDeploySchema

    for place, key, valid in ignored_keys(config, ServeDeploySchema):
        raise UsageError(
            f"{where}: Serve would ignore {place + key!r}{nearest(key, valid)}; valid keys: {', '.join(valid)}"
        )
    try:
        applications = ServeDeploySchema.model_validate(config).applications
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise UsageError(f"{where}: Serve refuses " + "; ".join(problems)) from None
    if not applications:
        raise UsageError(f"{where} holds no application, and Serve would end those that run; add one")
    return {app.name: _check_args(app.import_path, app.args, f"{where}: {app.name}") for app in applications}


def _check_args(import_path: str, args: Mapping[str, Any], where: str) -> ServeConfig | None:
    if import_path != IMPORT_PATH:
        if import_path.startswith("lookalike."):
            raise UsageError(f"{where}: import_path {import_path!r} is not an application; ours is {IMPORT_PATH}")
        return None
    config = parse_config(ServeConfig, args, where)
    if "tls" in args:
        raise UsageError(f"{where}: 'tls' is only for `lookalike serve`; put a proxy before the gRPC port instead")
    return config


def ignored_keys(value: Any, kind: Any, place: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Yield (place, key, valid keys) for each key of ``value`` that no pydantic model in the type ``kind`` has.

    Serve's models are read, not built: building some of them imports the user's modules.
    """
    models = list(_models_in(kind))
    if isinstance(value, list):
        for position, item in enumerate(value):
            yield from ignored_keys(item, kind, f"{place}{position}.")
    elif isinstance(value, Mapping) and models:
        types = {name: field.annotation for model in models for name, field in model.model_fields.items()}
        for key, item in value.items():
            if key not in types:
                yield place, str(key), sorted(types)
            yield from ignored_keys(item, types.get(key), f"{place}{key}.")


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models that a type names, as in ``list[Model]`` or ``dict | Model | None``."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from _models_in(part)
