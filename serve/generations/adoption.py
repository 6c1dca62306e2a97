"""What a service goes on from when it starts: its folder's state and log, and the index of its configuration."""

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.serve.generations.compaction import held_writes
from lookalike.serve.generations.generation import Generation
from lookalike.serve.generations.journal import Journal
from lookalike.serve.generations.state import Held, State
from lookalike.serve.settings.config import ServeConfig
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)


def adopt(state: State | None, config: ServeConfig, generation: Generation, journal: Journal) -> State:
    """The state to go on from: the one that is stored, unless the configuration names another index than before.

    Raises ``UsageError`` where acknowledged writes would be passed over.
    """
    chosen = _choose(state, config, generation, journal)
    _check_log(chosen, journal)
    return chosen


def _choose(state: State | None, config: ServeConfig, generation: Generation, journal: Journal) -> State:
    configured = (config.index, config.plan, config.encoder)
    if state is not None and state.configured == configured:
        return state
    includes = held_writes(generation.index, storage.local_path(config.writes.state or ""))
    if state is None:
        if includes + 1 < journal.first:
            raise UsageError(
                f"{journal.folder} has no state.json, and its writes before {journal.first} are only in "
                "the index that it served last; restore state.json from a copy, or set index to that "
                "one"
            )
        if journal.last:
            log.warning("no state.json %s", fields(folder=journal.folder, serving=config.index, writes=journal.last))
        held = Held.of(generation).model_copy(update={"includes_writes": includes})
        return State(configured=configured, held=(held,), current=held.name)
    serving = state.serving
    if includes + 1 < journal.first:
        raise UsageError(
            f"index {config.index} holds the service's writes up to {includes}, those up to "
            f"{journal.first - 1} are only in {serving.index} any more; build it from the embeddings of "
            "that one, or switch while the service runs, with includes_writes"
        )
    held = Held.of(generation).model_copy(update={"includes_writes": includes})
    if held.model_fingerprint != serving.model_fingerprint and journal.last > includes:
        raise UsageError(
            f"index {config.index} is of another model than the {journal.last - includes} "
            "writes that wait; compact them first, or switch while the service runs"
        )
    state = state.holding(held).serving_now(held.name).trimmed()
    return state.model_copy(update={"configured": configured})


def _check_log(state: State, journal: Journal) -> None:
    """Refuse a log that ends before what an index holds: new writes would get numbers that count as held."""
    newest = max(state.held, key=lambda one: one.includes_writes)
    if newest.includes_writes > journal.last:
        raise UsageError(
            f"{journal.folder} has the writes up to {journal.last}, index {newest.index} holds those up "
            f"to {newest.includes_writes}: writes-*.log are gone, or older than state.json; restore all "
            "from one copy, or serve that index with a new folder as writes.state"
        )
