"""Thousands of small classifiers trained at once, as batched matrix products on CPU or GPU.

Each model has one hidden layer on frozen features and answers one question: does the term apply to this picture? Its
accuracy on pictures it has not seen is the term's visual concreteness (Pinterest section 3.2.1). Every picture is held
out once: F folds make F models per term, which share one product with the term's samples.

The score of a term follows from its samples alone: they are scaled by their mean and deviation and padded to a size
that depends on their number, and all terms start from the same weights. Gradients are written out, so that a step is
five matrix products and one pass over flat parameters, and the numbers of two terms never mix.

Suffix legend: T terms, S samples, D features, F folds, J = F x hidden units (padded), K parameters.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from lookalike.data.dictionary.scores import SCORES, DictionaryConfig, ProbeConfig, digest
from lookalike.data.dictionary.sketch import Pools, Sample, choose_samples
from lookalike.seeds import derive_seed

PAD = 32  # the samples of a term are padded to a multiple of this
# floats of a cache line. A term's rows of every tensor fill whole lines: the rest that does not fill a vector
# instruction is computed without fused multiply-add, and rounding would depend on the term's place in a batch
LANES = 16
CPU_FLOATS, CUDA_FLOATS = 1 << 20, 1 << 28  # samples x D of a batch: 4 MiB fit into a cache, 1 GiB on a GPU
BETAS = (0.9, 0.999)


def score_bucket(
    bucket: pa.Table, pools: Pools, previous: pa.Table, config: DictionaryConfig, *, seed: int, device: str = "cpu"
) -> pa.Table:
    """``SCORES`` of the terms in ``bucket``, a merged sketch.

    ``previous`` (term, digest, hits): earlier scores; a term whose digest is unchanged keeps its hits, untrained.
    """
    samples = list(choose_samples(bucket, pools, config.probe.folds, seed))
    enough = [len(c.sample.positives) >= config.min_units for c in samples]
    digests = [digest(c.sample, config.probe, seed) if fits else None for c, fits in zip(samples, enough, strict=True)]
    terms = pa.array([c.term for c in samples], pa.string())
    earlier = previous.filter(pc.is_in(previous["term"], value_set=terms))
    hits_of = dict(zip(earlier["digest"].to_pylist(), earlier["hits"].to_pylist(), strict=True))
    reused = [fits and name in hits_of for name, fits in zip(digests, enough, strict=True)]
    train = [row for row, (fits, keeps) in enumerate(zip(enough, reused, strict=True)) if fits and not keeps]
    hits = np.array([hits_of[name] if keeps else 0 for name, keeps in zip(digests, reused, strict=True)], np.int64)
    hits[train] = score_terms([samples[row].sample for row in train], config.probe, seed, device)
    trials = [2 * len(c.sample.positives) if fits else 0 for c, fits in zip(samples, enough, strict=True)]
    columns = [terms, [c.sampled for c in samples], trials, hits, digests, reused]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCORES, strict=True)], schema=SCORES)


def score_terms(samples: list[Sample], config: ProbeConfig, seed: int, device: str = "cpu") -> NDArray[np.int64]:
    """Held-out hits [len(samples)], each out of twice the term's positives."""
    torch.set_num_threads(1)  # results must not depend on how threads split a sum
    hits = np.zeros(len(samples), np.int64)
    for rows in batch_samples(samples, CUDA_FLOATS if device == "cuda" else CPU_FLOATS):
        batch = stack_samples([samples[row] for row in rows], device)
        hits[rows] = _train(batch, config, seed).cpu().numpy()
    return hits


