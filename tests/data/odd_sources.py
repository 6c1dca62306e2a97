"""Sources of good pictures with as many odd entries among them, in each format; each is counted without our readers."""

import io
import itertools
import json
import os
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(88)


class OddSource(NamedTuple):
    """A source, what must be kept of it, and how many entries it has."""

    settings: dict[str, Any]
    good: dict[str, bytes]
    entries: int


def picture(number: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 90)).save(sink, "PNG")
    return sink.getvalue()


def not_pictures() -> Iterator[bytes]:
    """Bytes under the name of a picture that are none."""
    return itertools.cycle([b"", b"some text", picture(3)[:50], HEIC, b"\x89PNG\r\n\x1a\n", b"<svg/>", bytes(300)])


GOOD_NAMES = [
    "{}.png",
    "a::{}.png",
    "zip::{}.png",
    " {}.png",
    "{}#1.png",
    "{}?.png",
    "{} [x]*.PNG",
    "~{}.jfif",
    "ä{}.jpe",
]


def odd_folder(root: Path, num: int) -> OddSource:
    folder = root / "folder"
    for part in ("x", "y/z", "file::"):
        (folder / part).mkdir(parents=True)
    good = {}
    for number in range(num):
        name = f"{('', 'y/z/', 'file::/')[number % 4 % 3]}{GOOD_NAMES[number % len(GOOD_NAMES)].format(number)}"
        good[name.strip()] = picture(number)
        (folder / name).write_bytes(good[name.strip()])
    content, others = not_pictures(), (root / "elsewhere")
    others.mkdir()
    makers: list[Callable[[str], object]] = [
        lambda path: os.symlink("nowhere", f"{path}.jpg"),
        lambda path: os.symlink(f"{path}.gif", f"{path}.gif"),
        lambda path: os.symlink(others, path),
        lambda path: os.mkfifo(f"{path}.png"),
        lambda path: bind_socket(f"{path}.webp"),
        lambda path: Path(f"{path}.bmp").write_bytes(next(content)),
        lambda path: Path(f"{path}.tiff").write_bytes(next(content)),
        lambda path: write_raw(os.fsencode(path) + b"\xe9.png", picture(1)),
        lambda path: Path(f"{path}\x01.png").write_bytes(picture(1)),
        lambda path: Path(f"{path}.txt").write_bytes(b"notes"),
        lambda path: Path(f"{path}").write_bytes(b"no ending"),
        lambda path: (Path(path).mkdir(), Path(path, "metadata.csv").write_bytes(b"file_name\n")),
        lambda path: Path(f"{os.path.dirname(path)}/.{os.path.basename(path)}.png").write_bytes(picture(1)),
    ]
    for number, make in zip(range(num), itertools.cycle(makers), strict=False):
        make(f"{folder}/{('x', 'y/z', 'file::')[number % 3]}/odd{number}")
    entries = 0
    for where, folders, files in os.walk(folder):
        entries += len(files) + sum(os.path.islink(os.path.join(where, name)) for name in folders)
    return OddSource({"uri": str(folder), "format": "folder"}, good, entries)


def bind_socket(path: str) -> None:
    short = f"/tmp/{os.getpid()}.socket"  # a socket's name has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(short)
    os.rename(short, path) if os.stat(short).st_dev == os.stat(os.path.dirname(path)).st_dev else os.mkfifo(path)
    if os.path.exists(short):
        os.unlink(short)


