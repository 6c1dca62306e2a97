"""How a service goes on when it starts: from the state in its folder, or from the index of its configuration."""

from pathlib import Path

from lookalike import storage
from lookalike.artifacts import MANIFEST, Artifact
from lookalike.errors import ArtifactError, UsageError
from lookalike.serve.generations.compaction import ROOT, held_writes
from lookalike.serve.generations.database import Database
from lookalike.serve.generations.database_files import damage
from lookalike.serve.generations.generation import Generation
from lookalike.serve.generations.state import GenerationRef, State
from lookalike.serve.settings.config import ServeConfig
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)


def adopt(config: ServeConfig, generation: Generation, database: Database) -> State:
    """Return the stored state, moved to ``generation`` if the configuration names another index than before.

    Raises ``UsageError`` if acknowledged writes would be passed over.
    """
    state = _choose(config, generation, database)
    _check_log(state, database)
    database.check_complete()
    return state


def _choose(config: ServeConfig, generation: Generation, database: Database) -> State:
    state, configured = database.load_state(), (config.index, config.plan, config.encoder)
    if state is not None and state.configured == configured:
        return _without_damage(state)
    includes = held_writes(generation.index, storage.local_path(config.writes.state or ""))
    ref = GenerationRef.of(generation).model_copy(update={"includes_writes": includes})
    if state is None:
        if database.last:
            raise damage(database.path, "it has writes, and no state")
        return State(configured=configured, held=(ref,), current=ref.name)
    serving = state.serving
    check_includes(config.index, includes, database.first, serving.index)
    if ref.model_fingerprint != serving.model_fingerprint and database.last > includes:
        raise UsageError(
            f"index {config.index} is of another model than the {database.last - includes} "
            "writes that wait; compact them first, or switch while the service runs"
        )
    return state.holding(ref).serving_now(ref.name).trimmed().model_copy(update={"configured": configured})


def _without_damage(state: State) -> State:
    """Return ``state``; if its index is damaged, one with the index before, whose lacking writes the log has."""
    if not (problem := find_damage(state.serving.index)):
        return state
    previous = state.find(state.previous)
    if previous is None or find_damage(previous.index):
        raise ArtifactError(
            f"{problem}; it is the index that answers, and there is no other: restore it from a copy, or start with "
            "another index that holds its writes"
        )
    log.error("damaged index %s", fields(problem=problem, served=previous.index, effect="writes since are in the log"))
    return state.model_copy(update={"held": (previous,), "current": previous.name, "previous": None})


def find_damage(index: str) -> str:
    """Why an index cannot be served, by the sizes of its files and, up to ``FULL_CHECK_BYTES``, their contents."""
    try:
        Artifact.open(index, "index")
    except ArtifactError as error:
        return str(error)
    return ""


def check_includes(index: str, includes: int, first: int, serving: str) -> None:
    """Raise ``UsageError`` if ``index`` lacks writes before ``first``, the oldest that is kept."""
    if includes + 1 < first:
        raise UsageError(
            f"index {index} holds the service's writes up to {includes}, those up to {first - 1} are only in {serving} "
            "any more; build it from the embeddings of that one, or switch to it with includes_writes if it holds them"
        )


def _check_log(state: State, database: Database) -> None:
    """Refuse a log that ends before an index of this service: new writes would get numbers that count as included."""
    indexes = [(ref.includes_writes, f"index {ref.index}") for ref in state.held]
    for manifest in database.path.parent.glob(f"{ROOT}/embeddings/*/*/{MANIFEST}"):
        merged = Artifact.open(str(Path(manifest).parent), "embeddings", check=False)
        indexes.append((merged.manifest.config["writes"][-1], merged.uri))
    newest, where = max(indexes)
    if newest > database.last:
        raise UsageError(
            f"{database.path} has the writes up to {database.last}, {where} holds those up to {newest}: the database "
            "is older, or gone; restore a newer backup, serve that index with a new folder as writes.state, or remove "
            "it to go on without its writes"
        )
