"""What nested losses over large label spaces cost: a matrix a dim, weight-tied, accumulated, in chunks of classes.

    python -m tests.benchmarks.training_losses [--quick] [--rows 128] [--dim 256] [--classes 1000,18000,200000]

Forward and backward pass of nested softmax (dims 8, 16, ... to the embedding's) over the same rows and labels, each case
in a process of its own, all in one run. ``peak_mb`` counts bytes that live at once above inputs and weights, gradients
included; ``seconds`` is the median of some repetitions. Cases: ``mrl`` (a matrix a dim), ``mrl-e naive`` (one matrix,
a sliced matmul a dim, as the paper's own code does), ``mrl-e accumulated`` (block by block, scores kept) and the two
``chunked`` forms (scores of a chunk of classes at a time, computed again in the backward pass).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lookalike.retrieval.machine import machine_facts
from lookalike.train.tasks import TaskConfig, build_tasks

CASES = ("mrl", "mrl chunked", "mrl-e naive", "mrl-e accumulated", "mrl-e chunked")


def naive_loss(layer: nn.Linear, z: torch.Tensor, labels: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Weight-tied nested softmax with a matmul over each whole prefix."""
    losses = [functional.cross_entropy(functional.linear(z[:, :m], layer.weight[:, :m], layer.bias), labels)
              for m in dims]  # fmt: skip
    return torch.stack(losses).sum()


def build_case(case: str, num_classes: int, dims: tuple[int, ...], chunk: int) -> tuple[nn.Module, Callable[..., Any]]:
    """(the module with the weights, embeddings and labels -> scalar loss)."""
    torch.manual_seed(0)
    if case == "mrl-e naive":
        layer = nn.Linear(dims[-1], num_classes)
        return layer, lambda z, labels: naive_loss(layer, z, labels, dims)
    config = TaskConfig(kind="softmax", field="category", nesting="mrl-e" if case.startswith("mrl-e") else "mrl",
                        class_chunk=chunk if case.endswith("chunked") else num_classes)  # fmt: skip
    task = build_tasks({"t": config}, dims, {"category": num_classes}, (1.0,) * len(dims))["t"]
    return task, lambda z, labels: task(z, {"category": labels})


def peak_bytes(step: Callable[[], None]) -> int:
    """Most bytes that torch held at once during ``step``, above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    live = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return peak


def measure(case: str, num_classes: int, dims: tuple[int, ...], *, rows: int, chunk: int, repeats: int) -> dict[str, Any]:
    """Figures of one case."""
    torch.set_num_threads(1)
    module, loss = build_case(case, num_classes, dims, chunk)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(rows, dims[-1], generator=generator).requires_grad_()
    labels = torch.randint(0, num_classes, (rows,), generator=generator)
    values: list[float] = []

    def step() -> None:
        module.zero_grad(set_to_none=True)
        z.grad = None
        total = loss(z, labels)
        total.backward()
        values.append(float(total.detach()))

    peak, seconds = peak_bytes(step), []  # the first step, which also warms up
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    assert z.grad is not None
    return {"case": case, "classes": num_classes, "seconds": round(median(seconds), 5), "peak_mb": round(peak / 1e6, 2),
            "weights_mb": round(sum(p.numel() * 4 for p in module.parameters()) / 1e6, 2),
            "loss": round(values[-1], 4), "gradient_norm": round(float(z.grad.norm()), 5)}  # fmt: skip


def run_case(case: str, num_classes: int, options: argparse.Namespace) -> dict[str, Any]:
    """``measure`` in a fresh process, so that no case finds the memory of another."""
    command = [sys.executable, "-m", "tests.benchmarks.training_losses", "--case", case, "--classes", str(num_classes),
               "--rows", str(options.rows), "--dim", str(options.dim), "--chunk", str(options.chunk),
               "--repeats", str(options.repeats)]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios by label space: the naive weight-tied form over ours (above 1: ours is faster, smaller)."""
    found = {(row["case"], row["classes"]): row for row in rows}
    sizes = sorted({row["classes"] for row in rows})

    def ratio(one: str, other: str, figure: str) -> dict[str, float]:
        return {str(size): round(found[one, size][figure] / found[other, size][figure], 2) for size in sizes}

    by_case = {name: {"speedup": ratio(base, name, "seconds"), "memory": ratio(base, name, "peak_mb")}
               for name, base in (("mrl-e accumulated", "mrl-e naive"), ("mrl-e chunked", "mrl-e naive"),
                                  ("mrl chunked", "mrl"))}  # fmt: skip
    default = {size: "mrl-e chunked" if size > TaskConfig.model_fields["class_chunk"].default else "mrl-e accumulated"
               for size in sizes}  # fmt: skip
    ratios = {f"mrl_e_{short}": {str(size): by_case[name][short][str(size)] for size, name in default.items()}
              for short in ("speedup", "memory")}  # fmt: skip
    return {"by_case": by_case, "default": {str(size): name for size, name in default.items()}, "ratios": ratios}


def main() -> int:
    """Run all cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32 rows of 64 dims, 1,000 and 18,000 classes")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--classes")
    parser.add_argument("--chunk", type=int, default=TaskConfig.model_fields["class_chunk"].default)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rows = options.rows or (32 if options.quick else 128)
    options.dim = options.dim or (64 if options.quick else 256)
    sizes = options.classes or ("1000,18000" if options.quick else "1000,18000,200000")
    classes = [int(size) for size in sizes.split(",")]
    dims = tuple(m for m in (8, 16, 32, 64, 128, 256, 512, 1024) if m < options.dim) + (options.dim,)
    if options.case:
        print(json.dumps(measure(options.case, classes[0], dims, rows=options.rows, chunk=options.chunk,
                                 repeats=options.repeats)))  # fmt: skip
        return 0
    facts = {"bench": "training_losses", "rows": options.rows, "dims": dims, "chunk": options.chunk, "threads": 1,
             "machine": {**machine_facts(), "torch": torch.__version__}}  # fmt: skip
    rows = []
    for size in classes:
        for case in CASES:
            rows.append(run_case(case, size, options))
            print(json.dumps(facts | rows[-1]), flush=True)
    print(json.dumps(facts | {"summary": True, **summarise(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
