"""Reads one experiment from the access logs of all replicas."""

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
    """A request whose arm was decided by chance."""

    request_id: str
    arm: str
    session: str
    """Hash of the session; empty without one."""
    code: str
    duration_ms: float
    degraded: bool = False
    owners: dict[str, str] = field(default_factory=dict)
    """If interleaved: hash of a hit's id -> the arm that brought it."""

    @property
    def unit(self) -> str:
        """The unit that chance assigned to an arm: the session, or the request if it has none."""
        return self.session or self.request_id


@dataclass
class ExperimentLog:
    """Everything that the logs hold on one experiment."""

    settings: ExperimentSettings
    requests: list[LoggedRequest] = field(default_factory=list)
    feedback: set[tuple[str, str, str]] = field(default_factory=set)
    """(request_id, hash of the hit's id or "", kind); a set, because a client may send feedback twice."""
    forced: Counter[str] = field(default_factory=Counter)
    """Number of requests left out of the comparison, by reason."""
    closed: list[tuple[str, str]] = field(default_factory=list)
    """(arm, reason), once for each replica that closed it."""
    unreadable: int = 0
    """Number of lines that are cut off or damaged."""


def read_experiment_log(folder: str, name: str | None, kind: str | None = None) -> ExperimentLog:
    """Read experiment ``name`` (None: the only one) from the logs in ``folder`` and in folders below it.

    ``kind`` keeps only feedback of that kind. Raises ``UsageError`` if there is no experiment, or more than one.
    """
    root = Path(folder)
    paths = sorted(root.rglob("access-*.jsonl*"))
    if not paths:
        raise UsageError(
            f"{folder} holds no access-*.jsonl; give the folder of access_log.folder, or one with "
            "the collected logs of all replicas"
        )
    log = ExperimentLog(_read_settings(root, name))
    for line in _read_lines(paths, log):
        try:
            if line.get("method") == "Feedback" and line.get("code") == "OK":
                if kind in (None, line.get("kind")):
                    log.feedback.add((line["request_id"], line.get("id", ""), line["kind"]))
            elif line.get("experiment") == log.settings.name:
                _take(line, log)
        except (KeyError, TypeError, AttributeError):  # JSON, but not one of our lines
            log.unreadable += 1
    if not log.requests:
        raise UsageError(f"the access logs in {folder} have no request of experiment {log.settings.name!r}")
    return log


def _read_settings(root: Path, name: str | None) -> ExperimentSettings:
    by_name: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("experiment-*.json")):
        by_name.setdefault(path.stem.removeprefix("experiment-").rpartition("-")[0], []).append(path)
    if name is None and len(by_name) > 1:
        raise UsageError(f"{root} has the experiments {', '.join(by_name)}; choose one with --experiment")
    if not by_name or (name is not None and name not in by_name):
        raise UsageError(
            f"no experiment-{name or '*'}-*.json in {root}{nearest(name or '', list(by_name))}; replicas "
            "write it beside their access log, copy it along"
        )
    name = name or next(iter(by_name))
    paths = by_name[name]
    contents = {path.read_text(encoding="utf-8"): path for path in paths}
    if len(contents) > 1:
        raise UsageError(
            f"experiment {name!r} has changed while it ran "
            f"({', '.join(path.name for path in contents.values())}); a changed experiment needs a new "
            "name: keep one of the files and its logs"
        )
    try:
        values = json.loads(next(iter(contents)))
    except ValueError as error:
        raise UsageError(f"{paths[0]} is not JSON ({error}); copy it from the replica again") from None
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
    elif line["code"] != "CANCELLED":  # the caller left and saw no answer
        hits = [(hit, arm) for arm, ids in line.get("shown", {}).items() for hit in ids]
        times = Counter(hit for hit, _ in hits)
        owners = {hit: arm for hit, arm in hits if times[hit] == 1}  # queries of a batch may share a hit
        session, degraded = line.get("session", ""), line.get("degraded", False)
        log.requests.append(
            LoggedRequest(line["request_id"], line["arm"], session, line["code"], line["ms"], degraded, owners)
        )
