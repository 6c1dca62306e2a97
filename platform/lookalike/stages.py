"""Stages, typed functions from artifacts to one artifact, and the runner that skips, resumes and publishes.

Stages live in ``data/``, ``train/`` and ``serve/``; this module knows them only by dotted name, so that no import runs
upward. Third parties add a stage by an entry point of group ``lookalike.stage`` that names a ``Stage`` object.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Generic, TypeVar

from lookalike import storage
from lookalike.artifacts import Artifact, Draft, find, hash_json
from lookalike.config import Config
from lookalike.entries import list_entries
from lookalike.errors import UsageError
from lookalike.outlook import Outlook
from lookalike.registry import Registry, nearest
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
C = TypeVar("C", bound="StageConfig")


class StageConfig(Config):
    """Base of every stage's configuration."""

    seed: int = 17
    """Seed of every random choice of the stage; the recipe's seed unless the step sets its own."""


@dataclass(frozen=True)
class Input:
    """An artifact that a stage takes."""

    kind: str
    optional: bool = False
    many: bool = False
    """Takes a list of artifacts with different names, in the recipe's order."""


@dataclass
class StageRun(Generic[C]):
    """Arguments of a stage's function: its configuration, its opened inputs and the draft to fill."""

    config: C
    inputs: Mapping[str, list[Artifact]]
    out: Draft

    def one(self, name: str) -> Artifact:
        """The only artifact of a required input."""
        return self.inputs[name][0]

    def many(self, name: str) -> list[Artifact]:
        """All artifacts of an input that takes many."""
        return self.inputs.get(name, [])


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One verb of the command line that publishes an artifact."""

    name: str
    kind: str
    config: type[C]
    run: Callable[[StageRun[C]], None]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    sources: Callable[[C], list[str]] | None = None
    """URIs of raw data outside any artifact; their content is part of the fingerprint."""
    environment: Callable[[], list[str]] | None = None
    """What is installed here and changes the result, such as a decoder; part of the fingerprint unless empty."""
    resumable: bool = False
    """The stage continues an earlier attempt's draft; otherwise it starts from an empty draft."""
    preview: Callable[[StageRun[C]], list[str]] | None = None
    """Lines for a dry run about a step that would run, such as what it will need; writes nothing."""
    foresee: Callable[[C, Mapping[str, Mapping[str, Outlook]], Artifact | None], Outlook] | None = None
    """What the artifact will hold, given for each input what its artifacts (by name of their step or URI) will hold,
    and the artifact itself if it is published. Raises ``UsageError`` for a setting that cannot work with the inputs."""
    version: int = 1
    """Raised whenever the stage computes a different result from the same configuration."""


STAGES: Registry[Stage[Any]] = Registry("stage")
BUILT_IN = {
    "corpus": "lookalike.data.corpus:STAGE",
    "labels": "lookalike.data.labels:STAGE",
    "shards": "lookalike.data.shards:STAGE",
    "encoder": "lookalike.train.publish.encoder:STAGE",
    "pretrain": "lookalike.train.pretrain:STAGE",
    "finetune": "lookalike.train.finetune:STAGE",
    "embed": "lookalike.train.evaluate.embed:STAGE",
    "vectors": "lookalike.data.vectors:STAGE",
    "evaluate": "lookalike.train.evaluate.evaluate:STAGE",
    "classify": "lookalike.train.evaluate.classify:STAGE",
    "index": "lookalike.serve.index.build:STAGE",
    "plan": "lookalike.serve.index.plan_stage:STAGE",
}
"""The built-in stages, in the order they run."""


def load_object(dotted: str) -> Any:
    """The object named ``module:attribute``."""
    module, _, attribute = dotted.partition(":")
    return getattr(import_module(module), attribute)


def get_stage(name: str) -> Stage[Any]:
    """The stage called ``name``, imported on first use."""
    needed = [name] if name in BUILT_IN else list(BUILT_IN)  # another name: a plug-in, or an error that lists all
    for stage in needed:
        if stage not in STAGES:
            STAGES.register(stage)(load_object(BUILT_IN[stage]))
    return STAGES.get(name)


