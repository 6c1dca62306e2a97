"""Encoders as in Pinterest's Table 6: training and inference images/s, latency of one image; beside timm alone.

    python -m tests.benchmarks.encoders [--quick] [--backbones NAME ...] [--size 224] [--precision float32] [--rounds 5]

Ours and the bare loop take turns in one process on the same synthetic pictures; without a GPU, on one thread, times
are processor times: so the ratios hold on a busy machine. ``train``: forward, loss over 1,000 classes, backward, AdamW.
``inference``, at each batch size: from uint8 pixels to vectors in host memory (ours), and from float tensors on the
device to features on it (bare); the best batch counts. ``decode``: JPEG bytes to training tensors on one core, beside
the same torchvision transforms on Pillow's own decoding. One JSON object a line, the summary of ratios last.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from lookalike.retrieval.machine import machine_facts
from lookalike.vision.backbones import create_backbone, timm
from lookalike.vision.encoder import EmbeddingModel, Encoder, EncoderConfig, read_pixels
from lookalike.vision.images import decode
from lookalike.vision.transforms import AugmentConfig, TransformConfig
from tests.vision.train_transform import build_train_transform

PAPERS = ("vit_base_patch16_224", "efficientnet_b0", "efficientformer_l1", "resnet50", "resnext101_32x8d")
CLASSES = 1000
SAMPLE = "data/samples/furniture/part-000.parquet"
Step = Callable[[], object]


def build(backbone: str, size: int) -> tuple[EncoderConfig, EmbeddingModel]:
    """A random model with a projection to 256 nested dims."""
    model = create_backbone(backbone, size=size)
    width = int(model.num_features)  # type: ignore[arg-type]
    dims = (32, 64, 128, 256)
    config = EncoderConfig(
        backbone=backbone, num_features=width, dims=dims, projection=True, transform=TransformConfig(size=size)
    )
    return config, EmbeddingModel(model, width, dims[-1])


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on the device, channels last as the platform keeps it."""
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def timed(steps: dict[str, Step], rounds: int, num: int, device: torch.device) -> dict[str, float]:
    """Seconds of each step, the median over rounds in which all take turns; ``num`` repetitions a round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for turn in range(rounds + 1):  # the first one warms up
        for name, step in steps.items():
            _wait(device)
            start = clock()
            for _ in range(num):
                step()
            _wait(device)
            if turn:
                seconds[name].append((clock() - start) / num)
    return {name: median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def train_step(model: nn.Module, head: nn.Module, batch: torch.Tensor, precision: str) -> Step:
    """One optimizer step of model and head on ``batch`` with fixed labels."""
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-4)
    labels = torch.arange(len(batch), device=batch.device) % CLASSES
    half = precision != "float32"

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.device.type, getattr(torch, precision), enabled=half):
            loss = functional.cross_entropy(head(model(batch)), labels)
        loss.backward()
        optimizer.step()

    return step


def measure_train(backbone: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Training images/s of our embedding model and of the bare timm classifier."""
    batch = torch.randn(options.train_batch, 3, options.size, options.size, device=device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    bare, (config, ours) = create_backbone(backbone, size=options.size), build(backbone, options.size)
    heads = [place(nn.Linear(width, CLASSES), device) for width in (config.dim, config.num_features)]
    steps = {
        "ours": train_step(place(ours, device), heads[0], batch, options.precision),
        "bare": train_step(place(bare, device), heads[1], batch, options.precision),
    }
    seconds = timed(steps, options.rounds, 1, device)
    return {"case": "train", "batch": len(batch), **rates(seconds, len(batch))}


def rates(seconds: dict[str, float], num: int) -> dict[str, float]:
    """Images/s of both, and ours as a share of bare."""
    found = {f"{name}_images_s": round(num / value, 2) for name, value in seconds.items()}
    return {**found, "ratio": round(seconds["bare"] / seconds["ours"], 3)}


def bare_inference(model: nn.Module, batch: torch.Tensor, precision: str) -> Step:
    """Features of a batch of floats that is on the device already."""
    half = precision != "float32"

    def step() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(batch.device.type, getattr(torch, precision), enabled=half):
            features: torch.Tensor = model(batch)
            return features

    return step


def measure_inference(encoder: Encoder, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Inference images/s by batch size, the best one, and milliseconds of one image."""
    bare = place(create_backbone(encoder.config.backbone, size=options.size).eval(), device)
    best: dict[str, Any] = {}
    for num in sorted({1, *options.batches}):
        pixels = np.random.default_rng(num).integers(0, 256, (num, 3, options.size, options.size), np.uint8)
        batch = torch.randn(num, 3, options.size, options.size, device=device)
        batch = batch.contiguous(memory_format=torch.channels_last)
        steps: dict[str, Step] = {
            "ours": lambda pixels=pixels: encoder.encode_pixels(pixels),  # type: ignore[misc]
            "bare": bare_inference(bare, batch, options.precision),
        }
        seconds = timed(steps, options.rounds, max(1, options.images // num), device)
        row = {"case": "inference", "batch": num, **rates(seconds, num)}
        yield row
        if num == 1:
            yield {
                "case": "latency",
                **{f"{name}_ms": round(value * 1000, 2) for name, value in seconds.items()},
                "ratio": round(seconds["ours"] / seconds["bare"], 3),
            }
        if row["ours_images_s"] > best.get("ours_images_s", 0):
            best = row
    yield {**best, "case": "best inference"}


def sample_images(num: int) -> list[bytes]:
    """Pictures of the sample corpus, as JPEG."""
    images = []
    for batch in pq.ParquetFile(SAMPLE).iter_batches(num, columns=["image"]):
        for value in batch["image"][:num]:
            buffer = io.BytesIO()
            decode(value.as_py()).resize((320, 320)).save(buffer, "JPEG", quality=90)
            images.append(buffer.getvalue())
        break
    return images


def measure_decode(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Images/s of one core: what training reads (decode, Inception crop, colours) and what embedding reads."""
    from torchvision.transforms import v2

    images, config = sample_images(options.images), TransformConfig(size=options.size, fit="crop")
    augment = build_train_transform(config, AugmentConfig(min_scale=0.08))
    plain = v2.Compose(
        [
            v2.RandomResizedCrop(options.size, scale=(0.08, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.mean, config.std),
        ]
    )

    def opened() -> Iterator[Image.Image]:
        return (Image.open(io.BytesIO(image)).convert("RGB") for image in images)

    cpu = torch.device("cpu")
    seconds = timed(
        {
            "ours": lambda: [augment(decode(image)) for image in images],
            "bare": lambda: [plain(image) for image in opened()],
        },
        options.rounds,
        1,
        cpu,
    )
    yield {"case": "decode for training, one core", **rates(seconds, len(images))}
    usual = v2.Compose([v2.Resize(round(options.size / 0.875)), v2.CenterCrop(options.size), v2.ToImage()])
    seconds = timed(
        {"ours": lambda: read_pixels(images, config), "bare": lambda: [usual(i) for i in opened()]},
        options.rounds,
        1,
        cpu,
    )
    yield {"case": "decode for embedding, one core", **rates(seconds, len(images))}


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for row in measure_decode(options):
        yield {"backbone": None, **row}
    for backbone in options.backbones:
        config, model = build(backbone, options.size)
        encoder = Encoder(config, model, "bench", precision=options.precision)
        facts = {"backbone": backbone, "parameters": sum(p.numel() for p in model.parameters())}
        yield {**facts, **measure_train(backbone, options, device)}
        for row in measure_inference(encoder, options, device):
            yield {**facts, **row}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Our share of the bare loop's speed by backbone, and the decoding ratios."""
    summary: dict[str, Any] = {}
    for row in rows:
        if row["case"] in ("train", "best inference", "latency"):
            summary.setdefault(row["backbone"], {})[f"{row['case'].replace(' ', '_')}_vs_bare"] = row["ratio"]
        elif row["case"].startswith("decode"):
            summary[row["case"].split(",")[0].replace(" ", "_") + "_vs_bare"] = row["ratio"]
    return summary


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``--quick`` takes small models at 64 px."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small backbones at 64 px: a test of the benchmark")
    parser.add_argument("--backbones", nargs="+", default=list(PAPERS))
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in pixels")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes of inference")
    parser.add_argument("--images", type=int, default=32, help="images of a timing at least")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(args)
    if options.quick:
        options.backbones, options.size, options.rounds = ["test_efficientnet", "vit_tiny_patch16_224"], 64, 3
    return options


def main() -> int:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu, one thread, processor time"
    facts = {
        "bench": "encoders",
        "size": options.size,
        "precision": options.precision,
        "device": device,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": machine_facts(),
    }
    rows = []
    for row in run(options):
        rows.append(row)
        print(json.dumps({**facts, **row}), flush=True)
    print(json.dumps({**facts, "summary": True, **summarise(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
