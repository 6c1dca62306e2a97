"""The image encoder as a worker. Apart from the others, because it alone needs torch."""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from ray import serve

from lookalike.serve.config import ServeConfig
from lookalike.vision.encoder import Encoder
from lookalike.vision.images import ImageError, decode


class EncoderWorker:
    """The image encoder."""

    def __init__(self, uri: str, config: ServeConfig) -> None:
        torch.set_num_threads(config.encoder_replicas.num_threads)
        self._encoder = Encoder.load(uri)
        self._max_pixels = config.limits.max_pixels

    async def encode(self, images: Sequence[bytes]) -> list[bytes | str]:
        """A vector (float32 bytes, not normalised) for each image, or the reason why it is refused."""
        decoded = await asyncio.gather(*(asyncio.to_thread(self._decode, image) for image in images))
        pictures = [picture for picture in decoded if not isinstance(picture, str)]
        vectors = iter(await self._forward(pictures))
        return [picture if isinstance(picture, str) else next(vectors) for picture in decoded]

    def _decode(self, image: bytes) -> Image.Image | str:
        try:
            return decode(image, max_pixels=self._max_pixels)
        except ImageError as error:
            return str(error)

    async def _forward(self, pictures: Sequence[Image.Image]) -> list[bytes]:
        vectors = await asyncio.to_thread(self._encoder.encode, pictures)
        return [vector.astype("<f4").tobytes() for vector in vectors]


class BatchingEncoder(EncoderWorker):
    """The encoder as a deployment: the images of concurrent requests share forward passes. Works in Serve alone."""

    def __init__(self, uri: str, config: ServeConfig) -> None:
        super().__init__(uri, config)
        batching: Any = self._join  # what @serve.batch adds to a method is not in its type
        batching.set_max_batch_size(config.encoder_replicas.max_batch)
        batching.set_batch_wait_timeout_s(config.encoder_replicas.batch_wait_ms / 1000)

    async def _forward(self, pictures: Sequence[Image.Image]) -> list[bytes]:
        return list(await asyncio.gather(*(self._join(picture) for picture in pictures)))

    @serve.batch
    async def _join(self, pictures: list[Image.Image]) -> list[bytes]:
        return await super()._forward(pictures)
