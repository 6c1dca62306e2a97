"""Import this before torchvision or timm: it makes ``import torchvision`` work beside any build of torch.

torchvision registers fake kernels for two operators of its compiled extension when it is imported. A CUDA build of that
extension does not load beside a CPU build of torch, and the import fails for want of operators that images never use.
Their schemas are declared here, but only when the extension does not load: two declarations of one operator are an
error as well.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def declare_missing() -> "torch.library.Library | None":
    """Declare the schemas of ``torchvision::nms`` and ``torchvision::qnms`` unless torchvision brings them."""
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
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]  # torchvision loading it again is fine
        except OSError:
            continue
    return hasattr(torch.ops.torchvision, "nms")


DECLARED = declare_missing()
"""Keeps the declarations alive."""
