"""A generation: one index as it is served, with its plans and its encoder. Plain values, sent to every worker."""

from dataclasses import dataclass

from lookalike.artifacts import Artifact, lineage
from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval.index_meta import IndexMeta, read_index_meta, shard_of
from lookalike.retrieval.plan import Plan, load_measured, load_plan
from lookalike.serve.wire.requests import ServicePlans, check_plan


@dataclass(frozen=True)
class Generation:
    """URIs of the artifacts, and what they say."""

    index: str
    plan: str | None
    encoder: str | None
    """The encoder that made the index's vectors; None serves vectors and ids only."""
    meta: IndexMeta
    plans: ServicePlans
    includes_writes: int = 0
    """Number of the last write that the index itself holds."""

    @property
    def name(self) -> str:
        """Fingerprint of the index."""
        return self.meta.generation

    def group_of(self, image_id: str, num_groups: int) -> int:
        """The worker, of ``num_groups``, that holds ``image_id`` if any does."""
        return shard_of(image_id, self.meta.num_hash_shards) % num_groups

    def folders(self, group: int, num_groups: int) -> list[str]:
        """URIs of the shard folders that worker ``group`` of ``num_groups`` holds, in the order of their rows.

        Folders go by the hash shard they belong to, so a stored id and a later write of it meet in one worker.
        """
        owners = self.meta.hash_shards or range(self.meta.num_shards)
        return [
            f"{self.index.rstrip('/')}/{folder}"
            for folder, owner in zip(self.meta.shards, owners, strict=True)
            if owner % num_groups == group
        ]


def read_generation(
    index: str, plan: str | None, encoder: str = "auto", *, includes_writes: int = 0, check: bool = True
) -> Generation:
    """The generation of an index, its artifacts found and checked to belong together.

    ``encoder`` is a URI, ``auto`` for the index's ancestor, or ``none``; ``check`` reads all files of the index.

    Raises ``ArtifactError`` for an artifact that is missing or damaged and ``UsageError`` when plan, encoder and index
    do not belong together.
    """
    meta = read_index_meta(Artifact.open(index, "index", check=check))
    return Generation(index, plan, find_encoder(encoder, index, meta), meta, read_plans(plan, meta), includes_writes)


def read_plans(uri: str | None, meta: IndexMeta) -> ServicePlans:
    """The plan at ``uri`` and those measured beside it, checked against the index; exact search without one."""
    exact = Plan.exact(meta.dim)
    if uri is None:
        return ServicePlans(exact, exact)
    plan = load_plan(uri)
    check_plan(plan, meta)
    return ServicePlans(plan, exact, load_measured(uri))


def find_encoder(wanted: str, index: str, meta: IndexMeta) -> str | None:
    """URI of the encoder that made the index's vectors, or None when none is wanted.

    ``auto`` follows the lineage, and finds none for vectors that were made elsewhere; an encoder that is gone raises
    ``ArtifactError``, one of another fingerprint ``UsageError``.
    """
    if wanted == "none" or (wanted == "auto" and meta.encoder.external):
        return None
    uri = _encoder_of_lineage(index, meta.model_fingerprint) if wanted == "auto" else wanted
    encoder = Artifact.open(uri, "encoder", check=False)
    if encoder.manifest.fingerprint != meta.model_fingerprint:
        found = encoder.manifest.fingerprint
        raise UsageError(
            f"encoder {uri} has fingerprint {found}, the index {index} holds vectors of "
            f"{meta.model_fingerprint}; serve it with its own encoder, or index again"
        )
    return uri


def _encoder_of_lineage(index_uri: str, fingerprint: str) -> str:
    for _, _, ancestor in lineage(Artifact.open(index_uri, "index", check=False)):
        if isinstance(ancestor, Artifact) and ancestor.manifest.fingerprint == fingerprint:
            return ancestor.uri
    raise ArtifactError(
        f"no encoder {fingerprint} in the lineage of {index_uri}; set serve.encoder to its URI, or to "
        "none to serve vectors and ids only"
    )
