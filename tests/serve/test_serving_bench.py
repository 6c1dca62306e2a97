"""The serving benchmark: its raw server gives this service's answers, its load counts and ends, its ratios."""

from typing import TYPE_CHECKING

import psutil
import pytest

from lookalike.serve.local import LocalClient
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig
from tests.benchmarks.serving import Pair, compare
from tests.benchmarks.serving_load import MIN_REQUESTS, Call, Figures, apply_load, ask_once
from tests.benchmarks.serving_servers import Server, running

if TYPE_CHECKING:
    from tests.serve.conftest import World


@pytest.mark.slow
def test_the_raw_server_answers_as_the_service_and_ends(world: "World") -> None:
    names = ["img-004", "img-042"]
    queries = [pb.Query(vector=world.vectors[name].astype("<f4").tobytes()) for name in names]
    options = pb.SearchOptions(k=5)
    single = [pb.SearchRequest(query=query, options=options).SerializeToString() for query in queries]
    batch = pb.SearchBatchRequest(queries=queries, options=options).SerializeToString()
    files = {"index": world.index, "plan": world.plan, "encoder": world.encoder_uri}
    with running("raw", files) as server:
        found = [pb.SearchResponse.FromString(one).hits for one in ask_once(Call(server.address, "Search", single))]
        (many,) = ask_once(Call(server.address, "SearchBatch", [batch]))
        figures = apply_load(Call(server.address, "Search", single), 3, 0.1, server.process)
    assert [list(hits) for hits in found] == [list(one.hits) for one in pb.SearchBatchResponse.FromString(many).results]
    with LocalClient(ServeConfig(index=world.index, plan=world.plan)) as local:
        for name, hits in zip(names, found, strict=True):
            own = local.search(vector=world.vectors[name], k=5).hits
            assert [(hit.id, hit.score, hit.metadata) for hit in own] == [
                (hit.id, hit.score, dict(hit.metadata)) for hit in hits
            ]
    assert figures.requests >= 3 * MIN_REQUESTS
    assert 0 < figures.p50_ms <= figures.p99_ms
    assert figures.cpu_ms >= 0
    assert not psutil.pid_exists(server.process)


def test_a_server_that_does_not_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="raw server ended with 1"), running("raw", {"nothing": "of use"}):
        raise AssertionError


def window(p50_ms: float, *, qps: float = 1.0, cpu_ms: float = 1.0) -> Figures:
    return Figures(p50_ms, p50_ms, p50_ms, qps, cpu_ms, 1)


def test_ratios_take_the_hops_away() -> None:
    nowhere = Server("", 0)
    figures = {
        "raw single": window(2.0, cpu_ms=2.0),
        "served single": window(9.0, cpu_ms=5.0),
        "raw batch": window(10.0, qps=40.0),
        "served batch": window(20.0, qps=30.0),
        "hop without": window(1.0),
        "hop with": window(3.0),
    }
    ratios = dict(compare(Pair("default", "staged-2", nowhere, nowhere), figures))
    assert ratios["staged_2_hop_ms"] == 2.0
    assert ratios["staged_2_p50_vs_raw"] == 4.5
    assert ratios["staged_2_p50_minus_hops_vs_raw"] == 2.5  # two hops
    assert ratios["staged_2_batch_qps_vs_raw"] == 0.75
    assert ratios["staged_2_cpu_vs_raw"] == 2.5
    fused = dict(compare(Pair("default", "fused-1", nowhere, nowhere), figures))
    assert "fused_1_p50_minus_hops_vs_raw" not in fused
