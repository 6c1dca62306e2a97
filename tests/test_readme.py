"""The Python in README.md runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_section_in_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("sofa", "chair", "lamp"):
        Image.fromarray(random.integers(0, 256, (90, 120, 3), np.uint8)).save(f"{name}.png")
    section = README.read_text(encoding="utf-8").partition("\n## In Python\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("['lamp', ")
    import torch

    loss = names["loss"](names["backbone"](torch.zeros(2, 3, 32, 32)), torch.tensor([1, 2]))  # type: ignore[operator]
    assert loss.isfinite()
