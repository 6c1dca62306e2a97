"""What is told about vectors that were taken in: why rows were refused, and the card of the embeddings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lookalike.data.intake.files import VectorFile
from lookalike.data.intake.units import Repeated, Summary, Unit, UnitFiles
from lookalike.data.parts import read_table
from lookalike.entries import escaped

SHOWN = 3
"""Refused rows that a message names."""
SHOWN_FILES = 20
"""Files that a card names."""


def explain_refused(unit: Unit, summary: Summary, done: UnitFiles) -> str:
    """Why rows of a unit cannot be taken, by number and id, and the remedy."""
    rows = read_table(done.of("quarantine", unit.number)).to_pylist()
    shown = [f"row {row['row']}{_named(row)}: {row['field']} {row['reason']}: {row['detail']}" for row in rows[:SHOWN]]
    more = [f"and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return (
        f"{escaped(summary['file'])}: {len(rows)} of the rows {unit.start} to {unit.stop - 1} cannot be taken: "
        f"{'; '.join([*shown, *more])}; mend them, or set on_bad=quarantine to leave such rows out"
    )


def _named(row: Mapping[str, Any]) -> str:
    return f" ({row['image_id']!r})" if row["image_id"] not in (None, str(row["row"])) else ""


def explain_repeated(again: Repeated, sources: Mapping[int, str]) -> str:
    """Where an id stands twice, and the remedy; ``sources``: unit -> file."""
    first, row = again.earlier
    return (
        f"the id {again.image_id!r} stands in row {row} of {escaped(sources[first])} and in row {again.row} of "
        f"{escaped(sources[again.unit])}, and ids are unique; remove one, or set on_bad=quarantine to keep the first"
    )


def counted(reasons: Mapping[str, int]) -> str:
    """Refused rows by reason, most first."""
    return ", ".join(f"{reason}: {number}" for reason, number in Counter(reasons).most_common()) or "none"


def render_card(facts: Mapping[str, Any], files: Sequence[VectorFile], refused: Mapping[str, int]) -> str:
    """The card of the embeddings with these ``facts`` of ``meta.json``, in Markdown."""
    model, (shortest, longest) = escaped(facts["encoder"]["name"]), facts["lengths"]
    nested = "as trained (Matryoshka)" if facts["nested"] else "cut from vectors that were not trained nested"
    rows = {
        "model": model,
        "licence": escaped(facts["licence"] or "not stated"),
        "rows": f"{facts['rows']}; left out: {counted(refused)}",
        "dims": f"{', '.join(map(str, facts['dims']))}: {nested}",
        "stored as": f"{facts['dtype']}, {'length 1' if facts['normalized'] else 'as given'}",
        "lengths as given": f"{shortest:.4g} to {longest:.4g}",
    }
    lines = [
        f"# {model}: {facts['rows']} vectors of {facts['dim']} numbers",
        "",
        "Made elsewhere and taken in by `lookalike vectors`. There is no encoder, so pictures cannot be queries.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        *(f"| file | {escaped(file.uri)}: {file.num_rows} of {file.kind} |" for file in files[:SHOWN_FILES]),
        *([f"| | and {len(files) - SHOWN_FILES} more |"] if len(files) > SHOWN_FILES else []),
    ]
    return "\n".join(lines) + "\n"