def fingerprint(stage: Stage[C], config: C, inputs: Mapping[str, list[Artifact]]) -> str:
    """20 hex digits that identify the result of ``stage`` with this configuration and these inputs."""
    sources = {} if stage.sources is None else {uri: _digest_of_source(uri) for uri in stage.sources(config)}
    parents = {name: [[a.manifest.name, a.digest] for a in artifacts] for name, artifacts in inputs.items()}
    installed = [] if stage.environment is None else stage.environment()
    identity = [stage.name, stage.version, config.identity(), sources, parents]
    return hash_json([*identity, installed] if installed else identity)[:20]


def _digest_of_source(uri: str) -> str:
    found = list_entries(uri)
    if not found:
        raise UsageError(f"nothing to read at {uri}; give a file or a folder with files")
    digest = hashlib.sha256()
    for name, problem in found:
        content = problem or _digest_of_file(storage.join(uri, name) if name else uri)
        digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()


def _digest_of_file(uri: str) -> str:
    try:
        return storage.source_digest(uri)
    except OSError as error:  # the stage says of which record it is
        return f"{type(error).__name__}"


def check_input_names(stage: Stage[Any], inputs: Mapping[str, Sequence[object]]) -> None:
    """Raise ``UsageError`` if an input is unknown, is missing, or has too many artifacts."""
    for name in inputs:
        if name not in stage.inputs:
            takes = ", ".join(stage.inputs) or "none"
            close = nearest(name, list(stage.inputs))
            raise UsageError(f"stage {stage.name!r} has no input {name!r}{close}; it takes {takes}")
    for name, wanted in stage.inputs.items():
        given = inputs.get(name, [])
        if not given and not wanted.optional:
            raise UsageError(f"stage {stage.name!r} needs input {name!r} (an artifact of kind {wanted.kind!r})")
        if len(given) > 1 and not wanted.many:
            raise UsageError(f"stage {stage.name!r} takes one artifact as {name!r}, not {len(given)}")


def check_inputs(stage: Stage[Any], inputs: Mapping[str, list[Artifact]]) -> None:
    """Raise ``UsageError`` unless the inputs match the stage's declaration."""
    check_input_names(stage, inputs)
    for name, wanted in stage.inputs.items():
        for artifact in inputs.get(name, []):
            if artifact.manifest.kind != wanted.kind:
                raise UsageError(
                    f"stage {stage.name!r} takes an artifact of kind {wanted.kind!r} as {name!r}, "
                    f"{artifact.uri} is of kind {artifact.manifest.kind!r}"
                )


def execute(stage: Stage[C], config: C, inputs: Mapping[str, list[Artifact]], root: str, name: str) -> Artifact:
    """Publish ``stage``'s artifact under ``root``, or return it if it is already there."""
    check_inputs(stage, inputs)
    mark = fingerprint(stage, config, inputs)
    if (done := find(root, stage.kind, name, mark)) is not None:
        log.info("skip %s", fields(step=name, stage=stage.name, fingerprint=mark, reason="published already"))
        return done
    draft = Draft(root, stage.kind, name, mark)

    def waiting() -> None:
        log.warning("wait %s", fields(step=name, reason="another process is making the same artifact"))

    with storage.exclusive(storage.join(root, ".locks", f"{stage.kind}-{name}-{mark}"), waiting):
        done = find(root, stage.kind, name, mark)  # the other process may have published it
        return done if done is not None else _make(stage, config, inputs, draft)


def _make(stage: Stage[C], config: C, inputs: Mapping[str, list[Artifact]], draft: Draft) -> Artifact:
    name, mark = draft.name, draft.fingerprint
    if not stage.resumable:
        draft.clear()
    storage.make_directory(draft.uri)
    log.info("start %s", fields(step=name, stage=stage.name, fingerprint=mark))
    start = time.monotonic()
    stage.run(StageRun(config, inputs, draft))
    seconds = time.monotonic() - start
    artifact = draft.publish(
        config=config.model_dump(mode="json"), parents=inputs, stage_version=stage.version, duration_s=seconds
    )
    log.info("done %s", fields(step=name, stage=stage.name, seconds=round(seconds, 1), uri=artifact.uri))
    return artifact
