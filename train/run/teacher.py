"""The teacher of a distillation: a published encoder that embeds the student's own batches, without gradients."""

import torch
from torch import nn
from torch.nn import functional

from lookalike.artifacts import Artifact
from lookalike.vision.encoder import read_encoder
from lookalike.vision.transforms import TransformConfig
from lookalike.vision.tuning import is_convolutional


class Teacher(nn.Module):
    """Embeds the student's transformed images, float [n, 3, S, S], as the teacher does, [n, Dt].

    Both see the same crop and colours. The tensor is normalised again, to the teacher's means and deviations, and
    resized (bilinear, antialiased) to the teacher's size if that differs; an enlarged image has no more detail than the
    student's.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, uri: str, student: TransformConfig) -> None:
        super().__init__()
        config, model = read_encoder(Artifact.open(uri, "encoder"))
        self.size, self.dim = config.transform.size, config.dim
        memory = torch.channels_last if is_convolutional(model.backbone) else torch.contiguous_format
        self.model = model.eval().requires_grad_(False).to(memory_format=memory)  # type: ignore[call-overload]
        scale = torch.tensor(student.std) / torch.tensor(config.transform.std)
        shift = (torch.tensor(student.mean) - torch.tensor(config.transform.mean)) / torch.tensor(config.transform.std)
        self.same = bool((scale == 1).all() and (shift == 0).all())
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.same:
            images = images * self.scale + self.shift
        if images.shape[-1] != self.size:
            images = functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        embedding: torch.Tensor = self.model(images)
        return embedding.float()
