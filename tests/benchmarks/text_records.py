"""Made-up records with a Zipf vocabulary for the benchmark of the text side: seeded, written as parquet parts.

The most frequent words are those of the sample corpus; the others join two of them. So texts look English to a language
model, and the number of distinct words keeps growing with the records.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

SAMPLES = Path(__file__).parents[2] / "data" / "samples"
WORDS, ZIPF = 200_000, 1.05
PART_ROWS = 10_000
FOREIGN = {
    "de": "ein eine rotes blaues haus mit und der die das garten auto stuhl tisch lampe fenster kleine holz aus im am "
    "see baum katze hund blume vogel weg stadt alte neue bild von zwei frau mann kind auf dem",
    "fr": "une un petite maison avec et la le les jardin voiture chaise table lampe rouge bleu bois dans sur lac arbre "
    "chat chien fleur oiseau chemin ville vieille nouvelle image de deux femme homme enfant devant porte",
    "es": "una un casa con y el la los jardin coche silla mesa rojo azul madera en sobre lago arbol gato perro flor "
    "pajaro camino ciudad vieja nueva imagen de dos mujer hombre junto puerta pequena grande",
}
FILL = ("a", "of", "with", "and", "the", "in", "for")


def vocabulary(rng: np.random.Generator) -> NDArray[np.object_]:
    """``WORDS`` distinct words, the most frequent first."""
    counts: Counter[str] = Counter()
    for file in sorted(SAMPLES.glob("*/*.parquet")):
        table = pq.read_table(file, columns=["title", "description"])
        for column in table.columns:
            counts.update(re.findall(r"[a-z]{3,12}", " ".join(t or "" for t in column.to_pylist()).lower()))
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    distinct = dict.fromkeys(words)
    while len(distinct) < WORDS:
        first, second = rng.integers(0, min(len(words), 3000), (2, WORDS))
        distinct.update(
            dict.fromkeys(words[a] + words[b] for a, b in zip(first.tolist(), second.tolist(), strict=True))
        )
    return np.array(list(distinct)[:WORDS], object)


class Generator:
    """Makes parts of records; a part depends on its number and the seed alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = np.random.default_rng(seed)
        self.words = vocabulary(rng)
        self.paths = np.array(["/".join(self.words[rng.integers(40, 900, depth)]) for depth in rng.integers(1, 4, 400)])
        self.chance = np.cumsum(1.0 / np.arange(1, WORDS + 1) ** ZIPF)

    def _draw(self, rng: np.random.Generator, count: int) -> NDArray[np.object_]:
        rank = np.searchsorted(self.chance, rng.random(count) * self.chance[-1])
        return self.words[np.minimum(rank, WORDS - 1)]

    def _texts(self, rng: np.random.Generator, sizes: NDArray[np.int64]) -> list[str]:
        words = self._draw(rng, int(sizes.sum()))
        fill = rng.random(len(words)) < 0.2
        words[fill] = np.array(FILL, object)[rng.integers(0, len(FILL), int(fill.sum()))]
        return [" ".join(chunk).capitalize() for chunk in np.split(words, np.cumsum(sizes)[:-1])]

    def part(self, number: int, rows: int = PART_ROWS) -> pa.Table:
        """The text columns of a corpus part."""
        rng = np.random.default_rng([self.seed, number])
        titles = self._texts(rng, rng.integers(3, 9, rows))
        descriptions: list[str | None] = list(self._texts(rng, rng.integers(12, 30, rows)))
        locales: list[str | None] = ["en-US"] * rows
        for at in np.nonzero(rng.random(rows) < 0.1)[0].tolist():
            code = list(FOREIGN)[int(rng.integers(3))]
            pool = FOREIGN[code].split()
            titles[at] = " ".join(rng.choice(pool, int(rng.integers(3, 9)))).capitalize()
            descriptions[at] = " ".join(rng.choice(pool, 15))
            locales[at] = code if rng.random() < 0.7 else None
        for at in np.nonzero(rng.random(rows) < 0.7)[0].tolist():
            descriptions[at] = None
        sizes = rng.integers(1, 6, rows)
        keywords = pa.ListArray.from_arrays(
            pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32()),
            pa.array(self._draw(rng, int(sizes.sum())), pa.string()),
        )
        category = self.paths[np.minimum(rng.zipf(1.3, rows) - 1, len(self.paths) - 1)]
        columns: dict[str, Any] = {
            "image_id": [f"r{number:06d}-{row:05d}" for row in range(rows)],
            "title": titles,
            "description": descriptions,
            "keywords": keywords,
            "category": pa.array(category, pa.string()),
            "locale": locales,
            "creator": [f"shop {int(n)}" for n in rng.zipf(1.2, rows) % 9973],
            "dataset": ["synthetic"] * rows,
            "split": ["train"] * rows,
            "group": pa.nulls(rows, pa.string()),
        }
        return pa.table(columns)

    def write(self, folder: Path, records: int) -> list[str]:
        """Write parts that hold ``records`` records; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, start in enumerate(range(0, records, PART_ROWS)):
            path = folder / f"part-{number:06d}.parquet"
            pq.write_table(self.part(number, min(PART_ROWS, records - start)), path, row_group_size=1024)
            paths.append(str(path))
        return paths
