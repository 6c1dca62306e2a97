"""NumPy's files: ``.npy``, and the arrays of ``.npz``. Nothing is unpickled.

An array in C order is read a few rows at a time, on any store. One in Fortran order, whose rows are scattered over the
file, is memory-mapped. An array of an ``.npz`` is unpacked once into the draft's work folder.
"""

import hashlib
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

from lookalike import storage
from lookalike.data.intake.files import FORMATS, Numbers, Piece, VectorFile, Where, check_dtype, check_shape
from lookalike.entries import escaped
from lookalike.errors import UsageError

DAMAGE = (ValueError, EOFError, OverflowError, TypeError, KeyError, SyntaxError, RecursionError, TokenError)
"""What NumPy raises, as it parses a header, where that is damaged."""
SAVE_AGAIN = "write it again with numpy.save"


def read_header(file: Any, uri: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran order, dtype) of a ``.npy``, whose numbers begin where ``file`` then stands."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except DAMAGE as error:
        told = escaped(" ".join(str(error).split()), 200)
        raise UsageError(f"{escaped(uri)} is not a whole .npy file ({told}); {SAVE_AGAIN}") from None
    return shape, fortran, dtype


@FORMATS.register("npy")
class NpyFile(VectorFile):
    """One array [rows, dim]."""

    def __init__(self, uri: str, where: Where, work: str | None, shown: str | None = None) -> None:
        super().__init__(uri if shown is None else shown)
        self._path = uri
        with storage.open_file(uri) as file:
            shape, self._fortran, self._dtype = read_header(file, self.uri)
            self._begin = file.tell()
        check_dtype(self._dtype, self.uri, integers=where.integers)
        check_shape(shape, self.uri)
        self.num_rows, self.dim = shape
        self.kind = f"{self._dtype.name}{'' if self._dtype.isnative else ', big-endian'}"
        self._row_bytes = self.dim * self._dtype.itemsize
        needed, size = self._begin + self.num_rows * self._row_bytes, storage.size_bytes(uri)
        if size < needed:
            raise UsageError(
                f"{escaped(self.uri)} has {size} bytes, and {self.num_rows} vectors of {self.dim} {self.kind} need "
                f"{needed}; it was cut off: copy or {SAVE_AGAIN}"
            )
        if self._fortran and not storage.is_local(uri):
            raise UsageError(f"{escaped(self.uri)} is in Fortran order, which is read from a disk only; copy it to one")

    def pieces(self, start: int, stop: int, rows: int) -> Iterator[Piece]:
        if self._fortran:
            shape = self.num_rows, self.dim
            mapped: Numbers = np.memmap(
                storage.local_path(self._path), self._dtype, "r", offset=self._begin, shape=shape, order="F"
            )
            for first in range(start, stop, rows):
                yield Piece(self._native(np.array(mapped[first : min(first + rows, stop)], order="C")), {}, None)
            return
        with storage.open_file(self._path) as file:
            file.seek(self._begin + start * self._row_bytes)
            for first in range(start, stop, rows):
                yield Piece(self._native(self._read(file, min(rows, stop - first))), {}, None)

    def _read(self, file: BinaryIO, rows: int) -> Numbers:
        content = file.read(rows * self._row_bytes)
        if len(content) < rows * self._row_bytes:
            raise UsageError(f"{escaped(self.uri)} became shorter while it was read; {SAVE_AGAIN}")
        return np.frombuffer(content, self._dtype).reshape(rows, self.dim)

    def _native(self, vectors: Numbers) -> Numbers:
        return vectors.astype(self._dtype.newbyteorder("="), copy=False)


@FORMATS.register("npz")
def open_npz(uri: str, where: Where, work: str | None) -> VectorFile:
    """The array ``where.array`` of an ``.npz``, or its only one; unpacked below ``work``, or only looked at."""
    try:
        with storage.open_file(uri) as file, zipfile.ZipFile(file) as archive:
            arrays = [entry.removesuffix(".npy") for entry in archive.namelist() if entry.endswith(".npy")]
            name = _array_name(arrays, where.array, uri)
            shown = f"{uri}:{name}"
            with archive.open(f"{name}.npy") as member:
                shape, _, dtype = read_header(member, shown)
            check_dtype(dtype, shown, integers=where.integers)
            check_shape(shape, shown)
            if work is None:
                return _Looked(shown, shape, dtype)
            target = storage.join(work, f"{hashlib.sha256(shown.encode()).hexdigest()[:16]}.npy")
            if not storage.exists(target):
                with archive.open(f"{name}.npy") as member, storage.open_atomic(target) as unpacked:
                    shutil.copyfileobj(member, unpacked, 1 << 20)
            return NpyFile(target, where, work, shown)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as error:
        raise UsageError(
            f"{escaped(uri)} is not a whole .npz file ({error}); write it again with numpy.savez"
        ) from None


def _array_name(names: list[str], wanted: str | None, uri: str) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None or wanted not in names:
        told = "" if wanted is None else f" and no {wanted!r}"
        raise UsageError(f"{escaped(uri)} holds the arrays {', '.join(names) or '(none)'}{told}; set array to one")
    return wanted


class _Looked(VectorFile):
    """The header of an array that is not unpacked."""

    def __init__(self, uri: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        super().__init__(uri)
        (self.num_rows, self.dim), self.kind = shape, dtype.name

    def pieces(self, start: int, stop: int, rows: int) -> Iterator[Piece]:
        raise AssertionError("a preview reads no numbers")
