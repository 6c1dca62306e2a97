"""The state of a training run: everything that changes from step to step, and so everything a checkpoint holds."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lookalike.errors import LookalikeError
from lookalike.train.run.checkpoints import Checkpoint, random_state, restore, restore_random_state
from lookalike.train.run.curves import Curve, NonFiniteLossError
from lookalike.train.run.optimizer import build_optimizer, build_schedule, freeze
from lookalike.train.run.settings import TrainConfig
from lookalike.train.run.sharding import whole_state
from lookalike.train.tasks import MultiTaskModel
from lookalike.vision.tuning import averaged

MAX_SKIPPED = 40
"""Steps in a row that may overflow float16: from its first value of 65,536 the loss scale is by then below 1e-7."""
REMEDY = "set compute.precision=bfloat16 or float32, or lower optimizer.lr"


def build_scaler(device: str, *, enabled: bool) -> torch.amp.GradScaler:  # type: ignore[name-defined]
    """float16's loss scale. Workers skip a step together, because a shard of proxies may overflow on one alone."""
    if dist.is_initialized():
        return ShardedGradScaler(device, enabled=enabled, process_group=dist.group.WORLD)
    return torch.amp.GradScaler(device, enabled=enabled)  # type: ignore[attr-defined]


@dataclass
class Training:
    """Model, optimizer, schedule, loss scale, averaged weights, loss curve, and the step they have reached.

    The step alone gives the place in the data: a stream's batches follow from seed, stream and step, and there are
    ``workers.num`` streams whatever the number of workers.
    """

    model: MultiTaskModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    average: Any
    """timm's moving average of the encoder, or None."""
    curve: Curve
    step: int = 0
    skipped: int = 0
    """Steps that changed nothing, because a gradient overflowed float16."""
    skipped_in_a_row: int = 0
    worlds: list[list[int]] = field(default_factory=list)
    """[step, workers]: number of workers that trained from that step on; one entry per change."""

    @classmethod
    def begin(cls, model: MultiTaskModel, config: TrainConfig, total_steps: int) -> "Training":
        """The state before the first step, with the backbone frozen as the settings say."""
        freeze(model, config.backbone)
        optimizer = build_optimizer(model, config.optimizer)
        schedule = build_schedule(optimizer, config.schedule, config.epochs, total_steps)
        device = next(model.parameters()).device.type
        scaler = build_scaler(device, enabled=config.compute.precision == "float16")
        average = None if config.optimizer.ema_decay is None else averaged(model.encoder, config.optimizer.ema_decay)
        return cls(model, optimizer, schedule, scaler, average, Curve(total_steps))

    @property
    def lr(self) -> float:
        """Learning rate of the first group (the backbone's, if it trains) in the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def update(self, step: int) -> None:
        """Apply the gradients; ``step`` counts from 1. A step that overflows float16 changes only the loss scale.

        Raises ``NonFiniteLossError`` after ``MAX_SKIPPED`` such steps in a row.
        """
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step = step
        if self.scaler.get_scale() < scale:
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == MAX_SKIPPED:
                raise NonFiniteLossError(
                    f"float16 overflowed in each of the {MAX_SKIPPED} steps up to {step}, down to a loss scale of "
                    f"{self.scaler.get_scale():g}: the gradient is no number at any scale; {REMEDY}"
                )
            return
        self.skipped_in_a_row = 0
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model.encoder, step)

    def require_progress(self) -> None:
        """Raise ``LookalikeError`` if the run must not be published, because a task learned nothing, or because float16
        overflowed in most steps."""
        idle = [name for name in self.model.tasks if f"loss_{name}" not in self.curve.trained]
        if idle and self.curve.trained:
            raise LookalikeError(
                f"task {idle[0]!r} learned nothing: its loss was 0 in all {self.step} steps, as no row had a label, "
                "or no forward pass held two rows of one label; read other shards, make row groups hold classes whole "
                "(shards.together, loader.balance), use larger batches, or drop the task"
            )
        if self.skipped > self.step / 2:
            raise NonFiniteLossError(
                f"float16 overflowed in {self.skipped} of {self.step} steps, which changed nothing; {REMEDY}"
            )

    def join(self, world: int) -> None:
        if not self.worlds or self.worlds[-1][1] != world:
            self.worlds.append([self.step, world])

    def state(self, rank: int, pace: dict[str, float]) -> dict[str, Any]:
        """A worker's part of a checkpoint; every worker must call it. ``pace`` is kept for the final report."""
        weights, moments = whole_state(self.model, self.optimizer)
        own = {"random": random_state()}
        if rank:
            return own
        average = None if self.average is None else self.average.module.state_dict()
        return {
            **own,
            "step": self.step,
            "model": weights,
            "optimizer": moments,
            "average": average,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": (self.skipped, self.skipped_in_a_row),
            "curve": self.curve.state(),
            "worlds": self.worlds,
            "pace": pace,
        }

    def resume(self, checkpoint: Checkpoint, rank: int, world: int) -> None:
        """Continue from a checkpoint, which another number of workers may have written."""
        state = checkpoint.read()
        restore(self.model, self.optimizer, state, checkpoint.uri)
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self.curve.load(state["curve"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.step, self.worlds = state["step"], state["worlds"]
        if world == checkpoint.world:  # otherwise everything drawn from now on derives from the seed alone
            restore_random_state((state if rank == 0 else checkpoint.read(rank))["random"])


def export_weights(state: dict[str, Any], encoder: nn.Module) -> None:
    """Fill an encoder from a finished run's state, with the averaged weights if there are any."""
    own = {
        name.removeprefix("encoder."): value for name, value in state["model"].items() if name.startswith("encoder.")
    }
    encoder.load_state_dict(state["average"] or own)
