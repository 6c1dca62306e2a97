"""Arguments of public calls, checked the same way by the searcher, the clients and the commands. Needs only numpy.

A checked argument is returned in one plain form. One value is taken where several may be given (``delete("12")`` is one
id, not two letters); a wrong type or an unknown name raises ``ArgumentError``, before anything is done or sent.
"""

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Set
from numbers import Real
from operator import index
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from lookalike.errors import ArgumentError
from lookalike.registry import nearest

F = TypeVar("F", bound=Callable[..., Any])
MAX_SECONDS = 31_536_000.0
"""Longest time to wait, in seconds: a year."""
MAX_SHOWN = 60
"""Longest text that a message repeats whole, in characters."""
SYNONYMS = {
    **dict.fromkeys(("top_k", "topk", "limit", "n_results", "num", "size"), ("k",)),
    **dict.fromkeys(("filter", "filters", "expr", "conditions", "query_filter"), ("where", "allowed")),
    **dict.fromkeys(("timeout", "deadline_ms"), ("timeout_ms", "timeout_s")),
    **dict.fromkeys(("embedding", "query_vector"), ("vector", "queries")),
    **dict.fromkeys(("recall", "target_recall"), ("min_recall",)),
    "where": ("allowed",),
    "allowed": ("where",),
}
"""What other libraries call an argument -> our names for it."""


def show(value: object) -> str:
    """Return ``value`` for a message: short, in ASCII, and the type alone if it is no simple value."""
    if isinstance(value, str):
        return ascii(value if len(value) <= MAX_SHOWN else f"{value[: MAX_SHOWN - 10]}...{value[-7:]}")
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} {type(value).__name__}" if isinstance(value, bytes) else f"a {type(value).__name__}"
    shape = f" of {value.dtype} with shape {value.shape}" if isinstance(value, np.ndarray) else ""
    return f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}{shape}"


def reason(error: Exception) -> str:
    """Return the beginning of another library's message, in ASCII."""
    return str(error)[:200].encode("ascii", "backslashreplace").decode()


def check_text(name: str, value: object, remedy: str = "give a str") -> str:
    """Return ``value`` if it is a str that UTF-8 can carry."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name} is {show(value)}, which is no text; {remedy}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"{name}={show(value)} is no text: character {error.start} is half of a surrogate pair, or a byte that "
                "is not UTF-8; give valid Unicode"
            ) from None
    return value


def list_items(name: str, value: Any, single: type | tuple[type, ...], what: str, *, ordered: bool = True) -> list[Any]:
    """Return the items of an iterable, or of a ``single`` value a list of it alone; ``what`` says what is needed.

    ``ordered`` refuses sets, whose order is arbitrary: answers could not be told apart.
    """
    if isinstance(value, single):
        return [value]
    if isinstance(value, (str, bytes, bytearray, memoryview, Mapping)) or (ordered and isinstance(value, Set)):
        raise ArgumentError(f"{name} is {show(value)}; give {what}")
    try:
        items = iter(value)
    except TypeError:
        raise ArgumentError(f"{name} is {show(value)}, which cannot be iterated; give {what}") from None
    return list(items)


def list_texts(name: str, value: Any, what: str = "a list of str") -> list[str]:
    """Return one or several texts as a list."""
    items = list_items(name, value, str, what, ordered=False)
    if all(type(item) is str and item.isascii() for item in items):  # the fast way, for thousands of ids
        return items
    return [check_text(f"{name}[{place}]", item, f"give {what}") for place, item in enumerate(items)]


def check_whole(name: str, value: Any) -> int:
    """Return a whole number; bool and float are none."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return index(value)
    except TypeError:
        raise ArgumentError(f"{name}={show(value)} is no whole number; give an int") from None


