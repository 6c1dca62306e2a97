"""``lookalike finetune``: the multi-task Matryoshka embedding (Pinterest's unified embedding, nested as in MRL)."""

from lookalike.stages import Input, Stage
from lookalike.train.run.foresight import foresee
from lookalike.train.run.resolve import preview
from lookalike.train.run.settings import TrainConfig
from lookalike.train.run.trainer import INPUTS, run_training

STAGE = Stage(
    name="finetune",
    kind="encoder",
    config=TrainConfig,
    run=run_training,
    resumable=True,
    preview=preview,
    foresee=foresee,
    version=3,
    inputs={**INPUTS, "teacher": Input("encoder", optional=True)},
)
