"""One question to the workers: which generation to search, for which queries, by which plan."""

import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lookalike.retrieval.filters import Conditions
from lookalike.retrieval.plan import Plan


@dataclass(frozen=True, eq=False)
class Ask:
    """The ``k`` best rows of ``generation`` for each query. Packed only to cross to another process."""

    generation: str
    queries: npt.NDArray[np.float32]
    """float32 [n, dim]."""
    k: int
    plan: Plan
    filters: Conditions = field(default_factory=dict)
    """Column -> values, of which a hit holds one; no condition when empty."""

    @property
    def kind(self) -> Hashable:
        """Everything but the queries: asks of the same kind can share a call."""
        filters = tuple((column, tuple(values)) for column, values in self.filters.items())
        return self.generation, self.k, self.plan, filters

    @cached_property
    def packed(self) -> bytes:
        """The bytes of the queries, then a line of JSON; packed once for all shards."""
        rest = [self.generation, self.queries.shape[1], self.k, self.plan.model_dump(), self.filters]
        return b"\n".join((np.asarray(self.queries, "<f4").tobytes(), json.dumps(rest).encode()))

    @classmethod
    def unpack(cls, packed: bytes) -> "Ask":
        """The question that was ``packed``."""
        size = packed.rindex(b"\n")  # the JSON is one line
        generation, dim, k, plan, filters = json.loads(packed[size + 1 :])
        queries: Any = np.frombuffer(packed, "<f4", size // 4).reshape(-1, dim)
        return cls(generation, queries, k, Plan.model_validate(plan), filters)
