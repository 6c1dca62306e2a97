"""``lookalike``: a verb for each stage, and commands over recipes, artifacts and services.

This module knows stages and commands only by dotted name and imports them when their verb is called, so ``--help``
answers at once. Exit codes: 0 done, 1 failed, 2 wrong input, 3 artifact missing or damaged, 130 interrupted, 141 nobody
reads the output.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import lookalike
from lookalike.errors import LookalikeError
from lookalike.telemetry import printable_lines

STAGE_HELP = {
    "corpus": "read raw records, check every image, quarantine the bad ones",
    "encoder": "publish a backbone (packaged, from a file, or random) as an encoder, without training",
    "labels": "run the weak-label pipeline: annotations, dictionary, clusters, interests, near-duplicates",
    "shards": "write resampled, shuffled training shards",
    "pretrain": "train a backbone on weak labels (multi-label softmax, Ray Train DDP)",
    "finetune": "train the multi-task Matryoshka embedding",
    "embed": "embed a corpus with an encoder",
    "vectors": "take in vectors made elsewhere (.npy, parquet, Arrow, Lance, FAISS); --serve serves them",
    "evaluate": "measure retrieval per dimension against baselines",
    "classify": "measure what prefixes know of classes: probes, few shots, adaptive classification",
    "index": "build the sharded prefix index",
    "plan": "measure shortlist and re-rank plans and choose one",
}
COMMANDS = {
    "serve": ("run the retrieval service on this machine (gRPC)", "serve.commands.serve:serve"),
    "search": ("query a running service or an index on disk by image, vector or id", "serve.commands.search:search"),
    "token": ("make a bearer token of a tenant of the service", "serve.commands.token:token"),
    "admin": ("show or change what a running service serves", "serve.commands.admin:admin"),
    "experiment": ("compare the arms of a serving experiment by the access logs", "serve.experiment.report:experiment"),
    "export": ("write an encoder as a folder or hub repository, with ONNX", "train.publish.export:export"),
    "show": ("print an artifact with its lineage back to the corpus", "commands.show:show"),
    "verify": ("compare every file of artifacts with their manifests", "commands.verify:verify"),
    "run": ("run every step of a recipe", "commands.run:run"),
    "variants": ("run a recipe of variants: label counts beside retrieval (Table 2)", "commands.variants:variants"),
    "doctor": ("look at this machine: what would fail, and how to mend it", "commands.doctor:doctor"),
    "quickstart": ("run a whole recipe, serve it, query it, write a report", "serve.commands.quickstart:quickstart"),
}
"""Verb -> (help, object below the package ``lookalike``)."""
WITHOUT_RECIPE = {"vectors": "serve.commands.vectors:vectors"}
"""Stage verbs that also take files in place of a recipe -> the command that does."""
EXTRAS = {
    **dict.fromkeys(("wordllama", "py3langid", "sklearn"), "labels"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
}
"""Top-level module -> the extra that installs it; ``cpu`` or ``gpu`` installs all others."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    args = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: ids may hold what a terminal cannot show
    try:
        try:
            return _run(args)
        finally:  # what argparse prints as well, before Python ends and can only complain
            _flush()
    except OSError:
        if (failure := _drop_output()) is None:
            raise
        if isinstance(failure, BrokenPipeError):  # `lookalike show URI | head`
            return 141
        print(f"lookalike: the output cannot be written ({failure.strerror}); send it elsewhere", file=sys.stderr)
        return 1


def _flush() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()


def _drop_output() -> OSError | None:
    """Send what stdout and stderr cannot write to nowhere, and return the reason; None if both can write.

    They are tried with a line feed: after a failed ``print`` the buffer may be empty.
    """
    failure = None
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            print(file=stream, flush=True)
        except OSError as error:
            failure = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return failure


def _run(args: list[str]) -> int:
    try:
        return _dispatch(args)
    except LookalikeError as error:
        print(printable_lines(f"lookalike: {error}".replace("\n", "\n  ").split("\n")), file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "lookalike"):
            raise
        extra = EXTRAS.get(package, "cpu")
        print(f"lookalike: {package} is not installed; pip install 'lookalike[{extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lookalike: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _dispatch(args: list[str]) -> int:
    verb = args[0] if args else ""
    plugins = {point.name: point for point in entry_points(group="lookalike.command")}
    if verb in STAGE_HELP and not _takes_files(verb, args[1:]):
        from lookalike.commands.run import run_stage

        return run_stage(verb, f"{STAGE_HELP[verb].capitalize()}.", args[1:])
    if verb in STAGE_HELP or verb in COMMANDS or verb in plugins:
        from lookalike.stages import load_object
        from lookalike.telemetry import setup_logging

        setup_logging()
        own = WITHOUT_RECIPE.get(verb) or COMMANDS.get(verb, ("", ""))[1]
        command = load_object(f"lookalike.{own}") if own else plugins[verb].load()
        return int(command(args[1:]))
    return _top_level(args, plugins)


def _takes_files(verb: str, args: list[str]) -> bool:
    """Whether a stage verb is called with files of data: no recipe is among its arguments."""
    recipe = "--describe" in args or any(text.endswith((".yaml", ".yml")) for text in args)
    return verb in WITHOUT_RECIPE and not recipe


def _top_level(args: list[str], plugins: dict[str, Any]) -> int:
    parser = argparse.ArgumentParser(
        prog="lookalike",
        description=(lookalike.__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`lookalike VERB --help` explains a verb. Stages take a recipe and skip what is published already.",
    )
    parser.add_argument("--version", action="version", version=f"lookalike {lookalike.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, text in [*STAGE_HELP.items(), *((name, text) for name, (text, _) in COMMANDS.items())]:
        verbs.add_parser(name, help=text, add_help=False)
    for name in plugins:
        verbs.add_parser(name, help="(plug-in)", add_help=False)
    if args and not args[0].startswith("-"):
        from lookalike.registry import nearest

        parser.error(
            f"unknown verb {args[0]!r}{nearest(args[0], [*STAGE_HELP, *COMMANDS, *plugins])}; "
            "`lookalike --help` lists them"
        )
    parser.parse_args(args)  # --help, --version or no verb: each exits
    return 2


if __name__ == "__main__":
    sys.exit(main())
