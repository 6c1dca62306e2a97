"""The image encoder as a worker, in a file of its own because no other worker needs torch."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from ray import serve

from lookalike.serve.generations.follower import Follows
from lookalike.serve.generations.generation import Generation
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import not_loaded
from lookalike.vision.encoder import Encoder
from lookalike.vision.images import ImageError, decode


class EncoderWorker(Follows):
    """The image encoders of the generations; generations of one model share an encoder."""

    def __init__(self, config: ServeConfig, generations: Sequence[Generation], writer: Any = None) -> None:
        self.writer = writer
        torch.set_num_threads(config.encoder_replicas.num_threads)
        self._models: dict[str, str] = {}
        self._encoders: dict[str, Encoder] = {}
        self._max_pixels = config.limits.max_pixels
        for generation in generations:
            self.add(generation, self.open(generation))

    def open(self, generation: Generation) -> Encoder | None:
        """The encoder of ``generation``, loaded and tried on a blank image; None if it has none."""
        if generation.encoder is None:
            return None
        if (encoder := self._encoders.get(generation.meta.model_fingerprint)) is None:
            encoder = Encoder.load(generation.encoder)
            encoder.encode([Image.new("RGB", (64, 64))])
        return encoder

    def add(self, generation: Generation, opened: Encoder | None) -> None:
        model = generation.meta.model_fingerprint
        if opened is not None:
            self._encoders[model] = opened
        self._models[generation.name] = model

    def drop(self, name: str) -> None:
        """Let go of a generation, and of its encoder unless another generation has the same."""
        model = self._models.pop(name, "")
        if model not in self._models.values():
            self._encoders.pop(model, None)

    async def encode(self, generation: str, images: Sequence[bytes]) -> list[bytes | str]:
        """For each image a vector (float32 bytes, not normalised), or the reason why the image is refused."""
        if generation not in self._models:
            raise not_loaded(generation, self._models)
        model = self._models[generation]
        decoded = await asyncio.gather(*(asyncio.to_thread(self._decode, image) for image in images))
        pictures = [picture for picture in decoded if not isinstance(picture, str)]
        vectors = iter(await self._forward(model, pictures))
        return [picture if isinstance(picture, str) else next(vectors) for picture in decoded]

    def _decode(self, image: bytes) -> Image.Image | str:
        try:
            return decode(image, max_pixels=self._max_pixels)
        except ImageError as error:
            return str(error)

    async def _forward(self, model: str, pictures: Sequence[Image.Image]) -> list[bytes]:
        vectors = await asyncio.to_thread(self._encoders[model].encode, pictures)
        return [vector.astype("<f4").tobytes() for vector in vectors]


class BatchingEncoder(EncoderWorker):
    """The encoder as a deployment: images of concurrent requests share forward passes. Works only in Serve."""

    def __init__(self, config: ServeConfig, generations: Sequence[Generation], writer: Any = None) -> None:
        super().__init__(config, generations, writer)
        batching: Any = self._join  # the type does not know what @serve.batch adds
        batching.set_max_batch_size(config.encoder_replicas.max_batch)
        batching.set_batch_wait_timeout_s(config.encoder_replicas.batch_wait_ms / 1000)

    async def _forward(self, model: str, pictures: Sequence[Image.Image]) -> list[bytes]:
        return list(await asyncio.gather(*(self._join((model, picture)) for picture in pictures)))

    @serve.batch
    async def _join(self, pictures: list[tuple[str, Image.Image]]) -> list[bytes]:
        vectors: dict[int, bytes] = {}
        for model in {model for model, _ in pictures}:
            places = [place for place, (own, _) in enumerate(pictures) if own == model]
            vectors |= zip(places, await super()._forward(model, [pictures[place][1] for place in places]), strict=True)
        return [vectors[place] for place in range(len(pictures))]
