"""Model repositories: ``hf://owner/name[@revision]`` is an exported encoder on a hub, fetched once into a cache.

Works against the hub that ``HF_ENDPOINT`` names, with the token of ``HF_TOKEN`` or of ``hf auth login``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lookalike import storage
from lookalike.errors import LookalikeError, UsageError

SCHEME = "hf://"
FILES = ["*.json", "*.safetensors", "*.md"]
"""Files of a repository that loading needs; ONNX files are not fetched."""


def is_hub(uri: str) -> bool:
    """Whether ``uri`` names a repository on a hub."""
    return uri.startswith(SCHEME)


def is_cached(path: str) -> bool:
    """Whether a local path lies in the cache, whose snapshots are links to its blobs."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return storage.is_below(path, HF_HUB_CACHE)


def split(uri: str) -> tuple[str, str | None]:
    """(``owner/name``, revision or None) of a hub URI; ``UsageError`` for another form."""
    repository, _, revision = uri.removeprefix(SCHEME).rstrip("/").partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"{uri!r} names no repository; write hf://owner/name or hf://owner/name@revision")
    return repository, revision or None


def fetch(uri: str) -> str:
    """The local folder of a hub URI, downloaded unless it is in the cache; other URIs are returned unchanged.

    Raises ``LookalikeError`` if the hub refuses or cannot be reached.
    """
    if not is_hub(uri):
        return uri
    repository, revision = split(uri)
    import huggingface_hub

    with _explained("fetched from", repository):
        return str(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=FILES))


def push(folder: str, uri: str, *, message: str, public: bool = False) -> str:
    """Upload a local folder as one commit and return the commit's URL. A new repository is private unless ``public``.

    Raises ``LookalikeError`` if the hub cannot be reached or there is no token with write access.
    """
    repository, revision = split(uri)
    import huggingface_hub

    api: Any = huggingface_hub.HfApi()
    with _explained("pushed to", repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=message)
    return str(commit.commit_url)


@contextmanager
def _explained(what: str, repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client raises its own errors, those of its HTTP library, and the system's
        message = " ".join(str(error).split())[:200] or "no message"
        raise LookalikeError(
            f"nothing was {what} {repository} on the hub: {type(error).__name__}: {message}; check the name, the "
            "network (HF_ENDPOINT for your own hub) and the token (HF_TOKEN, or `hf auth login`), or use a folder"
        ) from error
