"""A str is a sequence of letters: no function of data/ has an argument that may be one where several are meant."""

import ast
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "data"
LOOSE = {"Sequence", "Iterable", "Collection", "Container", "Reversible"}


def arguments(tree: ast.AST) -> Iterator[tuple[str, ast.arg]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]:
                yield node.name, argument


def is_loose(annotation: ast.AST) -> bool:
    """Whether a str fits: Sequence[str], or a union or a mapping with it."""
    return any(
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id in LOOSE
        and isinstance(node.slice, ast.Name)
        and node.slice.id == "str"
        for node in ast.walk(annotation)
    )


def test_no_argument_of_several_texts_may_be_one_text() -> None:
    found = [
        f"{path.name}: {function}({argument.arg})"
        for path in FOLDER.rglob("*.py")
        for function, argument in arguments(ast.parse(path.read_text()))
        if argument.annotation is not None and is_loose(argument.annotation)
    ]
    assert found == []


def test_a_loose_argument_would_be_found() -> None:
    tree = ast.parse("def f(a: list[str], b: Mapping[str, Sequence[str]], c: Iterable[str] | None) -> None: ...")
    assert [argument.arg for _, argument in arguments(tree) if is_loose(argument.annotation or tree)] == ["b", "c"]
