"""Where an administrator may send the service: roots below which it opens artifacts and writes backups.

A token of the role ``admin`` decides what is served. It does not make the service read or write anything else that its
user, or its machine, can reach.
"""

from collections.abc import Iterable, Sequence

from lookalike import storage
from lookalike.serve.generations.generation import Generation
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import refused, shorten


def artifact_roots(config: ServeConfig, generation: Generation) -> list[str]:
    """Roots of the artifacts that the service starts with, the folder of the writes, and ``writes.roots``."""
    named = (generation.index, generation.plan, generation.encoder)
    return [*(_root_of(uri) for uri in named if uri is not None), *backup_roots(config)]


def backup_roots(config: ServeConfig) -> list[str]:
    """The folder of the writes, and ``writes.roots``."""
    return [root for root in (config.writes.state, *config.writes.roots) if root is not None]


def check_below(what: str, uris: Iterable[str | None], roots: Sequence[str]) -> None:
    """Raise FAILED_PRECONDITION unless each of ``uris`` that is not None lies below one of ``roots``.

    The message does not tell whether there is anything: an administrator of the service need not know the machine.
    """
    for uri in uris:
        if uri is not None and not any(_is_below(uri, root) for root in roots):
            raise refused(
                f"{what} {shorten(uri)}: for this service it is not there, because it looks only below "
                f"{' or '.join(dict.fromkeys(map(shorten, roots)))}; put it there, or add its root to writes.roots"
            )


def _root_of(uri: str) -> str:
    """The root of an artifact at ``<root>/<kind>/<name>/<fingerprint>``; never the root of a disk or a bucket list."""
    scheme, sign, path = uri.rpartition("://")
    parts = path.rstrip("/").split("/")
    for num in (3, 2, 1):
        if any(kept := parts[: len(parts) - num]):
            return f"{scheme}{sign}{'/'.join(kept)}"
    return uri


def _is_below(uri: str, root: str) -> bool:
    if not uri or "::" in uri:  # fsspec would open a chain of file systems
        return False
    if _is_on_disk(uri) or _is_on_disk(root):
        both = _is_on_disk(uri) and _is_on_disk(root)
        return both and storage.is_below(storage.local_path(uri), storage.local_path(root))
    folder = f"{root.rstrip('/')}/"
    return uri.startswith(folder) and storage.is_plain(uri.removeprefix(folder).rstrip("/"))


def _is_on_disk(uri: str) -> bool:
    """As ``storage.is_local``, but for stores whose package is not installed, too."""
    return "://" not in uri or uri.startswith("file://")
