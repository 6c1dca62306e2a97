"""A recipe: a YAML file with the steps of a run, the inputs of each and its settings.

A step is a stage with a name; its inputs are other steps' names, or URIs of artifacts published elsewhere. The same
file drives a laptop and a cluster; ``key.sub=value`` overrides on the command line change single settings. A recipe
that differs from another in a few settings, such as a smoke twin, has ``extends: other.yaml`` and only those settings.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field, PrivateAttr

from lookalike import storage
from lookalike.artifacts import Artifact, Draft, find
from lookalike.cluster import ClusterConfig
from lookalike.config import Config, apply_overrides, parse_config
from lookalike.errors import ArtifactError, UsageError
from lookalike.outlook import Outlook
from lookalike.plain_yaml import parse_yaml
from lookalike.registry import nearest
from lookalike.stages import (
    Stage,
    StageConfig,
    StageRun,
    check_input_names,
    check_inputs,
    execute,
    fingerprint,
    get_stage,
)
from lookalike.telemetry import printable

DEEPEST = 8
"""Longest chain of recipes that extend each other."""


class Step(Config):
    """One use of a stage."""

    stage: str
    """The stage's name: the verb on the command line."""
    inputs: dict[str, str | list[str]] = {}
    """Input name -> a step of this recipe or the URI of an artifact (a list where the stage takes many)."""
    settings: dict[str, Any] = {}
    """The stage's own configuration; unknown keys are refused."""


