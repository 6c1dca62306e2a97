"""Named extension points: weights, tasks, trackers, source formats, annotators, term embedders, index types, stages.

Third parties add to one through an entry point of group ``lookalike.<registry name>``.
"""

import difflib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from lookalike.errors import UsageError

T = TypeVar("T")


def nearest(name: str, valid: list[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Registry(Generic[T]):
    """Objects by name; duplicates are refused and unknown names explained."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an object under ``name``; ``ValueError`` if the name is taken."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.name} {name!r} is registered already; choose another name")
            self._items[name] = item
            return item

        return add

    def get(self, name: str) -> T:
        """The object under ``name``; ``UsageError`` with the valid names and the nearest if it is unknown."""
        if name in self._items:
            return self._items[name]
        plugins = {point.name: point for point in entry_points(group=f"lookalike.{self.name}")}
        if name in plugins:
            self._items[name] = plugins[name].load()
            return self._items[name]
        valid = sorted({*self._items, *plugins})
        raise UsageError(f"unknown {self.name} {name!r}{nearest(name, valid)}; valid: {', '.join(valid)}")

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))
