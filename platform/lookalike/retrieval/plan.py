"""A retrieval plan: the prefix of the shortlist, the rows that survive each funnel step, the dim that ranks the answer.

MRL paper, section 4.3: adaptive retrieval (a shortlist of K at D_s, re-ranked at D_r) and funnel retrieval.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from lookalike.artifacts import Artifact
from lookalike.config import Config
from lookalike.errors import ArtifactError, UsageError


class Plan(Config):
    """How to answer a query; every size is per shard, so more shards look at more candidates."""

    shortlist_dim: int = Field(ge=1)
    """D_s: the prefix that makes the shortlist, in dimensions."""
    shortlist_k: int = Field(default=200, ge=1, le=1_000_000)
    """K: rows that each shard shortlists; at least the number of results asked for."""
    stages: tuple[tuple[int, int], ...] = ()
    """Funnel steps between shortlist and re-rank: (dim, surviving rows); dims increase, rows do not."""
    margins: tuple[Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)], ...] = ()
    """Early exit: how far below the k-th best cosine a row may be and still survive, at D_s and at each stage; empty:
    no early exit. A query with clear neighbours re-ranks few rows, a query in a crowd as many as the plan allows."""
    rerank_dim: int = Field(ge=1)
    """D_r: the prefix whose cosine ranks the answer, in dimensions; normally the full size."""
    ef_search: int | None = Field(default=None, ge=1, le=1_000_000)
    """HNSW candidate list; at least K. None: K."""
    nprobe: int | None = Field(default=None, ge=1, le=1_000_000)
    """Lists that an IVF shortlist probes, at most all it has. None: 16."""
    scan: bool = False
    """Make the shortlist by an exact scan of the stored prefix, not by its index."""

    @classmethod
    def exact(cls, dim: int) -> "Plan":
        """The exact answer at ``dim``: a scan of every stored row."""
        return cls(shortlist_dim=dim, shortlist_k=1, rerank_dim=dim, scan=True)

    @property
    def is_exact(self) -> bool:
        """Whether this is :meth:`exact` of some dim."""
        return self.scan and self.shortlist_dim == self.rerank_dim

    @property
    def is_single_stage(self) -> bool:
        """Whether the shortlist itself ranks the answer."""
        return self.shortlist_dim == self.rerank_dim

    @model_validator(mode="after")
    def _ordered(self) -> "Plan":
        dims = [self.shortlist_dim, *(dim for dim, _ in self.stages), self.rerank_dim]
        if self.rerank_dim != self.shortlist_dim or self.stages:
            for lower, higher in pairwise(dims):
                if higher <= lower:
                    raise ValueError(f"dims {dims} must grow from shortlist over stages to re-rank")
        keeps = [self.shortlist_k, *(keep for _, keep in self.stages)]
        if any(after > before or after < 1 for before, after in pairwise(keeps)):
            raise ValueError(f"survivors {keeps} must not grow from step to step and must be at least 1")
        if self.margins and (len(self.margins) != len(keeps) or self.rerank_dim == self.shortlist_dim):
            raise ValueError(
                f"{len(self.margins)} margins; a plan that re-ranks takes 1 for the shortlist and 1 "
                f"for each of its {len(self.stages)} stages"
            )
        return self

    def require_dims(self, dims: Sequence[int]) -> None:
        """Raise ``UsageError`` unless every dim of the plan is among an index's nested ``dims``."""
        used = [self.shortlist_dim, *(dim for dim, _ in self.stages), self.rerank_dim]
        unknown = sorted({dim for dim in used if dim not in dims})
        if unknown:
            raise UsageError(
                f"plan dims {unknown} are not nested dims of the index, which has {list(dims)}; choose from these"
            )

    def describe(self) -> str:
        """The plan in one line, for people."""
        if self.is_exact:
            return f"exact scan at {self.rerank_dim}-d"
        how = "scan" if self.scan else "index"
        funnel = "".join(f" -> {keep} at {dim}-d" for dim, keep in self.stages)
        efforts = {"ef": self.ef_search, "nprobe": self.nprobe}
        given = ", ".join(f"{name} {size}" for name, size in efforts.items() if size is not None)
        effort = f" ({given})" if given else ""
        rerank = "" if self.rerank_dim == self.shortlist_dim else f" -> re-rank at {self.rerank_dim}-d"
        margins = f", early exit at {', '.join(f'{margin:.3g}' for margin in self.margins)}" if self.margins else ""
        return f"{how} at {self.shortlist_dim}-d, {self.shortlist_k} rows{effort}{funnel}{rerank}{margins}"

    def list_steps(self, k: int) -> list[tuple[int, int, float]]:
        """(dim, surviving rows, margin) at D_s, at each stage and at D_r, for ``k`` results; inf for no margin."""
        margins = [*(self.margins or [inf] * (1 + len(self.stages))), inf]
        steps = [(self.shortlist_dim, self.shortlist_k), *self.stages, (self.rerank_dim, k)]
        if self.rerank_dim == self.shortlist_dim:
            return [(self.rerank_dim, k, inf)]
        return [(dim, max(keep, k), margin) for (dim, keep), margin in zip(steps, margins, strict=True)]


def parse_plan(values: Any, where: str) -> Plan:
    """A ``Plan`` from plain values; ``ArtifactError`` naming ``where`` if they are invalid."""
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise ArtifactError(f"{where} holds no valid plan: {error.errors()[0]['msg']}") from None


def load_plan(uri: str) -> Plan:
    """The plan chosen in a published ``plan`` artifact."""
    artifact = Artifact.open(uri, "plan")
    content = artifact.read_json("plan.json")
    return parse_plan(content.get("plan") if isinstance(content, dict) else None, artifact.path("plan.json"))


def load_measured(uri: str) -> tuple[tuple[float, Plan], ...]:
    """(lower end of the recall's 95% interval, plan) of every candidate measured in a ``plan`` artifact, least modelled
    work first; empty for a plan written by hand."""
    artifact = Artifact.open(uri, "plan", check=False)
    where = artifact.path("plan.json")
    try:
        candidates = artifact.read_json("plan.json").get("candidates", [])
        rows = [(row["model_us"], row["recall_low"], row["plan"]) for row in candidates]
    except (KeyError, TypeError):
        raise ArtifactError(f"{where} lists candidates without figures; run the plan step again") from None
    rows.sort(key=lambda row: row[0])
    return tuple((float(recall), parse_plan(plan, where)) for _, recall, plan in rows)
