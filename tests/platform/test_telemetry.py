"""Whatever a name holds, it stays on its line of a terminal or log and moves no cursor."""

import io
import logging
import unicodedata
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.cli import main
from lookalike.errors import UsageError
from lookalike.telemetry import fields, get_logger, printable, printable_lines

EVIL = "a\x1b[2Jb\r\nok  c\x9b1md\u202ee\u2028f\x07"
PLAIN = r"a\x1b[2Jb\r\nok  c\x9b1md\u202ee\u2028f\x07"


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What a handler with Python's plain format writes for the loggers below ``lookalike``."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("lookalike").addHandler(handler)
    yield stream
    logging.getLogger("lookalike").removeHandler(handler)


@given(st.text(st.characters(), max_size=30))
@settings(max_examples=50, deadline=None)
def test_printable_text_has_no_character_that_acts(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in shown)
    assert not any(unicodedata.bidirectional(letter) in ("LRE", "RLE", "PDF", "LRO", "RLO") for letter in shown)
    assert not any(unicodedata.bidirectional(letter) in ("LRI", "RLI", "FSI", "PDI") for letter in shown)
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["chair-7", "椅子　赤", "کتاب\u200cها", "👩\u200d🚀", "مرحبا", "é \\n", ""])  # noqa: RUF001
def test_words_of_all_languages_stay(text: str) -> None:
    assert printable(text) == text


def test_lines_stay_apart() -> None:
    assert printable_lines(["one", EVIL]) == f"one\n{PLAIN}"


def test_fields_are_one_line() -> None:
    assert fields(id=EVIL, rate=0.123456, name='x" y', plain="z") == f'id="{PLAIN}" rate=0.1235 name="x\\" y" plain=z'


def test_logs_are_one_line_a_record_whatever_handler_writes_them(logged: io.StringIO) -> None:
    get_logger("trial").warning("failed %s", EVIL)
    assert logged.getvalue() == f"failed {PLAIN}\n"


def test_tracebacks_forge_no_line(logged: io.StringIO) -> None:
    try:
        raise ValueError(f"{EVIL}\n12:00:00 I all is well")
    except ValueError as error:
        get_logger("trial").error("fault", exc_info=error)
    first, *rest = logged.getvalue().splitlines()
    assert first == "fault"
    assert rest
    assert all(line.startswith("  ") for line in rest)
    assert "\x1b" not in logged.getvalue()


def test_errors_of_the_command_line_forge_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: str) -> None:
        raise UsageError(f"no file {EVIL}\nlookalike: done")

    monkeypatch.setattr("lookalike.stages.load_object", fail)
    assert main(["verify", "x"]) == 2
    err = capsys.readouterr().err
    assert [line[:2] for line in err.splitlines()] == ["lo", "  ", "  "]
    assert not any(letter in err for letter in "\x1b\x9b\u202e\x07\r")
