"""``lookalike vectors FILE``: vectors made elsewhere -> index -> plan -> served, with defaults.

It runs the first step and writes a recipe, whose other steps the verbs ``index``, ``plan`` and ``serve`` take one by
one; with ``--serve`` it runs all of them.
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from lookalike import storage
from lookalike.commands.run import print_dry_run
from lookalike.config import apply_overrides, parse_config
from lookalike.errors import UsageError
from lookalike.flags import Parser
from lookalike.recipe import Recipe, run_steps
from lookalike.serve.commands.serve import is_setting, serve
from lookalike.serve.settings.config import ServeConfig
from lookalike.telemetry import printable

RECIPE = "recipe.yaml"
NOTE = "# Written by `lookalike vectors`, which writes it again each time: copy it before you change it.\n"
SHORTLIST_FROM = 8
"""Shortlists are built over prefixes from this share of the vector on: 1/8 of a nested one."""
STEPS = ("vectors", "index", "plan")


def vectors(args: Sequence[str]) -> int:
    """Take in vectors; with ``--serve`` index, plan and serve them too."""
    options = read_arguments(args)
    name = _name_of(options.file[0])
    root = options.root or f"runs/{name}"
    values = apply_overrides(build_values(name, root, options), [_full(text) for text in options.set])
    recipe = read_recipe(values)
    if options.dry_run:
        print_dry_run(recipe, ["vectors"])
        return 0
    if options.serve:
        prepare_service(recipe)
    embeddings = recipe.run_step("vectors")
    settings = values["steps"]["index"].setdefault("settings", {})
    settings.setdefault("shortlist_dims", choose_shortlists(**_facts(embeddings.read_json("meta.json"))))
    path = storage.join(root, RECIPE)
    storage.write_atomic(path, (NOTE + yaml.safe_dump(values, sort_keys=False)).encode())
    if not options.serve:
        quoted = shlex.quote(path)
        print(printable(embeddings.uri))
        print(f"next: lookalike index {quoted}; lookalike plan {quoted}; lookalike serve {quoted}")
        return 0
    run_steps(Recipe.load(path))
    return serve([path])


def read_arguments(args: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = Parser(
        prog="lookalike vectors",
        description="Take in vectors made elsewhere, and serve them. With a recipe (.yaml) in place of files: run its "
        "steps of stage vectors.",
    )
    files = "files of .npy, .npz, .parquet, .arrow, .feather, .lance or .faiss, a folder of them, or a pattern"
    parser.add_argument("file", nargs="+", help=files)
    parser.add_argument("--table", help="parquet, Arrow, CSV, TSV or JSON lines with ids and columns of the vectors")
    ids = "column of the ids, in the table if there is one (default: image_id, id, _id, ids, key or pk)"
    parser.add_argument("--id-column", metavar="COLUMN", help=ids)
    lists = "column of the vectors (default: the only one with lists of numbers)"
    parser.add_argument("--vector-column", metavar="COLUMN", help=lists)
    parser.add_argument("--array", metavar="NAME", help="array of an .npz that holds several")
    column = "take embeddings' column NAME (title, group, category ...) from this COLUMN"
    parser.add_argument("--column", action="append", default=[], metavar="NAME=COLUMN", help=column)
    parser.add_argument("--model", help="name of the model that made them (default: the name of the file)")
    parser.add_argument("--licence", help="licence of the vectors, for their card")
    parser.add_argument("--nested", action="store_true", help="the model was trained nested (Matryoshka)")
    bad = "stop at rows that cannot be taken, or list them and leave them out (default: %(default)s)"
    parser.add_argument("--on-bad", choices=("stop", "quarantine"), default="stop", help=bad)
    parser.add_argument("--root", help="where artifacts and the recipe go (default: runs/NAME)")
    more = "any other setting of a step or the service: index.dtype=int8, plan.target=0.95, port=0"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=more)
    parser.add_argument("--serve", action="store_true", help="then index and plan them, and serve them until Ctrl-C")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, run nothing")
    return parser.parse_args(list(args))


def build_values(name: str, root: str, options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of the options, as plain values."""
    given = {key: getattr(options, key) for key in ("vector_column", "array", "licence")}
    settings: dict[str, Any] = {"uri": [storage.absolute(uri) for uri in options.file]}
    settings |= {"model": options.model or name, "on_bad": options.on_bad}
    settings |= {key: value for key, value in given.items() if value is not None}
    settings |= {"nested": True} if options.nested else {}
    if options.column:
        settings["columns"] = dict(_read_pair(text) for text in options.column)
    ids = {} if options.id_column is None else {"id_column": options.id_column}
    if options.table is None:
        settings |= ids
    else:
        settings["table"] = {"uri": storage.absolute(options.table), **ids}
    steps = {
        "vectors": {"stage": "vectors", "settings": settings},
        "index": {"stage": "index", "inputs": {"embeddings": "vectors"}},
        "plan": {"stage": "plan", "inputs": {"index": "index", "queries": "vectors"}},
    }
    return {"name": name, "root": root, "steps": steps}


def read_recipe(values: dict[str, Any]) -> Recipe:
    """The recipe of plain values; raises ``UsageError`` as for one that was written by hand."""
    recipe = parse_config(Recipe, values, "lookalike vectors")
    recipe = recipe.model_copy(update={"root": storage.absolute(recipe.root)})
    recipe.check_steps()
    return recipe


def prepare_service(recipe: Recipe) -> None:
    """Check the settings of the service, and that its port is free, before the index that it waits for is built."""
    config = parse_config(ServeConfig, {"index": "built by then", **recipe.serve}, "serve")
    from lookalike.serve.app import allow_messages, free_port

    allow_messages(config)
    free_port(config.port)


def choose_shortlists(dims: Sequence[int], *, nested: bool) -> list[int]:
    """Prefixes to build shortlists over: of a nested model from 1/8 of the vector on, else from 1/2 on."""
    full = dims[-1]
    least = full / (SHORTLIST_FROM if nested else 2)
    return [dim for dim in dims if least <= dim and (dim < full or not nested or len(dims) == 1)] or [full]


def _facts(meta: dict[str, Any]) -> dict[str, Any]:
    return {"dims": meta["dims"], "nested": meta["nested"]}


def _name_of(uri: str) -> str:
    """A name for the artifacts: the file's, without its ending and what no folder's name should have."""
    last = [part for part in uri.rstrip("/").split("/") if not set(part) & set("*?[")][-1:]
    stem = last[0].partition(".")[0] if last else ""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "vectors"


def _full(text: str) -> str:
    """An override of the recipe for one of a step's or the service's settings."""
    head = text.partition("=")[0].partition(".")[0]
    if head in STEPS and "." in text.partition("=")[0]:
        return f"steps.{head}.settings.{text.partition('.')[2]}"
    if is_setting(text.partition("=")[0]):
        return f"serve.{text}"
    if head in Recipe.model_fields:
        return text
    raise UsageError(
        f"--set {text!r} names no setting; write STEP.key=value with a step of {', '.join(STEPS)}, or "
        "a setting of the service, such as port=0"
    )


def _read_pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise UsageError(f"--column {text!r} is not NAME=COLUMN, as in title=caption")
    return name, column
