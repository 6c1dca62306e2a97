"""A training stage as a process of its own, for tests that kill it.

    python tests/train/run/driver.py ROOT LOG STALL_AT [ANOTHER_ROOT ...]

Every batch that a worker asks for is noted in LOG as ``rank step``. At batch STALL_AT (0: never) the worker sleeps, so
that the test finds the run in the middle of an epoch, after a checkpoint and before the next one.
"""

import sys
import time

import ray

from lookalike.artifacts import Artifact
from lookalike.stages import execute
from lookalike.train.finetune import STAGE
from lookalike.train.run.settings import TrainConfig

CONFIG = {
    "tasks": {
        "weak": {"kind": "multilabel_softmax", "field": "labels"},
        "category": {"kind": "softmax", "field": "category", "nesting": "mrl-e"},
        "identity": {"kind": "normalized_softmax", "field": "group"},
    },
    "mix": {"catalogue": 3, "clipart": 1},
    "embedding_dim": 8,
    "dims": [2, 4, 8],
    "epochs": 2.4,
    "batch_size": 8,
    "checkpoint_every": 5,
    "workers": {"num": 2},
    "backbone": {"freeze_batch_norm": False},
}


def main(roots: list[str], log: str, stall_at: int) -> None:
    """Fine-tune under each root in turn and print the artifact's URI."""

    def watch_batches() -> None:  # runs once in every worker process, before the stage's own code
        from lookalike.train.run import loop

        original = loop.Feed.step

        def watched(self: loop.Feed):  # type: ignore[no-untyped-def]
            with open(log, "a") as file:
                file.write(f"{self.place.rank} {self.done + 1}\n")
            if self.done + 1 == stall_at:
                time.sleep(600)
            yield from original(self)

        loop.Feed.step = watched  # type: ignore[method-assign]

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=150 << 20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": watch_batches},
    )
    for root in roots:
        inputs = {kind: [Artifact.open(f"{root}/{kind}/{kind}/{'5' * 20}", kind)] for kind in ("shards", "encoder")}
        print(execute(STAGE, TrainConfig.model_validate(CONFIG), inputs, root, "tiny").uri, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main([sys.argv[1], *sys.argv[4:]], sys.argv[2], int(sys.argv[3]))
