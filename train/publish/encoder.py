"""``lookalike encoder``: publish an untrained backbone (packaged, from a file, random) or an exported encoder."""

import torch
from pydantic import Field
from torch import nn

from lookalike import hub, storage
from lookalike.artifacts import Artifact
from lookalike.errors import UsageError
from lookalike.seeds import derive_seed
from lookalike.stages import Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger
from lookalike.vision.backbones import Pooling, create_backbone
from lookalike.vision.encoder import CARD_FILE, EmbeddingModel, EncoderConfig, read_encoder, save_encoder
from lookalike.vision.transforms import TransformConfig
from lookalike.vision.weights import SUFFIXES, is_weight_file

log = get_logger(__name__)


class PublishConfig(StageConfig):
    """A backbone and its image transform."""

    backbone: str = Field(min_length=1)
    """timm architecture."""
    weights: str = "random"
    """``random``, a name of the weights registry (``efficientnet-lite0``), ``timm[:tag]``, a file's path; or an
    exported encoder, which brings projection, dims and transform: its folder, or ``hf://owner/name[@revision]``."""
    pooling: Pooling = "native"
    """``gem``: the generalised mean instead of a convolutional network's average."""
    transform: TransformConfig = TransformConfig()
    """Evaluation transform; training derives its own from it."""


def publish(run: StageRun[PublishConfig]) -> None:
    """Write the encoder of the configured backbone, or a copy of an exported one."""
    config = run.config
    if is_exported(config.weights):
        encoder, model, card = _import(config)
    else:
        encoder, model = _build(config)
        card = (
            f"# {run.out.name}\n\n`{config.backbone}` with weights `{config.weights}`, not trained further; "
            f"{encoder.dim}-d features at {encoder.transform.size} px.\n"
        )
    run.out.stats.update(parameters=sum(p.numel() for p in model.backbone.parameters()), dim=encoder.dim)
    save_encoder(run.out, model, encoder, card)


def _build(config: PublishConfig) -> tuple[EncoderConfig, EmbeddingModel]:
    torch.manual_seed(derive_seed(config.seed, "random weights"))
    backbone = create_backbone(config.backbone, config.weights, size=config.transform.size, pooling=config.pooling)
    if config.weights == "timm" or config.weights.startswith("timm:"):
        _compare_transform(backbone, config)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    encoder = EncoderConfig(
        backbone=config.backbone, num_features=width, dims=(width,), pooling=config.pooling, transform=config.transform
    )
    return encoder, EmbeddingModel(backbone, width, None)


def _compare_transform(backbone: nn.Module, config: PublishConfig) -> None:
    """Warn if images would be normalised differently from the training of timm's weights."""
    trained: dict[str, tuple[float, ...]] = backbone.pretrained_cfg  # type: ignore[assignment]
    for name, ours in (("mean", config.transform.mean), ("std", config.transform.std)):
        if max(abs(a - b) for a, b in zip(ours, trained[name], strict=True)) > 1e-3:
            log.warning(
                "transform differs %s",
                fields(setting=f"transform.{name}", given=list(ours), weights_were_trained_with=list(trained[name])),
            )


def is_exported(weights: str) -> bool:
    """Whether ``weights`` names an exported encoder: a folder or a repository, not a file."""
    return hub.is_hub(weights) or (is_weight_file(weights) and not weights.endswith(SUFFIXES))


def _import(config: PublishConfig) -> tuple[EncoderConfig, EmbeddingModel, str]:
    artifact = Artifact.open(hub.fetch(config.weights), "encoder")
    encoder, model = read_encoder(artifact)
    given = config.model_dump(include=config.model_fields_set)
    for name in ("backbone", "pooling", "transform"):
        stored = encoder.model_dump()[name]
        if name in given and given[name] != stored:
            raise UsageError(
                f"the encoder at {config.weights} has {name}={stored}, not {given[name]}; give its own"
                + ("" if name == "backbone" else f" {name} or none")
            )
    card = storage.read_bytes(artifact.path(CARD_FILE)).decode()
    origin = f"Imported from `{config.weights}`, fingerprint `{artifact.manifest.fingerprint}`."
    return encoder, model, f"{card.rstrip()}\n\n{origin}\n"


def preview(run: StageRun[PublishConfig]) -> list[str]:
    """One line about the encoder; raises ``UsageError`` for an unknown backbone or a size it cannot take."""
    config = run.config
    if is_exported(config.weights):
        return []
    with torch.device("meta"):
        backbone = create_backbone(config.backbone, "random", size=config.transform.size, pooling=config.pooling)
    numbers = sum(parameter.numel() for parameter in backbone.parameters())
    return [f"{numbers:,} parameters, {backbone.num_features}-d features at {config.transform.size} px"]


def _sources(config: PublishConfig) -> list[str]:
    return [hub.fetch(config.weights)] if is_weight_file(config.weights) else []


STAGE = Stage(name="encoder", kind="encoder", config=PublishConfig, run=publish, sources=_sources, preview=preview)
