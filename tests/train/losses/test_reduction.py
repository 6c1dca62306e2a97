"""Chunked reductions of scores against whole logits, values and gradients (float64)."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lookalike.train.losses.reduction import Factors, Over, prefix_norms, reduce_scores


def make(dims: Sequence[int], num_classes: int, *, tied: bool, bias: bool, seed: int) -> list[torch.Tensor]:
    """Leaf tensors: embeddings [9, D], weights, biases."""
    generator = torch.Generator().manual_seed(seed)
    sizes = dims[-1:] if tied else dims
    shapes = [(9, dims[-1]), *((num_classes, m) for m in sizes), *((num_classes,) for m in sizes if bias)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def naive(
    leaves: list[torch.Tensor],
    dims: Sequence[int],
    labels: torch.Tensor,
    *,
    tied: bool,
    scale: float | None,
    over: Over,
) -> torch.Tensor:
    """All outputs from whole logits, a sliced matmul for each dim, as one tensor [M, n, 2 + K]."""
    z, *rest = leaves
    count = 1 if tied else len(dims)
    outputs = []
    for i, m in enumerate(dims):
        weight = rest[0 if tied else i][:, :m]
        logits = z[:, :m] @ weight.T
        if scale is not None:
            logits = scale * functional.cosine_similarity(z[:, None, :m], weight[None], dim=2)
        elif len(rest) > count:
            logits = logits + rest[count + (0 if tied else i)]
        reduced = logits.logsumexp(dim=1) if over == "logsumexp" else functional.softplus(logits).sum(dim=1)
        inside = (labels >= 0) & (labels < logits.shape[1])
        picked = torch.where(inside, logits.gather(1, labels.clamp(0, logits.shape[1] - 1)), 0.0)
        outputs.append(torch.cat([reduced[:, None], picked, logits.sum(dim=1)[:, None]], dim=1))
    return torch.stack(outputs)


def ours(
    leaves: list[torch.Tensor],
    dims: Sequence[int],
    labels: torch.Tensor,
    *,
    tied: bool,
    scale: float | None,
    over: Over,
    chunk: int,
) -> torch.Tensor:
    count = 1 if tied else len(dims)
    factors = Factors(tuple(dims), tuple(leaves[1 : 1 + count]), tuple(leaves[1 + count :]), scale)
    reduced = reduce_scores(leaves[0], factors, labels, over=over, chunk=chunk, total=True)
    return torch.cat([reduced.over[..., None], reduced.picked, reduced.total[..., None]], dim=2)


@settings(max_examples=60)
@given(st.data())
def test_chunks_give_what_whole_logits_give(data: st.DataObject) -> None:
    dims = data.draw(st.sets(st.integers(1, 12), min_size=1, max_size=4))
    num_classes, chunk, seed = (data.draw(st.integers(low, high)) for low, high in ((1, 11), (1, 12), (0, 1000)))
    form, tied = data.draw(st.sampled_from(["plain", "bias", "cosine"])), data.draw(st.booleans())
    over: Over = data.draw(st.sampled_from(["logsumexp", "softplus"]))
    ordered, scale = sorted(dims), 7.0 if form == "cosine" else None
    leaves = make(ordered, num_classes, tied=tied, bias=form == "bias", seed=seed)
    labels = torch.randint(-2, num_classes + 2, (9, 3), generator=torch.Generator().manual_seed(seed))
    one = ours(leaves, ordered, labels, tied=tied, scale=scale, over=over, chunk=chunk)
    other = naive(leaves, ordered, labels, tied=tied, scale=scale, over=over)
    assert torch.allclose(one, other, atol=1e-10)
    mix = torch.randn(one.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    for a, b in zip(
        torch.autograd.grad((one * mix).sum(), leaves), torch.autograd.grad((other * mix).sum(), leaves), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("scale", [None, 5.0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [2, 6])
def test_a_second_backward_pass_gives_the_same(tied: bool, scale: float | None, chunk: int) -> None:
    leaves = make((2, 4), 6, tied=tied, bias=False, seed=0)
    labels = torch.randint(0, 6, (9, 2))
    total = ours(leaves, (2, 4), labels, tied=tied, scale=scale, over="logsumexp", chunk=chunk).square().sum()
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_large_scores_do_not_overflow() -> None:
    leaves = [tensor.detach().mul(1e3).requires_grad_() for tensor in make((2, 4), 6, tied=True, bias=False, seed=0)]
    labels = torch.zeros((9, 1), dtype=torch.int64)
    out = ours(leaves, (2, 4), labels, tied=True, scale=None, over="logsumexp", chunk=2)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_no_classes_reduce_to_nothing() -> None:
    """A worker that holds none of the sampled classes."""
    leaves = make((2, 4), 0, tied=True, bias=True, seed=0)
    labels = torch.full((9, 1), -1)
    out = ours(leaves, (2, 4), labels, tied=True, scale=None, over="logsumexp", chunk=2)
    assert (out[..., 0] == -torch.inf).all()
    assert torch.autograd.grad(out[..., 1:].sum(), leaves[0])[0].abs().max() == 0.0


def test_memory_does_not_grow_with_the_label_space() -> None:
    """Peak of live bytes, forward and backward, above the gradients themselves."""

    def extra(num_classes: int) -> int:
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((64, 32), (num_classes, 32))]
        labels = torch.zeros((64, 1), dtype=torch.int64)

        def step() -> None:
            reduced = reduce_scores(leaves[0], Factors((8, 16, 32), (leaves[1],)), labels, over="logsumexp", chunk=500)
            (reduced.over - reduced.picked[..., 0]).sum().backward()

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        live = peak = 0
        for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            live += size
            peak = max(peak, live)
        return peak - 4 * num_classes * 32

    small, large = extra(2_000), extra(16_000)
    assert large < 1.2 * small + 100_000
    assert large < 64 * 16_000 * 4  # less than a single [n, C] matrix of scores, three dims together


def test_bfloat16_scores_under_autocast_stay_near() -> None:
    torch.manual_seed(0)
    z, weight = torch.randn(16, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    labels = torch.randint(0, 50, (16, 1))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            reduced = reduce_scores(z, Factors((8, 32), (weight,)), labels, over="logsumexp", chunk=20)
        loss = (reduced.over - reduced.picked[..., 0]).mean()
        results.append((loss, *torch.autograd.grad(loss, (z, weight))))
    assert results[1][0].dtype == torch.float32
    assert 0 < abs(float(results[0][0].detach()) - float(results[1][0].detach())) < 0.05
    for exact, low in zip(results[0][1:], results[1][1:], strict=True):
        assert functional.cosine_similarity(exact.flatten(), low.flatten(), dim=0) > 0.999


def test_prefix_norms() -> None:
    vectors = torch.randn(5, 6, dtype=torch.float64)
    for m, norms in zip((1, 4, 6), prefix_norms(vectors, (1, 4, 6)), strict=True):
        assert torch.allclose(norms, vectors[:, :m].norm(dim=1))
    assert prefix_norms(torch.zeros(1, 2), (2,)).item() == float("inf")
