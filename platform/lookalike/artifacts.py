"""Artifacts: the only thing that passes from one stage to the next.

``<root>/<kind>/<name>/<fingerprint>/`` holds data files and ``manifest.json``. The manifest is written last and commits
the artifact: a folder without it is a draft, which no reader accepts. The fingerprint hashes the configuration and the
parents' digests, so the same inputs lead to the same folder, and the stage is skipped.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pyarrow.parquet as pq
from pydantic import ValidationError, field_validator

import lookalike
from lookalike import hub, storage
from lookalike.config import Config
from lookalike.errors import ArtifactError, ForeignArtifactError, UsageError

FORMAT_VERSION = 2  # 2 has a checksum
MANIFEST = "manifest.json"
FOLDER = "<root>/<kind>/<name>/<fingerprint>"
REMEDY = "remove the folder and run its stage again, or restore it from a copy"
WORK = "_work"  # a draft's private folder for state to resume from; never published
MOST_MANIFEST_BYTES = 128 << 20  # some 600,000 files
DEEPEST_LINEAGE = 64
FULL_CHECK_BYTES = 2 << 30  # artifacts up to this size are checked by content, larger ones by file size


class FileEntry(Config):
    """One data file of an artifact."""

    path: str
    """Relative to the artifact's folder."""
    size_bytes: int
    rows: int | None = None
    """Rows of a parquet file; None for other formats."""
    sha256: str

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        if not storage.is_plain(value):
            raise ValueError(f"it lists {value!r:.200}, which is not a plain path inside the artifact")
        return value


class Parent(Config):
    """An artifact that this one was made from."""

    uri: str
    """Relative to the root if both are under the same root, so that a root can be moved as a whole."""
    kind: str
    digest: str

    @field_validator("uri")
    @classmethod
    def _plain_or_absolute(cls, value: str) -> str:
        absolute = "://" in value or value.startswith("/")
        if "::" in value or ".." in value.split("/") or not (absolute or storage.is_plain(value)):
            raise ValueError(f"its parent {value!r:.200} is neither an absolute URI nor a plain path below the root")
        return value


class Manifest(Config):
    """What an artifact is, what it was made from and which files it has."""

    format_version: int = FORMAT_VERSION
    kind: str
    name: str
    fingerprint: str
    code_version: str
    stage_version: int
    config: dict[str, Any]
    parents: dict[str, list[Parent]]
    files: list[FileEntry]
    stats: dict[str, Any]
    created: str
    """UTC time of publishing, ISO 8601."""
    duration_s: float
    """Seconds that the last attempt, which published, took."""
    checksum: str = ""
    """Hex SHA-256 of the manifest's own bytes with this field empty."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 over fingerprint and file contents; children refer to it."""
        return hash_json([self.kind, self.fingerprint, [[f.path, f.sha256] for f in self.files]])


