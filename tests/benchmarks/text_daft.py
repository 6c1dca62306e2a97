"""The text side in Daft, for comparison: the rules for one text as row functions, the rest as expressions.

It leaves out what ``text_polars`` leaves out, except that terms and matches are exact: they come from ``data.terms``.
"""

from typing import Any

from lookalike.data.text.languages import MIN_WORDS, SURE, language_of
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.terms import canonical, match_terms, ngrams
from tests.benchmarks.text_polars import language_model

FREE_TEXT = ("title", "description")


def _may_read(languages: bool) -> Any:
    model = language_model()

    def may(text: str, locale: str | None) -> bool:
        foreign = language_of(locale) not in (None, "en")
        if not languages or len(text.split()) < MIN_WORDS:
            return not (languages and foreign)
        code, confidence = model.classify(text)
        return code == "en" or (not foreign and confidence < SURE)

    return may


def run(paths: list[str], languages: bool) -> dict[str, Any]:
    """Vocabulary and annotations of the parts; their sizes."""
    import daft
    from daft import DataType, col, lit

    config, may = AnnotationConfig(), _may_read(languages)
    lists = config.lists()
    weights = {name: weight for name, weight in config.field_weights.items() if name != "interactions"}

    def texts(name: str, value: Any, locale: str | None) -> list[str]:
        found = value if name == "keywords" else value.split("/") if name == "category" else [value]
        return [text for text in found if text and (name == "category" or may(text, locale))]

    def propose(name: str) -> Any:
        def each(value: Any, locale: str | None, creator: str | None, dataset: str | None) -> list[str]:
            own = ngrams(creator or "") | ngrams(dataset or "")
            found: set[str] = set()
            for text in texts(name, value, locale) if value is not None else ():
                found |= ngrams(text) if name in FREE_TEXT else {canonical(text) or ""}
            return sorted(found - own - {""})

        return daft.func(each, return_dtype=DataType.list(DataType.string()))

    def name_terms(name: str, vocabulary: frozenset[str]) -> Any:
        def each(value: Any, locale: str | None, creator: str | None, dataset: str | None) -> list[str]:
            own = ngrams(creator or "") | ngrams(dataset or "")
            found: set[str] = set()
            for text in texts(name, value, locale) if value is not None else ():
                whole = None if name in FREE_TEXT else canonical(text)
                found |= {whole} if whole is not None and whole in vocabulary else match_terms(text, vocabulary)
            return sorted(found - own)

        return daft.func(each, return_dtype=DataType.list(DataType.string()))

    records = daft.read_parquet(paths)
    given = [col(name) for name in ("locale", "creator", "dataset")]

    def table(function: Any, names: list[str]) -> Any:
        frames = [
            records.select(
                col("image_id"), lit(weights[name]).alias("weight"), function(name)(col(name), *given).alias("term")
            ).explode("term")
            for name in names
        ]
        joined = frames[0]
        for frame in frames[1:]:
            joined = joined.concat(frame)
        return joined.where(col("term").not_null())

    strong = [name for name, weight in weights.items() if weight >= config.min_score]
    pairs = table(propose, strong).select("image_id", "term").distinct()
    counts = pairs.groupby("term").agg(col("image_id").count().alias("images"))
    frequent = counts.where(col("images") >= config.min_images).to_pydict()["term"]
    vocabulary = frozenset(term for term in frequent if lists.accepts(term))
    named = table(lambda name: name_terms(name, vocabulary), list(weights))
    doubt = named.select("image_id", "term", (lit(1.0) - col("weight")).ln().alias("log"))
    scored = doubt.groupby("image_id", "term").agg(col("log").sum())
    kept = scored.where(lit(1.0) - col("log").exp() >= config.min_score - 1e-9)
    return {"terms": len(vocabulary), "annotations": kept.count_rows()}
