"""What a training step needs of its shards, checked before the shards are made."""

from collections.abc import Mapping

from lookalike.artifacts import Artifact
from lookalike.errors import UsageError
from lookalike.outlook import Outlook, listed
from lookalike.registry import nearest
from lookalike.train.run.resolve import LABEL_FIELDS, remedy
from lookalike.train.run.settings import TrainConfig
from lookalike.train.tasks import ATTRIBUTE, TASKS, PrefixTask


def foresee(train: TrainConfig, given: Mapping[str, Mapping[str, Outlook]], made: Artifact | None) -> Outlook:
    """See ``Stage.foresee``: the data sets of the mix, and two classes of every field that a task reads."""
    (shards,) = given["shards"].values()
    datasets = shards.get("dataset")
    for name in train.mix:
        if datasets is not None and name not in datasets:
            raise UsageError(
                f"mix names dataset {name!r}{nearest(name, list(datasets))}; the shards will have {listed(datasets)}; "
                "name one of these, or give the corpus step a source of this dataset"
            )
    for name, task in train.tasks.items():
        _require_classes(name, task.field, shards)
        if train.loader.views == 1 and issubclass(TASKS.get(task.kind), PrefixTask):
            _require_pair(name, task.field, shards)
    return {}


def _require_classes(task: str, field: str, shards: Outlook) -> None:
    """Raise ``UsageError`` if the shards will have fewer than two classes of a field that holds classes."""
    attributes = shards.get("attribute")
    if field.startswith(ATTRIBUTE) and attributes is not None and field.removeprefix(ATTRIBUTE) not in attributes:
        attribute = field.removeprefix(ATTRIBUTE)
        raise UsageError(
            f"tasks.{task}.field is {field!r}, and the shards will have no attribute {attribute!r}"
            f"{nearest(attribute, list(attributes))}; there will be {listed(attributes)}; {remedy(field)}"
        )
    classes = shards.get(field)
    if classes is not None and len(classes) < 2 and (field in LABEL_FIELDS or field.startswith(ATTRIBUTE)):
        raise UsageError(
            f"tasks.{task}.field is {field!r}, and the shards will have {len(classes)} classes of it "
            f"({listed(classes)}); a task needs two; {remedy(field)}, or drop the task"
        )


def _require_pair(task: str, field: str, shards: Outlook) -> None:
    """Raise ``UsageError`` if a task compares rows of one class, and no class will have two rows."""
    classes = shards.get(field) if field in LABEL_FIELDS else None
    if classes and max(classes.values()) < 2:
        raise UsageError(
            f"tasks.{task} compares rows of one {field}, and each of the {len(classes)} will have one row; map a "
            f"column that several rows share to {field}, set loader.views=2, or drop the task"
        )
