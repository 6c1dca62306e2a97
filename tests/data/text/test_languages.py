import numpy as np
import polars as pl
import pytest

from lookalike.data.text.languages import IDENTIFY_CHARACTERS, identify, language_of, readable

FRENCH = "Une petite maison avec un jardin et une voiture devant la porte"
ENGLISH = "A small house with a garden and a car in front of the door"
RUSSIAN = "\u041a\u0440\u0430\u0441\u043d\u044b\u0439 \u0434\u0438\u0432\u0430\u043d \u0438 \u0441\u0442\u0443\u043b"
TEXTS = [
    FRENCH,
    ENGLISH,
    ENGLISH.upper(),
    "Ein rotes Sofa mit zwei Kissen",
    RUSSIAN,
    "",
    "12",
    "\U0001f525",
    "\u8d64\u3044\u30bd\u30d5\u30a1",
    "Naranja y lim\u00f3n en una mesa de madera",
    "s\u030co",
    "a b c d e f",
    "clip art of a tree " * 30,
]


def test_batches_answer_as_py3langid_does_for_one_text() -> None:
    langid = pytest.importorskip("py3langid.langid")
    alone = langid.LanguageIdentifier.from_modelpath(langid.MODEL_DIR / langid.MODEL_FILE, norm_probs=True)
    language, confidence = identify(TEXTS)
    expected = [alone.classify(text[:IDENTIFY_CHARACTERS]) for text in TEXTS]
    assert language.tolist() == [code for code, _ in expected]
    np.testing.assert_allclose(confidence, [value for _, value in expected], rtol=1e-4)


def may(text: str, locale: str | None, language: str = "en") -> bool:
    schema = {"text": pl.String, "locale": pl.String}
    return not readable(pl.DataFrame({"text": [text], "locale": [locale]}, schema=schema), language).is_empty()


def test_foreign_text_is_not_read_and_the_locale_is_a_hint() -> None:
    assert may(ENGLISH, "en")
    assert not may(FRENCH, "en")
    assert may(ENGLISH, "fr")  # long enough to be identified against a wrong locale
    assert not may("Portrait", "fr")  # too short: the locale decides
    assert may("Portrait", None)
    assert may(FRENCH, "fr", "fr")
    assert not may("Das rote Haus am See", None)
    assert may("Das rote Haus am See", "en")  # not sure enough to be believed against the locale


@pytest.mark.parametrize(
    ("locale", "code"),
    [
        ("en", "en"),
        ("en-GB", "en"),
        ("EN_us", "en"),
        ("eng", "en"),
        ("fra", "fr"),
        ("est", "et"),
        ("zh-Hans-CN", "zh"),
        ("all", None),
        ("N/A", None),
        ("", None),
        (None, None),
        ("xx", None),
    ],
)
def test_the_language_of_a_locale(locale: str | None, code: str | None) -> None:
    assert language_of(locale) == code
