"""``lookalike encoder``: a backbone as it is (packaged, from a file, random), published as an encoder."""

import torch
from pydantic import Field

from lookalike.seeds import derive_seed
from lookalike.stages import Stage, StageConfig, StageRun
from lookalike.vision.backbones import create_backbone, is_weight_file
from lookalike.vision.encoder import EmbeddingModel, EncoderConfig, save_encoder
from lookalike.vision.transforms import TransformConfig


class ExportConfig(StageConfig):
    """A backbone and its image transform."""

    backbone: str = Field(min_length=1)
    """timm architecture."""
    weights: str = "random"
    """``random``, a name of the weights registry (``efficientnet-lite0``), ``timm[:tag]`` or a file's path."""
    transform: TransformConfig = TransformConfig()
    """Evaluation transform; training derives its own from it."""


def export(run: StageRun[ExportConfig]) -> None:
    """Write the encoder of the configured backbone."""
    config = run.config
    torch.manual_seed(derive_seed(config.seed, "random weights"))
    backbone = create_backbone(config.backbone, config.weights)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    encoder = EncoderConfig(backbone=config.backbone, num_features=width, dims=(width,), transform=config.transform)
    run.out.stats.update(parameters=sum(p.numel() for p in backbone.parameters()), dim=width)
    card = (f"# {run.out.name}\n\n`{config.backbone}` with weights `{config.weights}`, not trained further; "
            f"{width}-d features at {config.transform.size} px.\n")  # fmt: skip
    save_encoder(run.out, EmbeddingModel(backbone, width, None), encoder, card)


def _weight_files(config: ExportConfig) -> list[str]:
    return [config.weights] if is_weight_file(config.weights) else []


STAGE = Stage(name="encoder", kind="encoder", config=ExportConfig, run=export, sources=_weight_files)
