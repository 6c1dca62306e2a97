"""What the service itself remembers: which generations it holds and which one answers. ``state.json`` in its folder."""

import json
from pathlib import Path

from pydantic import ValidationError

from lookalike import storage
from lookalike.config import Config
from lookalike.errors import ArtifactError
from lookalike.serve.generations.generation import Generation

STATE = "state.json"


class Held(Config):
    """A generation by its URIs."""

    name: str
    index: str
    plan: str | None
    encoder: str | None
    model_fingerprint: str
    num_rows: int
    includes_writes: int

    @property
    def key(self) -> str:
        """What tells it from others: the same index with another plan, encoder or share of the writes is another."""
        return f"{self.name} {self.plan or ''} {self.encoder or ''} {self.includes_writes}"

    @classmethod
    def of(cls, generation: Generation) -> "Held":
        """How a generation is remembered."""
        return cls(
            name=generation.name,
            index=generation.index,
            plan=generation.plan,
            encoder=generation.encoder,
            model_fingerprint=generation.meta.model_fingerprint,
            num_rows=generation.meta.num_live,
            includes_writes=generation.includes_writes,
        )


class State(Config):
    """What is held, and what answers."""

    format_version: int = 1
    configured: tuple[str, str | None, str]
    """Index, plan and encoder of the configuration that the service was last started with."""
    held: tuple[Held, ...]
    current: str
    previous: str | None = None

    def find(self, name: str | None) -> Held | None:
        """The generation held under ``name``."""
        return next((one for one in self.held if one.name == name), None)

    @property
    def serving(self) -> Held:
        """The generation that answers."""
        found = self.find(self.current)
        assert found is not None, "what answers is held"
        return found

    def holding(self, one: Held) -> "State":
        """The same with ``one`` held, in the place of another of its name."""
        others = tuple(other for other in self.held if other.name != one.name)
        return self.model_copy(update={"held": (*others, one)})

    def serving_now(self, name: str) -> "State":
        """The same with ``name`` answering; what answered before is the previous one."""
        previous = self.current if self.current != name else self.previous
        return self.model_copy(update={"current": name, "previous": previous})

    def trimmed(self) -> "State":
        """The same without generations that neither answer nor may be rolled back to."""
        kept = tuple(one for one in self.held if one.name in (self.current, self.previous))
        return self.model_copy(update={"held": kept})


def load_state(folder: str) -> State | None:
    """The state in ``folder``, None before the first; ``ArtifactError`` when it cannot be understood."""
    path = Path(folder) / STATE
    if not path.exists():
        return None
    try:
        state = State.model_validate(json.loads(path.read_bytes()))
        if state.find(state.current) is None:
            raise ValueError(f"{state.current} is not among what is held")
        return state
    except (ValueError, ValidationError) as error:
        raise ArtifactError(f"{path} is damaged ({str(error).splitlines()[0]}); restore it from a copy") from None


def save_state(folder: str, state: State) -> None:
    """Store ``state`` so that a crash leaves the old one or the new one."""
    storage.write_atomic(f"{folder}/{STATE}", (state.model_dump_json(indent=1) + "\n").encode())
