"""The service in the mode that clusters use, HAProxy in front and calls between replicas by gRPC, in a Ray of its own.

    python -m tests.serve.production

Writes, a switch, a rollback and a compaction, and the errors of wrong requests; prints one JSON object.
"""

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}  # before Ray is imported

import numpy as np

from lookalike.cluster import ClusterConfig, ensure_ray
from lookalike.serve.app import start, stop
from lookalike.serve.client import Client, StoredRow
from lookalike.serve.settings.config import ServeConfig, Writes
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.soak import NUM_ROWS, publish_generations

TOKEN = "a-token-of-this-test-alone"
VECTOR = np.arange(1, 65, dtype=np.float32)


def main() -> None:
    """Serve, change and search."""
    with tempfile.TemporaryDirectory() as root:
        uris = list(publish_generations(f"{root}/artifacts", np.random.default_rng(1)))
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        tenants = Path(root, "tenants.yaml")
        tenants.write_text(f"tenants:\n- {{name: a, token_sha256: ['{digest}'], role: admin}}\n")
        ensure_ray(ClusterConfig(num_cpus=2, object_store_mb=150, progress_bars=False))
        address = start(
            ServeConfig(
                index=uris[0],
                encoder="none",
                port=0,
                loopback_only=False,
                tenants=str(tenants),
                cpus_per_replica=0.1,
                timeout_s=5,
                writes=Writes(state=f"{root}/state"),
            )
        )
        with Client(address, token=TOKEN) as client:
            client.wait_ready()
            print(json.dumps(use(client, uris)))
        stop()


def use(client: Client, uris: list[str]) -> dict[str, object]:
    """Return the outcome of each step."""
    client.upsert([StoredRow("new", VECTOR, {"view": "front"})])
    written = time.monotonic()
    while client.search(vector=VECTOR, k=1).ids != ["new"]:
        assert time.monotonic() - written < 20, "the written row is not found"
    many = [StoredRow(f"row-{number}", np.random.default_rng(number).normal(size=64)) for number in range(256)]
    client.upsert(many)
    first = client.describe().generation
    wrong = [
        {"vector": VECTOR[:3]},
        {"image_id": "nobody"},
        {"vector": VECTOR, "k": 10**6},
        {"vector": VECTOR, "model_fingerprint": "another"},
    ]
    codes = [code_of(client, request) for request in wrong]
    switched = client.switch(uris[1], encoder="none").index
    try:
        client.switch("/nowhere", encoder="none")
    except RetrievalError as error:
        codes.append(error.code.name)
    back = client.rollback().name
    compacted = client.compact()
    streamed = list(client.search_stream([["new"], ["nobody"]], k=1))
    return {
        "codes": codes,
        "switched": switched == uris[1],
        "rolled_back": back == first,
        "rows": compacted.num_rows - NUM_ROWS,
        "pending": client.status().pending_rows,
        "found": client.search(image_id="new", k=1).ids,
        "streamed": [batch.code.name if isinstance(batch, RetrievalError) else batch[0].ids for batch in streamed],
    }


def code_of(client: Client, request: dict[str, Any]) -> str:
    """Name of the status of a search."""
    try:
        client.search(**request)
    except RetrievalError as error:
        return error.code.name
    return "OK"


if __name__ == "__main__":
    main()
