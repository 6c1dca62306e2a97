"""A plan as a message, for the service and for clients."""

from typing import Protocol

from lookalike.serve.proto import retrieval_pb2 as pb


class PlanLike(Protocol):
    """What ``plan=`` takes: ``SearchPlan`` here, or ``lookalike.retrieval.plan.Plan``."""

    @property
    def shortlist_dim(self) -> int: ...
    @property
    def shortlist_k(self) -> int: ...
    @property
    def stages(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def rerank_dim(self) -> int: ...
    @property
    def ef_search(self) -> int | None: ...
    @property
    def nprobe(self) -> int | None: ...
    @property
    def margins(self) -> tuple[float, ...]: ...
    @property
    def scan(self) -> bool: ...


def to_plan(plan: PlanLike) -> pb.Plan:
    """Return the message of a plan."""
    return pb.Plan(
        shortlist_dim=plan.shortlist_dim,
        shortlist_k=plan.shortlist_k,
        rerank_dim=plan.rerank_dim,
        stages=[pb.PlanStep(dim=dim, keep=keep) for dim, keep in plan.stages],
        ef_search=plan.ef_search,
        scan=plan.scan,
        nprobe=plan.nprobe,
        margins=plan.margins,
    )
