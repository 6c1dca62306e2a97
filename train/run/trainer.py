"""The driver of a training stage: resolve the model, run Ray Train over the workers, publish an encoder.

The run's checkpoints lie in the draft, so a stage that is run again after a crash of the driver continues from the last
checkpoint. Workers that die are restarted within the run; an error that a restart would meet again ends it.
"""

import os
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from lookalike import storage
from lookalike.errors import LookalikeError, UsageError
from lookalike.progress import follow_remote
from lookalike.stages import Input, StageRun
from lookalike.telemetry import fields, get_logger
from lookalike.train.run.checkpoints import last_checkpoint
from lookalike.train.run.loop import train_worker
from lookalike.train.run.rendezvous import torch_config
from lookalike.train.run.resolve import resolve
from lookalike.train.run.settings import LoopConfig, TrainConfig
from lookalike.train.run.state import export_weights
from lookalike.vision.encoder import build_model, save_encoder

log = get_logger(__name__)
INPUTS = {"shards": Input("shards"), "encoder": Input("encoder")}


def run_training(run: StageRun[TrainConfig]) -> None:
    """Train as configured and fill the draft with the encoder."""
    config = resolve(run)
    folder = run.out.work("train")
    with follow_remote(run.out.name, config.total_steps, unit="step") as progress:
        fit(config, folder, progress)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None or checkpoint.step != config.total_steps:
        raise LookalikeError(
            f"training {run.out.name!r} ended at {checkpoint.uri if checkpoint else 'no checkpoint'}, before "
            f"step {config.total_steps}; run it again to continue"
        )
    state = checkpoint.read()
    encoder = build_model(config.encoder)
    export_weights(state, encoder)
    points = state["curve"]["points"]
    run.out.write_json("history.json", points)
    run.out.stats.update(
        steps=config.total_steps,
        images=config.total_steps * run.config.batch_size,
        dims=list(config.encoder.dims),
        workers=state["worlds"],
        **({"skipped_steps": state["skipped"][0]} if state["skipped"][0] else {}),
        **_rounded(points[-1]),
        **_rounded(state["pace"]),
    )
    save_encoder(run.out, encoder, config.encoder, training_card(run.out.name, config, points[-1]))


def fit(config: LoopConfig, folder: str, progress: Any) -> None:
    """Run the worker group to the end, from the last checkpoint in ``folder`` if there is one."""
    train = config.train
    check_resources(train)
    storage.make_directory(folder)
    storage.remove_temporaries(folder)
    filesystem, path = storage.arrow_filesystem(folder)
    workers = train.workers.num if train.workers.min is None else (train.workers.min, train.workers.num)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"loop": config.model_dump(mode="json"), "folder": folder, "progress": progress},
        torch_config=torch_config(use_gpu=train.workers.use_gpu),
        scaling_config=ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]
            use_gpu=train.workers.use_gpu,
            resources_per_worker={"CPU": train.workers.cpus, **({"GPU": 1} if train.workers.use_gpu else {})},
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=os.path.abspath(path) if storage.is_local(folder) else path,
            storage_filesystem=filesystem,
            callbacks=[StopAtOwnErrors(train.workers.num)],  # type: ignore[list-item]
            failure_config=FailureConfig(max_failures=train.workers.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps the workers' errors in types of its own
        raise own_error(error) or LookalikeError(f"training failed: {error}") from error


def check_resources(train: TrainConfig) -> None:
    """Raise ``UsageError`` if Ray has too few CPUs or GPUs: on one machine the run would wait forever.

    On a cluster, which may grow, log a warning.
    """
    workers = train.workers.min or train.workers.num
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, each, setting in (
        ("CPU", train.workers.cpus, "cluster.num_cpus, a smaller workers.num"),
        ("GPU", int(train.workers.use_gpu), "workers.use_gpu=false, or take a machine with GPUs"),
    ):
        needed, present = workers * each, resources.get(name, 0.0)
        if needed <= present:
            continue
        message = f"{workers} workers need {needed} {name}s and Ray has {present:g}; set {setting}, or workers.min"
        if not os.environ.get("RAY_ADDRESS"):
            raise UsageError(message)
        log.warning("waiting %s", fields(reason=message))


LASTING = (TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError, ImportError)
"""Errors of code and input, which a restart would meet again; a lost worker or connection is none of them."""


class StopAtOwnErrors(UserCallback):  # type: ignore[misc]
    """Ends the run at an error that a restart would meet again: a ``LookalikeError`` (wrong input, a loss that is not
    finite), or the same one of ``LASTING`` on all ``num`` workers. When a worker dies the others fail otherwise."""

    def __init__(self, num: int) -> None:
        self._num = num

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train's controller calls this when workers have failed."""
        for failure in worker_exceptions.values():
            if (error := _own(failure)) is not None:
                raise error
        causes = [cause for failure in worker_exceptions.values() if (cause := _find(failure, LASTING)) is not None]
        if len(causes) == self._num and len({(type(cause), str(cause)) for cause in causes}) == 1:
            raise LookalikeError(
                f"training failed on all {self._num} workers: {type(causes[0]).__name__}: {causes[0]}; their logs say "
                "where; a restart would meet it again"
            )


def own_error(error: BaseException) -> LookalikeError | None:
    """The ``LookalikeError`` that ended a run, or None."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None), error]
    return next((own for failure in failures if failure is not None and (own := _own(failure)) is not None), None)


def _own(failure: BaseException) -> LookalikeError | None:
    found = _find(failure, (LookalikeError,))
    return found if isinstance(found, LookalikeError) else None


def _find(failure: BaseException, kinds: tuple[type[Exception], ...]) -> Exception | None:
    """The exception of one of ``kinds`` that Ray has wrapped in ``failure``, or None."""
    for name in ("", "_base_exc", "cause", "__cause__"):
        candidate = getattr(failure, name, None) if name else failure
        if isinstance(candidate, kinds):
            return candidate
    return None


def _rounded(point: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in point.items() if key != "step"}


def _describe_field(config: LoopConfig, field: str) -> str:
    count = config.num_classes.get(field)
    return f"`{field}`" if count is None or field == "teacher" else f"{count} classes of `{field}`"


def training_card(name: str, config: LoopConfig, last: dict[str, float]) -> str:
    """What was trained and how, in Markdown; ``last``: the last point of the loss curve."""
    train, encoder = config.train, config.encoder
    tasks = "\n".join(
        f"- `{task}`: {settings.kind} over {_describe_field(config, settings.field)}, {settings.nesting}, "
        f"weight {settings.weight}"
        for task, settings in train.tasks.items()
    )
    losses = ", ".join(f"{key} {value:.3f}" for key, value in last.items() if key.startswith("loss"))
    return f"""# {name}

Image encoder: `{encoder.backbone}` at {encoder.transform.size} px, embedding of {encoder.dim} dimensions, nested at
{", ".join(map(str, encoder.dims))}. Vectors come unnormalised; truncate first, then normalise, then compare by cosine.

Trained for {config.total_steps} steps of {train.batch_size} images on {", ".join(train.mix)}, seed {train.seed}:

{tasks}

Last losses: {losses or "none recorded"}. The manifest beside this file names every input.
"""
