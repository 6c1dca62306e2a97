"""The driver of training: what it refuses before a run, the teacher, whose errors end a run, and the dry run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from torch.nn import functional

from lookalike.artifacts import Artifact, Draft
from lookalike.errors import LookalikeError, UsageError
from lookalike.stages import execute
from lookalike.train.finetune import STAGE
from lookalike.train.run import trainer
from lookalike.train.run.curves import NonFiniteLossError
from lookalike.train.run.resolve import resolve
from lookalike.train.run.settings import TrainConfig
from lookalike.train.run.teacher import Teacher
from lookalike.train.run.trainer import StopAtOwnErrors, check_resources, own_error
from lookalike.vision.encoder import EncoderConfig, build_model, save_encoder
from lookalike.vision.transforms import TransformConfig
from tests.train.conftest import NUM_CLASSES, TASKS, Bench, publish_encoder, shard_rows, write_shard


def settings(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"tasks": TASKS, "mix": {"catalogue": 1}, "batch_size": 8, **values})


def publish_teacher(root: str, size: int = 48, mean: float = 0.5) -> Artifact:
    torch.manual_seed(5)
    config = EncoderConfig(
        backbone="test_efficientnet",
        num_features=256,
        dims=(6,),
        projection=True,
        transform=TransformConfig(size=size, mean=(mean, 0.5, 0.5), std=(0.5, 0.25, 0.5)),
    )
    draft = Draft(root, "encoder", "teacher", "7" * 20)
    save_encoder(draft, build_model(config), config, "# teacher\n")
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


@pytest.fixture
def distill() -> dict[str, Any]:
    return {**TASKS, "learn": {"kind": "distill", "field": "teacher"}}


def test_a_teacher_is_wanted_by_tasks_that_distil_and_by_no_others(bench: Bench, distill: dict[str, Any]) -> None:
    teacher = publish_teacher(bench.root)
    config = resolve(bench.run(settings(tasks=distill), teacher=teacher))
    assert config.teacher == teacher.uri
    assert config.num_classes["teacher"] == 6
    with pytest.raises(UsageError, match=r"task 'learn' distils and there is no teacher; give the step an input"):
        resolve(bench.run(settings(tasks=distill)))
    with pytest.raises(UsageError, match=r"no task distils; add a task of kind 'distill', or drop the input"):
        resolve(bench.run(settings(), teacher=teacher))
    assert STAGE.inputs["teacher"].optional


def test_a_teacher_sees_the_students_pixels_in_its_own_size_and_normalisation(bench: Bench) -> None:
    artifact = publish_teacher(bench.root, mean=0.4)
    student = TransformConfig(size=32, mean=(0.3, 0.5, 0.2), std=(0.5, 0.5, 0.1))
    teacher = Teacher(artifact.uri, student)
    pixels = torch.rand(3, 3, 32, 32)
    seen = (pixels - torch.tensor(student.mean)[:, None, None]) / torch.tensor(student.std)[:, None, None]
    own = (pixels - torch.tensor([0.4, 0.5, 0.5])[:, None, None]) / torch.tensor([0.5, 0.25, 0.5])[:, None, None]
    resized = functional.interpolate(own, (48, 48), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = teacher.model(resized)
    found = teacher(seen)
    assert found.shape == (3, 6)
    assert not found.requires_grad
    assert not teacher.model.training
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_worker_puts_the_teachers_embeddings_into_the_batch(
    bench: Bench, distill: dict[str, Any], tmp_path: Any
) -> None:
    from lookalike.train.run.loop import Feed, Pace, Place

    teacher = publish_teacher(bench.root)
    train = settings(tasks=distill, workers={"num": 1}, embedding_dim=8)
    config = resolve(bench.run(train, teacher=teacher))
    place, model = Place(config, 0, 1, torch.device("cpu"), str(tmp_path)), bench.begin(config).model
    ((batch, shares, _),) = Feed(place, model, 0, Pace(8)).step()
    assert shares["learn"].tolist() == [1.0, 1.0]
    assert batch["teacher"].shape == (8, 6)
    expected = Teacher(teacher.uri, config.encoder.transform)(batch["images"])
    assert torch.equal(batch["teacher"], expected)


def test_too_few_cpus_or_no_gpu_are_explained_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_resources(settings())
    check_resources(settings(workers={"num": 4, "min": 1}))
    with pytest.raises(
        UsageError, match=r"4 workers need 4 CPUs and Ray has 2; set cluster.num_cpus, a smaller workers.num, or"
    ):
        check_resources(settings(workers={"num": 4}))
    with pytest.raises(
        UsageError, match=r"2 workers need 2 GPUs and Ray has 0; set workers.use_gpu=false, or take a machine"
    ):
        check_resources(settings(workers={"use_gpu": True}))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_resources(settings(workers={"num": 4}))  # a cluster may grow


def test_an_error_of_ours_ends_the_run_and_others_are_tried_again() -> None:
    bad = NonFiniteLossError("the loss is not finite")
    wrapped = SimpleNamespace(_base_exc=bad)
    stop = StopAtOwnErrors(2)
    stop.after_exception(None, {0: RuntimeError("connection reset")})
    with pytest.raises(NonFiniteLossError, match="the loss is not finite"):
        stop.after_exception(None, {0: RuntimeError("connection reset"), 1: wrapped})  # type: ignore[dict-item]

    fault = ValueError("Expected more than 1 value per channel when training")
    stop.after_exception(None, {0: fault, 1: RuntimeError("connection reset")})
    stop.after_exception(None, {0: fault})
    with pytest.raises(LookalikeError, match="failed on all 2 workers: ValueError: Expected more than 1 value"):
        stop.after_exception(None, {0: fault, 1: ValueError(str(fault))})

    class WorkersFailed(Exception):
        worker_failures = {0: RuntimeError("reset"), 1: wrapped}

    class ControllerFailed(Exception):
        controller_failure = bad

    assert own_error(WorkersFailed()) is bad
    assert own_error(ControllerFailed()) is bad
    assert own_error(RuntimeError("x")) is None
    assert own_error(bad) is bad


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_damaged_image_ends_the_run_at_the_first_attempt(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    publish_encoder(root)
    rows = [{**row, "image": b"no picture"} for row in shard_rows("catalogue", 16, seed=0)]
    draft = Draft(root, "shards", "shards", "5" * 20)
    write_shard(f"{draft.uri}/catalogue/part-00000.parquet", rows, 8)
    draft.write_json("classes.json", {name: [str(i) for i in range(n)] for name, n in NUM_CLASSES.items()})
    draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)
    run = Bench(root).run(settings(workers={"num": 1, "max_failures": 3}, initialise={"method": "random"}))
    with pytest.raises(LookalikeError, match="image"):
        execute(STAGE, run.config, run.inputs, root, "tiny")
    (curves,) = (tmp_path / "root" / "tensorboard").iterdir()
    assert len(list(curves.iterdir())) == 1  # each attempt begins a file


def test_a_run_that_ends_early_publishes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(trainer, "fit", lambda *args: None)
    monkeypatch.setattr(trainer, "follow_remote", lambda *args, **kwargs: nullcontext())
    with pytest.raises(LookalikeError, match=r"training 'tiny' ended at no checkpoint, before step 5; run it again"):
        trainer.run_training(bench.run(settings()))
