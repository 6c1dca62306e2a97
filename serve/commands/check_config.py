"""``lookalike serve --check-config``: a Serve config file, held against Serve's own schema and ours, key by key.

Serve ignores most keys that it does not know, so a misspelt setting would keep its default without a word.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.registry import nearest
from lookalike.serve.settings.config import ServeConfig

IMPORT_PATH = "lookalike.serve.app:build"
Schema = Mapping[str, Any]


def check_file(path: str) -> list[str]:
    """A line on each application in a Serve config file or in the RayService manifests of a YAML file.

    Raises ``UsageError`` for what Serve refuses, keys that it would ignore, and settings that are not ours.
    """
    try:
        documents = [one for one in yaml.safe_load_all(Path(path).read_text()) if one is not None]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); give a Serve config file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML: {error}") from None
    configs = list(_configs(documents, path))
    if not configs:
        raise UsageError(f"{path} holds neither a Serve config nor a RayService; give one of them")
    return [line for where, config in configs for line in describe(check_serve_config(config, where))]


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
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, AttributeError) as error:
        raise UsageError(f"{where}: spec.serveConfigV2 is no YAML text: {error}") from None


def describe(settings: Mapping[str, ServeConfig | None]) -> list[str]:
    """Lines of text on what ``check_serve_config`` found."""
    return [
        f"{name}: {'not ours, its args are not checked' if one is None else f'serves {one.index}'}"
        for name, one in settings.items()
    ]


def check_serve_config(config: Any, where: str) -> dict[str, ServeConfig | None]:
    """The settings of each application by name (None for one that is not ours); raises as ``check_file`` does."""
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_json_schema()
    for place, key, valid in unknown_keys(config, schema, schema.get("$defs", {})):
        raise UsageError(
            f"{where}: Serve would ignore {f'{place}.{key}'.removeprefix('.')!r}{nearest(key, valid)}; "
            f"valid keys: {', '.join(valid)}"
        )
    try:
        applications = ServeDeploySchema.model_validate(config).applications
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise UsageError(f"{where}: Serve refuses " + "; ".join(problems)) from None
    if not applications:
        raise UsageError(f"{where} holds no application, and Serve would end those that run; add one")
    return {one.name: _check_args(one.import_path, one.args, f"{where}: {one.name}") for one in applications}


def _check_args(import_path: str, args: Mapping[str, Any], where: str) -> ServeConfig | None:
    if import_path != IMPORT_PATH:
        if import_path.startswith("lookalike."):
            raise UsageError(f"{where}: import_path {import_path!r} is no application; ours is {IMPORT_PATH}")
        return None
    config = parse_config(ServeConfig, args, where)
    if "tls" in args:
        raise UsageError(f"{where}: 'tls' is of `lookalike serve` alone; put a proxy before the gRPC port instead")
    return config


def unknown_keys(value: Any, schema: Schema, shared: Schema, place: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """(place, key, valid keys) of each key that the JSON schema does not name where it names some."""
    options = list(_options(schema, shared))
    if isinstance(value, Mapping):
        known = {key: part for option in options for key, part in option.get("properties", {}).items()}
        others = [
            option["additionalProperties"]
            for option in options
            if isinstance(option.get("additionalProperties"), Mapping)
        ]
        for key, item in value.items():
            if known and key not in known:
                yield place, str(key), sorted(known)
            inner = known.get(key, {"anyOf": others})
            yield from unknown_keys(item, inner, shared, f"{place}.{key}".removeprefix("."))
    elif isinstance(value, list):
        items = {"anyOf": [option["items"] for option in options if "items" in option]}
        for position, item in enumerate(value):
            yield from unknown_keys(item, items, shared, f"{place}.{position}".removeprefix("."))


def _options(schema: Schema, shared: Schema) -> Iterator[Schema]:
    """The plain schemas that ``schema`` stands for; where one is a model, a free mapping beside it does not count."""
    if "$ref" in schema:
        yield from _options(shared[schema["$ref"].rpartition("/")[2]], shared)
    elif "anyOf" in schema or "allOf" in schema:
        for part in [*schema.get("anyOf", ()), *schema.get("allOf", ())]:
            yield from _options(part, shared)
    else:
        yield schema
