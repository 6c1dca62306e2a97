"""Batches decoded by actors: the bytes of the trainer's own, whatever dies."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lookalike.errors import ArtifactError, LookalikeError
from lookalike.train.feed import decoding
from lookalike.train.feed.decoding import actor_batches, to_arrays, to_tensors
from lookalike.train.feed.loader import BatchDataset
from lookalike.train.feed.mixture import Mixture
from lookalike.vision.transforms import AugmentConfig, build_augmentation
from tests.train.feed.test_loader import SIZE, assert_same, files, make_batches, replaced

pytestmark = pytest.mark.ray
Augment = Callable[[Image.Image], Image.Image]


def test_arrays_and_tensors_are_one_another(tmp_path: Path) -> None:
    (batch, *_) = make_batches(files(tmp_path))
    arrays = to_arrays(batch)
    assert arrays["images"].flags.c_contiguous  # Ray hands it over without a copy
    assert arrays["images"].nbytes == 8 * 3 * 32 * 32
    assert_same([to_tensors(arrays)], [batch])


@pytest.mark.slow
@pytest.mark.parametrize(("actors", "start"), [(1, 0), (2, 3)])
def test_actors_build_the_same_batches_in_order(ray_session: None, tmp_path: Path, actors: int, start: int) -> None:
    made = files(tmp_path, repeat=1.5)
    found = list(actor_batches(make_batches(made, start, views=2), actors, num_cpus=0.5))
    assert_same(found, list(make_batches(made, start, views=2)))


def with_augment(dataset: BatchDataset, change: Callable[[Augment], Augment]) -> BatchDataset:
    dataset.builder.augment = change(build_augmentation(SIZE, AugmentConfig()))
    return dataset


@pytest.mark.slow
def test_a_batch_whose_actor_died_is_built_again(ray_session: None, tmp_path: Path) -> None:
    made, marker = files(tmp_path), str(tmp_path / "died")

    def dies_once(plain: Augment) -> Augment:
        calls = []

        def augment(image: Image.Image) -> Image.Image:
            calls.append(1)
            if len(calls) == 27 and not os.path.exists(marker):  # in the middle of the fourth batch
                Path(marker).touch()
                os._exit(1)
            return plain(image)

        return augment

    found = list(actor_batches(with_augment(make_batches(made), dies_once), 1, num_cpus=0.5))
    assert os.path.exists(marker)
    assert_same(found, list(make_batches(made)))


@pytest.mark.slow
def test_no_more_batches_are_built_than_the_trainer_takes(ray_session: None, tmp_path: Path) -> None:
    made, seen = files(tmp_path), str(tmp_path / "seen")

    def counted(plain: Augment) -> Augment:
        def augment(image: Image.Image) -> Image.Image:
            with open(seen, "a") as file:
                file.write("x")
            return plain(image)

        return augment

    batches = actor_batches(with_augment(make_batches(made), counted), 1, num_cpus=0.5)
    next(batches)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert len(Path(seen).read_text()) <= 8 * decoding.AHEAD
        time.sleep(0.1)
    assert len(Path(seen).read_text()) == 8 * decoding.AHEAD
    batches.close()


@pytest.mark.slow
def test_an_error_in_an_actor_arrives_as_it_is(ray_session: None, tmp_path: Path) -> None:
    made = replaced(tmp_path, category=3)
    with pytest.raises(ArtifactError, match=r"^[^\n]*row group 1: column 'category' holds 3[^\n]*$"):
        list(actor_batches(make_batches(made, mixture=Mixture(5, {"catalogue": 1})), 1, num_cpus=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [{"num_cpus": 64.0}, {"resource": "decoder"}])
def test_actors_that_find_no_place_are_explained(ray_session: None, tmp_path: Path, wanted: dict[str, Any]) -> None:
    with pytest.raises(LookalikeError, match=r"no batch from 1 loader.actors of .* within 1 s; .* add nodes, or lower"):
        next(actor_batches(make_batches(files(tmp_path)), 1, limit_s=1.0, **wanted))