def write_raw(path: bytes, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def image_folder(root: Path, num: int) -> dict[str, bytes]:
    """Images that tables name, beside entries that they should not."""
    root.mkdir()
    (root / "sub").mkdir()
    os.mkfifo(root / "pipe.png")
    os.symlink("nowhere", root / "dangling.png")
    os.symlink("/etc/hostname", root / "out.png")
    for name, content in zip(("empty.png", "text.png", "cut.png", "a.heic"), not_pictures(), strict=False):
        (root / name).write_bytes(content)
    good = {f"a::{number}.png": picture(number) for number in range(num)}
    for name, content in good.items():
        (root / name).write_bytes(content)
    return good


ODD_IMAGES = [
    *("", "gone.png", "sub", "pipe.png", "dangling.png", "out.png", "empty.png", "text.png", "cut.png", "a.heic"),
    *(
        "../x.png",
        "s3://bucket/x.png",
        "zz://x",
        "file:///etc/hostname",
        "data:image/png;base64,AA",
        "http://127.0.0.1:9/",
    ),
]
ODD_CSV_ROWS = [
    *(b"%d", b"%d,a,b,c,d", b'"%d"x,a::1.png,t', b'%d,a::1.png,"open', b'%d,"a::1.png,t', b'"%d', b",a::1.png,t"),
    *(b"caf\xe9%d,a::1.png,t", b"\x01%d,a::1.png,t", b'%d,a::1.png,"12" wide"', b"%d;a::1.png;t"),
]


def interleave(first: list[Any], second: list[Any]) -> list[Any]:
    return [item for pair in itertools.zip_longest(first, second) for item in pair if item is not None]


def odd_csv(root: Path, num: int) -> OddSource:
    (root / "csv").mkdir()
    names = image_folder(root / "csv" / "img", num)
    good = {f"{number:04d}": name for number, name in enumerate(names)}
    rows = [f'{key},{name},"a, b"'.encode() for key, name in good.items()]
    odd = [f"o{n},{name},t".encode() for n, name in enumerate(ODD_IMAGES)]
    odd += [row.replace(b"%d", b"%d" % n) for n, row in zip(range(num - len(odd)), itertools.cycle(ODD_CSV_ROWS))]
    lines = [b"image_id,image_uri,title", *interleave(rows, odd)]
    (root / "csv" / "rows.csv").write_bytes(b"\n".join(lines))
    settings = {"uri": f"{root}/csv/rows.csv", "format": "csv", "base_uri": f"{root}/csv/img"}
    return OddSource(settings, {key: names[name] for key, name in good.items()}, len(lines) - 1)


def odd_table_folder(root: Path, num: int) -> OddSource:
    """A folder with a table, which names some of its files and some that are not there."""
    names = image_folder(root / "listed", num)
    rows = [f'"{name}",t' for name in names]
    odd = [f'"{name}",t' for name in ODD_IMAGES]
    odd += [f"gone{number},t" for number in range(num // 2)]
    for number in range(num - len(odd)):
        (root / "listed" / f"beside{number}.{('png', 'txt', '')[number % 3]}").write_bytes(picture(1))
    lines = ["file_name,title", *interleave(rows, odd)]
    (root / "listed" / "metadata.csv").write_text("\n".join(lines))
    entries = [os.path.join(where, name) for where, _, files in os.walk(root / "listed") for name in files]
    named = {f"{root}/listed/{name}" for name in (*names, *ODD_IMAGES)} | {f"{root}/listed/metadata.csv"}
    return OddSource({"uri": f"{root}/listed", "format": "folder"}, names, len(lines) - 1 + len({*entries} - named))


ODD_LINES = [
    *(
        '{"image_id": "%d"}',
        "{broken %d",
        "[%d]",
        "%d",
        '"%d"',
        "null",
        "}",
        "[" * 5000,
        '{"image_id": "n%d", "image_uri"',
    ),
    *(
        '{"image_id": ' + key + ', "image_uri": "a::1.png"}'
        for key in ("9007199254740993.0", "1e400", '{"a": %d}', "null", '"\\ud800"', '"0001"')
    ),
    '{"image_id": "x%d", "image_uri": 7}',
]


def odd_jsonl(root: Path, num: int) -> OddSource:
    (root / "jsonl").mkdir()
    names = image_folder(root / "jsonl" / "img", num)
    good = {f"{number:04d}": name for number, name in enumerate(names)}
    rows = [json.dumps({"image_id": key, "image_uri": name, "title": 1.0}) for key, name in good.items()]
    odd = [json.dumps({"image_id": f"o{n}", "image_uri": name}) for n, name in enumerate(ODD_IMAGES)]
    odd += [row.replace("%d", str(n)) for n, row in zip(range(num - len(odd)), itertools.cycle(ODD_LINES))]
    lines = interleave(rows, odd)
    (root / "jsonl" / "rows.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    settings = {"uri": f"{root}/jsonl/rows.jsonl", "format": "jsonl", "base_uri": f"{root}/jsonl/img"}
    return OddSource(settings, {key: names[name] for key, name in good.items()}, len(lines))


def odd_table(num: int) -> tuple[pa.Table, dict[str, bytes]]:
    """Rows of bytes, ids as doubles: whole ones, and those that are none."""
    good = {str(number): picture(number) for number in range(num)}
    content = not_pictures()
    ids = itertools.cycle([None, 0.0, 2.0**53, 1e300, float("inf"), float("nan")])
    odd: list[tuple[float | None, bytes | None]] = [(next(ids), picture(1)) for _ in range(num // 2)]
    odd += [(num + 0.5 + n, None if n % 5 == 0 else next(content)) for n in range(num - len(odd))]
    rows = interleave([(float(key), data) for key, data in good.items()], odd)
    table = pa.table({"image_id": pa.array([key for key, _ in rows], pa.float64())})
    return table.append_column("image", pa.array([data for _, data in rows], pa.binary())), good


def odd_parquet(root: Path, num: int) -> OddSource:
    (root / "parquet").mkdir()
    table, good = odd_table(num)
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), f"{root}/parquet/a::1.parquet", row_group_size=30)
    with open(os.fsencode(f"{root}/parquet/b") + b"\xe9.parquet", "wb") as file:
        pq.write_table(table.slice(half), file)
    pq.write_table(table.slice(0, 0), f"{root}/parquet/empty.parquet")
    os.symlink("nowhere", root / "parquet" / "c.parquet")
    os.mkfifo(root / "parquet" / "d.parquet")
    (root / "parquet" / "README.md").write_text("text")
    return OddSource({"uri": f"{root}/parquet", "format": "parquet"}, good, table.num_rows + 4)


def odd_lance(root: Path, num: int) -> OddSource:
    import lance

    table, good = odd_table(num)
    lance.write_dataset(table, f"{root}/rows.lance", max_rows_per_file=50)
    return OddSource({"uri": f"{root}/rows.lance", "format": "lance"}, good, table.num_rows)


def odd_tar(root: Path, num: int) -> OddSource:
    (root / "tar").mkdir()
    good, content = {}, not_pictures()
    members: list[tuple[str, bytes | str | None]] = []
    for number in range(num):
        good[key := f"x/a::{number}"] = picture(number)
        members += [(f"{key}.png", good[key]), (f"{key}.txt", b"t"), (f"{key}.seg.png", b"mask")]
        odd = f"x/o{number}"
        kinds: list[list[tuple[str, bytes | str | None]]] = [
            [(f"{odd}.png", picture(1)), (f"{odd}.jpg", picture(2))],
            [(f"{odd}.png", picture(1)), (f"{odd}.png", picture(2))],
            [(f"{odd}.txt", b"alone")],
            [("x/a::0.txt", b"after its image")],
            [("x/a::0.png", picture(0))],
            [(f"{odd}.png", "x/a::0.png")],
            [(f"{odd}.png", None)],
            [(f"{odd}.png", picture(1)), (f"{odd}.json", b"{broken")],
            [(f"{odd}.png", next(content))],
            [(f"x/._{number}.png", b"resource fork")],
            [(f"x/\udce9{number}.png", picture(1))],
            [(f"{odd}", b"no ending")],
        ]
        members += kinds[number % len(kinds)]
    with tarfile.open(root / "tar" / "a.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if data is None or isinstance(data, str):
                member.type, member.linkname = (tarfile.FIFOTYPE, "") if data is None else (tarfile.LNKTYPE, data)
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    keys = [name.rpartition("/")[2].partition(".")[0] or name for name, _ in members]
    return OddSource({"uri": f"{root}/tar", "format": "webdataset"}, good, len(list(itertools.groupby(keys))))


SOURCES: list[Callable[[Path, int], OddSource]] = [
    odd_folder,
    odd_table_folder,
    odd_csv,
    odd_jsonl,
    odd_parquet,
    odd_lance,
    odd_tar,
]
