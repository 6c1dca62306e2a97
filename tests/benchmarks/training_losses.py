"""What nested losses over large label spaces cost: a matrix a dim, weight-tied, accumulated, in chunks of classes.

    python -m tests.benchmarks.training_losses [--quick] [--rows 128] [--dim 256] [--classes 1000 18000 200000]

Forward and backward pass of nested softmax (dims 8, 16, ... to the embedding's) over the same rows, labels and weights,
on one thread, the cases of a label space in turn. ``cpu_s`` is the least over rounds of the process's own time, so
that a busy machine shifts it little; ``peak_mb`` the bytes that live at once above inputs and weights, gradients
included. Cases: ``mrl`` (a matrix a dim), ``mrl-e naive`` (one matrix, a sliced matmul a dim, as the paper's own code
does), ``mrl-e accumulated`` (block by block, scores kept for autograd), and ``chunked``, what tasks use (scores of a
chunk of classes at a time, computed again in the backward pass). Every case must give the loss and the gradient of its
naive form. At 200,000 classes it needs about 3 GB.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from lookalike.retrieval.machine import machine_facts
from lookalike.train.losses.matryoshka import NestedLinear
from lookalike.train.losses.reduction import reduce_scores
from lookalike.train.tasks import TaskConfig

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CHUNK = TaskConfig.model_fields["class_chunk"].default


def kept(head: NestedLinear) -> Loss:
    """The sum over dims of cross-entropy of the head's scores."""
    return lambda z, labels: torch.stack([functional.cross_entropy(scores, labels) for scores in head(z)]).sum()


def chunked(head: NestedLinear, chunk: int) -> Loss:
    """The same by chunks."""

    def loss(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        reduced = reduce_scores(z, head.factors(), labels[:, None], over="logsumexp", chunk=chunk)
        return (reduced.over - reduced.picked[..., 0]).mean(dim=1).sum()

    return loss


def naive(head: NestedLinear) -> Loss:
    """The same with one matrix and a matmul over each whole prefix."""

    def loss(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight, bias = head.layers[0].weight, head.layers[0].bias
        assert isinstance(weight, torch.Tensor)
        scores = [z[:, :m] @ weight[:, :m].T + bias for m in head.dims]
        return torch.stack([functional.cross_entropy(score, labels) for score in scores]).sum()

    return loss


def list_cases(num_classes: int, dims: tuple[int, ...], chunk: int) -> Iterator[tuple[str, NestedLinear, Loss]]:
    """(name, head, loss) of everything compared; forms of one nesting share their weights."""
    torch.manual_seed(0)
    separate, tied = NestedLinear(dims, num_classes, "mrl"), NestedLinear(dims, num_classes, "mrl-e")
    yield "mrl", separate, kept(separate)
    yield "mrl chunked", separate, chunked(separate, chunk)
    yield "mrl-e naive", tied, naive(tied)
    yield "mrl-e accumulated", tied, kept(tied)
    yield "mrl-e chunked", tied, chunked(tied, chunk)


def peak_bytes(step: Callable[[], Any]) -> int:
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


def measure(num_classes: int, dims: tuple[int, ...], *, rows: int, chunk: int, rounds: int) -> list[dict[str, Any]]:
    """Figures of all cases over one label space."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(rows, dims[-1], generator=generator).requires_grad_()
    labels = torch.randint(0, num_classes, (rows,), generator=generator)
    cases = list(list_cases(num_classes, dims, chunk))

    def step(head: NestedLinear, loss: Loss) -> dict[str, float]:
        z.grad = None
        total = loss(z, labels)
        total.backward()
        assert z.grad is not None
        found = {"loss": round(total.item(), 3), "gradient_norm": round(float(z.grad.norm()), 3)}
        head.zero_grad(set_to_none=True)
        return found

    found = [
        {
            "case": name,
            "classes": num_classes,
            **step(head, loss),
            "peak_mb": round(peak_bytes(lambda head=head, loss=loss: step(head, loss)) / 1e6, 2),
            "weights_mb": round(sum(p.numel() * 4 for p in head.parameters()) / 1e6, 2),
        }
        for name, head, loss in cases
    ]
    for nesting in ("mrl", "mrl-e"):
        values = {(row["loss"], row["gradient_norm"]) for row in found if row["case"].split()[0] == nesting}
        spread = [max(column) / min(column) - 1 for column in zip(*values, strict=True)]
        assert max(spread) < 1e-3, values
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for i, (_, head, loss) in enumerate(cases):
            start = time.process_time()
            step(head, loss)
            seconds[i].append(time.process_time() - start)
    return [{**row, "cpu_s": round(min(times), 5)} for row, times in zip(found, seconds, strict=True)]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios by label space, above 1 where the second form is faster or smaller than the first."""
    found = {(row["case"], row["classes"]): row for row in rows}
    sizes = sorted({row["classes"] for row in rows})

    def ratio(one: str, other: str, figure: str) -> dict[str, float]:
        return {str(size): round(found[one, size][figure] / found[other, size][figure], 2) for size in sizes}

    pairs = {
        "mrl_e": ("mrl-e naive", "mrl-e chunked"),
        "mrl_e_accumulated": ("mrl-e naive", "mrl-e accumulated"),
        "mrl_chunked": ("mrl", "mrl chunked"),
        "mrl_e_over_mrl": ("mrl", "mrl-e chunked"),
    }
    figures = {"speedup": "cpu_s", "memory": "peak_mb"}
    return {f"{name}_{kind}": ratio(*pair, figure) for name, pair in pairs.items() for kind, figure in figures.items()}


def main() -> int:
    """Run all cases and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32 rows of 64 dims, 1,000 and 18,000 classes")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--classes", type=int, nargs="+")
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, dim = options.rows or (32 if options.quick else 128), options.dim or (64 if options.quick else 256)
    dims = (*(m for m in (8, 16, 32, 64, 128, 256, 512, 1024) if m < dim), dim)
    facts = {
        "bench": "training_losses",
        "rows": rows,
        "dims": dims,
        "chunk": options.chunk,
        "rounds": options.rounds,
        "threads": 1,
        "machine": {**machine_facts(), "torch": torch.__version__},
    }
    found = []
    for size in options.classes or ((1000, 18_000) if options.quick else (1000, 18_000, 200_000)):
        for row in measure(size, dims, rows=rows, chunk=options.chunk, rounds=options.rounds):
            found.append(row)
            print(json.dumps(facts | row), flush=True)
    print(json.dumps(facts | {"summary": True, "ratios": summarise(found)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
