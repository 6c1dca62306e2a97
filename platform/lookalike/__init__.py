"""lookalike: from raw images with messy text to a served, adaptive visual search.

The package spans several folders of the repository (see README, "The house"): ``platform/lookalike`` is the ground
floor; ``data/``, ``train/`` and ``serve/`` stand on it and never import each other.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a source tree (a checkout, or one uploaded as a Ray working_dir) data/, train/ and serve/ are two folders up, in
# the wheel beside this file. Extending __path__ makes the same imports work in both, without an installation.
_SOURCE_ROOT = Path(__file__).resolve().parents[2]
if (_SOURCE_ROOT / "pyproject.toml").is_file() and (_SOURCE_ROOT / "train").is_dir():
    __path__.append(str(_SOURCE_ROOT))

_LAZY = {
    "Artifact": "lookalike.artifacts",
    "Client": "lookalike.serve.client",
    "Config": "lookalike.config",
    "Encoder": "lookalike.vision.encoder",
    "MatryoshkaLoss": "lookalike.train.losses.matryoshka_loss",
    "NestedCosine": "lookalike.train.losses.matryoshka",
    "NestedLinear": "lookalike.train.losses.matryoshka",
    "Plan": "lookalike.retrieval.plan",
    "Recipe": "lookalike.recipe",
    "Searcher": "lookalike.retrieval.searcher",
    "evaluate": "lookalike.train.evaluate.arrays",
}
__all__ = [
    "Artifact",
    "Client",
    "Config",
    "Encoder",
    "MatryoshkaLoss",
    "NestedCosine",
    "NestedLinear",
    "Plan",
    "Recipe",
    "Searcher",
    "__version__",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562), so that ``import lookalike`` does not import torch or Ray."""
    if name not in _LAZY:
        raise AttributeError(f"module 'lookalike' has no attribute {name!r}; it exports {sorted(__all__)}")
    return getattr(import_module(_LAZY[name]), name)
