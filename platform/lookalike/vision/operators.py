"""Import this before torchvision or timm: it makes ``import torchvision`` work beside any build of torch.

On import, torchvision registers fake kernels for two operators of its compiled extension. A CUDA build of the extension
does not load beside a CPU build of torch, and the import then fails because these operators, which images never use,
are missing. So their schemas are declared here, but only if the extension does not load, because declaring an operator
twice is an error too.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def declare_missing() -> "torch.library.Library | None":
    """Declare the schemas of ``torchvision::nms`` and ``torchvision::qnms`` unless torchvision's extension loads."""
    if _load_extension():
        return None
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # type: ignore[no-any-return]


def _load_extension() -> bool:
    spec = find_spec("torchvision")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    for file in sorted(folder.glob("_C*.so")):
        try:
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]  # torchvision may load it again
        except OSError:
            continue
    return hasattr(torch.ops.torchvision, "nms")


DECLARED = declare_missing()
"""Keeps the declarations alive."""
