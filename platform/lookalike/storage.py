"""The only module that touches file systems: all paths of artifacts are fsspec URIs (local, ``s3://``, ``memory://``)."""

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import fsspec
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem

from lookalike.errors import LookalikeError, UsageError
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
CHUNK_BYTES = 8 << 20
READ_WHOLE_BYTES = 1 << 30  # raw files up to this size are identified by all their content
WRAPPERS = ("zip", "tar", "libarchive", "dir", "simplecache", "filecache", "blockcache", "reference")
"""File systems that fsspec lays over another one."""
TEMPORARY = ".tmp"  # suffix of a file being written; listings leave it out


def resolve(uri: str) -> tuple[Any, str]:
    """The fsspec file system of ``uri`` and the path in it; ``UsageError`` if there is no such file system."""
    plain = "::" in uri and not is_chain(uri)
    try:  # NUL, which no path holds, keeps fsspec from taking :: in a name for a chain
        fs, path = fsspec.core.url_to_fs(uri.replace("::", "\0") if plain else uri)
    except (ValueError, ImportError) as error:  # a protocol unknown to fsspec, or one whose package is not installed
        raise UsageError(
            f"{uri!r} cannot be opened: {error}; give a local path or an fsspec URI, such as "
            "s3://bucket/folder with s3fs installed"
        ) from None
    return fs, path.replace("\0", "::") if plain else path


def is_chain(uri: str) -> bool:
    """Whether ``::`` joins file systems, as in ``zip://a.csv::s3://bucket/a.zip``, and is not part of a file's name."""
    *wrappers, _ = uri.split("::")
    known = fsspec.available_protocols()
    return bool(wrappers) and all(wrapper in known or wrapper.partition("://")[0] in WRAPPERS for wrapper in wrappers)


def is_local(uri: str) -> bool:
    """Whether ``uri`` is on a local disk, where files can be memory-mapped and renamed atomically."""
    return isinstance(resolve(uri)[0], LocalFileSystem)


def local_path(uri: str) -> str:
    """The disk path of a local ``uri``."""
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        raise ValueError(f"{uri} is not on a local disk")
    return str(path)


def absolute(uri: str) -> str:
    """``uri`` with a local path made absolute, because worker processes have other working directories."""
    return local_path(uri) if is_local(uri) else uri


def join(uri: str, *parts: str) -> str:
    """``uri`` with path parts appended."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """``uri`` as a pyarrow file system and a path, for pyarrow and Ray Data."""
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        return pafs.LocalFileSystem(), path
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def arrow_file(uri: str) -> Any:
    """``uri`` opened for pyarrow, which itself cannot open a name that is no UTF-8."""
    filesystem, path = arrow_filesystem(uri)
    return filesystem.open_input_file(path) if path.isascii() or _is_utf8(path) else open(path, "rb")


def _is_utf8(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


def exists(uri: str) -> bool:
    """Whether the file or folder exists."""
    fs, path = resolve(uri)
    return bool(fs.exists(path))


def is_plain(path: str) -> bool:
    """Whether ``path`` is relative and stays below any folder that it is joined to, whatever the file system."""
    return not any(part in ("", ".", "..") for part in path.split("/")) and not (
        path.startswith("~") or "::" in path or "\0" in path
    )


def is_below(path: str, folder: str) -> bool:
    """Whether the local ``path`` is ``folder`` or lies below it, once all links are followed."""
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return real == root or real.startswith(root.rstrip("/") + "/")


def open_regular(path: str) -> BinaryIO:
    """Open a local file for reading; ``OSError`` for a FIFO, which would wait, or a device, which may not end."""
    _require_regular(path, os.stat(path).st_mode)  # opening some devices does something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def _require_regular(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", path)


@contextmanager
def open_file(uri: str) -> Iterator[Any]:
    """A regular file, open for reading bytes."""
    fs, path = resolve(uri)  # kept until the end: the file system of an archive closes it when it is collected
    with open_regular(path) if isinstance(fs, LocalFileSystem) else fs.open(path, "rb") as file:
        yield file


def read_bytes(uri: str, most_bytes: int | None = None) -> bytes:
    """The whole content of a regular file; ``OSError`` if it has more than ``most_bytes``."""
    with open_file(uri) as file:
        content = bytes(file.read() if most_bytes is None else file.read(most_bytes + 1))
    if most_bytes is not None and len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", uri)
    return content


def write_atomic(uri: str, content: bytes) -> None:
    """Write a small file so that readers see all or nothing of it, even after a crash (on disk: fsync and rename)."""
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, content)  # an object store's put is atomic
        return
    with open_atomic(uri) as file:
        file.write(content)


@contextmanager
def open_atomic(uri: str) -> Iterator[BinaryIO]:
    """A new file that appears under its name when the block ends, and leaves no trace if the block raises.

    On a disk it is written beside its place and renamed; elsewhere it is uploaded from the local temporary folder. A
    full disk raises ``LookalikeError``.
    """
    fs, path = resolve(uri)
    local = isinstance(fs, LocalFileSystem)
    temporary = f"{path if local else tempfile.gettempdir() + '/upload'}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
    try:
        if local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if local:
                os.fsync(file.fileno())
        if local:
            os.replace(temporary, path)
            sync_directory(os.path.dirname(path))
        else:
            fs.put_file(temporary, path)
    except OSError as error:
        raise _no_space(uri, error) from None
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def allocate(path: str) -> None:
    """Give a local file all the space that its size says; a full disk raises ``LookalikeError``."""
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, size))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot
                raise _no_space(path, error) from None


def _no_space(uri: str, error: OSError) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return LookalikeError(
        f"no space left to write {uri}; free some, or choose another root, and run again: finished work is kept"
    )


def sync_directory(path: str) -> None:
    """Sync a local folder, so that new and renamed files in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(uri: str) -> None:
    """Create a folder and its parents, unless it exists."""
    fs, path = resolve(uri)
    fs.makedirs(path, exist_ok=True)


