"""Tasks: a head and its loss as one module, so that DDP wraps both; several tasks share one embedding.

A batch holds every task's labels for every row; a row without a task's label gives that task no gradient (Zhai et al.
2019: the unified embedding). ``base`` has settings and interface, the other modules the kinds.
"""

from lookalike.train.tasks.base import ATTRIBUTE, CLASS_FIELDS, TASKS, Batch, Task, TaskConfig, form_of
from lookalike.train.tasks.classes import ClassTask
from lookalike.train.tasks.model import MultiTaskModel, Shares, build_tasks
from lookalike.train.tasks.prefixes import PrefixTask

__all__ = [
    "ATTRIBUTE",
    "CLASS_FIELDS",
    "TASKS",
    "Batch",
    "ClassTask",
    "MultiTaskModel",
    "PrefixTask",
    "Shares",
    "Task",
    "TaskConfig",
    "build_tasks",
    "form_of",
]
