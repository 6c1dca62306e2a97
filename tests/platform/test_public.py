"""The promise of ``import lookalike``: few names, loaded when they are used."""

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import lookalike
from lookalike.recipe import Recipe
from lookalike.serve.client import AsyncClient
from lookalike.serve.local import LocalClient

MOST = 15


def test_few_names_are_promised_and_each_is_there() -> None:
    assert len(lookalike.__all__) <= MOST
    assert lookalike.__all__ == sorted(lookalike.__all__)
    for name in lookalike.__all__:
        assert getattr(lookalike, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'encoder'; it exports \['Artifact', 'Client'"):
        lookalike.encoder  # noqa: B018


def test_importing_loads_nothing_heavy() -> None:
    script = "import lookalike, sys; print([m for m in ('torch', 'ray', 'numpy', 'pydantic') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


PUBLIC = [*(getattr(lookalike, name) for name in lookalike.__all__ if name != "__version__"), AsyncClient, LocalClient]


def of_several_texts(cls: Any) -> list[str]:
    """``method(argument: annotation)`` of the public methods whose argument holds texts, and is no mapping."""
    found = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                text = "" if argument.annotation is None else ast.unparse(argument.annotation)
                if "[str]" in text and not text.startswith(("Mapping[", "dict[")):
                    found.append(f"{node.name}({argument.arg}: {text})")
    return found


def test_where_several_texts_are_meant_one_is_accepted_and_never_its_letters(tmp_path: Path) -> None:
    found = {name for cls in PUBLIC for name in of_several_texts(cls)}
    assert {name.partition("(")[0] for name in found} == {"delete", "evaluate", "find", "load", "foresee", "of"}
    assert all(": str | " in name for name in found), found
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"{{name: r, root: {tmp_path}, steps: {{ab: {{stage: encoder, settings: {{backbone: test_efficientnet}}}}}}}}"
    )
    loaded = Recipe.load(str(recipe), "seed=3")
    assert loaded.seed == 3
    loaded.foresee("ab")
