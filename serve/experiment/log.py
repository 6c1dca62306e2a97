"""Reads the access logs of all replicas for one experiment."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.registry import nearest
from lookalike.serve.settings.watching import ExperimentSettings


@dataclass(slots=True)
class LoggedRequest:
    """One request that the experiment's chance has given its arm."""

    request_id: str
    arm: str
    session: str
    """Hash of the session; empty without one."""
    code: str
    duration_ms: float
    degraded: bool = False
    owners: dict[str, str] = field(default_factory=dict)
    """Interleaved: hash of a hit's id -> the arm that brought it."""

    @property
    def unit(self) -> str:
        """What chance was asked for: the session, or the request without one."""
        return self.session or self.request_id


@dataclass
class ExperimentLog:
    """All that the logs say of an experiment."""

    settings: ExperimentSettings
    requests: list[LoggedRequest] = field(default_factory=list)
    feedback: set[tuple[str, str, str]] = field(default_factory=set)
    """(request_id, hash of the hit's id or "", kind), each once: a client may have told it twice."""
    forced: Counter[str] = field(default_factory=Counter)
    """Requests that are no part of the comparison, by reason."""
    closed: list[tuple[str, str]] = field(default_factory=list)
    """(arm, what it broke), once for each replica that closed it."""
    unreadable: int = 0
    """Lines that are cut off or damaged."""


def read_experiment_log(folder: str, name: str | None, kind: str | None = None) -> ExperimentLog:
    """What the logs in ``folder``, and in folders below it, say of experiment ``name`` (the only one, if None).

    ``kind`` keeps feedback of that kind. Raises ``UsageError`` when there is nothing to read, or more than one.
    """
    root = Path(folder)
    paths = sorted(root.rglob("access-*.jsonl*"))
    if not paths:
        raise UsageError(
            f"{folder} holds no access-*.jsonl; give the folder that access_log.folder names, or one into "
            "which you have collected those of all replicas"
        )
    log = ExperimentLog(_read_settings(root, name))
    for line in _read_lines(paths, log):
        try:
            if line.get("method") == "Feedback" and line.get("code") == "OK":
                if kind in (None, line.get("kind")):
                    log.feedback.add((line["request_id"], line.get("id", ""), line["kind"]))
            elif line.get("experiment") == log.settings.name:
                _take(line, log)
        except (KeyError, TypeError, AttributeError):  # JSON, and no line of ours
            log.unreadable += 1
    if not log.requests:
        raise UsageError(f"the access logs in {folder} have no request of experiment {log.settings.name!r}")
    return log


def _read_settings(root: Path, name: str | None) -> ExperimentSettings:
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("experiment-*.json")):
        found.setdefault(path.stem.removeprefix("experiment-").rpartition("-")[0], []).append(path)
    if name is None and len(found) > 1:
        raise UsageError(f"{root} has the experiments {', '.join(found)}; choose one with --experiment")
    if not found or (name is not None and name not in found):
        raise UsageError(
            f"no experiment-{name or '*'}-*.json in {root}{nearest(name or '', list(found))}; replicas "
            "write one beside their access log, copy it along"
        )
    paths = found[name or next(iter(found))]
    contents = {path.read_text(encoding="utf-8"): path for path in paths}
    if len(contents) > 1:
        raise UsageError(
            f"experiment {name or next(iter(found))!r} has changed while it ran "
            f"({', '.join(path.name for path in contents.values())}); a changed experiment needs a new "
            "name: keep the file, and the logs, of one"
        )
    try:
        values = json.loads(next(iter(contents)))
    except ValueError as error:
        raise UsageError(f"{paths[0]} is no JSON ({error}); copy it from the replica again") from None
    return parse_config(ExperimentSettings, values, str(paths[0]))


def _read_lines(paths: list[Path], log: ExperimentLog) -> Iterator[dict[str, Any]]:
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for text in lines:
                try:
                    line = json.loads(text) if text.strip() else {}
                except ValueError:
                    line = None
                if isinstance(line, dict):
                    yield line
                else:
                    log.unreadable += 1


def _take(line: dict[str, Any], log: ExperimentLog) -> None:
    if line["method"] == "Guardrail":
        log.closed.append((line["arm"], line["reason"]))
    elif "forced" in line:
        log.forced[line["forced"]] += 1
    elif line["code"] != "CANCELLED":  # the caller has gone: no answer was seen
        shown = [(one, arm) for arm, ids in line.get("shown", {}).items() for one in ids]
        often = Counter(one for one, _ in shown)
        owners = {one: arm for one, arm in shown if often[one] == 1}  # of a batch's queries, several may share a hit
        log.requests.append(
            LoggedRequest(
                line["request_id"],
                line["arm"],
                line.get("session", ""),
                line["code"],
                line["ms"],
                line.get("degraded", False),
                owners,
            )
        )
