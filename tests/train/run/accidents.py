"""Training on a simulated cluster of two nodes while workers and nodes are killed; a process of its own.

    python tests/train/run/accidents.py ROOT LOG SEED

ROOT holds shards and an encoder; it is copied for each run. Prints a JSON object: accident -> the artifact's URI.
``calm`` is the run that nothing happens to.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from lookalike.artifacts import Artifact
from lookalike.stages import execute
from lookalike.train.finetune import STAGE
from lookalike.train.run.settings import TrainConfig

CONFIG = {
    "tasks": {
        "weak": {"kind": "multilabel_softmax", "field": "labels"},
        "identity": {"kind": "normalized_softmax", "field": "group"},
    },
    "mix": {"catalogue": 3, "clipart": 1},
    "embedding_dim": 8,
    "dims": [2, 4, 8],
    "epochs": 2.4,
    "batch_size": 8,
    "checkpoint_every": 3,
    "workers": {"num": 2},
}
STEPS = 16
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


def watch_steps(log: str) -> Any:
    """A hook for worker processes that notes ``rank step pid node`` of every step begun."""

    def hook() -> None:
        from lookalike.train.run import loop

        original = loop.Feed.step

        def watched(self: loop.Feed):  # type: ignore[no-untyped-def]
            node = ray.get_runtime_context().get_node_id()
            with open(log, "a") as file:
                file.write(f"{self.place.rank} {self.done + 1} {os.getpid()} {node}\n")
            time.sleep(0.2)  # so that an accident meets the step that it is meant for
            yield from original(self)

        loop.Feed.step = watched  # type: ignore[method-assign]

    return hook


def wait_for(log: str, step: int, node: str, training: "Future[str]") -> int:
    """The process that trains on ``node``, once it has begun ``step``."""
    while not training.done():
        time.sleep(0.05)
        lines = [line.split() for line in Path(log).read_text().splitlines()] if os.path.exists(log) else []
        for _, at, pid, where in (line for line in lines if len(line) == 4):
            if int(at) >= step and where == node:
                return int(pid)
    raise AssertionError(f"the run ended before step {step}: {training.result()}")


def run(root: str, **settings: Any) -> str:
    """Fine-tune under ``root``."""
    inputs = {kind: [Artifact.open(f"{root}/{kind}/{kind}/{'5' * 20}", kind)] for kind in ("shards", "encoder")}
    return execute(STAGE, TrainConfig.model_validate({**CONFIG, **settings}), inputs, root, "tiny").uri


def main(root: str, log: str, seed: int) -> None:
    """Train calmly, then with a killed node that is replaced, one that is not, and a killed worker."""
    steps = random.Random(seed)
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    second = cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"worker_process_setup_hook": watch_steps(log)})
    done = {}
    for kind in ("calm", "node", "shrink", "worker"):
        folder, begun = shutil.copytree(root, f"{root}-{kind}"), time.monotonic()
        if os.path.exists(log):
            os.unlink(log)
        with ThreadPoolExecutor(1) as pool:  # nodes are added by the main thread alone
            training = pool.submit(run, folder, **({"workers": {"num": 2, "min": 1}} if kind == "shrink" else {}))
            if kind != "calm":
                pid = wait_for(log, steps.randint(5, STEPS - 2), second.node_id, training)
            if kind == "worker":
                os.kill(pid, signal.SIGKILL)
            if kind in ("node", "shrink"):
                cluster.remove_node(second, allow_graceful=False)
            if kind == "node":
                second = cluster.add_node(**NODE)
            done[kind] = training.result()
        if kind == "shrink":
            second = cluster.add_node(**NODE)
        print(kind, round(time.monotonic() - begun), "s", file=sys.stderr, flush=True)
    print(json.dumps(done))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
