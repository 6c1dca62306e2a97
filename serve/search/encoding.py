"""The image encoder as a worker, in a file of its own because no other worker needs torch.

Pictures are decoded in processes (``decoding``) and encoded in a thread of this worker, so nothing else waits for them.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from ray import serve

from lookalike.serve.generations.follower import Follows
from lookalike.serve.generations.generation import Generation
from lookalike.serve.search.decoding import Decoders
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.errors import not_loaded
from lookalike.vision.decoder import Order
from lookalike.vision.encoder import Encoder
from lookalike.vision.images import ImageError

FORWARD_BATCH = 32
"""Pictures of a request in one forward pass; their pixels are then released."""
Pixels = npt.NDArray[np.uint8]


class EncoderWorker(Follows):
    """The image encoders of the generations; generations of one model share an encoder."""

    def __init__(self, config: ServeConfig, generations: Sequence[Generation], writer: Any = None) -> None:
        self.writer = writer
        torch.set_num_threads(config.encoder_replicas.num_threads)
        self._models: dict[str, str] = {}
        self._encoders: dict[str, Encoder] = {}
        limits = config.limits
        self._order = Order(limits.max_pixels, limits.max_scans, limits.max_decode_s)
        self._decoders = Decoders(config.encoder_replicas.num_decoders)
        self._thread = ThreadPoolExecutor(1, "encoder")
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

    async def encode(self, generation: str, images: Sequence[bytes], tenant: str = "") -> list[bytes | str]:
        """For each image a vector (float32 bytes, not normalised).

        The last may be the reason why an image is refused; then those after it are not decoded.
        """
        if generation not in self._models:
            raise not_loaded(generation, self._models)
        self._decoders.admit(tenant)
        model = self._models[generation]
        order = self._order._replace(square=self._encoders[model].config.transform.square)
        vectors, pixels = list[bytes | str](), list[Pixels]()
        async with aclosing(self._decoders.decode_all(images, order, tenant)) as replies:
            try:
                async for reply in replies:
                    assert reply.pixels is not None
                    pixels.append(reply.pixels)
                    if len(pixels) == FORWARD_BATCH or len(vectors) + len(pixels) == len(images):
                        vectors += await self._forward(model, pixels)
                        pixels.clear()
            except ImageError as error:
                return [*vectors, *(b"" for _ in pixels), str(error)]
        return vectors

    def warm_up(self) -> None:
        """Start the decoders, for a service; whoever may never send an image does without."""
        self._decoders.start()

    def close(self) -> None:
        """End the decoders."""
        self._decoders.close()
        self._thread.shutdown()

    async def _forward(self, model: str, pixels: Sequence[Pixels]) -> list[bytes]:
        encode = self._encoders[model].encode_pixels
        vectors = await asyncio.get_running_loop().run_in_executor(self._thread, encode, np.stack(pixels))
        return [vector.astype("<f4").tobytes() for vector in vectors]


class BatchingEncoder(EncoderWorker):
    """The encoder as a deployment: images of concurrent requests share forward passes. Works only in Serve."""

    def __init__(self, config: ServeConfig, generations: Sequence[Generation], writer: Any = None) -> None:
        super().__init__(config, generations, writer)
        batching: Any = self._join  # the type does not know what @serve.batch adds
        batching.set_max_batch_size(config.encoder_replicas.max_batch)
        batching.set_batch_wait_timeout_s(config.encoder_replicas.batch_wait_ms / 1000)
        self.warm_up()

    async def _forward(self, model: str, pixels: Sequence[Pixels]) -> list[bytes]:
        return list(await asyncio.gather(*(self._join((model, picture)) for picture in pixels)))

    @serve.batch
    async def _join(self, pictures: list[tuple[str, Pixels]]) -> list[bytes]:
        vectors: dict[int, bytes] = {}
        for model in {model for model, _ in pictures}:
            places = [place for place, (own, _) in enumerate(pictures) if own == model]
            vectors |= zip(places, await super()._forward(model, [pictures[place][1] for place in places]), strict=True)
        return [vectors[place] for place in range(len(pictures))]
