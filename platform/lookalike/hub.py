"""Model repositories: ``hf://owner/name[@revision]`` is an exported encoder on a hub, fetched once into a cache.

Works against the hub that ``HF_ENDPOINT`` names, with the token of ``HF_TOKEN`` or of ``hf auth login``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lookalike.errors import LookalikeError, UsageError

SCHEME = "hf://"
FILES = ["*.json", "*.safetensors", "*.md"]
"""What loading needs of a repository; ONNX files stay where they are."""


def is_hub(uri: str) -> bool:
    """Whether ``uri`` names a repository on a hub."""
    return uri.startswith(SCHEME)


def split(uri: str) -> tuple[str, str | None]:
    """(``owner/name``, revision or None) of a hub URI; another form raises ``UsageError``."""
    repository, _, revision = uri.removeprefix(SCHEME).rstrip("/").partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"{uri!r} names no repository; write hf://owner/name or hf://owner/name@revision")
    return repository, revision or None


def fetch(uri: str) -> str:
    """The local folder of a hub URI, downloaded when it is not in the cache; any other URI as it is.

    Raises ``LookalikeError`` when the hub cannot be reached, or refuses.
    """
    if not is_hub(uri):
        return uri
    repository, revision = split(uri)
    import huggingface_hub

    with _explained("fetched from", repository):
        return str(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=FILES))


def push(folder: str, uri: str, *, message: str, public: bool = False) -> str:
    """Upload a local folder as one commit; a repository that is new is private unless ``public``. The commit's URL.

    Raises ``LookalikeError`` when the hub cannot be reached, or there is no token that may write.
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
    except Exception as error:  # the client raises its own errors, its HTTP library's, and the system's
        said = " ".join(str(error).split())[:200] or "no message"
        raise LookalikeError(
            f"nothing was {what} {repository} on the hub: {type(error).__name__}: {said}; check the name, the network "
            "(HF_ENDPOINT for a hub of your own) and the token (HF_TOKEN, or `hf auth login`), or use a folder instead"
        ) from error
