"""The state of a training run: everything that changes from step to step, and so everything a checkpoint holds."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lookalike.train.run.checkpoints import Checkpoint, random_state, restore, restore_random_state
from lookalike.train.run.curves import Curve
from lookalike.train.run.optimizer import build_optimizer, build_schedule, freeze
from lookalike.train.run.settings import TrainConfig
from lookalike.train.run.sharding import whole_state
from lookalike.train.tasks import MultiTaskModel
from lookalike.vision.tuning import averaged


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
    worlds: list[list[int]] = field(default_factory=list)
    """[step, workers]: number of workers that trained from that step on; one entry per change."""

    @classmethod
    def begin(cls, model: MultiTaskModel, config: TrainConfig, total_steps: int) -> "Training":
        """The state before the first step, with the backbone frozen as the settings say."""
        freeze(model, config.backbone)
        optimizer = build_optimizer(model, config.optimizer)
        schedule = build_schedule(optimizer, config.schedule, config.epochs, total_steps)
        scaler = torch.amp.GradScaler(enabled=config.compute.precision == "float16")  # type: ignore[attr-defined]
        average = None if config.optimizer.ema_decay is None else averaged(model.encoder, config.optimizer.ema_decay)
        return cls(model, optimizer, schedule, scaler, average, Curve(total_steps))

    @property
    def lr(self) -> float:
        """Learning rate of the first group (the backbone's, if it trains) in the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def update(self, step: int) -> None:
        """Apply the gradients; ``step`` counts from 1."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model.encoder, step)
        self.step = step

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
