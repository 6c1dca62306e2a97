"""The driver of a training stage: resolve the model, run Ray Train over the workers, publish an encoder.

Ray Train's run folder lies in the draft, so a stage that is run again after a crash of the driver continues from the
last checkpoint; worker crashes are retried within the run.
"""

import importlib.util
import os
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.errors import LookalikeError, UsageError
from lookalike.progress import follow_remote
from lookalike.registry import nearest
from lookalike.stages import Input, StageRun
from lookalike.telemetry import get_logger
from lookalike.train.loader import list_units, require_units
from lookalike.train.loop import build_multitask_model, read_state, train_worker
from lookalike.train.memory import require_memory
from lookalike.train.settings import LoopConfig, TrainConfig
from lookalike.vision.encoder import EmbeddingModel, EncoderConfig, read_config, save_encoder

log = get_logger(__name__)
INPUTS = {"shards": Input("shards"), "encoder": Input("encoder")}
LABEL_FIELDS = ("labels", "category", "group")


def run_training(run: StageRun[TrainConfig]) -> None:
    """Train as configured and fill the draft with the encoder."""
    shards, source = run.one("shards"), run.one("encoder")
    config = resolve(run.config, shards, source)
    with follow_remote(run.out.name, config.total_steps, unit="step") as progress:
        result = fit(config, run.out.work("train"), progress)
    if result.checkpoint is None:
        raise LookalikeError(f"training {run.out.name!r} ended without a checkpoint: {result.error}")
    with result.checkpoint.as_directory() as folder:
        state = read_state(folder)
    model = build_multitask_model(config, initialise=False)
    model.load_state_dict(state["model"])
    assert isinstance(model.encoder, EmbeddingModel)
    history = _history(result)
    write_curves(storage.join(run.out.root, "tensorboard", f"{run.out.name}-{run.out.fingerprint}"), history)
    run.out.write_json("history.json", history)
    run.out.stats.update(steps=config.total_steps, images=config.total_steps * run.config.batch_size,
                         dims=list(config.encoder.dims), **_last(history))  # fmt: skip
    save_encoder(run.out, model.encoder, config.encoder, model_card(run.out.name, config, history))


def resolve(train: TrainConfig, shards: Artifact, source: Artifact) -> LoopConfig:
    """Everything a worker needs, checked: datasets, classes, nested dims; wrong names raise ``UsageError``."""
    classes = shards.read_json("classes.json")
    files: dict[str, list[str]] = {}
    for name in train.mix:
        files[name] = shards.files(f"{name}/", ".parquet")
        if files[name]:
            require_units(name, list_units(files[name]), train.num_workers)
        else:
            valid = sorted({uri.rsplit("/", 2)[-2] for uri in shards.files(suffix=".parquet")})
            raise UsageError(f"mix names dataset {name!r}{nearest(name, valid)}; {shards.uri} has {', '.join(valid)}")
    num_classes = {field: len(classes[field]) for field in LABEL_FIELDS}
    for name, task in train.tasks.items():
        if num_classes.get(task.field, 2) < 2:  # fields that are no classes have no count
            raise UsageError(f"task {name!r} reads {task.field!r}, of which the shards have {num_classes[task.field]} "
                             "classes; two are needed")  # fmt: skip
    base = read_config(source)
    dims = train.resolve_dims(base.num_features)
    require_memory(train.tasks, dims, num_classes, rows=train.batch_size // train.num_workers,
                   world=train.num_workers, slots=2 if train.optimizer == "adamw" else 1,
                   limit_gib=train.task_memory_gib)  # fmt: skip
    encoder = EncoderConfig(backbone=base.backbone, num_features=base.num_features, dims=dims,
                            projection=train.embedding_dim is not None, transform=base.transform)  # fmt: skip
    first = next(iter(train.mix))
    return LoopConfig(train=train, encoder=encoder, source_encoder=source.uri, files=files, num_classes=num_classes,
                      rows_per_epoch=expected_rows(files[first], train.resample))  # fmt: skip


