"""A retrieval plan: which prefix makes the shortlist, how many rows survive each funnel step, what ranks the answer.

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
    """How one query is answered; every size is per shard, so more shards look at more candidates."""

    shortlist_dim: int = Field(ge=1)
    """D_s: the prefix that the shortlist is made with, in dimensions."""
    shortlist_k: int = Field(default=200, ge=1, le=1_000_000)
    """K: rows each shard shortlists; raised to the number of results asked for when that is larger."""
    stages: tuple[tuple[int, int], ...] = ()
    """Funnel steps between shortlist and re-rank: (dim, rows that survive), dims growing, survivors not."""
    margins: tuple[Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)], ...] = ()
    """Early exit: how far below the k-th best a row's cosine may be to survive, at D_s and at each stage; none by
    default. A query whose neighbours stand apart re-ranks few rows, one in a crowd as many as the plan allows."""
    rerank_dim: int = Field(ge=1)
    """D_r: the prefix whose cosine ranks the answer, in dimensions; the full size unless there is a reason."""
    ef_search: int | None = Field(default=None, ge=1, le=1_000_000)
    """HNSW candidate list; never less than K. None takes K."""
    nprobe: int | None = Field(default=None, ge=1, le=1_000_000)
    """Lists an IVF shortlist looks into, at most all it has. None takes 16."""
    scan: bool = False
    """Make the shortlist by an exact scan of the stored prefix instead of the index built over it."""

    @classmethod
    def exact(cls, dim: int) -> "Plan":
        """The exact answer at ``dim``: one scan of every stored row."""
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
                f"{len(self.margins)} margins; a plan that re-ranks takes one for the shortlist and one "
                f"for each of its {len(self.stages)} stages"
            )
        return self

    def require_dims(self, dims: Sequence[int]) -> None:
        """Raise ``UsageError`` unless every dim of the plan is one of an index's nested ``dims``."""
        used = [self.shortlist_dim, *(dim for dim, _ in self.stages), self.rerank_dim]
        unknown = sorted({dim for dim in used if dim not in dims})
        if unknown:
            raise UsageError(
                f"plan dims {unknown} are not nested dims of the index, which has {list(dims)}; choose from these"
            )

    def describe(self) -> str:
        """One line for people."""
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
        """(dim, rows kept, margin) at D_s, at each stage and at D_r, for ``k`` results; no margin is infinite."""
        margins = [*(self.margins or [inf] * (1 + len(self.stages))), inf]
        steps = [(self.shortlist_dim, self.shortlist_k), *self.stages, (self.rerank_dim, k)]
        if self.rerank_dim == self.shortlist_dim:
            return [(self.rerank_dim, k, inf)]
        return [(dim, max(keep, k), margin) for (dim, keep), margin in zip(steps, margins, strict=True)]


def parse_plan(values: Any, where: str) -> Plan:
    """A ``Plan`` from plain values; ``ArtifactError`` naming ``where`` when they make none."""
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise ArtifactError(f"{where} holds no valid plan: {error.errors()[0]['msg']}") from None


def load_plan(uri: str) -> Plan:
    """The plan that a published ``plan`` artifact chose."""
    artifact = Artifact.open(uri, "plan")
    content = artifact.read_json("plan.json")
    return parse_plan(content.get("plan") if isinstance(content, dict) else None, artifact.path("plan.json"))


def load_measured(uri: str) -> tuple[tuple[float, Plan], ...]:
    """(lower end of the recall's 95% interval, plan) of every candidate that a ``plan`` artifact measured, those with
    the least modelled work first; none of a plan that was written by hand."""
    artifact = Artifact.open(uri, "plan", check=False)
    try:
        candidates = artifact.read_json("plan.json").get("candidates", [])
        found = [(one["model_us"], one["recall_low"], one["plan"]) for one in candidates]
    except (KeyError, TypeError):
        where = artifact.path("plan.json")
        raise ArtifactError(f"{where} lists candidates without figures; run the plan step again") from None
    found.sort(key=lambda one: one[0])
    return tuple((float(recall), parse_plan(plan, artifact.path("plan.json"))) for _, recall, plan in found)
