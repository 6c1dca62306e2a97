"""What the loader and the loop cost beside the bare model: images/s, waiting for data, decoding paths.

    python -m tests.benchmarks.training [--quick] [--repetitions 3] [--backbone NAME] [--size 112] [--batch-size 32]
        [--workers 2] [--gpu] [--loader-processes 0] [--decode-actors 0]

Pictures are those of the sample corpus, the model has random weights, the stage is ``finetune`` as a recipe runs it.
Figures that are compared are measured in turn, several times, in one run; a row holds the median and the extremes, and
ratios are of pairs that stood side by side. One JSON object a line, the last one with the ratios.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.cluster import ClusterConfig, ensure_ray
from lookalike.retrieval.machine import machine_facts
from lookalike.schemas import SHARD
from lookalike.stages import StageRun, execute
from lookalike.train.feed.decoding import actor_batches, to_arrays
from lookalike.train.feed.loader import Batch, BatchDataset, build_loader
from lookalike.train.finetune import STAGE
from lookalike.train.run.batches import worker_batches
from lookalike.train.run.initialise import build_multitask_model
from lookalike.train.run.resolve import resolve
from lookalike.train.run.settings import LoopConfig, TrainConfig
from lookalike.vision.backbones import create_backbone
from lookalike.vision.encoder import EncoderConfig, build_model, save_encoder
from lookalike.vision.images import decode
from lookalike.vision.transforms import TransformConfig, normalize_pixels

SAMPLE = "data/samples/furniture"
STEPS = 30  # of a run of the loop, and of the bare model; both count from their first

IN_STORE = 3  # batches that the paths have ready at most


def publish_shards(root: str) -> Artifact:
    """Training shards of the furniture pictures: their groups, their categories, made-up weak labels."""
    (name,) = storage.list_files(SAMPLE)
    rows = pq.read_table(storage.join(SAMPLE, name), columns=["image_id", "image", "category", "group"]).to_pylist()
    classes = {field: sorted({row[field] for row in rows if row[field]}) for field in ("category", "group")}
    random = np.random.default_rng(0)
    made = [
        {
            "image_id": rows[i]["image_id"],
            "image": rows[i]["image"],
            "dataset": "furniture",
            "labels": sorted(random.choice(50, int(random.integers(1, 4)), replace=False).tolist()),
            **{field: classes[field].index(rows[i][field]) if rows[i][field] else -1 for field in classes},
            "repeat": float(random.uniform(1, 2)),
        }
        for i in random.permutation(len(rows))
    ]
    draft = Draft(root, "shards", "shards", "5" * 20)
    storage.make_directory(storage.join(draft.uri, "furniture"))
    table = pa.Table.from_pylist(made, schema=SHARD)
    pq.write_table(table, storage.join(draft.uri, "furniture", "part-000000.parquet"), row_group_size=256)
    draft.write_json("classes.json", {"labels": [str(i) for i in range(50)], **classes})
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


def publish_encoder(root: str, backbone: str, size: int) -> Artifact:
    """The backbone with random weights."""
    width = int(create_backbone(backbone).num_features)  # type: ignore[arg-type]
    config = EncoderConfig(backbone=backbone, num_features=width, dims=(width,), transform=TransformConfig(size=size))
    draft = Draft(root, "encoder", "encoder", "5" * 20)
    save_encoder(draft, build_model(config), config, "# random\n")
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


def settings(options: argparse.Namespace, seed: int) -> TrainConfig:
    """A multi-task fine-tuning of ``STEPS`` steps."""
    rows = 4008 * 1.5  # expected rows of an epoch
    return TrainConfig.model_validate(
        {
            "tasks": {
                "weak": {"kind": "multilabel_softmax", "field": "labels"},
                "identity": {"kind": "normalized_softmax", "field": "group"},
            },
            "mix": {"furniture": 1},
            "batch_size": options.batch_size,
            "initialise": {"method": "random"},
            "embedding_dim": 128,
            "epochs": STEPS * options.batch_size / rows,
            "dims": [16, 128],
            "checkpoint_every": 10,
            "workers": {"num": options.workers, "use_gpu": options.gpu},
            "seed": seed,
            "loader": {"processes": options.loader_processes, "actors": options.decode_actors},
        }
    )


def measure_loop(config: TrainConfig, inputs: dict[str, list[Artifact]], root: str) -> dict[str, float]:
    """Images/s and the share of time waiting for data of the stage as a recipe runs it."""
    stats = execute(STAGE, config, inputs, root, "bench").manifest.stats
    return {name: stats[name] for name in ("images_per_s", "data_wait")}


def step_bare(values: dict[str, Any]) -> None:
    """A worker of the bare model: one synthetic batch, forward, backward and optimizer step, nothing else."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    config = LoopConfig.model_validate(values["loop"])
    torch.set_num_threads(config.train.workers.cpus)
    world, size = ray.train.get_context().get_world_size(), config.encoder.transform.size
    model: torch.nn.Module = build_multitask_model(config, initialise=False)
    model = prepare_model(model, parallel_strategy="ddp" if world > 1 else None)
    n, device = config.train.batch_size // world, get_device()
    batch = {
        "images": torch.rand(n, 3, size, size).contiguous(memory_format=torch.channels_last),
        "labels": torch.randint(0, 50, (n, 3)),
        "group": torch.randint(0, 100, (n,)),
        "category": torch.zeros(n, dtype=torch.int64),
    }
    batch = {name: value.to(device) for name, value in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    began = seconds_now(device)
    for _ in range(STEPS):
        total, _ = model(batch)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
    rate = STEPS * config.train.batch_size / (seconds_now(device) - began)
    if ray.train.get_context().get_world_rank() == 0:
        Path(values["result"]).write_text(str(rate))


def seconds_now(device: torch.device) -> float:
    """The clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_bare(config: LoopConfig, folder: str) -> float:
    """Images/s of as many Ray Train workers that only step the model."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train = config.train
    resources = {"CPU": train.workers.cpus, **({"GPU": 1} if train.workers.use_gpu else {})}
    trainer = TorchTrainer(
        step_bare,
        train_loop_config={"loop": config.model_dump(mode="json"), "result": f"{folder}.txt"},
        torch_config=TorchConfig(backend="nccl" if train.workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.workers.num, use_gpu=train.workers.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(storage_path=folder),
    )
    trainer.fit()
    return float(Path(f"{folder}.txt").read_text())


def build_paths(dataset: Callable[[], BatchDataset]) -> dict[str, Iterator[Batch]]:
    """The three ways to decode, each with its first batches taken: processes and actors have started."""
    paths = {
        "own_process": iter(dataset()),
        "loader_process": iter(build_loader(dataset(), 1)),
        "decode_actor": actor_batches(dataset(), 1),
    }
    for path in paths.values():
        next(path)
    return paths


def take(batches: Iterator[Batch], num: int) -> float:
    """Pictures/s of ``num`` batches, taken by a trainer that does nothing else, after those that lay ready."""
    for _ in range(IN_STORE):
        next(batches)
    began = time.perf_counter()
    pictures = sum(len(next(batches)["ids"]) for _ in range(num))
    return pictures / (time.perf_counter() - began)


def measure_decoding(dataset: BatchDataset, num: int) -> dict[str, float]:
    """Pictures/s of one core: decoded alone, decoded and augmented into batches; and what normalising costs."""
    pictures = [data for piece in dataset.plan(0).slices for data in _images(piece.unit)][:512]
    began = time.process_time()
    for data in pictures:
        decode(data)
    decoded = len(pictures) / (time.process_time() - began)
    began = time.process_time()
    batches = [dataset.builder.build(dataset.plan(step)) for step in range(num)]
    built = sum(len(batch["ids"]) for batch in batches) / (time.process_time() - began)
    began = time.process_time()
    for batch in batches:
        normalize_pixels(batch["images"], TransformConfig())
    return {
        "decode": decoded,
        "decode_augment": built,
        "normalize": sum(len(batch["ids"]) for batch in batches) / (time.process_time() - began),
    }


def _images(unit: Any) -> list[bytes]:
    from lookalike.train.feed.row_groups import read_row_group

    return list(read_row_group(unit, ["image"])["image"].to_pylist())


def measure_transport(batch: Batch) -> dict[str, float]:
    """Milliseconds to put a batch into Ray's object store and take it out: pixels as uint8, and as float32."""
    import ray

    found = {}
    arrays = to_arrays(batch)
    for name, dtype in (("uint8_ms", np.uint8), ("float32_ms", np.float32)):
        sent = {**arrays, "images": arrays["images"].astype(dtype)}
        began = time.perf_counter()
        for _ in range(20):
            ray.get(ray.put(sent))["images"].copy()
        found[name] = 1e3 * (time.perf_counter() - began) / 20
    return found


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and extremes to three decimals."""
    known = list(values)
    return {"median": round(median(known), 3), "min": round(min(known), 3), "max": round(max(known), 3)}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition with a tiny backbone at 48 px")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=112, help="side of the pictures in pixels")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a global batch")
    parser.add_argument("--workers", type=int, default=2, help="Ray Train workers of one CPU")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--loader-processes", type=int, default=0)
    parser.add_argument("--decode-actors", type=int, default=0)
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.backbone, options.size = 1, "test_efficientnet", 48
    return options


def main() -> int:
    """Measure and print the rows."""
    options = parse_options()
    cpus = options.workers * (1 + options.decode_actors)
    ensure_ray(ClusterConfig(num_cpus=max(2, cpus), object_store_mb=400, progress_bars=False))
    torch.set_num_threads(1)
    facts = {
        "bench": "training",
        "backbone": options.backbone,
        "size": options.size,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "gpu": torch.cuda.get_device_name() if options.gpu else None,
        "machine": machine_facts(),
    }

    def row(case: str, **values: Any) -> None:
        print(json.dumps({**facts, "case": case, **values}), flush=True)

    with tempfile.TemporaryDirectory() as root:
        inputs = {"shards": [publish_shards(root)], "encoder": [publish_encoder(root, options.backbone, options.size)]}
        config = resolve(StageRun(settings(options, 0), inputs, Draft(root, "encoder", "bench", "none")))
        endless = config.model_copy(update={"rows_per_epoch": 1 << 30})

        def dataset() -> BatchDataset:
            return worker_batches(endless, 0, 0)

        decoding = [measure_decoding(dataset(), 20) for _ in range(options.repetitions)]
        for name in decoding[0]:
            row(name, pictures_per_s_per_core=spread(each[name] for each in decoding))
        transport = [measure_transport(next(iter(dataset()))) for _ in range(options.repetitions)]
        row("object_store", **{name: spread(each[name] for each in transport) for name in transport[0]})
        paths = build_paths(dataset)
        rates = [{name: take(path, 12) for name, path in paths.items()} for _ in range(2 * options.repetitions)]
        for name in paths:
            row(name, pictures_per_s=spread(each[name] for each in rates))
        del paths
        loops, bares = [], []
        for number in range(options.repetitions):
            loops.append(measure_loop(settings(options, number), inputs, root))
            bares.append(measure_bare(config, os.path.join(root, f"bare-{number}")))
        row("loop", images_per_s=spread(each["images_per_s"] for each in loops))
        row("bare", images_per_s=spread(bares))
        ratios = {
            "loop_vs_bare": spread(loop["images_per_s"] / bare for loop, bare in zip(loops, bares, strict=True)),
            "data_wait_share": spread(each["data_wait"] for each in loops),
            **{
                f"{name}_vs_own_process": spread(each[name] / each["own_process"] for each in rates)
                for name in ("loader_process", "decode_actor")
            },
        }
        print(json.dumps({**facts, "summary": True, **ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
