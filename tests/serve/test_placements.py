"""Every placement that ``build`` can make gives the searcher's answers (Serve's in-process test mode)."""

from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from ray import serve

from lookalike.retrieval.plan import Plan
from lookalike.serve.app import build
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import RetrievalError
from lookalike.serve.wire.plans import to_plan
from lookalike.serve.wire.requests import check_local

if TYPE_CHECKING:
    from tests.serve.conftest import World

PLANS = [
    Plan(shortlist_dim=8, shortlist_k=5, rerank_dim=64),
    Plan(shortlist_dim=8, shortlist_k=20, stages=((16, 12),), rerank_dim=64, ef_search=40, nprobe=3),
    Plan(shortlist_dim=8, shortlist_k=20, stages=((16, 12),), rerank_dim=64, margins=(0.3, 0.05)),
    Plan.exact(64),
    Plan(shortlist_dim=16, shortlist_k=7, rerank_dim=16),
]


class Context:
    """As much of a gRPC context as the ingress touches."""

    def __init__(self, peer: str = "ipv4:127.0.0.1:50000") -> None:
        self.code, self.details, self._peer = grpc.StatusCode.OK, "", peer

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


@pytest.fixture(scope="module", params=["fused", "sharded", "staged"])
def ingress(request: pytest.FixtureRequest, world: "World") -> Any:
    config = ServeConfig(index=world.index, plan=world.plan, placement=request.param)
    return serve.run(build(config), name=request.param, _local_testing_mode=True)


@pytest.mark.parametrize("plan", PLANS, ids=Plan.describe)
def test_same_answers_as_the_searcher(ingress: Any, world: "World", plan: Plan) -> None:
    names = list(world.images)[:9]
    queries = [pb.Query(vector=world.vectors[name].tobytes()) for name in names]
    request = pb.SearchBatchRequest(queries=queries, options=pb.SearchOptions(k=6, plan=to_plan(plan)))
    response = ingress.SearchBatch.remote(request, grpc_context=Context()).result()
    hits = world.searcher.search(np.stack([world.vectors[name] for name in names]), 6, plan)
    results = [result.hits for result in response.results]
    assert [[hit.id for hit in result] for result in results] == [
        [image_id for image_id in world.searcher.ids(rows) if image_id] for rows in hits.rows
    ]
    for result, scores in zip(results, hits.scores, strict=True):
        assert np.array_equal([hit.score for hit in result], scores[: len(result)])
    assert (response.info.coverage.shards_answered, response.info.coverage.shards_asked) == (2, 2)


def test_callers_from_elsewhere_are_refused(ingress: Any, world: "World") -> None:
    context = Context(peer="ipv4:10.0.0.7:50000")
    request = pb.SearchRequest(query=pb.Query(image_id="img-000"))
    assert not ingress.Search.remote(request, grpc_context=context).result().hits  # the status is not sent in this mode
    with pytest.raises(RetrievalError, match=r"PERMISSION_DENIED.*loopback_only=false"):
        check_local(context.peer())
    assert ingress.Search.remote(request, grpc_context=Context(peer="ipv6:[::1]:50000")).result().hits
