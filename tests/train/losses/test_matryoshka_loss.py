"""``MatryoshkaLoss`` in a plain PyTorch loop: against sums written out, with other libraries' losses and backbones."""

from collections.abc import Callable

import pytest
import timm
import torch
from pytorch_metric_learning import losses
from torch import nn
from torch.nn import functional

from lookalike import MatryoshkaLoss, NestedCosine, NestedLinear
from lookalike.errors import UsageError

DIMS = (4, 8, 16)
WEIGHTS = (2.0, 1.0, 0.5)


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


LABELS = torch.arange(12) % 3


def close_with_gradient(found: torch.Tensor, expected: torch.Tensor, embedding: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, embedding, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("nesting", ["mrl", "mrl-e"])
def test_a_classifier_per_dim_or_one_tied_is_equation_one(nesting: str, embedding: torch.Tensor) -> None:
    head = NestedLinear(DIMS, 3, nesting)
    found = MatryoshkaLoss(DIMS, nn.CrossEntropyLoss(), head=head, weights=WEIGHTS)(embedding, LABELS)
    expected = torch.zeros(())
    for i, (m, c) in enumerate(zip(DIMS, WEIGHTS, strict=True)):
        layer = head.layers[i if nesting == "mrl" else 0]
        expected = expected + c * functional.cross_entropy(
            embedding[:, :m] @ layer.weight[:, :m].T + layer.bias, LABELS
        )
    close_with_gradient(found, expected, embedding)


@pytest.mark.parametrize("make", [losses.TripletMarginLoss, losses.NTXentLoss, losses.SupConLoss])
def test_losses_of_pytorch_metric_learning(make: Callable[[], nn.Module], embedding: torch.Tensor) -> None:
    found = MatryoshkaLoss(DIMS, make(), weights=WEIGHTS)(embedding, LABELS)
    expected = sum(c * make()(embedding[:, :m], LABELS) for m, c in zip(DIMS, WEIGHTS, strict=True))
    close_with_gradient(found, expected, embedding)
    reference = torch.randn(5, 16)
    options = {"ref_emb": reference[:, :4], "ref_labels": LABELS[:5]}
    one = MatryoshkaLoss([4], make())(embedding[:, :4], LABELS, **options)
    torch.testing.assert_close(one, make()(embedding[:, :4], LABELS, **options))


def test_a_loss_with_parameters_of_the_embeddings_width_is_one_per_dim(embedding: torch.Tensor) -> None:
    each = [losses.ProxyAnchorLoss(num_classes=3, embedding_size=m) for m in DIMS]
    loss = MatryoshkaLoss(DIMS, each)
    assert {id(p) for p in loss.parameters()} == {id(p) for one in each for p in one.parameters()}
    expected = sum(one(embedding[:, :m], LABELS) for m, one in zip(DIMS, each, strict=True))
    close_with_gradient(loss(embedding, LABELS), expected, embedding)


def clip_loss(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """As in CLIP and open_clip: unit vectors of two towers."""
    for part in (left, right):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(len(part)))
    logits, target = scale * left @ right.T, torch.arange(len(left))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def test_two_towers_are_cut_and_scaled_alike(embedding: torch.Tensor) -> None:
    other = torch.randn(12, 16)
    found = MatryoshkaLoss(DIMS, clip_loss, embeddings=2, normalise=True)(embedding, other, 20.0)
    expected = sum(
        clip_loss(functional.normalize(embedding[:, :m]), functional.normalize(other[:, :m]), 20.0) for m in DIMS
    )
    close_with_gradient(found, expected, embedding)


def test_a_backbone_of_timm_learns_to_tell_classes_apart_at_every_dim() -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("test_efficientnet", num_classes=0)
    loss = MatryoshkaLoss([8, 32, 256], nn.CrossEntropyLoss(), head=NestedCosine([8, 32, 256], 4))
    images = torch.randn(4, 3, 32, 32).repeat(4, 1, 1, 1) + 0.3 * torch.randn(16, 3, 32, 32)
    labels = torch.arange(16) % 4
    optimizer = torch.optim.AdamW([*backbone.parameters(), *loss.parameters()], lr=1e-2)
    first = None
    for _ in range(25):
        value = loss(backbone(images), labels)
        first = float(value) if first is None else first
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert loss.head is not None
    with torch.no_grad():
        assert all((scores.argmax(dim=1) == labels).all() for scores in loss.head(backbone(images)))
    assert first is not None
    assert float(value) < 0.8 * first


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MatryoshkaLoss([], clip_loss), r"dims \[\] must be positive and increasing"),
        (lambda: MatryoshkaLoss([8, 8], clip_loss), r"dims \[8, 8\] must be positive and increasing"),
        (lambda: MatryoshkaLoss(DIMS, clip_loss, weights=[1.0]), "1 weights for 3 dims; give one each"),
        (lambda: MatryoshkaLoss(DIMS, [clip_loss]), "1 losses for 3 dims; give one each"),
        (lambda: MatryoshkaLoss(DIMS, clip_loss, head=NestedLinear([4, 8], 3)), r"the head has dims \[4, 8\], not"),
        (lambda: MatryoshkaLoss(DIMS, clip_loss, head=NestedLinear(DIMS, 3), normalise=True), "leave out embeddings"),
        (lambda: MatryoshkaLoss(DIMS, clip_loss)(torch.zeros(2, 32)), r"shape \[2, 32\]; dims end at 16"),
        (lambda: MatryoshkaLoss(DIMS, clip_loss)(torch.zeros(16)), r"shape \[16\]; dims end at 16"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()
