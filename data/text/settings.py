"""Settings of the annotations: the fields that are read, their weights, and the terms that are refused."""

from typing import Annotated, Literal

from pydantic import Field

from lookalike.config import Config
from lookalike.data.text.wordlists import WordLists, load_lists

TextField = Literal["title", "description", "keywords", "category", "interactions"]
Weight = Annotated[float, Field(ge=0, le=1)]


class AnnotationConfig(Config):
    """How text becomes scored terms."""

    annotator: str = "lexical"
    """Name in the registry ``lookalike.annotator``."""
    field_weights: dict[TextField, Weight] = Field(
        default={"keywords": 0.7, "title": 0.6, "category": 0.6, "description": 0.35, "interactions": 0.3}
    )
    """Probability that a term which the field names is true of the picture; fields combine as noisy-or. Fields that are
    left out are not read. The weight of a term in ``interactions``, cut to [0, 1], is multiplied with this one."""
    min_score: float = Field(0.5, ge=0, le=1)
    """Annotations with a lower score are discarded."""
    high_confidence: float = Field(0.6, ge=0, le=1)
    """Images with at least this score are positives of the visual dictionary."""
    min_images: int = Field(8, ge=1)
    """Training images that must name a term for it to enter the vocabulary, mined or supplied."""
    max_terms: int | None = Field(None, ge=1)
    """Size limit of the vocabulary: the terms that most images name, ties in alphabetical order. None: no limit."""
    vocabulary: str | None = None
    """URI of a list of terms, one per line: the only terms that annotations may have."""
    language: str | None = Field("en", min_length=2, max_length=2)
    """Text in another language is not read; with ``en``, terms with letters that are not Latin are refused. None reads
    all text."""
    max_characters: int = Field(2000, ge=60, le=100_000)
    """Characters that are read of a title, a description or an entry of a list."""
    sensitive: str | None = None
    """URI of a list of terms that must not become labels, one per line."""
    packaged_sensitive: bool = True
    """Whether the packaged list of sensitive terms is used too."""
    aliases: dict[str, str] | str = Field(default={})
    """Term -> the term that it is merged into, or the URI of a YAML or CSV file with these pairs."""
    stop_terms: tuple[str, ...] = ()
    """Terms that say nothing about the pictures of this corpus, in addition to the packaged boilerplate list."""
    scores_from: Literal["annotations", "keywords"] = "annotations"
    """Where ``precomputed`` finds the user's terms: in the corpus field ``annotations``, or in keywords of the form
    ``term:0.83`` (a ``term`` alone has score 1)."""

    def sources(self) -> list[str]:
        """URIs of the files that the settings name; their content changes the result."""
        return [uri for uri in (self.vocabulary, self.sensitive, self.aliases) if isinstance(uri, str)]

    def lists(self) -> WordLists:
        """The word lists that the settings name. Raises ``UsageError`` for a file that cannot be used."""
        return load_lists(
            sensitive=self.sensitive,
            packaged_sensitive=self.packaged_sensitive,
            stop_terms=self.stop_terms,
            aliases=self.aliases,
            vocabulary=self.vocabulary,
            latin=self.language == "en",
        )
