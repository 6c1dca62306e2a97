"""Local mode: the client's interface over an index on disk, in this process, without a server."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

from lookalike.arguments import check_seconds, check_text, names_checked
from lookalike.config import parse_config
from lookalike.serve.client import Client
from lookalike.serve.experiment.assignment import own_generations, read_arms
from lookalike.serve.front.fused import open_workers
from lookalike.serve.front.service import RPCS, Service
from lookalike.serve.generations.generation import Generation, read_generation
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig


class LocalClient(Client):
    """A ``Client`` that answers by itself: the same checks, the same work and the same errors as the service.

    ``timeout_s`` bounds a call where only the index is given; a configuration has its own.
    """

    @names_checked
    def __init__(self, index: str | ServeConfig, *, timeout_s: float = 30.0) -> None:
        if isinstance(index, ServeConfig):
            config = index
        else:
            uri = check_text("index", index, "give the URI of an index as str, or a ServeConfig")
            settings = {"index": uri, "timeout_s": check_seconds("timeout_s", timeout_s)}
            config = parse_config(ServeConfig, settings, "local")
        generation = read_generation(config.index, config.plan, config.encoder)
        self.address, self.timeout_s = config.index, timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lookalike-local", daemon=True)
        self._thread.start()
        self.service = self._run(_open_service(config, generation))

    @names_checked
    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return at once: it is ready."""

    @names_checked
    def close(self) -> None:
        """End the thread that answers."""
        self.service.observer.close()
        if self.service.router.encoder is not None:
            self.service.router.encoder.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stream(self, requests: Iterator[pb.SearchStreamRequest]) -> Iterator[pb.SearchStreamResponse]:
        """One batch after the other."""
        return (self._call("SearchStream", request) for request in requests)

    def _admin(self, method: str, request: Any, timeout_s: float) -> Any:
        return self._call(method, request)

    def _call(self, method: str, request: Any) -> Any:
        sent = type(request).FromString(request.SerializeToString())  # as a server would see it
        return self._run(self.service.stream_one(sent) if method == "SearchStream" else self._answer(method, sent))

    async def _answer(self, method: str, request: Any) -> Any:
        with self.service.observer.watch(method) as trace:
            return await RPCS[method](self.service, request, trace)


async def _open_service(config: ServeConfig, generation: Generation) -> Service:
    arms = read_arms(config, generation)
    router = open_workers(config, generation, [generation, *own_generations(arms, generation)])
    return Service(config, generation, router, arms=arms)
