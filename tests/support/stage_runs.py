"""Former names of ``support/trainers.py``, until all tests import from there."""

from support import trainers
from support.trainers import *  # noqa: F403
from support.trainers import StageLogs as Watch  # noqa: F401
from support.trainers import make_task_trainer as make_trainer  # noqa: F401


def make_pass_trainer(folder, model, data, noise=None, parts=None, **arguments):
    parts = {"eval_dataset": data, **(parts or {})}
    return trainers.make_trainer(folder, model, data, noise, parts=parts, **arguments)
