"""``lookalike serve``."""

import atexit
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lookalike.config import Config, apply_overrides, parse_config
from lookalike.errors import ArtifactError, UsageError
from lookalike.flags import Parser
from lookalike.recipe import Recipe, read_values
from lookalike.registry import nearest
from lookalike.serve.commands.check_config import IMPORT_PATH, check_file
from lookalike.serve.commands.supervisor import ServiceLostError, Supervisor
from lookalike.serve.settings.config import ServeConfig
from lookalike.telemetry import printable, printable_lines

if TYPE_CHECKING:
    from lookalike.serve.front.tls import Proxy

END_WITHIN_S = 4.0
"""Longest time that a lost service in a cluster of others is waited for to end, in seconds."""


def serve(args: Sequence[str]) -> int:
    """Serve an index from this machine until Ctrl-C or SIGTERM; or check and print settings."""
    parser = Parser(prog="lookalike serve", description="Serve an index over gRPC.")
    parser.add_argument("recipe", nargs="?", help="recipe YAML; its serve: section holds the settings")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings of the service, as in port=0 limits.max_k=50; with a recipe also the recipe's, as in root=...",
    )
    parser.add_argument("--index", help="URI of the index to serve; default: the recipe's step of stage index")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the settings; serve nothing")
    parser.add_argument(
        "--check-config",
        metavar="FILE",
        help="read a Serve config file or a RayService manifest, "
        "refuse keys that Serve would ignore and values that it would reject; serve nothing",
    )
    parser.add_argument("--emit-config", action="store_true", help="print the YAML for `serve deploy` (serveConfigV2)")
    options = parser.parse_intermixed_args(args)
    if options.recipe and "=" in options.recipe and not Path(options.recipe).exists():
        options.overrides, options.recipe = [options.recipe, *options.overrides], None
    if options.check_config:
        print(printable_lines(check_file(options.check_config)))
        return 0
    config = resolve(options.recipe, options.overrides, options.index, in_cluster=options.emit_config)
    if options.emit_config:
        print(emit_config(config), end="")
        return 0
    if options.dry_run:
        print(json.dumps(config.model_dump(mode="json"), indent=1))
        return 0
    from lookalike.serve.front.guard import private_files

    with private_files():
        return _serve_until_stopped(config)


def resolve(
    recipe_path: str | None, overrides: Sequence[str], index: str | None, *, in_cluster: bool = False
) -> ServeConfig:
    """Return the settings of a service from a recipe, overrides and an index, after checking that artifacts fit.

    An override of a service's setting goes to the service, the others to the recipe. In a cluster callers come from
    other machines, so ``loopback_only`` is false there unless it is set.
    """
    own = [text for text in overrides if is_setting(text.partition("=")[0])]
    others = [text for text in overrides if text not in own]
    _refuse_unknown(others, recipe_path)
    values = {} if recipe_path is None else _from_recipe(recipe_path, others)
    if index is not None:  # the recipe's plan and encoder belong to the recipe's index
        values = {key: value for key, value in values.items() if key not in ("plan", "encoder")} | {"index": index}
    values = apply_overrides(values, own)
    if "index" not in values:
        raise UsageError("nothing to serve; give a recipe or --index URI")
    if in_cluster:
        values.setdefault("loopback_only", False)
    config = parse_config(ServeConfig, values, "serve")
    from lookalike.serve.app import read_service
    from lookalike.serve.experiment.assignment import read_arms
    from lookalike.serve.front.guard import check_guard

    check_guard(config)
    read_arms(config, read_service(config))
    return config


def is_setting(key: str) -> bool:
    """Whether a dotted key is a setting of the service: ``index`` is, ``index.num_shards`` belongs to a step."""
    head, dot, _ = key.partition(".")
    field = ServeConfig.model_fields.get(head)
    return field is not None and (not dot or isinstance(field.default, Config))


