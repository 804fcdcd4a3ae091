"""Batches made ahead by other processes are the batches made on demand."""

import torch

from bsbr.data.tasks import TaskConfig
from bsbr.training.batches import TaskBatches
from bsbr.training.recipe import PretrainConfig


def test_batches_made_ahead_are_those_made_on_demand_in_any_order() -> None:
    task = TaskConfig(task="passkey", length=64, vocab=64)
    config = PretrainConfig(context=64, batch_tokens=256, tokens=2560, curriculum=((32, 0.5),), task=task.to_dict())
    here, ahead = (TaskBatches(task, config, 10, torch.device("cpu"), workers=n) for n in (0, 2))
    for step in (0, 1, 2, 3, 7, 8, 4, 5):  # a run that is resumed starts elsewhere
        for own, other in zip(here.at(step), ahead.at(step), strict=True):
            assert (own is None and other is None) or torch.equal(own, other)
