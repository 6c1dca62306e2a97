"""The text side in Daft: the rules of ``text_plain`` as row functions, the rest as expressions."""

from typing import Any

from lookalike.data.text.settings import AnnotationConfig
from tests.benchmarks.text_plain import COLUMNS, candidates, scores, spellings


def run(paths: list[str], config: AnnotationConfig) -> dict[str, Any]:
    """Sizes of the vocabulary and the annotations of the parts."""
    import daft
    from daft import DataType, col
    from daft.functions import to_struct

    lists, record = config.lists(), to_struct(*map(col, COLUMNS))
    records = daft.read_parquet(paths)

    def propose(record: dict[str, Any]) -> list[str]:
        return sorted({lists.aliases.get(term, term) for term in candidates(record, config)})

    terms = daft.func(propose, return_dtype=DataType.list(DataType.string()))
    proposed = records.where(col("split") == "train").select(terms(record).alias("term")).explode("term")
    images = proposed.where(col("term").not_null()).groupby("term").agg(col("term").count().alias("images"))
    counts = images.to_pydict()
    vocabulary = spellings(dict(zip(counts["term"], counts["images"], strict=True)), config)

    def annotate(record: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"term": term, "score": score} for term, score in scores(record, config, vocabulary).items()]

    pair = DataType.struct({"term": DataType.string(), "score": DataType.float64()})
    named = daft.func(annotate, return_dtype=DataType.list(pair))
    annotations = records.select(col("image_id"), named(record).alias("named")).explode("named")
    return {
        "terms": len(set(vocabulary.values())),
        "annotations": annotations.where(col("named").not_null()).count_rows(),
    }
