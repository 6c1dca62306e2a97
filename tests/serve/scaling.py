"""One to three ingress replicas and back under a short load, in a Ray of its own; prints one JSON object.

RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S=0.5 python -m tests.serve.scaling
"""

import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter

import numpy as np
import ray
from ray import serve

from lookalike.serve.app import APP_NAME, start, stop
from lookalike.serve.client import AsyncClient
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.load import Autoscaling, Deployments, ReplicaSettings
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.conftest import publish, publish_embeddings, publish_index

CALLERS = 12


def publish_small(root: str) -> str:
    """URI of an index of made-up vectors."""
    from lookalike.artifacts import Draft

    vectors = {
        f"img-{row:03d}": vector
        for row, vector in enumerate(np.random.default_rng(5).normal(size=(60, 64)).astype(np.float32))
    }
    draft = Draft(root, "encoder", "encoder", "a" * 20)
    draft.write_json("nothing.json", {})
    encoder = publish(draft)
    embeddings = publish_embeddings(root, encoder, vectors)
    return publish_index(root, embeddings, vectors, encoder.manifest.fingerprint).uri


def count_running() -> int:
    """Ingress replicas that answer."""
    states = serve.status().applications[APP_NAME].deployments["ingress"].replica_states
    return int(states.get("RUNNING", 0))


async def until(wanted: int, within_s: float) -> int:
    """Wait until so many replicas run; how many do at the end."""
    deadline = time.monotonic() + within_s
    while (running := await asyncio.to_thread(count_running)) != wanted and time.monotonic() < deadline:
        await asyncio.sleep(0.3)
    return running


async def observe(address: str) -> dict[str, object]:
    """Load until there are three, then none until there is one."""
    answered, errors = 0, Counter[str]()
    vector = np.ones(64, np.float32)

    async def ask(client: AsyncClient) -> None:
        nonlocal answered
        while True:
            try:
                await client.search(vector=vector, k=3)
                answered += 1
            except RetrievalError as error:
                errors[str(error)[:200]] += 1

    before = await until(1, 60)
    async with AsyncClient(address) as client:
        callers = [asyncio.ensure_future(ask(client)) for _ in range(CALLERS)]
        most = await until(3, 120)
        for caller in callers:
            caller.cancel()
        for caller in callers:
            with contextlib.suppress(asyncio.CancelledError):
                await caller
    after = await until(1, 120)
    return {"before": before, "most": most, "after": after, "answered": answered, "errors": errors}


def main() -> None:
    """Command line."""
    scaling = Autoscaling(
        max_replicas=3,
        target_ongoing_requests=2,
        upscale_delay_s=1,
        downscale_delay_s=3,
        look_back_s=3,
    )
    with tempfile.TemporaryDirectory() as root:
        ray.init(
            num_cpus=2,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        config = ServeConfig(
            index=publish_small(root),
            encoder="none",
            placement="fused",
            port=0,
            cpus_per_replica=0.1,
            deployments=Deployments(ingress=ReplicaSettings(autoscaling=scaling)),
        )
        address = start(config)
        seen = asyncio.run(observe(address))
        stop()
        ray.shutdown()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
