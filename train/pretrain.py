"""``lookalike pretrain``: a backbone on weak labels by multi-label softmax (Beal et al. 2021, section 3.4)."""

from lookalike.stages import Stage
from lookalike.train.run.foresight import foresee
from lookalike.train.run.resolve import preview
from lookalike.train.run.settings import TrainConfig
from lookalike.train.run.trainer import INPUTS, run_training
from lookalike.train.tasks import TaskConfig


class PretrainConfig(TrainConfig):
    """Pretraining: the backbone's own features, one task over all clusters."""

    tasks: dict[str, TaskConfig] = {"weak": TaskConfig(kind="multilabel_softmax", field="labels")}
    """One multi-label softmax over the weak labels."""


STAGE: Stage[TrainConfig] = Stage(
    name="pretrain",
    kind="encoder",
    config=PretrainConfig,
    run=run_training,
    inputs=INPUTS,
    resumable=True,
    preview=preview,
    foresee=foresee,
    version=3,
)
