"""How replicas call each other."""

from typing import Any

from ray.serve.handle import DeploymentHandle


def by_grpc(worker: Any) -> Any:
    """``worker``; a Serve handle with calls by gRPC.

    By Ray's own calls, which are Serve's default, a replica waits until its caller has taken the answer: one frozen
    replica would freeze all that it has asked something.
    """
    return worker.options(_by_reference=False) if isinstance(worker, DeploymentHandle) else worker