def hash_json(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Artifact:
    """A published artifact, opened: its manifest is valid and, if checked, matches the files."""

    def __init__(self, uri: str, manifest: Manifest) -> None:
        self.uri = uri.rstrip("/")
        self.manifest = manifest

    @classmethod
    def open(cls, uri: str, kind: str | None = None, *, check: bool = True) -> "Artifact":
        """Open the artifact at ``uri``.

        ``kind``: the required kind. ``check`` compares every file with the manifest: by SHA-256 if they are up to
        ``FULL_CHECK_BYTES`` together, else by size. Raises ``ArtifactError`` with the problem and the remedy.
        """
        artifact = cls(uri, _read_manifest(uri.rstrip("/")))
        if kind is not None and artifact.manifest.kind != kind:
            raise ArtifactError(f"{uri} is an artifact of kind {artifact.manifest.kind!r}, not of kind {kind!r}")
        if check:
            artifact.verify(content=sum(f.size_bytes for f in artifact.manifest.files) <= FULL_CHECK_BYTES)
        return artifact

    @property
    def root(self) -> str:
        """The folder above this artifact's ``<kind>/<name>/<fingerprint>``."""
        return self.uri.rsplit("/", 3)[0]

    @property
    def digest(self) -> str:
        """Hex SHA-256 over fingerprint and file contents."""
        return self.manifest.digest

    @property
    def stats(self) -> dict[str, Any]:
        """Statistics that its stage recorded."""
        return self.manifest.stats

    def path(self, *parts: str) -> str:
        """URI of a file inside the artifact."""
        return storage.join(self.uri, *parts)

    def files(self, prefix: str = "", suffix: str = "") -> list[str]:
        """URIs of its files whose relative path has this prefix and suffix, sorted."""
        return [self.path(f.path) for f in self.manifest.files if f.path.startswith(prefix) and f.path.endswith(suffix)]

    def read_json(self, name: str) -> Any:
        """The content of a JSON file inside the artifact."""
        return json.loads(storage.read_bytes(self.path(name)))

    def parents(self) -> Iterator[tuple[str, Parent, str]]:
        """(input name, parent entry, absolute URI) of each parent."""
        for input_name, entries in self.manifest.parents.items():
            for entry in entries:
                absolute = entry.uri if "://" in entry.uri or entry.uri.startswith("/") else f"{self.root}/{entry.uri}"
                yield input_name, entry, absolute

    def examine(self, *, content: bool) -> Iterator[tuple[FileEntry, str | None]]:
        """(file, problem) for each file of the manifest; None if it exists with the right size (and content)."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            problems = pool.map(lambda entry: self._problem(entry, content), self.manifest.files)
            yield from zip(self.manifest.files, problems, strict=True)

    def verify(self, *, content: bool) -> None:
        """Raise ``ArtifactError`` unless every file exists with the size (and SHA-256) in the manifest."""
        problems = [problem for _, problem in self.examine(content=content) if problem]
        if problems:
            raise ArtifactError(
                f"{self.uri} is damaged: {'; '.join(problems[:3])}; {REMEDY}; `lookalike verify` lists all"
            )

    def _problem(self, entry: FileEntry, content: bool) -> str | None:
        uri = self.path(entry.path)
        try:
            if self._links_outside(uri):
                return f"{entry.path} is a link to a place outside the artifact"
            size = storage.size_bytes(uri)
            if size != entry.size_bytes:
                return f"{entry.path} has {size} bytes, expected {entry.size_bytes}"
            if content and storage.sha256(uri) != entry.sha256:
                return f"{entry.path} does not match its SHA-256"
        except FileNotFoundError:
            return f"{entry.path} is missing"
        except OSError as error:  # from the disk or the store
            return f"{entry.path} cannot be read ({error})"
        return None

    def _links_outside(self, uri: str) -> bool:
        if not storage.is_local(uri):
            return False
        path, folder = storage.local_path(uri), storage.local_path(self.uri)
        return not storage.is_below(path, folder) and not (hub.is_cached(folder) and hub.is_cached(path))


def _read_json(uri: str) -> tuple[bytes, Any]:
    """(bytes, value) of the manifest in the folder ``uri``."""
    try:
        content = storage.read_bytes(storage.join(uri, MANIFEST), MOST_MANIFEST_BYTES)
        return content, json.loads(content)
    except FileNotFoundError:
        state = "it is not there"
        if storage.exists(uri):
            state = f"it is an unfinished draft (no {MANIFEST}), or not the folder of an artifact ({FOLDER})"
        raise ArtifactError(f"no artifact at {uri}: {state}; run the stage that makes it") from None
    except NotADirectoryError:
        raise ArtifactError(f"no artifact at {uri}: it is a file; give the folder of one ({FOLDER})") from None
    except PermissionError as error:
        raise ArtifactError(f"{uri} cannot be read ({error.strerror or error}); give this user access") from None
    except UsageError:  # an unknown URI scheme
        raise
    except OSError as error:
        raise ArtifactError(f"{uri}/{MANIFEST} cannot be read ({error.strerror or error}); {REMEDY}") from None
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{uri}/{MANIFEST} is damaged: not JSON ({error}); {REMEDY}") from None


def _read_manifest(uri: str) -> Manifest:
    content, raw = _read_json(uri)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactError(
            f"{uri}/{MANIFEST} has manifest format {version!r}, this lookalike {lookalike.__version__} reads up to "
            f"{FORMAT_VERSION}; upgrade lookalike"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{uri}/{MANIFEST} is damaged: {_first_problem(error)}; {REMEDY}") from None
    signed = content.replace(manifest.checksum.encode(), b"", 1)
    has_checksum = manifest.checksum or version != 1  # format 1 has none; a damaged manifest may claim any version
    if has_checksum and hashlib.sha256(signed).hexdigest() != manifest.checksum:
        raise ArtifactError(f"{uri}/{MANIFEST} is damaged: it does not match its own checksum; {REMEDY}")
    return manifest


def _first_problem(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def write_manifest(uri: str, manifest: Manifest) -> Manifest:
    """Write ``manifest`` with its checksum into the folder ``uri``, which makes it an artifact; return it so."""
    plain = manifest.model_copy(update={"format_version": FORMAT_VERSION, "checksum": ""})
    signed = plain.model_copy(update={"checksum": hashlib.sha256(_manifest_bytes(plain)).hexdigest()})
    storage.write_atomic(storage.join(uri, MANIFEST), _manifest_bytes(signed))
    return signed


def _manifest_bytes(manifest: Manifest) -> bytes:
    return (manifest.model_dump_json(indent=1) + "\n").encode()


class Draft:
    """An unfinished artifact: a stage writes files into it and fills ``stats``; :meth:`publish` commits it."""

    def __init__(self, root: str, kind: str, name: str, fingerprint: str) -> None:
        self.root, self.kind, self.name, self.fingerprint = root.rstrip("/"), kind, name, fingerprint
        self.uri = storage.join(self.root, kind, name, fingerprint)
        self.stats: dict[str, Any] = {}

    def path(self, *parts: str) -> str:
        """URI for a file of the artifact."""
        return storage.join(self.uri, *parts)

    def work(self, *parts: str) -> str:
        """URI for private state (checkpoints of a run), removed when the artifact is published."""
        return storage.join(self.uri, WORK, *parts)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file into the artifact."""
        storage.write_atomic(self.path(name), (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def clear(self) -> None:
        """Remove everything that an earlier attempt left."""
        storage.remove_tree(self.uri)

    def publish(
        self, *, config: Mapping[str, Any], parents: Mapping[str, list[Artifact]], stage_version: int, duration_s: float
    ) -> Artifact:
        """Write the manifest of all files in the draft and return the artifact."""
        storage.remove_temporaries(self.uri)
        names = [n for n in storage.list_files(self.uri) if n != MANIFEST and not n.startswith(f"{WORK}/")]
        with ThreadPoolExecutor(max_workers=4) as pool:
            entries = list(pool.map(lambda name: describe_file(self.uri, name), names))
        manifest = Manifest(
            kind=self.kind,
            name=self.name,
            fingerprint=self.fingerprint,
            code_version=lookalike.__version__,
            stage_version=stage_version,
            config=dict(config),
            files=entries,
            stats=self.stats,
            parents={key: [self._parent(a) for a in artifacts] for key, artifacts in parents.items()},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            duration_s=round(duration_s, 3),
        )
        manifest = write_manifest(self.uri, manifest)
        storage.remove_tree(self.work())  # only now: until the manifest is written, a resumed attempt needs it
        return Artifact(self.uri, manifest)

    def _parent(self, artifact: Artifact) -> Parent:
        inside = artifact.uri.startswith(self.root + "/")
        uri = artifact.uri[len(self.root) + 1 :] if inside else artifact.uri
        return Parent(uri=uri, kind=artifact.manifest.kind, digest=artifact.digest)


def describe_file(folder: str, name: str) -> FileEntry:
    """The manifest's entry of the file ``name`` in ``folder``."""
    uri, rows = storage.join(folder, name), None
    if name.endswith(".parquet"):
        filesystem, path = storage.arrow_filesystem(uri)
        rows = pq.read_metadata(path, filesystem=filesystem).num_rows
    return FileEntry(path=name, size_bytes=storage.size_bytes(uri), rows=rows, sha256=storage.sha256(uri))


def find(root: str, kind: str, name: str, fingerprint: str) -> Artifact | None:
    """The published artifact with that fingerprint; None if there is none, or only a draft."""
    uri = storage.join(root, kind, name, fingerprint)
    if not storage.exists(storage.join(uri, MANIFEST)):
        return None
    storage.remove_tree(storage.join(uri, WORK))  # left by an attempt that was killed right after publishing
    return Artifact.open(uri, kind)


def lineage(
    artifact: Artifact, depth: int = 0, seen: set[str] | None = None, *, roots: Sequence[str] = ()
) -> Iterator[tuple[int, str, Artifact | ArtifactError]]:
    """(depth, input name, ancestor), depth first; for a missing or changed ancestor, the error in its place.

    If an ancestor is reached in several ways, its own ancestors are listed once. Ancestors are opened on this machine's
    disks, below the artifact's root and below ``roots``; one elsewhere is a ``ForeignArtifactError``, because whoever
    wrote the manifest would otherwise choose whom this machine calls.
    """
    seen = set() if seen is None else seen
    roots = [artifact.root, *roots]
    for input_name, entry, uri in artifact.parents():
        try:
            _check_reach(uri, roots, depth)
            parent = Artifact.open(uri, entry.kind, check=False)
            if parent.digest != entry.digest:
                raise ArtifactError(f"{uri} has changed since: digest {parent.digest[:12]}, was {entry.digest[:12]}")
        except ArtifactError as error:
            yield depth + 1, input_name, error
            continue
        yield depth + 1, input_name, parent
        if uri not in seen:
            seen.add(uri)
            yield from lineage(parent, depth + 1, seen, roots=roots)


def _check_reach(uri: str, roots: Sequence[str], depth: int) -> None:
    if depth >= DEEPEST_LINEAGE:
        raise ArtifactError(f"{uri} and its ancestors are not followed: more than {DEEPEST_LINEAGE} generations")
    on_disk = "://" not in uri or uri.startswith("file://")
    if not on_disk and not any(uri.startswith(f"{root.rstrip('/')}/") for root in roots):
        known = " or ".join(dict.fromkeys(roots))
        raise ForeignArtifactError(
            f"{uri} is not opened: it is neither on a disk of this machine nor below {known}; if you trust it, show it "
            "by itself, or name its root with `lookalike show --root`"
        )