def check_number(name: str, value: Any) -> float:
    """Return a real number as a float; bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentError(f"{name}={show(value)} is no number; give a float")
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError(f"{name}={show(value)} is beyond a float; give a smaller one") from None


def check_seconds(name: str, value: Any) -> float:
    """Return a time to wait, above 0 and at most ``MAX_SECONDS``."""
    seconds = check_number(name, value)
    if not (math.isfinite(seconds) and 0 < seconds <= MAX_SECONDS):
        raise ArgumentError(f"{name}={seconds} is not above 0 and at most {MAX_SECONDS:.0f} (a year); give seconds")
    return seconds


def check_flag(name: str, value: Any) -> bool:
    """Return a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentError(f"{name}={show(value)} is neither True nor False; give one of them")
    return bool(value)


def check_image(name: str, value: Any) -> bytes:
    """Return an encoded image as bytes; a path, an open file, a picture and its pixels are told apart."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (str, os.PathLike)):
        remedy = 'give the content of the file: open(path, "rb").read()'
    elif hasattr(value, "read"):
        remedy = "give what is in the file: .read()"
    elif type(value).__module__.startswith("PIL."):
        remedy = "save it into an io.BytesIO as PNG and give .getvalue()"
    else:
        remedy = "give an encoded image, as a file holds it; a vector goes into another argument"
    raise ArgumentError(f"{name} is {show(value)}, not bytes; {remedy}")


def check_array(name: str, value: Any) -> npt.NDArray[Any]:
    """Return an array of real numbers; text, bool, objects, complex and masked numbers are none."""
    if type(value).__module__.startswith("PIL."):
        check_image(name, value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentError(f"{name} is {show(value)}, no array of numbers ({reason(error)})") from None
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ArgumentError(f"{name} is an array with masked numbers; fill them in, or leave the vector out")
    if array.dtype.kind not in "fiu":
        kind = "" if isinstance(value, np.ndarray) else f" of {array.dtype}"
        raise ArgumentError(f"{name} is {show(value)}{kind}; give numbers, as float32")
    return array


def to_float32(name: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return ``array`` as little-endian float32; refuse a finite number that float32 cannot hold."""
    if array.dtype.kind != "f" or array.dtype.itemsize <= 4:
        return array.astype("<f4", copy=False)
    with np.errstate(over="ignore"):
        result: npt.NDArray[np.float32] = array.astype("<f4")
    if not np.isfinite(result).all():
        lost = np.argwhere(~np.isfinite(result) & np.isfinite(array))
        if len(lost):
            place = tuple(lost[0].tolist())
            raise ArgumentError(f"{name}{list(place)} is {array[place]}, beyond float32; scale the vector")
    return result


def names_checked(function: F) -> F:
    """Decorator: refuse unknown keyword arguments with the nearest known name.

    ``**settings: Unpack[SomeTypedDict]`` counts as the names of the dict.
    """
    names = [name for name, kind in inspect.signature(function).parameters.items() if _is_named(kind)]
    for kind in inspect.signature(function).parameters.values():
        if kind.kind is kind.VAR_KEYWORD:
            names += get_args(kind.annotation)[0].__annotations__
    known, method = frozenset(names), f".{function.__name__}".removesuffix(".__init__")

    def check(self: Any, given: Mapping[str, Any]) -> None:
        if not given.keys() <= known:
            name = next(name for name in given if name not in known)
            takes = f"it takes {', '.join(names)}" if names else "it takes none by name"
            call = f"{(self if isinstance(self, type) else type(self)).__name__}{method}"
            raise ArgumentError(f"{call} has no argument {show(name)}{_nearest(name, names)}; {takes}")

    @functools.wraps(function)
    async def awaited(self: Any, *args: Any, **given: Any) -> Any:
        check(self, given)
        return await function(self, *args, **given)

    @functools.wraps(function)
    def called_at_once(self: Any, *args: Any, **given: Any) -> Any:
        if given:
            check(self, given)
        return function(self, *args, **given)

    return awaited if inspect.iscoroutinefunction(function) else called_at_once  # type: ignore[return-value]


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.name not in {"self", "cls"} and parameter.kind in (
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.KEYWORD_ONLY,
    )


def _nearest(name: str, names: list[str]) -> str:
    ours = [one for one in SYNONYMS.get(name, ()) if one in names]
    return f" (did you mean {ours[0]!r}?)" if ours else nearest(name, names)