def _refuse_unknown(overrides: list[str], recipe_path: str | None) -> None:
    """Raise ``UsageError`` for an override that is neither the service's nor a key or step of the recipe."""
    valid: set[str] = set()
    if recipe_path is not None:
        steps = read_values(recipe_path).get("steps")
        valid = {*Recipe.model_fields, *(steps if isinstance(steps, dict) else ())}
    settings = list(ServeConfig.model_fields)
    for text in overrides:
        head = text.partition("=")[0].partition(".")[0]
        if head not in valid:
            also = ", nor of the recipe" if valid else ""
            raise UsageError(
                f"{text!r} is not a setting of the service{also}{nearest(head, settings)}; the service has "
                f"{', '.join(settings)}"
            )


def _from_recipe(path: str, overrides: list[str]) -> dict[str, Any]:
    recipe = Recipe.load(path, overrides)
    values = dict(recipe.serve)
    for key in ("index", "plan"):
        steps = [name for name, step in recipe.steps.items() if step.stage == key]
        if key in values or not steps:
            continue
        if len(steps) > 1:
            raise UsageError(
                f"recipe {recipe.name!r} has {len(steps)} {key!r} steps ({', '.join(steps)}); set "
                f"serve.{key} to the URI of one"
            )
        artifact = recipe.published(steps[0])
        if artifact is None:
            raise ArtifactError(f"step {steps[0]!r} is not published yet; run `lookalike {key} {path}` first")
        values[key] = artifact.uri
    return values


def emit_config(config: ServeConfig) -> str:
    """Return the Serve config file (for ``serve deploy``, or ``serveConfigV2`` of a RayService) that runs ``config``.

    In a cluster callers come from other machines, so ``loopback_only`` is false unless it was set on purpose.
    """
    from lookalike.serve.front.listener import SERVICERS

    args = config.model_dump(mode="json", exclude_defaults=True, exclude={"port", "tls"})
    args["loopback_only"] = config.loopback_only and "loopback_only" in config.model_fields_set
    application = {"name": "lookalike", "route_prefix": "/", "import_path": IMPORT_PATH, "args": args}
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "grpc_options": {"port": config.port or 9000, "grpc_servicer_functions": SERVICERS},
        "logging_config": {"enable_access_log": False},
        "applications": [application],
    }
    return yaml.safe_dump(document, sort_keys=False)


def _serve_until_stopped(config: ServeConfig) -> int:
    from lookalike.serve.app import free_port, start, stop
    from lookalike.serve.front.tls import proxy

    stopped = threading.Event()
    tls = config.tls.model_copy(update={"port": free_port(config.tls.port)}) if config.tls.enabled else None
    address = start(config)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # after start, where Ray sets its own SIGTERM handler
            signal.signal(number, lambda *_: stopped.set())
        with nullcontext() if tls is None else proxy(tls, int(address.rpartition(":")[2])) as encrypted:
            also = "" if encrypted is None else f" and by TLS at {encrypted.address}"
            print(f"serving {printable(config.index)} at {address}{also}; Ctrl-C stops it", flush=True)
            _watch(address, encrypted, stopped)
    except ServiceLostError as lost:
        print(f"lookalike: {lost}", file=sys.stderr, flush=True)  # first: what follows may take a while
        _abandon()
        atexit.register(_end_at_once, lost.exit_code)
        return lost.exit_code
    except BaseException:
        stop()
        raise
    stop()
    return 0


def _watch(address: str, encrypted: "Proxy | None", stopped: threading.Event) -> None:
    """Return when the service is told to stop; raises if it cannot go on."""
    from lookalike.cluster import Part, look_at, ray_parts
    from lookalike.serve.app import read_work

    def find_parts() -> list[Part]:
        own = [] if encrypted is None else [look_at("the TLS proxy", encrypted.process)]
        return [*ray_parts(), *own]

    supervisor = Supervisor(address, find_parts=find_parts, read_work=read_work)
    while not stopped.wait(0.5):
        if encrypted is not None:
            encrypted.check()
        supervisor.check()


def _end_at_once(exit_code: int) -> None:
    """End this process without what Ray does at its end: that waits for the parts that are lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _abandon() -> None:
    """End what is left of a service, no part of which can be asked to end; each may hang."""
    from lookalike.cluster import is_joined, kill_ray
    from lookalike.serve.app import stop

    if not is_joined():
        kill_ray()
        return
    ending = threading.Thread(target=stop, daemon=True)
    ending.start()
    ending.join(END_WITHIN_S)
