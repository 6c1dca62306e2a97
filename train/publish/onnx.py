"""An encoder as one ONNX file, and the check that both compute the same."""

import copy
import warnings
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lookalike.errors import LookalikeError
from lookalike.vision.encoder import EmbeddingModel, EncoderConfig
from lookalike.vision.transforms import normalize_pixels

INPUT, OUTPUT = "images", "embedding"
MAX_COSINE_LOSS = 1e-4
"""Largest 1 - cosine between the vectors of the two runtimes, at the worst nested dim."""
MAX_RELATIVE_DIFFERENCE = 1e-3
"""Largest difference of a value, as a share of the largest value."""


def require_packages() -> None:
    """Raise ``ModuleNotFoundError``, which leads to the extra's name, if a package of exporter or check is missing."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        import_module(needed)


def write_onnx(path: str, model: EmbeddingModel, size: int) -> None:
    """Write ``model`` to a local file: images float32 [n, 3, size, size] -> embedding float32 [n, dim], any n."""
    frozen = copy.deepcopy(model).cpu().float().eval()
    example = torch.zeros(2, 3, size, size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about torch
        frozen(example)  # fills caches that a model computes once (EfficientFormer's attention biases)
        torch.onnx.export(
            frozen,
            (example,),
            path,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: torch.export.Dim("n")}},
        )


def check_parity(
    path: str, model: EmbeddingModel, config: EncoderConfig, pixels: npt.NDArray[np.uint8]
) -> dict[str, Any]:
    """Compare the file with the model on real pictures, uint8 [n, 3, size, size], one by one and as one batch.

    Returns ``pictures``, ``max_abs_difference``, ``max_abs_value`` and ``min_cosine`` over all nested dims. Raises
    ``LookalikeError`` with these figures if they are out of tolerance.
    """
    session = import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    images = normalize_pixels(torch.from_numpy(pixels), config.transform)
    with torch.inference_mode():
        expected = copy.deepcopy(model).cpu().float().eval()(images).numpy()
    single = [session.run([OUTPUT], {INPUT: image[None].numpy()})[0] for image in images]
    actual = np.stack([np.concatenate(single), session.run([OUTPUT], {INPUT: images.numpy()})[0]])
    cosines = [_cosines(actual[..., :dim], expected[:, :dim]).min() for dim in config.dims]
    figures = {
        "pictures": len(pixels),
        "max_abs_difference": float(np.abs(actual - expected).max()),
        "max_abs_value": float(np.abs(expected).max()),
        "min_cosine": float(min(cosines)),
    }
    relative = figures["max_abs_difference"] / max(figures["max_abs_value"], 1e-12)
    if not (relative <= MAX_RELATIVE_DIFFERENCE and figures["min_cosine"] >= 1 - MAX_COSINE_LOSS):
        raise LookalikeError(
            f"the ONNX file does not compute what the encoder computes: {figures}; allowed are "
            f"{MAX_RELATIVE_DIFFERENCE} of the largest value and a cosine of {1 - MAX_COSINE_LOSS}; "
            "nothing was exported"
        )
    return figures


def _cosines(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    result: npt.NDArray[np.float64] = (left * right).sum(axis=-1) / np.maximum(norms, 1e-30)
    return result
