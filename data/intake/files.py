"""The interface of files of vectors, and the registry of their formats."""

import glob
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lookalike import storage
from lookalike.config import Config
from lookalike.entries import escaped, is_hidden
from lookalike.errors import UsageError
from lookalike.registry import Registry, nearest
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
Numbers = npt.NDArray[Any]
"""Vectors as their file holds them: any real dtype of this machine's byte order, [n, dim]."""
FLOATS = ("float16", "float32", "float64")
ID_NAMES = ("image_id", "id", "_id", "ids", "key", "pk")
"""Names by which a column of ids is found if the settings name none, in this order."""
HF_STATE = "state.json"


class Where(Config):
    """Where a file holds vectors and ids."""

    array: str | None = None
    """Name of the array in an ``.npz`` with several."""
    vector_column: str | None = None
    """Column of the vectors in a table; None: the only column that holds lists of numbers."""
    id_column: str | None = None
    """Column of the ids in a table; None: the first of image_id, id, _id, ids, key and pk that it has, if any."""
    integers: bool = False
    """Take signed integers as numbers. Right for int8 vectors that were quantised with one scale and no zero point,
    since a cosine does not depend on the scale; wrong for bits packed into bytes."""


class Piece(NamedTuple):
    """Some rows of a file, in order."""

    vectors: Numbers
    """[n, dim]; zeros for rows in ``unfit``."""
    unfit: dict[int, tuple[str, str]]
    """Row of the piece -> (reason, detail) if the file holds no vector of ``dim`` numbers there."""
    table: pa.Table | None
    """Its other columns, ids among them; None if the file holds vectors only."""


class VectorFile(ABC):
    """A file, or a data set, that holds vectors. Opening one reads its header only."""

    num_rows: int
    dim: int
    kind: str
    """Number format, for people: ``float32``, ``list<float>``."""
    id_column: str | None = None
    """Column of ``Piece.table`` with the ids."""
    columns: tuple[str, ...] = ()
    """Columns of ``Piece.table``."""
    note: str = ""
    """What a user should know about the file, such as its metric."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @abstractmethod
    def pieces(self, start: int, stop: int, rows: int) -> Iterator[Piece]:
        """The rows ``start`` to ``stop``, at most ``rows`` at a time."""


FORMATS: Registry[Any] = Registry("vector_format")
"""Ending of a file, without its dot -> class or function of (uri, where, work) -> ``VectorFile``.

``work`` is a folder for what has to be unpacked, or None if nothing may be written.
"""


def list_sources(uris: list[str]) -> list[str]:
    """The files and data sets that ``uris`` (files, folders, globs) name, in their order; raises ``UsageError``."""
    found = [name for uri in uris for name in _expand(storage.absolute(uri))]
    if twice := next((name for place, name in enumerate(found) if name in found[:place]), None):
        raise UsageError(f"{escaped(twice)} is named twice, and each vector is taken once; name it once")
    return found


def _expand(uri: str) -> list[str]:
    fs, path = storage.resolve(uri)
    if glob.has_magic(uri) and not fs.exists(path):
        matches = sorted(fs.glob(path))
        if not matches:
            raise UsageError(f"nothing matches {escaped(uri)}; give a file, a folder or a pattern of files")
        prefix = "" if storage.is_local(uri) else f"{uri.partition('://')[0]}://"
        return [name for match in matches for name in _expand(prefix + match)]
    if not fs.exists(path):
        raise UsageError(f"there is nothing at {escaped(uri)}; give a file of vectors, or a folder of them")
    if fs.isfile(path) or _ending(uri) == "lance" or fs.exists(f"{path}/{HF_STATE}"):
        return [uri]
    if fs.exists(f"{path}/dataset_dict.json"):
        splits = json.loads(storage.read_bytes(storage.join(uri, "dataset_dict.json"))).get("splits", [])
        raise UsageError(f"{escaped(uri)} holds the splits {', '.join(splits)}; give the folder of one, or {uri}/*")
    names = [name for name in storage.list_files(uri) if not is_hidden(name)]
    known = [name for name in names if _ending(name) in FORMATS]
    if not known:
        raise UsageError(f"{escaped(uri)} holds no file of vectors; endings that are read: {_endings()}")
    if len(known) < len(names):
        left = sorted({f".{_ending(name)}" for name in names if name not in known})
        log.warning("files passed over by their endings %s", fields(folder=uri, files=len(names) - len(known), of=left))
    return [storage.join(uri, name) for name in known]


def open_file(uri: str, where: Where, work: str | None) -> VectorFile:
    """Open the header of a file; raises ``UsageError`` with the rule it breaks and the remedy."""
    ending = "hf" if storage.exists(storage.join(uri, HF_STATE)) else _ending(uri)
    if ending not in FORMATS:
        raise UsageError(
            f"{escaped(uri)}: vectors are not read from files of this ending{nearest(ending, sorted(FORMATS))}; "
            f"endings that are read: {_endings()}"
        )
    opened: VectorFile = FORMATS.get(ending)(uri, where, work)
    return opened


def _ending(uri: str) -> str:
    name = uri.rstrip("/").rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def _endings() -> str:
    return ", ".join(f".{ending}" for ending in sorted(FORMATS) if ending != "hf") + ", folders of Hugging Face"


def check_dtype(dtype: np.dtype[Any], uri: str, *, integers: bool) -> None:
    """Raise ``UsageError`` unless numbers of ``dtype`` are vectors."""
    name = dtype.name
    if name in FLOATS or (integers and dtype.kind == "i"):
        return
    if dtype.hasobject:
        remedy = "holds Python objects, which are never unpickled; save numbers: np.asarray(x.tolist(), 'float32')"
    elif dtype.kind == "V":
        remedy = f"holds {dtype.str!r}, a type that NumPy does not know (bfloat16?) or a record; save it as float32"
    elif dtype.kind == "i":
        remedy = (
            f"holds {name}, whose scale the file does not say; set integers=true if all numbers have one scale and "
            "no zero point, or save them as float32"
        )
    elif dtype.kind == "u":
        remedy = f"holds {name}: packed bits, or numbers with a zero point; unpack them and save float32"
    else:
        remedy = f"holds {name}, and vectors are of {', '.join(FLOATS)}; save them as float32"
    raise UsageError(f"{escaped(uri)} {remedy}")


def check_shape(shape: tuple[int, ...], uri: str) -> None:
    """Raise ``UsageError`` unless ``shape`` is [rows, dim]."""
    if len(shape) == 1:
        raise UsageError(
            f"{escaped(uri)} holds one list of {shape[0]} numbers, and vectors are [rows, dim]; save "
            "x.reshape(1, -1) if it is one vector, or x.reshape(-1, dim)"
        )
    if len(shape) != 2 or shape[0] < 0 or shape[1] < 1:
        raise UsageError(f"{escaped(uri)} has shape {shape}, and vectors are [rows, dim]; save x.reshape(len(x), -1)")
