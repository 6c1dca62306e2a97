"""Entries of folders that others filled: each once, whatever it is and however it is called."""

import os
import tempfile
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike import storage
from lookalike.entries import Entry, ending, escaped, list_entries, walk
from lookalike.errors import UsageError

name_bytes = st.binary(min_size=1, max_size=12).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}
)
KINDS = {
    "file": None,
    "link": None,
    "dangling": "dangling_link",
    "loop": "dangling_link",
    "folder link": "link_to_folder",
    "pipe": "not_a_file",
}


def make(path: bytes, kind: str, root: bytes) -> None:
    if kind == "file":
        with open(path, "wb") as file:
            file.write(path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.symlink({"link": root + b"/target", "loop": path, "folder link": root}.get(kind, b"nowhere"), path)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from([b"", b"a::b", b"\xff"]), name_bytes), st.sampled_from(list(KINDS)), max_size=8
    )
)
def test_every_entry_is_listed_once_with_what_it_is(entries: dict[tuple[bytes, bytes], str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        inside = os.fsencode(root) + b"/in"
        for folder in (b"", b"a::b", b"\xff"):
            os.makedirs(os.path.join(inside, folder), exist_ok=True)
        (Path(root) / "target").write_bytes(b"x")
        wanted = {}
        for (folder, name), kind in entries.items():
            path = os.path.join(inside, folder, name)
            if not os.path.lexists(path):
                make(path, kind, os.fsencode(root))
                wanted[os.fsdecode(os.path.join(folder, name))] = KINDS[kind]
        assert dict(list_entries(f"{root}/in")) == wanted
        found = list(walk(*storage.resolve(f"{root}/in")))
        assert dict(found) == wanted
        for first, last in pairwise(found):
            assert list(walk(*storage.resolve(f"{root}/in"), first.name, last.name)) == [first, last]
        for name, problem in wanted.items():
            escaped(name).encode()
            assert escaped(ending(name)).isprintable()
            if problem is None:
                assert storage.read_bytes(storage.join(f"{root}/in", name)) is not None


@pytest.mark.parametrize("name", ["a::b.jpg", "::", "zip::x", "s3::y.jpg", "a::/b", ":::", "memory::b"])
@pytest.mark.parametrize("base", ["disk", "memory://chain", "relative"])
def test_colons_in_names_chain_nothing(tmp_path: Path, base: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = {"disk": str(tmp_path), "relative": "sub"}.get(base, base)
    uri = storage.join(root, name)
    storage.write_atomic(uri, b"x")
    assert storage.read_bytes(uri) == b"x"
    assert storage.list_files(root) == [name]
    fsspec.filesystem("memory").store.clear()


def test_chains_of_file_systems_stay(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/b.txt", "x")
    assert storage.read_bytes(f"zip://in/b.txt::{tmp_path}/a.zip") == b"x"
    assert storage.resolve(f"simplecache::file://{tmp_path}/a.zip") != storage.resolve(f"{tmp_path}/a.zip")
    with pytest.raises(UsageError, match="cannot be opened"):
        storage.resolve("nosuch://a::b")


def test_what_is_no_folder_has_no_entries(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "link")
    (tmp_path / "file").write_bytes(b"")
    assert [list_entries(f"{tmp_path}/{name}") for name in ("pipe", "link", "gone")] == [[], [], []]
    assert list_entries(f"{tmp_path}/file") == [Entry("")]
