"""YAML of strangers: read as plain values, in bounded time and memory, with errors that name file and line.

YAML lets a short text stand for an endless one: an alias repeats a value, nested aliases multiply, merge keys copy. A
document is therefore measured while it is composed, each alias as large as what it repeats, and refused before any
value is built.
"""

from typing import Any

import yaml

from lookalike.errors import UsageError

MOST_BYTES = 1 << 20
"""Size of a document; our own recipes have at most 10 kB. With its aliases written out it may have twice as many
characters, where each value counts ``VALUE_CHARS`` and its own length."""
VALUE_CHARS = 32
DEEPEST = 64
"""Values inside each other."""


class _Bound(yaml.MarkedYAMLError):
    def __init__(self, event: Any, problem: str) -> None:
        super().__init__(problem=problem, problem_mark=event.start_mark)


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses documents above the bounds, and values that contain themselves."""

    def __init__(self, stream: str | bytes, most_chars: int) -> None:
        super().__init__(stream)
        self._depth, self._most_chars = 0, most_chars
        self._sizes: dict[yaml.Node, int] = {}  # of finished nodes, aliases written out
        self._seen = 0  # size of all nodes so far, each once

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > DEEPEST:
            raise _Bound(event, f"values lie more than {DEEPEST} deep inside each other; flatten them")
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        assert node is not None
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                raise _Bound(event, "an alias stands inside its own value; write the value out")
            return node
        if isinstance(node, yaml.MappingNode):
            inside = sum(self._sizes[key] + self._sizes[value] for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            inside = sum(map(self._sizes.__getitem__, node.value))
        else:
            inside = len(node.value)
            self._seen += inside
        size = VALUE_CHARS + inside
        self._seen += VALUE_CHARS
        if max(size, self._seen) > self._most_chars:
            most = f"more than {self._most_chars // VALUE_CHARS:,} values or {self._most_chars:,} characters"
            raise _Bound(event, f"with aliases written out it has {most}; repeat less, or split the file")
        self._sizes[node] = size
        if self._depth == 0:
            self._most_chars, self._seen = self._most_chars - size, 0  # what is left for further documents
        return node


def parse_yaml(content: str | bytes, where: str, most_bytes: int = MOST_BYTES, *, secret: bool = False) -> Any:
    """The plain value of a YAML or JSON document; ``UsageError`` names ``where``, the line, the problem.

    ``secret``: the error names the place alone, because the text there may be a token.
    """
    documents = parse_documents(content, where, most_bytes, secret=secret)
    if len(documents) > 1:
        raise UsageError(f"{where} holds {len(documents)} YAML documents; keep one")
    return documents[0] if documents else None


def parse_documents(
    content: str | bytes, where: str, most_bytes: int = MOST_BYTES, *, secret: bool = False
) -> list[Any]:
    """The plain values of all documents of a YAML text; see :func:`parse_yaml`."""
    if len(content) > most_bytes:
        raise UsageError(f"{where} is {len(content):,} bytes of YAML; at most {most_bytes:,} are read: split the file")
    try:
        loader = _Loader(content, 2 * most_bytes)
        documents = []
        while loader.check_data():  # type: ignore[no-untyped-call]
            documents.append(loader.get_data())  # type: ignore[no-untyped-call]
        return documents
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f": line {mark.line + 1}, column {mark.column + 1}"
        problem = ": ".join(filter(None, (error.context, error.problem)))
        shown = "" if secret and not isinstance(error, _Bound) else f": {problem}"
        raise UsageError(f"{where} is not valid YAML{place}{shown}") from None
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError) as error:
        # ill-formed bytes; dates, numbers and tags that look like some but are none
        shown = "" if secret else f": {' '.join(str(error).split())}"
        raise UsageError(f"{where} is not valid YAML{shown}") from None
