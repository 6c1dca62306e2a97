"""Settings of the annotations: which text is read, how it is weighted, which terms are refused."""

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
    """Probability that a term a field names is true of the picture; fields combine as noisy-or. The fields left out
    are not read. A term of ``interactions`` counts by its weight there, cut to [0, 1], times this one."""
    min_score: float = Field(0.5, ge=0, le=1)
    """Annotations below are discarded."""
    high_confidence: float = Field(0.6, ge=0, le=1)
    """Images at or above are positives of the visual dictionary."""
    min_images: int = Field(8, ge=1)
    """Training images a term must be named by to enter the vocabulary, mined or supplied."""
    max_terms: int | None = Field(None, ge=1)
    """Terms of the vocabulary at the most: those that the most images name, equal ones by the alphabet."""
    vocabulary: str | None = None
    """URI of a list of terms, one a line: the only ones that annotations may have."""
    language: str | None = Field("en", min_length=2, max_length=2)
    """Text in another language is not read, and terms with letters that are not Latin are refused; None takes all."""
    max_characters: int = Field(2000, ge=60, le=100_000)
    """Characters read of a title, a description or one entry of a list."""
    sensitive: str | None = None
    """URI of a list of terms that make an unfit label, one a line."""
    packaged_sensitive: bool = True
    """Whether the packaged list of sensitive terms counts beside that of ``sensitive``."""
    aliases: dict[str, str] | str = Field(default={})
    """Term -> the term it is merged into, or the URI of a YAML or CSV file of such pairs."""
    stop_terms: tuple[str, ...] = ()
    """Terms of this corpus that say nothing about pictures, beside the packaged boilerplate list."""
    scores_from: Literal["annotations", "keywords"] = "annotations"
    """Where ``precomputed`` finds the user's terms: the corpus field ``annotations``, or keywords of the form
    ``term:0.83`` (``term`` alone has score 1)."""

    def sources(self) -> list[str]:
        """URIs of the files the settings name; their content shapes the result."""
        named = [self.vocabulary, self.sensitive, self.aliases]
        return [uri for uri in named if isinstance(uri, str)]

    def lists(self) -> WordLists:
        """The word lists the settings name, loaded. Raises ``UsageError`` for a file that cannot be used."""
        return load_lists(
            sensitive=self.sensitive,
            packaged_sensitive=self.packaged_sensitive,
            stop_terms=self.stop_terms,
            aliases=self.aliases,
            vocabulary=self.vocabulary,
            latin=self.language == "en",
        )
