"""The text side in idiomatic single-process polars, for comparison: the same rules as far as expressions reach.

Words are made singular and languages identified by Python functions mapped over unique values, as expressions cannot.
It leaves out: case folding beyond ``to_lowercase``, invisible characters and combining marks, words in other scripts,
the rule that a sensitive word spoils a longer term, aliases, and the cap on characters. Of overlapping matches it keeps
those not inside a longer one, which differs from longest-first reading where matches chain.
"""

from functools import cache
from typing import Any

import polars as pl

from lookalike.data.text.languages import MIN_WORDS, SURE, language_of
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.terms import STOP_WORDS, singular

FREE_TEXT = ("title", "description")
BREAKS = r"[^\w\s'+&_-]+|\s-+\s|[\n\r\t]"


@cache
def language_model() -> Any:
    """py3langid as it is: one text a call."""
    from py3langid.langid import MODEL_DIR, MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_modelpath(MODEL_DIR / MODEL_FILE, norm_probs=True)


def identify_unique(texts: pl.Series) -> pl.DataFrame:
    """text, wanted, unsure of each distinct text, one call of py3langid each."""
    model = language_model()
    unique = texts.unique()
    found = [model.classify(text) if len(text.split()) >= MIN_WORDS else ("", 0.0) for text in unique.to_list()]
    return pl.DataFrame(
        {
            "text": unique,
            "wanted": [code == "en" for code, _ in found],
            "unsure": [confidence < SURE for _, confidence in found],
        }
    )


def texts_of(records: pl.LazyFrame, names: list[str], languages: bool) -> pl.DataFrame:
    """row, field, text of every text to read."""
    frames = []
    for name in names:
        one = records.select("row", "locale", pl.lit(name).alias("field"), pl.col(name).alias("text"))
        if name == "category":
            one = one.with_columns(pl.col("text").str.split("/"))
        frames.append(one.explode("text") if name in ("category", "keywords") else one)
    frame = pl.concat(frames).drop_nulls("text").collect()
    if not languages:
        return frame
    locales = frame["locale"].unique().to_list()
    foreign = [code for code in locales if language_of(code) not in (None, "en")]
    frame = frame.join(identify_unique(frame.filter(pl.col("field").is_in(FREE_TEXT))["text"]), on="text", how="left")
    own = ~pl.col("locale").is_in(foreign).fill_null(False)
    may = pl.col("wanted").fill_null(False) | (own & pl.col("unsure").fill_null(True))
    return frame.filter((pl.col("field") == "category") | may)


def words_of(texts: pl.DataFrame) -> pl.DataFrame:
    """row, field, phrase, whole, word, single, edge, inner: one row a word, in order."""
    text = pl.col("text").str.normalize("NFKC").str.to_lowercase().str.replace_all("\u2019", "'", literal=True)
    words = (
        texts.with_row_index("source")
        .with_columns(text.str.replace_all(BREAKS, "\x1e").str.split("\x1e"))
        .explode("text")
        .with_row_index("phrase")
        .with_columns(word=pl.col("text").str.extract_all(r"[^\W_][\w'+&--_]*"))
        .explode("word")
        .drop_nulls("word")
        .with_columns(pl.col("word").str.strip_chars("'"))
    )
    unique = words["word"].unique()
    facts = pl.DataFrame({"word": unique, "single": [singular(word) for word in unique.to_list()]}).with_columns(
        inner=pl.col("word").str.contains(r"[^\W\d_]")
    )
    facts = facts.with_columns(edge=pl.col("inner") & ~pl.col("word").is_in(list(STOP_WORDS)))
    return words.join(facts, on="word", how="left", maintain_order="left").with_row_index("at")