def expected_rows(uris: list[str], resample: bool) -> int:
    """Rows of one epoch: all rows, or the sum of their repeat factors."""
    total = 0.0
    for uri in uris:
        filesystem, path = storage.arrow_filesystem(uri)
        if resample:
            total += pc.sum(pq.read_table(path, columns=["repeat"], filesystem=filesystem)["repeat"]).as_py() or 0.0
        else:
            total += pq.read_metadata(path, filesystem=filesystem).num_rows
    return max(1, round(total))


def fit(config: LoopConfig, folder: str, progress: Any) -> Result:
    """Run the worker group to the end; a run found in ``folder`` continues from its last checkpoint."""
    train = config.train
    storage.make_directory(folder)
    filesystem, path = storage.arrow_filesystem(folder)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"loop": config.model_dump(mode="json"), "progress": progress},
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(num_workers=train.num_workers, use_gpu=train.use_gpu,
                                     resources_per_worker={"CPU": train.cpus_per_worker,
                                                           **({"GPU": 1} if train.use_gpu else {})}),
        run_config=RunConfig(name="run", storage_path=os.path.abspath(path) if storage.is_local(folder) else path,
                             storage_filesystem=filesystem,
                             failure_config=FailureConfig(max_failures=train.max_failures),
                             checkpoint_config=CheckpointConfig(num_to_keep=2)),
    )  # fmt: skip
    try:
        return trainer.fit()
    except Exception as error:  # Ray wraps the workers' errors in types of its own
        raise own_error(error) or LookalikeError(f"training failed: {error}") from error


def own_error(error: BaseException) -> LookalikeError | None:
    """The error of ours that made a worker fail, or None when it was something else."""
    for failure in getattr(error, "worker_failures", {}).values():
        for candidate in (failure, getattr(failure, "cause", None), failure.__cause__):
            if isinstance(candidate, LookalikeError):
                return candidate
    return None


def _history(result: Result) -> list[dict[str, float]]:
    frame = result.metrics_dataframe
    if frame is not None:
        keep = [c for c in frame.columns if c in ("step", "loss", "grad_norm", "images_per_s", "data_wait")
                or c.startswith("loss_")]  # fmt: skip
        return [{str(k): float(v) for k, v in row.items()} for row in frame[keep].to_dict("records")]
    kept = result.best_checkpoints or []
    return [{k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))} for _, metrics in kept]


def write_curves(folder: str, history: list[dict[str, float]]) -> None:
    """Write the history for TensorBoard, outside the artifact (event files hold times), where the extra ``tracking``
    is installed and the root is a local disk."""
    if importlib.util.find_spec("tensorboardX") is None or not storage.is_local(folder):
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(storage.local_path(folder)) as writer:
        for row in history:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, int(row["step"]))


def _last(history: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in (history[-1] if history else {}).items() if key != "step"}


def _values(config: LoopConfig, field: str) -> str:
    count = config.num_classes.get(field)
    return f"`{field}`" if count is None else f"{count} classes of `{field}`"


def model_card(name: str, config: LoopConfig, history: list[dict[str, float]]) -> str:
    """A short model card in Markdown."""
    train, encoder = config.train, config.encoder
    tasks = "\n".join(f"- `{task}`: {settings.kind} over {_values(config, settings.field)}, {settings.nesting}, "
                      f"weight {settings.weight}"
                      for task, settings in train.tasks.items())  # fmt: skip
    losses = ", ".join(f"{key} {value:.3f}" for key, value in _last(history).items() if key.startswith("loss"))
    return f"""# {name}

Image encoder: `{encoder.backbone}` at {encoder.transform.size} px, embedding of {encoder.dim} dimensions, nested at
{", ".join(map(str, encoder.dims))}. Vectors come unnormalised; truncate first, then normalise, then compare by cosine.

Trained for {config.total_steps} steps of {train.batch_size} images on {", ".join(train.mix)}, seed {train.seed}:

{tasks}

Last losses: {losses or "none recorded"}. The manifest beside this file names every input.
"""

