"""Experts: one network fine-tuned for several tasks, and merged again by every method.

`mixlab experts` runs it. To merge models of one's own, read `Family.merge`: it is the same for all.
"""

from mixlab.experts.job import Family, default_config, run
from mixlab.experts.setting import Examples, Setting, prepare
from mixlab.experts.tables import Group, Result
from mixlab.experts.tasks import TASKS, Task, parse_task

__all__ = [
    "TASKS",
    "Examples",
    "Family",
    "Group",
    "Result",
    "Setting",
    "Task",
    "default_config",
    "parse_task",
    "prepare",
    "run",
]
