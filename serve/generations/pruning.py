"""Removes results of compactions that no served index needs, so that they do not fill the disk."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from lookalike import storage
from lookalike.artifacts import MANIFEST, Artifact
from lookalike.errors import ArtifactError
from lookalike.serve.generations.compaction import COMPACTING, ROOT, find_embeddings
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)


def prune(folder: str, held: Sequence[str], keep_s: float) -> list[str]:
    """Remove the indexes and embeddings that compactions published in the service's ``folder`` more than ``keep_s``
    seconds ago, but for the indexes ``held`` (URIs) and the embeddings that these were made from; what was removed.

    Files that others share by hard links stay theirs. An artifact that was only partly removed does not open.
    """
    needed, oldest, removed = set(map(_mark, needed_by(held))), time.time() - keep_s, []
    for kind in ("index", "embeddings"):
        for manifest in sorted(Path(folder, ROOT, kind).glob(f"*/*/{MANIFEST}")):
            uri = str(manifest.parent)
            if _mark(uri) not in needed and manifest.stat().st_mtime < oldest:
                manifest.unlink()
                storage.remove_tree(uri)
                removed.append(uri)
    if removed:
        log.info("pruned %s", fields(removed=len(removed), folder=folder))
    return removed


def prune_drafts(folder: str, held: Sequence[str]) -> list[str]:
    """Remove what failed and killed compactions left in the service's ``folder``; what was removed.

    That is drafts, and embeddings of which no index was made and that none of the indexes ``held`` (URIs) needs. A
    compaction that is under way, here or in another process, keeps everything.
    """
    root = Path(folder, ROOT)
    lock = storage.try_lock(root / COMPACTING) if root.is_dir() else None
    if lock is None:
        return []
    with lock:
        drafts = [path for path in root.glob("*/*/*") if path.is_dir() and not (path / MANIFEST).exists()]
        removed = [str(path) for path in [*drafts, *_unused_embeddings(root, held)]]
        for uri in removed:
            Path(uri, MANIFEST).unlink(missing_ok=True)
            storage.remove_tree(uri)
    if removed:
        log.info("pruned drafts %s", fields(removed=len(removed), folder=folder))
    return removed


def _unused_embeddings(root: Path, held: Sequence[str]) -> list[Path]:
    indexes = [str(path.parent) for path in root.glob(f"index/*/*/{MANIFEST}")]
    needed = set(map(_mark, needed_by([*held, *indexes])))
    return [path.parent for path in root.glob(f"embeddings/*/*/{MANIFEST}") if _mark(str(path.parent)) not in needed]


def needed_by(held: Sequence[str]) -> Iterable[str]:
    """The indexes ``held`` and the embeddings that they were made from."""
    for uri in held:
        yield uri
        try:
            yield find_embeddings(Artifact.open(uri, "index", check=False)).uri
        except ArtifactError as error:
            log.warning("no embeddings to keep %s", fields(index=uri, reason=str(error)[:200]))


def _mark(uri: str) -> tuple[str, ...]:
    """Kind, name and fingerprint: the same by whatever path a folder is reached."""
    return tuple(uri.rstrip("/").split("/")[-3:])
