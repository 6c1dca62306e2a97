"""``meta.json`` of an index artifact: what it holds, in which shards, and which shards may hold an id."""

import bisect
import hashlib

from pydantic import Field, ValidationError

from lookalike.artifacts import Artifact
from lookalike.config import Config
from lookalike.errors import ArtifactError
from lookalike.retrieval.shard_meta import FORMAT_VERSION, require_format

INDEX_META = "meta.json"


class EncoderRef(Config):
    """The model that made the vectors of an index."""

    fingerprint: str
    """Model fingerprint; queries must carry the same one."""
    name: str = ""
    """Name of the artifact, for people."""
    uri: str = ""
    """Place of its artifact when the vectors were made."""
    external: bool = False
    """The model lies elsewhere: the vectors were taken in by the stage ``vectors``, and there is no encoder."""


class IndexMeta(Config):
    """Contents of an index artifact; all but ``generation`` is in its ``meta.json``."""

    format_version: int = Field(default=FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    """Layout of the index."""
    dims: tuple[int, ...] = Field(min_length=1)
    """Nested dims, smallest first; the last is the size of a vector."""
    num_rows: int = Field(ge=0)
    """Vectors in all shards, including those under tombstones."""
    num_deleted: int = Field(default=0, ge=0)
    """Rows under tombstones, which are in no answer."""
    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of the shards, in the order of their global rows."""
    shard_rows: tuple[int, ...]
    """Vectors in each shard."""
    hash_shards: tuple[int, ...] = ()
    """The hash shard (``shard_of``) of each folder, ascending: a hash shard with appended rows has several folders, its
    segments. Empty if each folder is a hash shard."""
    dtype: str
    """Number format of the stored vectors."""
    shortlist: str
    """Index type of the shortlists."""
    shortlist_dims: tuple[int, ...]
    """Prefixes with a shortlist index."""
    columns: tuple[str, ...]
    """Metadata columns of each row."""
    encoder: EncoderRef
    """The model that made the vectors."""
    generation: str = ""
    """Fingerprint of the index artifact."""

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.dims[-1]

    @property
    def num_shards(self) -> int:
        """Number of shard folders, the units of search and serving."""
        return len(self.shards)

    @property
    def num_hash_shards(self) -> int:
        """Number of hash shards that ids are divided among."""
        return self.hash_shards[-1] + 1 if self.hash_shards else len(self.shards)

    @property
    def num_live(self) -> int:
        """Vectors that are not deleted."""
        return self.num_rows - self.num_deleted

    def segments_of(self, image_id: str) -> range:
        """Places in ``shards`` of the folders that may hold ``image_id``."""
        owners, owner = self.hash_shards or range(len(self.shards)), shard_of(image_id, self.num_hash_shards)
        return range(bisect.bisect_left(owners, owner), bisect.bisect_right(owners, owner))

    @property
    def model_fingerprint(self) -> str:
        """Fingerprint of the encoder."""
        return self.encoder.fingerprint

    @property
    def offsets(self) -> list[int]:
        """Global number of each shard's first row."""
        return [sum(self.shard_rows[:position]) for position in range(len(self.shard_rows))]


def read_index_meta(artifact: Artifact) -> IndexMeta:
    """``meta.json`` of an opened index artifact; ``ArtifactError`` if it is missing or damaged."""
    try:
        raw = require_format(artifact.read_json(INDEX_META), FORMAT_VERSION, artifact.path(INDEX_META))
        meta = IndexMeta.model_validate(raw)
    except FileNotFoundError:
        raise ArtifactError(
            f"{artifact.path(INDEX_META)} is missing; build the index again or restore it from a copy"
        ) from None
    except (ValueError, ValidationError) as error:
        raise ArtifactError(
            f"{artifact.path(INDEX_META)} is damaged ({str(error).splitlines()[0]}); build the index again"
        ) from None
    return meta.model_copy(update={"generation": artifact.manifest.fingerprint})


def shard_of(image_id: str, num_shards: int) -> int:
    """The hash shard of ``image_id``, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "big") % num_shards