class Recipe(Config):
    """Steps, each after the steps it reads."""

    name: str
    root: str
    """fsspec URI under which all artifacts of the run are published."""
    seed: int = Field(17, ge=0)
    """Seed of every step that does not set its own."""
    cluster: ClusterConfig = ClusterConfig()
    steps: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], Step]
    """Name -> step. Names are folders under the root and heads of overrides: letters, digits, - and _."""
    serve: dict[str, Any] = {}
    """Settings of the retrieval service (``lookalike serve``)."""
    demo: dict[str, Any] = {}
    """Settings of the tour that ``lookalike quickstart`` ends with."""
    _artifacts: dict[str, Artifact] = PrivateAttr(default_factory=dict)
    _outlooks: dict[str, tuple[Outlook, bool]] = PrivateAttr(default_factory=dict)
    """Step -> what it will hold, and whether that is final, since its artifact was looked at."""

    @classmethod
    def load(cls, path: str, overrides: str | list[str] | None = None) -> "Recipe":
        """Read ``path``, apply dotted overrides and check every step against its stage.

        Overrides: ``seed=3``, ``steps.pretrain.settings.epochs=2`` or, shorter, ``pretrain.epochs=2``.
        """
        values = read_values(path)
        full = [_expand(override, values.get("steps") or {}) for override in _as_list(overrides or [])]
        recipe = parse_config(cls, apply_overrides(values, full), path)
        recipe = recipe.model_copy(update={"root": storage.absolute(recipe.root)})
        recipe.check_steps()
        return recipe

    def check_steps(self) -> None:
        """Raise ``UsageError`` unless every step has valid settings and the inputs that its stage takes."""
        seen: set[str] = set()
        for name, step in self.steps.items():
            self.stage(name), self.config(name)
            for source in [source for sources in step.inputs.values() for source in _as_list(sources)]:
                if "/" not in source and source not in seen:
                    where = "comes later; move it up" if source in self.steps else "is not in this recipe"
                    raise UsageError(f"step {name!r} reads {source!r}, which {where}{nearest(source, sorted(seen))}")
            self._check_inputs(name)
            seen.add(name)

    def _check_inputs(self, name: str) -> None:
        """Inputs match the stage's declaration; checked before anything runs, so that a typo is found at once."""
        stage = self.stage(name)
        given = {key: _as_list(sources) for key, sources in self.steps[name].inputs.items()}
        try:
            check_input_names(stage, given)
        except UsageError as error:
            raise UsageError(f"step {name!r}: {error}") from None
        for key, sources in given.items():
            for source in (source for source in sources if source in self.steps):
                wanted, made = stage.inputs[key].kind, self.stage(source).kind
                if made != wanted:
                    raise UsageError(
                        f"step {name!r}: stage {stage.name!r} takes an artifact of kind {wanted!r} as "
                        f"{key!r}, step {source!r} makes one of kind {made!r}"
                    )

    def foresee(self, names: str | Iterable[str] | None = None) -> None:
        """Raise ``UsageError`` if a step needs what its inputs will not hold: a label, a split, a data set.

        ``names``: the steps to check, with all that they read; None: every step. What is not known yet passes.
        """
        needed = set(self.steps if names is None else [names] if isinstance(names, str) else names)
        for name in reversed(self.steps):
            if name in needed:
                needed.update(source for sources in self.steps[name].inputs.values() for source in _as_list(sources))
        outlooks: dict[str, Outlook] = {}
        for name in [name for name in self.steps if name in needed]:
            outlooks[name] = self._foresee(name, outlooks)

    def _foresee(self, name: str, outlooks: Mapping[str, Outlook]) -> Outlook:
        foresee, inputs = self.stage(name).foresee, self.steps[name].inputs
        if foresee is None:
            return {}
        known, is_final = self._outlooks.get(name, ({}, False))
        made = None if is_final else self._made(name)
        if is_final or (made is None and not inputs and name in self._outlooks):  # sources are read once
            return known
        given = {key: {source: outlooks.get(source, {}) for source in _as_list(some)} for key, some in inputs.items()}
        try:
            outlook = foresee(self.config(name), given, made)
        except UsageError as error:
            raise UsageError(f"step {name!r}: {error}") from None
        self._outlooks[name] = outlook, made is not None
        return outlook

    def _made(self, name: str) -> Artifact | None:
        try:
            return self.published(name)
        except ArtifactError:  # of an input that is not published
            return None

    def stage(self, name: str) -> Stage[Any]:
        """The stage of a step."""
        if name not in self.steps:
            raise UsageError(f"no step {name!r}{nearest(name, list(self.steps))}; steps: {', '.join(self.steps)}")
        return get_stage(self.steps[name].stage)

    def config(self, name: str) -> StageConfig:
        """The parsed configuration of a step."""
        settings = {"seed": self.seed, **self.steps[name].settings}
        config: StageConfig = parse_config(self.stage(name).config, settings, f"step {name!r}")
        return config

    def steps_of(self, stage: str) -> list[str]:
        """Names of the steps that use ``stage``."""
        names = [name for name, step in self.steps.items() if step.stage == stage]
        if not names:
            raise UsageError(f"recipe {self.name!r} has no step of stage {stage!r}; it has {', '.join(self.steps)}")
        return names

    def inputs(self, name: str) -> dict[str, list[Artifact]]:
        """The opened inputs of a step; ``ArtifactError`` if one is not published yet."""
        return {
            key: [self._open(source) for source in _as_list(sources)]
            for key, sources in self.steps[name].inputs.items()
        }

    def _open(self, source: str) -> Artifact:
        if source not in self.steps:
            return Artifact.open(storage.absolute(source))
        artifact = self.published(source)
        if artifact is None:
            stage = self.steps[source].stage
            raise ArtifactError(
                f"step {source!r} is not published under {self.root} with these settings; run "
                f"`lookalike {stage} RECIPE --step {source}` first, or `lookalike run RECIPE` for "
                "every step"
            )
        return artifact

    def published(self, name: str) -> Artifact | None:
        """The artifact of a step, or None if it has not run with these settings."""
        if name in self._artifacts:  # checked once per run: a content check reads every file
            return self._artifacts[name]
        stage, config, inputs = self.stage(name), self.config(name), self.inputs(name)
        check_inputs(stage, inputs)
        artifact = find(self.root, stage.kind, name, fingerprint(stage, config, inputs))
        return artifact if artifact is None else self._artifacts.setdefault(name, artifact)

    def preview(self, name: str) -> list[str]:
        """The stage's preview of a step whose inputs are published; empty for most stages."""
        stage, config, inputs = self.stage(name), self.config(name), self.inputs(name)
        draft = Draft(self.root, stage.kind, name, fingerprint(stage, config, inputs))
        return [] if stage.preview is None else stage.preview(StageRun(config, inputs, draft))

    def run_step(self, name: str) -> Artifact:
        """Run a step whose inputs are published, or return the artifact that it published before."""
        self._artifacts[name] = execute(self.stage(name), self.config(name), self.inputs(name), self.root, name)
        return self._artifacts[name]


