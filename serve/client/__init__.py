"""The clients. Imports grpcio, protobuf, numpy, ``proto`` and the plain modules of ``wire``, nothing else."""

from lookalike.errors import ArgumentError
from lookalike.serve.client.client import DEFAULT_ADDRESS, AsyncClient, Client
from lookalike.serve.client.credentials import ClientTls
from lookalike.serve.client.requests import Query, SearchSettings, StoredRow
from lookalike.serve.client.results import (
    Description,
    Embeddings,
    Hit,
    SearchInfo,
    SearchPlan,
    SearchResult,
)
from lookalike.serve.wire.errors import MAX_MESSAGE_BYTES, RetrievalError
from lookalike.serve.wire.plans import PlanLike

__all__ = [
    "DEFAULT_ADDRESS",
    "MAX_MESSAGE_BYTES",
    "ArgumentError",
    "AsyncClient",
    "Client",
    "ClientTls",
    "Description",
    "Embeddings",
    "Hit",
    "PlanLike",
    "Query",
    "RetrievalError",
    "SearchInfo",
    "SearchPlan",
    "SearchResult",
    "SearchSettings",
    "StoredRow",
]
