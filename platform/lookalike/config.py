"""The base of all configuration: strict, frozen, and aware of which fields shape the result.

A field made by :func:`runtime` says how a stage runs (workers, rows in flight), not what it computes. It is not part of
the fingerprint, so changing it never repeats finished work.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lookalike.errors import UsageError
from lookalike.plain_yaml import parse_yaml
from lookalike.registry import nearest

C = TypeVar("C", bound="Config")


def runtime(default: Any, **kwargs: Any) -> Any:
    """A pydantic field that is not part of the fingerprint."""
    return Field(default, json_schema_extra={"runtime": True}, **kwargs)


class Config(BaseModel):
    """Strict configuration: unknown keys are refused, instances are frozen, docstrings describe fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """Every field that shapes the result, as JSON values: the input of the fingerprint."""
        return _identity(self)


def _identity(config: BaseModel) -> dict[str, Any]:
    result: dict[str, Any] = {}
    plain = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("runtime"):
            continue
        result[name] = _identity_value(getattr(config, name), plain[name])
    return result


def _identity_value(value: Any, plain: Any) -> Any:
    if isinstance(value, BaseModel):
        return _identity(value)
    if isinstance(value, Mapping):
        return {str(key): _identity_value(item, plain[str(key)]) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity_value(item, plain_item) for item, plain_item in zip(value, plain, strict=True)]
    return plain


def parse_config(config_class: type[C], values: Mapping[str, Any], where: str) -> C:
    """Build ``config_class`` from plain values; ``UsageError`` names ``where``, the field and the remedy."""
    try:
        return config_class.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(config_class, problem) for problem in error.errors()]
        raise UsageError(f"{where}: " + "; ".join(lines)) from None


def _explain(config_class: type[BaseModel], problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, name = problem["loc"]
        model = _model_at(config_class, parents)
        valid = sorted(getattr(model, "model_fields", {}))
        return f"unknown key {place!r}{_hint(model, str(name), valid)}; valid keys: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"{place!r} is required; add it"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem["input"], Mapping):
        return f"{place}: {message}" if place else message
    return f"{place!r} is {problem['input']!r}: {message}"


def _hint(model: Any, name: str, valid: list[str]) -> str:
    """The key that ``name`` may stand for: one of ``valid``, or a key of the model's groups (``optimizer.lr``)."""
    groups = {key: getattr(model.model_fields[key].annotation, "model_fields", {}) for key in valid}
    dotted = [f"{group}.{key}" for group, keys in groups.items() for key in keys]
    moved = [key for key in dotted if key.endswith(f".{name}")]
    return nearest(moved[0], moved) if moved else nearest(name, [*valid, *dotted])


def _model_at(config_class: type[BaseModel], loc: Sequence[Any]) -> Any:
    """The model that ``loc`` leads to, through models, their unions, mappings and sequences."""
    current: Any = config_class
    for part in loc:
        field = getattr(current, "model_fields", {}).get(part)
        annotation = current if field is None else field.annotation
        current = next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")), annotation)
    return current


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """``values`` with dotted ``key.sub=value`` assignments applied to a copy; values are read as YAML."""
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise UsageError(f"override {override!r} is not of the form key.sub=value")
        value = parse_yaml(text, f"override {override[:200]!r}: the value")
        values = _assigned(values, path.split("."), value, override)
    return values


def _assigned(values: dict[str, Any], keys: list[str], value: Any, override: str) -> dict[str, Any]:
    key, *rest = keys
    if rest:
        child = values.get(key, {})
        if not isinstance(child, dict):
            raise UsageError(f"override {override!r}: {key!r} is {child!r}, which has no keys of its own")
        value = _assigned(child, rest, value, override)
    return {**values, key: value}
