"""What the artifacts of a recipe will hold, told before its first step runs, so that what cannot work ends at once."""

from collections.abc import Iterable, Mapping, Sequence

from lookalike.errors import UsageError
from lookalike.registry import nearest

Outlook = Mapping[str, Mapping[str, int]]
"""Column -> each value that an artifact's rows will have in it -> the most rows that can have it. An empty mapping: no
row will have a value. A column that is missing: nothing is known about it."""
MOST_LISTED = 12


def require_values(outlook: Outlook, setting: str, where: Mapping[str, Sequence[str]], columns: Sequence[str]) -> None:
    """Raise ``UsageError`` for a condition of ``where`` that no row can meet.

    ``setting`` names ``where``; ``columns`` are those that the rows have.
    """
    for column, values in where.items():
        require_column(setting, column, columns)
        known = outlook.get(column)
        if known is not None and not any(value in known for value in values):
            close = nearest(values[0], list(known)) if values else ""
            raise UsageError(
                f"{setting}.{column} is {list(values)}, and no row will have such a {column}{close}; there will be "
                f"{listed(known)}; name one of these, or give the corpus step's sources another {column} (columns, "
                "constants)"
            )


def require_column(setting: str, column: str, columns: Sequence[str]) -> None:
    """Raise ``UsageError`` unless ``columns`` have ``column``, which ``setting`` names."""
    if column not in columns:
        raise UsageError(
            f"{setting} names column {column!r}{nearest(column, list(columns))}; there are {', '.join(columns)}"
        )


def listed(values: Iterable[str]) -> str:
    """The first values in alphabetical order, for a message; ``none`` if there are none."""
    names = sorted(values)
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(map(repr, names[:MOST_LISTED])) + more if names else "none"