def read_values(path: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain values of the recipe at ``path``, over those of the recipe it ``extends``, if any.

    ``extends`` is a path relative to ``path``. Mappings are merged key by key; other values, lists too, replace those
    of the extended recipe. Raises ``UsageError`` if a file cannot be read or recipes extend each other in a circle.
    """
    try:
        values = parse_yaml(storage.read_bytes(path), path)
    except FileNotFoundError:
        by = f", which {extended_by[-1]} extends" if extended_by else ""
        raise UsageError(f"no recipe at {path}{by}; deploy/recipes/ has some to start from") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); give the path of a recipe") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold a mapping with name, root and steps; it holds {type(values).__name__}")
    below = values.pop("extends", None)
    if below is None:
        return values
    if not isinstance(below, str):
        raise UsageError(f"{path}: 'extends' is {below!r}; give the path of one recipe, relative to this one")
    if path in extended_by or len(extended_by) == DEEPEST:
        raise UsageError(f"recipes extend each other: {' -> '.join([*extended_by, path])}; one must stand alone")
    folder, slash, _ = path.rpartition("/")
    return _overlay(read_values(folder + slash + below, (*extended_by, path)), values)


def _overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def run_steps(recipe: Recipe) -> tuple[dict[str, Artifact], list[dict[str, Any]]]:
    """Run all steps in order; (artifact of each step, facts about each step: stage, skipped, seconds)."""
    if not recipe.steps:
        raise UsageError(f"recipe {recipe.name!r} has no steps; add some under steps")
    artifacts: dict[str, Artifact] = {}
    stages = []
    for number, name in enumerate(recipe.steps, 1):
        skipped, stage = recipe.published(name) is not None, recipe.steps[name].stage
        mark = "published already, skipped" if skipped else "running"
        print(f"[{number}/{len(recipe.steps)}] {name} ({printable(stage)}): {mark}", file=sys.stderr, flush=True)
        artifacts[name] = recipe.run_step(name)
        if not skipped:
            recipe.foresee()  # more is known now
        seconds = artifacts[name].manifest.duration_s
        stages.append({"step": name, "stage": stage, "skipped": skipped, "seconds": seconds})
    return artifacts, stages


def _as_list(sources: str | list[str]) -> list[str]:
    return [sources] if isinstance(sources, str) else sources


def _expand(override: str, steps: Mapping[str, Any]) -> str:
    key, separator, _ = override.partition("=")
    if separator and "." not in key and key not in Recipe.model_fields:
        known = sorted(Recipe.model_fields)
        raise UsageError(
            f"override {override!r}: unknown key {key!r}{nearest(key, known)}; valid keys: "
            f"{', '.join(known)}; a setting of a step is STEP.{key}=value"
        )
    head, dot, rest = override.partition(".")
    if dot and head not in steps and head not in Recipe.model_fields and "=" not in head:
        raise UsageError(
            f"override {override!r}: no step {head!r}{nearest(head, list(steps))}; steps: {', '.join(steps)}"
        )
    return f"steps.{head}.settings.{rest}" if separator and dot and head in steps else override
