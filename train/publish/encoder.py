"""``lookalike encoder``: publish an untrained backbone (packaged, from a file, random) or an exported encoder."""

import torch
from pydantic import Field

from lookalike import hub, storage
from lookalike.artifacts import Artifact
from lookalike.config import Config, parse_config
from lookalike.errors import UsageError
from lookalike.seeds import derive_seed
from lookalike.stages import Stage, StageConfig, StageRun
from lookalike.vision.backbones import Pooling, create_backbone, require_architecture
from lookalike.vision.encoder import (
    CARD_FILE,
    EmbeddingModel,
    EncoderConfig,
    read_encoder,
    save_encoder,
    wrap_backbone,
)
from lookalike.vision.transforms import Channels, Deviations, Fit, Interpolation, Share, Side, TransformConfig
from lookalike.vision.weights import SUFFIXES, config_beside, is_weight_file, own_transform


class TransformSettings(Config):
    """The evaluation transform; what is not set here is as the weights were trained (``vision.weights``)."""

    size: Side | None = None
    """Side of the square input in pixels."""
    fit: Fit | None = None
    """``pad`` keeps the whole picture on white (catalogue; also when nothing is set); ``crop`` cuts the centre,
    as most weights were trained (photographs)."""
    crop_fraction: Share | None = None
    """Share of the short side that ``crop`` keeps."""
    interpolation: Interpolation | None = None
    """How pictures are scaled."""
    mean: Channels | None = None
    """Channel means in the backbone's training, of values in [0, 1]."""
    std: Deviations | None = None
    """Channel standard deviations in the backbone's training."""

    @property
    def given(self) -> dict[str, object]:
        """Field -> value of those that are set."""
        return self.model_dump(exclude_none=True)


class PublishConfig(StageConfig):
    """A backbone and its image transform."""

    backbone: str = Field(min_length=1)
    """timm architecture."""
    weights: str = "random"
    """``random``, a name of the weights registry (``efficientnet-lite0``), ``timm[:tag]``, a file's path; or an
    exported encoder, which brings projection, dims and transform: its folder, or ``hf://owner/name[@revision]``."""
    pooling: Pooling = "native"
    """``gem``: the generalised mean instead of a convolutional network's average."""
    transform: TransformSettings = TransformSettings()
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
    return wrap_backbone(config.backbone, config.weights, resolve_transform(config), config.pooling)


def resolve_transform(config: PublishConfig) -> TransformConfig:
    """The settings' transform, filled up with the weights' own; ``UsageError`` for an unknown backbone."""
    require_architecture(config.backbone)
    own = own_transform(config.backbone, config.weights).model_dump()
    return parse_config(TransformConfig, {**own, **config.transform.given}, "transform")


def is_exported(weights: str) -> bool:
    """Whether ``weights`` names an exported encoder: a folder or a repository, not a file."""
    return hub.is_hub(weights) or (is_weight_file(weights) and not weights.endswith(SUFFIXES))


def _import(config: PublishConfig) -> tuple[EncoderConfig, EmbeddingModel, str]:
    artifact = Artifact.open(hub.fetch(config.weights), "encoder")
    encoder, model = read_encoder(artifact)
    given = config.model_dump(include=config.model_fields_set)
    for name in ("backbone", "pooling", "transform"):
        stored = encoder.model_dump()[name]
        if name == "transform":
            given[name] = {**stored, **config.transform.given}
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
    size = resolve_transform(config).size
    with torch.device("meta"):
        backbone = create_backbone(config.backbone, "random", size=size, pooling=config.pooling)
    numbers = sum(parameter.numel() for parameter in backbone.parameters())
    return [f"{numbers:,} parameters, {backbone.num_features}-d features at {size} px"]


def _sources(config: PublishConfig) -> list[str]:
    if not is_weight_file(config.weights):
        return []
    beside = [] if is_exported(config.weights) else [config_beside(config.weights)]
    return [hub.fetch(config.weights), *(uri for uri in beside if storage.exists(uri))]


STAGE = Stage(
    name="encoder", kind="encoder", version=2, config=PublishConfig, run=publish, sources=_sources, preview=preview
)
