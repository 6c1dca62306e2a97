"""What a service remembers: the generations it holds and the one that answers."""

from lookalike.config import Config
from lookalike.serve.generations.generation import Generation


class GenerationRef(Config):
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
        """Identity: the same index with another plan, encoder or number of included writes is another generation."""
        return f"{self.name} {self.plan or ''} {self.encoder or ''} {self.includes_writes}"

    @classmethod
    def of(cls, generation: Generation) -> "GenerationRef":
        """The reference to ``generation``."""
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
    """The generations that are held, and which of them answers."""

    configured: tuple[str, str | None, str]
    """Index, plan and encoder of the configuration that the service was last started with."""
    held: tuple[GenerationRef, ...]
    current: str
    previous: str | None = None

    def find(self, name: str | None) -> GenerationRef | None:
        """The generation held under ``name``."""
        return next((ref for ref in self.held if ref.name == name), None)

    @property
    def serving(self) -> GenerationRef:
        """The generation that answers."""
        ref = self.find(self.current)
        assert ref is not None, "the generation that answers is held"
        return ref

    @property
    def includes_writes(self) -> int:
        """Number of the last write that every held generation includes."""
        return min(ref.includes_writes for ref in self.held)

    def holding(self, ref: GenerationRef) -> "State":
        """A copy that holds ``ref``, in place of a generation of the same name."""
        others = tuple(other for other in self.held if other.name != ref.name)
        return self.model_copy(update={"held": (*others, ref)})

    def serving_now(self, name: str) -> "State":
        """A copy in which ``name`` answers; the generation that answered before becomes the previous one."""
        previous = self.current if self.current != name else self.previous
        return self.model_copy(update={"current": name, "previous": previous})

    def trimmed(self) -> "State":
        """A copy without the generations that neither answer nor are the previous one."""
        refs = tuple(ref for ref in self.held if ref.name in (self.current, self.previous))
        return self.model_copy(update={"held": refs})