def remove_tree(uri: str) -> None:
    """Remove a folder and its contents, if it exists."""
    fs, path = resolve(uri)
    if isinstance(fs, LocalFileSystem):
        shutil.rmtree(path, ignore_errors=True)
    elif fs.exists(path):
        fs.rm(path, recursive=True)


def remove_file(uri: str) -> None:
    """Remove a file, if it exists."""
    fs, path = resolve(uri)
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def share_file(source: str, target: str) -> None:
    """Give ``target`` the content of ``source``, which may be removed later but never changes.

    On one disk this is a hard link: nothing is copied, and either name may be removed. Elsewhere it is a copy, made by
    the store itself if both are in the same one.
    """
    fs, path = resolve(source)
    other, place = resolve(target)
    if isinstance(fs, LocalFileSystem) and isinstance(other, LocalFileSystem):
        try:
            os.link(path, place)
        except OSError:  # another disk, or a file system without links
            shutil.copyfile(path, place)
    elif fs is other:
        fs.cp_file(path, place)
    else:
        with fs.open(path, "rb") as file, other.open(place, "wb") as copy:
            shutil.copyfileobj(file, copy, CHUNK_BYTES)


def list_files(uri: str) -> list[str]:
    """Paths of all files under ``uri``, relative to it and sorted; ``['']`` if ``uri`` is a file.

    Temporary files left by a crash are not included, nor FIFOs, devices and links to either or to nothing: a warning
    names each. Links to folders are not followed.
    """
    fs, path = resolve(uri)
    if fs.isfile(path):
        return [""]
    prefix = path.rstrip("/") + "/"
    names = (name[len(prefix) :] for name in fs.find(path) if name.startswith(prefix))
    names = (name for name in names if not name.endswith(TEMPORARY))
    return sorted(name for name in names if not isinstance(fs, LocalFileSystem) or _is_regular(prefix + name))


def _is_regular(path: str) -> bool:
    if os.path.isfile(path):
        return True
    if not os.path.isdir(path):
        log.warning("left out %s", fields(path=path, reason="not a regular file"))
    return False


def remove_temporaries(uri: str) -> None:
    """Delete temporary files that a crash left under ``uri``."""
    fs, path = resolve(uri)
    for name in fs.find(path):
        if name.endswith(TEMPORARY):
            fs.rm_file(name)


def try_lock(path: Path) -> IO[bytes] | None:
    """Lock the file ``path`` on this machine; None if another process holds it.

    The lock lasts until the returned file is closed or its process ends, however it ends.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def exclusive(uri: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file ``uri`` alone on this machine; calls ``waiting`` once if another process holds it.

    A root that is not local is not locked.
    """
    if not is_local(uri):
        yield
        return
    path = Path(local_path(uri))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = try_lock(path)
    if file is None:
        waiting()
        file = path.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
    with file:
        yield


def size_bytes(uri: str) -> int:
    """Size of a regular file in bytes."""
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        return int(fs.size(path))
    status = os.stat(path)
    _require_regular(path, status.st_mode)
    return status.st_size


def free_bytes(folder: str) -> int:
    """Space that this user may still fill on the disk of a local ``folder``, in bytes."""
    return shutil.disk_usage(local_path(folder)).free


def sha256(uri: str) -> str:
    """Hex SHA-256 of a file's content, read in chunks."""
    digest = hashlib.sha256()
    for chunk in _chunks(uri):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(uri: str) -> Iterator[bytes]:
    with open_file(uri) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def source_digest(uri: str) -> str:
    """Identity of a raw file's content: its SHA-256 on a disk, the store's own checksum elsewhere.

    A file on a disk larger than ``READ_WHOLE_BYTES`` is identified by the SHA-256 of its size, first and last chunk,
    because reading terabytes only to see that nothing changed would cost too much.
    """
    fs, path = resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        return str(fs.checksum(path))
    size = size_bytes(uri)
    if size <= READ_WHOLE_BYTES:
        return sha256(uri)
    with open_regular(path) as file:
        first = file.read(CHUNK_BYTES)
        file.seek(-CHUNK_BYTES, os.SEEK_END)
        return hashlib.sha256(str(size).encode() + first + file.read(CHUNK_BYTES)).hexdigest()
