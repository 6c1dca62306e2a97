"""The terms that annotations may have, as a table that spans of text are joined with."""

from collections.abc import Mapping

import polars as pl

from lookalike.data.text.terms import endings


class Vocabulary:
    """The canonical terms that annotations may have; an alias is matched as the term it stands for."""

    def __init__(self, terms: list[str], aliases: Mapping[str, str] | None = None) -> None:
        self.terms = pl.Series(sorted(set(terms)), dtype=pl.String)
        positions = {term: position for position, term in enumerate(self.terms.to_list())}
        self._positions = positions | {a: positions[term] for a, term in (aliases or {}).items() if term in positions}
        ends = [[self._positions[e] for e in endings(s) if e in self._positions] for s in self._positions]
        self.spellings = pl.DataFrame(
            {"term": list(self._positions), "position": list(self._positions.values()), "ends": ends},
            schema={"term": pl.String, "position": pl.Int64, "ends": pl.List(pl.Int64)},
        )
        """One row per term and alias. ``position`` is that of its term; ``ends`` are the positions of all terms that it
        ends in, itself included."""

    def __len__(self) -> int:
        return len(self.terms)

    def __contains__(self, term: str) -> bool:
        position = self.position(term)
        return position >= 0 and self.terms[position] == term

    def position(self, term: str) -> int:
        """Index in ``terms`` of the term that ``term`` is or stands for; -1 if there is none."""
        return self._positions.get(term, -1)
