from pathlib import Path

import pytest

from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.wordlists import resolve_aliases
from lookalike.errors import UsageError


@pytest.mark.parametrize(
    "term",
    [
        "swastika",
        "nude woman",
        "clipart",
        "flat icon collection",
        "house pet",
        "drugs store",
        "adult content box",
        "\u0441hair",
    ],
)
def test_sensitive_boilerplate_and_foreign_terms_are_refused(term: str) -> None:
    lists = AnnotationConfig(stop_terms=("House Pets",)).lists()
    assert not lists.accepts(term)
    assert lists.accepts("picture frame")


def test_the_users_list_of_sensitive_terms_comes_on_top_or_instead(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("# ours\nCigarettes\nBlood Bags\n", encoding="utf-8")
    both = AnnotationConfig(sensitive=str(file)).lists()
    assert [both.accepts(t) for t in ("cigarette", "cigarette box", "blood bag", "blood", "swastika")] == [
        False,
        False,
        False,
        True,
        False,
    ]
    alone = AnnotationConfig(sensitive=str(file), packaged_sensitive=False).lists()
    assert alone.accepts("swastika")
    assert not alone.accepts("cigarette")


def test_a_supplied_vocabulary_is_canonical_and_merged(tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    file.write_text("Office Chairs\nCouches\nthe\n", encoding="utf-8")
    config = AnnotationConfig(vocabulary=str(file), aliases={"couch": "sofa"})
    assert config.lists().vocabulary == {"office chair", "sofa"}
    assert config.sources() == [str(file)]


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "Couches: sofas\nSettee: couch\n"), ("a.csv", "Couches,sofas\nSettee,couch\n")]
)
def test_aliases_from_a_file_lead_to_their_last_term(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    lists = AnnotationConfig(aliases=str(tmp_path / name)).lists()
    assert [lists.aliases.get(t, t) for t in ("settee", "couch", "sofa", "tshirt")] == [
        "sofa",
        "sofa",
        "sofa",
        "t shirt",
    ]


@pytest.mark.parametrize(
    ("setting", "content", "message"),
    [
        ("aliases", "- a\n", "not a mapping"),
        ("aliases", "a: [", "not valid YAML"),
        ("aliases", "the: sofa\n", "not a pair of terms"),
        ("vocabulary", "# none\n", "holds no term"),
        ("sensitive", None, "there is no file"),
    ],
)
def test_files_that_cannot_be_used_are_explained(
    tmp_path: Path, setting: str, content: str | None, message: str
) -> None:
    file = tmp_path / "list.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        AnnotationConfig.model_validate({setting: str(file)}).lists()


def test_a_csv_line_of_three_columns_and_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b,c\n", encoding="utf-8")
    with pytest.raises(UsageError, match="'a,b,c' has 3 columns"):
        AnnotationConfig(aliases=str(tmp_path / "a.csv")).lists()
    (tmp_path / "b.txt").write_bytes(b"sofa\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        AnnotationConfig(vocabulary=str(tmp_path / "b.txt")).lists()


def test_aliases_in_a_circle_are_refused() -> None:
    with pytest.raises(UsageError, match="a -> b -> a go in a circle"):
        resolve_aliases({"a": "b", "b": "a"})