def terms_of(words: pl.DataFrame) -> pl.DataFrame:
    """Every candidate: row, field, source, at, length, term; of fields that are terms already the whole text only."""
    found = []
    size = pl.len().over("source")
    words = words.with_columns(size=size)
    for length in (1, 2, 3):
        last = {name: pl.col(name).shift(1 - length) for name in ("phrase", "edge", "single", "source")}
        fine = pl.col("edge") & last["edge"]
        parts = [last["single"]]
        for offset in reversed(range(length - 1)):
            parts.insert(0, pl.col("word").shift(-offset))
            fine = fine & pl.col("inner").shift(-offset)
        free = pl.col("field").is_in(FREE_TEXT)
        same = (
            pl.when(free)
            .then(last["phrase"] == pl.col("phrase"))
            .otherwise((last["source"] == pl.col("source")) & (pl.col("size") == length))
        )
        term, fine = pl.concat_str(parts, separator=" "), (fine & same).fill_null(False)
        columns = words.select("row", "field", "source", "at", length=pl.lit(length), term=term, fine=fine)
        found.append(columns.filter("fine").drop("fine"))
    return pl.concat(found).filter(pl.col("term").str.len_chars().is_between(2, 60))


def without_own(terms: pl.DataFrame, records: pl.LazyFrame) -> pl.DataFrame:
    """Terms that are not in the name of the record's creator or data set."""
    names = (
        pl.concat(
            [
                records.select("row", "creator", pl.lit("title").alias("field"), text=name)
                for name in (pl.col("creator"), pl.col("dataset"))
            ]
        )
        .drop_nulls("text")
        .collect()
    )
    unique = names.select("text", "field").unique().with_row_index("row")
    own = terms_of(words_of(unique)).select(name="row", term="term").unique()
    pairs = names.join(unique.select("text", name="row"), on="text").select("row", "name").join(own, on="name")
    return terms.join(pairs.select("row", "term"), on=["row", "term"], how="anti")


def run(paths: list[str], languages: bool) -> dict[str, Any]:
    """Sizes of what ``label`` finds."""
    vocabulary, annotations = label(paths, languages)
    return {"terms": vocabulary.height, "annotations": annotations.height}


def label(paths: list[str], languages: bool) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Vocabulary (term, images) and annotations (row, term, score) of the parts."""
    config = AnnotationConfig()
    lists = config.lists()
    records = pl.scan_parquet(paths).with_row_index("row")
    weights = {name: weight for name, weight in config.field_weights.items() if name != "interactions"}
    words = words_of(texts_of(records, list(weights), languages))
    terms = without_own(terms_of(words), records)
    strong = [name for name, weight in weights.items() if weight >= config.min_score]
    counts = terms.filter(pl.col("field").is_in(strong)).group_by("term").agg(pl.col("row").n_unique().alias("images"))
    refused = list(lists.sensitive | lists.boilerplate)
    frequent = counts.filter((pl.col("images") >= config.min_images) & ~pl.col("term").is_in(refused))
    return frequent, match(terms, frequent, weights, config.min_score)


def match(terms: pl.DataFrame, vocabulary: pl.DataFrame, weights: dict[str, float], least: float) -> pl.DataFrame:
    """row, term, score: noisy-or of the fields that name a term."""
    known = terms.join(vocabulary.select("term"), on="term", how="semi")
    long = known.filter((pl.col("length") > 1) & pl.col("field").is_in(FREE_TEXT))
    inside = pl.concat(
        [
            long.select("source", at=pl.col("at") + start, length=pl.lit(size, pl.Int32)).join(
                long.filter(pl.col("length") == outer).select("source", at=pl.col("at") + start),
                on=["source", "at"],
                how="semi",
            )
            for outer, start, size in ((2, 0, 1), (3, 0, 1), (3, 1, 1), (3, 0, 2))
        ]
    )
    named = known.with_columns(pl.col("at").cast(pl.Int64), pl.col("length").cast(pl.Int32)).join(
        inside.with_columns(pl.col("at").cast(pl.Int64)).unique(), on=["source", "at", "length"], how="anti"
    )
    once = named.select("row", "field", "term").unique()
    doubt = (1.0 - pl.col("field").replace_strict(weights, return_dtype=pl.Float64)).product()
    scored = once.group_by("row", "term").agg(score=1.0 - doubt)
    return scored.filter(pl.col("score") >= least).sort("row", "score", "term", descending=[False, True, False])
