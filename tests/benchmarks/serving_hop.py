"""The hop that the serving benchmark measures: calls from an ingress that does nothing to replicas that do nothing.

They answer RPCs of the retrieval service: Describe calls no replica, Embed calls one for each image.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.schema import LoggingConfig

from lookalike.serve.proto import retrieval_pb2 as pb


class Replica:
    """Returns its argument."""

    async def answer(self, data: bytes) -> bytes:
        return data


class HopIngress:
    """Calls as many replicas at once as there are images."""

    def __init__(self, replicas: Sequence[Any]) -> None:
        self._replicas = replicas

    async def Describe(self, request: pb.DescribeRequest, grpc_context: RayServegRPCContext) -> pb.DescribeResponse:
        return pb.DescribeResponse()

    async def Embed(self, request: pb.EmbedRequest, grpc_context: RayServegRPCContext) -> pb.EmbedResponse:
        calls = (one.answer.remote(image) for one, image in zip(self._replicas, request.images, strict=False))
        await asyncio.gather(*calls)
        return pb.EmbedResponse()


def build_hop(num_replicas: int) -> serve.Application:
    """The application, with the options of the one it is compared with."""
    options: dict[str, Any] = {
        "max_ongoing_requests": 64,
        "max_queued_requests": 256,
        "ray_actor_options": {"num_cpus": 0.05},
        "logging_config": LoggingConfig(enable_access_log=False),
    }
    replica = serve.deployment(**options)(Replica)
    replicas = [replica.options(name=f"no-op-{number}").bind() for number in range(num_replicas)]
    return serve.deployment(name="hop", **options)(HopIngress).bind(replicas)