def _padded(sample: Sample) -> int:
    return -(-2 * len(sample.positives) // PAD) * PAD


def batch_samples(samples: list[Sample], floats: int) -> Iterator[list[int]]:
    """Positions of samples of one padded size, as many at a time as ``floats`` allow."""
    by_size: dict[int, list[int]] = {}
    for row, sample in enumerate(samples):
        by_size.setdefault(_padded(sample), []).append(row)
    for size, rows in sorted(by_size.items()):
        step = max(1, floats // (size * samples[rows[0]].positives.shape[1]))
        yield from (rows[start : start + step] for start in range(0, len(rows), step))


class Batch(NamedTuple):
    """Samples of several terms, padded to one size."""

    x_TSD: torch.Tensor
    """Standardised features, zero in the padding."""
    target_TS: torch.Tensor
    """1 for positives, else 0."""
    fold_TS: torch.Tensor
    """The fold that holds a sample out, -1 in the padding."""


def stack_samples(samples: list[Sample], device: str) -> Batch:
    """``Batch`` of samples of one padded size."""
    size, dim = _padded(samples[0]), samples[0].positives.shape[1]
    x = np.zeros((len(samples), size, dim), np.float16)
    target, fold = np.zeros((len(samples), size), np.float32), np.full((len(samples), size), -1, np.int64)
    for row, (positives, negatives, folds) in enumerate(samples):
        half = len(positives)
        x[row, :half], x[row, half : 2 * half] = positives, negatives
        target[row, :half] = 1
        fold[row, : 2 * half] = folds
    fold_TS = torch.from_numpy(fold).to(device)
    valid_TS1 = (fold_TS >= 0).float().unsqueeze(2)
    share_TS1 = valid_TS1 / valid_TS1.sum(dim=1, keepdim=True)
    x_TSD = torch.from_numpy(x).to(device).float()
    x_TSD -= (x_TSD * share_TS1).sum(dim=1, keepdim=True)
    x_TSD /= (x_TSD.square() * share_TS1).sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
    return Batch(x_TSD.mul_(valid_TS1), torch.from_numpy(target).to(device), fold_TS)


def _train(batch: Batch, config: ProbeConfig, seed: int) -> torch.Tensor:
    """Hits [T] on held-out samples, after the models of all folds were trained on the other samples.

    Positives and negatives each have half of the weight.
    """
    x_TSD, target_TS, fold_TS = batch
    held_TSF = fold_TS.unsqueeze(2) == torch.arange(config.folds, device=x_TSD.device)
    target_TS1 = target_TS.unsqueeze(2)
    train_TSF = ((fold_TS >= 0).unsqueeze(2) & ~held_TSF).float()
    sides = (train_TSF * target_TS1, train_TSF * (1 - target_TS1))
    positives_T1F, negatives_T1F = (side.sum(dim=1, keepdim=True) for side in sides)
    weight_TSF = sides[0] / (2 * positives_T1F).clamp(min=1) + sides[1] / (2 * negatives_T1F).clamp(min=1)
    flat_TK = initial_parameters(x_TSD.shape[2], config, seed).to(x_TSD.device).repeat(len(x_TSD), 1)
    first_TJD, bias_T1J, second_TJF, bias_T1F = layers_of(flat_TK, x_TSD.shape[2], config)
    slope_TK, mean_TK, square_TK = (torch.zeros_like(flat_TK) for _ in range(3))
    slopes = layers_of(slope_TK, x_TSD.shape[2], config)
    own_JF = (second_TJF[0] != 0).float()  # a model reads only its own hidden units
    for step in range(1, config.steps + 1):
        hidden_TSJ = torch.baddbmm(bias_T1J, x_TSD, first_TJD.transpose(1, 2)).relu_()
        logits_TSF = torch.baddbmm(bias_T1F, hidden_TSJ, second_TJF)
        error_TSF = logits_TSF.sigmoid_().sub_(target_TS1).mul_(weight_TSF)  # d loss / d logits of cross-entropy
        back_TSJ = torch.ops.aten.threshold_backward(torch.bmm(error_TSF, second_TJF.transpose(1, 2)), hidden_TSJ, 0.0)
        slopes[0].copy_(torch.bmm(back_TSJ.transpose(1, 2), x_TSD))
        slopes[1].copy_(back_TSJ.sum(dim=1, keepdim=True))
        slopes[2].copy_(torch.bmm(hidden_TSJ.transpose(1, 2), error_TSF).mul_(own_JF))
        slopes[3].copy_(error_TSF.sum(dim=1, keepdim=True))
        mean_TK.lerp_(slope_TK, 1 - BETAS[0])  # AdamW from here on
        square_TK.mul_(BETAS[1]).addcmul_(slope_TK, slope_TK, value=1 - BETAS[1])
        root_TK = (square_TK / (1 - BETAS[1] ** step)).sqrt_().add_(1e-8)
        flat_TK.mul_(1 - config.learning_rate * config.weight_decay)
        flat_TK.addcdiv_(mean_TK, root_TK, value=-config.learning_rate / (1 - BETAS[0] ** step))
    hidden_TSJ = torch.baddbmm(bias_T1J, x_TSD, first_TJD.transpose(1, 2)).relu_()
    says_TSF = torch.baddbmm(bias_T1F, hidden_TSJ, second_TJF) > 0
    # a model that saw one side knows no other answer
    says_TSF = (says_TSF & (positives_T1F > 0)) | (negatives_T1F == 0)
    return ((says_TSF == (target_TS1 > 0.5)) & held_TSF).sum(dim=(1, 2))


def layers_of(flat_TK: torch.Tensor, dim: int, config: ProbeConfig) -> list[torch.Tensor]:
    """Weights [T, J, D] and biases [T, 1, J] of the hidden layer and [T, J, F], [T, 1, F] of the last, as views."""
    width = -(-config.folds * config.hidden // LANES) * LANES
    shapes = [(width, dim), (1, width), (width, config.folds), (1, config.folds)]
    ends = np.cumsum([rows * columns for rows, columns in shapes]).tolist()
    return [
        flat_TK[:, end - rows * columns : end].view(-1, rows, columns)
        for end, (rows, columns) in zip(ends, shapes, strict=True)
    ]


def initial_parameters(dim: int, config: ProbeConfig, seed: int) -> torch.Tensor:
    """Parameters [K] from which every term starts: the same for all folds, the last layer block diagonal, else zeros.

    The weights of padded hidden units stay zero, because their gradient is zero.
    """
    folds, hidden = config.folds, config.hidden
    generator = torch.Generator().manual_seed(derive_seed(seed, "probe"))
    spare = -folds * hidden % LANES
    first = torch.randn(hidden, dim, generator=generator) / dim**0.5
    second = torch.randn(hidden, 1, generator=generator) / hidden**0.5
    parts = [
        pad(first.repeat(folds, 1), (0, 0, 0, spare)),
        torch.zeros(folds * hidden + spare),
        pad(torch.kron(torch.eye(folds), second), (0, 0, 0, spare)),
        torch.zeros(-(-folds // LANES) * LANES),
    ]
    return torch.cat([part.flatten() for part in parts])
